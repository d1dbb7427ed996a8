"""Vision transformer blocks and the DINO encoder, with the parameter names of the public DINO files.

Attention runs through `vidops.video_attention`; everything else is plain `torch.nn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

import vidops
from vidops import checkpoints
from vidops.checkpoints import LoadReport

ATTENTION_NEEDS = ("none", "map", "heads", "keys")


def _random_seed() -> int:
    """A dropout seed from torch's global CPU generator, so that `torch.manual_seed` fixes a training run."""
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))


class Attention(nn.Module):
    """Multi-head self-attention whose weights, dropped or not, or mean keys can be returned with the output.

    With `qkv_bias` but not `key_bias` the projection has none, and `q_bias` and `v_bias` are parameters of their own.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool,
        key_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads: {dim} channels do not split into {heads} heads")
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias and key_bias)
        self.q_bias: nn.Parameter | None = None
        self.v_bias: nn.Parameter | None = None
        if qkv_bias and not key_bias:
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, heads, N, C / heads); channels are head-major."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, x: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, ...]:
        """Projections number `first` to `last` - 1 of (q, k, v), heads split; the others are not computed."""
        dim = self.qkv.in_features
        rows = slice(first * dim, last * dim)
        bias = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        bias = None if bias is None else bias[rows]
        parts = F.linear(x, self.qkv.weight[rows], bias).chunk(last - first, dim=-1)
        return tuple(self.split_heads(part) for part in parts)

    def forward(
        self, x: torch.Tensor, need: str = "none", *, seed: int | None = None, backend: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (B, N, C) -> output (B, N, C); None, the head-mean map (B, N, N), all maps (B, heads, N, N) or the
        head-mean keys (B, N, C / heads).
        """
        q, k, v = self.project(x, 0, 3)
        dropout = self.attention_dropout if self.training else 0.0
        if dropout > 0 and seed is None:
            seed = _random_seed()
        options: dict[str, Any] = {
            "scale": self.scale,
            "dropout_p": dropout,
            "seed": seed,
            "backend": backend,
        }
        weights = None
        if need == "none":
            out = cast(torch.Tensor, vidops.video_attention(q, k, v, **options))
        elif need == "map":
            out, weights = vidops.video_attention(q, k, v, need="map", **options)
        elif need == "keys":
            out, weights = vidops.video_attention(q, k, v, need="keys", **options)
        elif need == "heads":
            # The mean over one head is that head: with heads moved to the batch axis the map output is all of
            # them. The dropout counter runs over (batch, head, query, key), so the mask is the same as well.
            batch, heads = q.shape[:2]
            single = [t.flatten(0, 1).unsqueeze(1) for t in (q, k, v)]
            out, weights = vidops.video_attention(*single, need="map", **options)
            out, weights = (t.unflatten(0, (batch, heads)) for t in (out.squeeze(1), weights))
        else:
            raise ValueError(f"need: expected one of {', '.join(ATTENTION_NEEDS)}, got {need!r}")
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2))), weights


def stochastic_depth(x: torch.Tensor, probability: float) -> torch.Tensor:
    """x (B, N, C) with whole samples set to zero, each with `probability`; kept ones grow by its complement."""
    kept = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - probability)
    return x * (kept / (1 - probability))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: ``x + Attn(LN1(x))``, then ``x + MLP(LN2(x))``; `layer_scale` is the first value of
    the factors of both branches, None for no factors.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        hidden: int,
        qkv_bias: bool,
        eps: float,
        key_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(
            dim,
            heads,
            qkv_bias=qkv_bias,
            key_bias=key_bias,
            attention_dropout=attention_dropout,
            dropout=dropout,
        )
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden, dropout)
        self.ls1, self.ls2 = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))

    def forward(
        self, x: torch.Tensor, need: str = "none", *, seed: int | None = None, backend: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (B, N, C) -> tokens (B, N, C) and what was asked for beside them, see `Attention`."""
        update, weights = self.attn(self.norm1(x), need, seed=seed, backend=backend)
        x = x + self._kept(self.ls1(update))
        return x + self._kept(self.ls2(self.mlp(self.norm2(x)))), weights

    def _kept(self, update: torch.Tensor) -> torch.Tensor:
        return stochastic_depth(update, self.drop_path) if self.training and self.drop_path > 0 else update


def patch_grid(images: torch.Tensor, patch: int) -> tuple[int, int]:
    """Patch rows and columns of images (B, 3, H, W); ValueError when they do not split into patches."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if min(height, width) < patch or height % patch or width % patch:
        raise ValueError(f"images: {height}x{width} are no multiples of the patch size {patch}")
    return height // patch, width // patch


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class EncoderOutput(NamedTuple):
    """What the last block of the encoder yields; nothing of it passed the final LayerNorm."""

    x: torch.Tensor  # patch tokens (B, C, h, w)
    cls: torch.Tensor  # CLS token (B, C)
    attn: torch.Tensor | None  # weights (B, heads, 1 + h*w, 1 + h*w), None when not asked for
    k: torch.Tensor  # keys without CLS (B, C, h, w), channels head-major


class DinoEncoder(nn.Module):
    """DINO ViT returning the outputs that Ding et al. (ECCV 2024) use, sheet section 2.1.

    Args:
        dim, depth, heads, patch: size of the net; `img_size`: side in pixels of the stored position grid.
        hidden: width of the MLPs (default 4 * dim).
        eps: epsilon of every LayerNorm.
        drop_path: stochastic depth of the last block in training mode; it grows linearly from 0 at the first.
        layer_scale, mask_token: what a DINOv2 checkpoint has in addition, see `Block`; the token is never applied.
    """

    def __init__(
        self,
        *,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int = 8,
        img_size: int = 224,
        hidden: int | None = None,
        eps: float = 1e-6,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        mask_token: bool = False,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth: expected at least one block, got {depth}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: expected 0 <= p < 1, got {drop_path}")
        if patch < 1 or img_size < patch:
            raise ValueError(f"img_size: {img_size} pixels hold no patch of {patch}")
        self.patch = patch
        self.grid = img_size // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(dim, patch)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads,
                hidden=hidden or 4 * dim,
                qkv_bias=True,
                eps=eps,
                drop_path=drop_path * i / max(depth - 1, 1),
                layer_scale=layer_scale,
            )
            for i in range(depth)
        )
        # Part of every checkpoint and never applied: all four outputs are taken before it.
        self.norm = nn.LayerNorm(dim, eps=eps)
        self._initialise()

    def _initialise(self) -> None:
        for parameter in (self.pos_embed, self.cls_token):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def grid_of(self, images: torch.Tensor) -> tuple[int, int]:
        """Patch rows and columns of images (B, 3, H, W); ValueError when they do not split into patches."""
        return patch_grid(images, self.patch)

    def position_embedding(self, rows: int, columns: int) -> torch.Tensor:
        """Position embedding (1, 1 + rows*columns, C) for a patch grid.

        The stored grid is resized by *scale factors* with 0.1 added to the target size, as DINO does: the
        sampling positions depend on that 0.1, so the ratio of the sizes must not be recomputed.
        """
        if rows == columns == self.grid:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        stored = patches.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        factors = [(rows + 0.1) / self.grid, (columns + 0.1) / self.grid]
        resized = F.interpolate(
            stored, scale_factor=factors, mode="bicubic", align_corners=False, recompute_scale_factor=False
        )
        if tuple(resized.shape[-2:]) != (rows, columns):
            raise RuntimeError(f"position grid resized to {tuple(resized.shape[-2:])}, not {(rows, columns)}")
        return torch.cat([cls, resized.flatten(2).transpose(1, 2)], dim=1)

    def _before_last(self, images: torch.Tensor, backend: str | None) -> tuple[torch.Tensor, int, int]:
        rows, columns = self.grid_of(images)
        tokens = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.position_embedding(rows, columns)
        for block in list(self.blocks)[:-1]:
            tokens, _ = block(tokens, backend=backend)
        return tokens, rows, columns

    def _keys(self, tokens: torch.Tensor) -> torch.Tensor:
        """Keys (B, N, C) of the last block for its input tokens (B, N, C), heads concatenated."""
        last = cast(Block, self.blocks[-1])
        (keys,) = last.attn.project(last.norm1(tokens), 1, 2)
        return keys.transpose(1, 2).flatten(2)

    def forward(
        self, images: torch.Tensor, *, need_attention: bool = True, backend: str | None = None
    ) -> EncoderOutput:
        """Normalised images (B, 3, H, W), H and W multiples of the patch size -> the four outputs."""
        tokens, rows, columns = self._before_last(images, backend)
        keys = self._keys(tokens)
        tokens, attention = self.blocks[-1](tokens, "heads" if need_attention else "none", backend=backend)

        def as_image(t: torch.Tensor) -> torch.Tensor:
            return t[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))

        return EncoderOutput(as_image(tokens), tokens[:, 0], attention, as_image(keys))

    def keys(self, images: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        """Only the keys, as tokens (B, h*w, C): the last block's attention and MLP are not computed."""
        tokens, _, _ = self._before_last(images, backend)
        return self._keys(tokens)[:, 1:]


def _canonical_names(
    state: Mapping[str, torch.Tensor], layout: str
) -> tuple[dict[str, torch.Tensor], str, tuple[str, ...]]:
    """Names of a model whose encoder is called "encoder", for a state dict in any accepted layout: its own, one of
    DINO's or CLIP's. Also the layout found, and names left out.
    """
    state = checkpoints.without_prefix(state, "module.")
    kept = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    if kept:
        ignored = tuple(name for name in state if not name.startswith("backbone."))
        return {f"encoder.{name}": t for name, t in kept.items()}, f"DINO checkpoint, {layout}", ignored
    visual = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    if visual:
        ignored = tuple(name for name in state if not name.startswith("visual."))
        return {f"encoder.{name}": t for name, t in visual.items()}, f"CLIP checkpoint, {layout}", ignored
    if "pos_embed" in state or "patch_embed.proj.weight" in state:
        return {f"encoder.{name}": t for name, t in state.items()}, "DINO backbone", ()
    return state, layout, ()


def load_with_encoder(model: nn.Module, path: str | Path, *, strict: bool) -> LoadReport:
    """Load a local checkpoint into a model whose encoder is called "encoder"; without `strict` everything but
    the encoder may be missing.
    """
    found = checkpoints.read_state_dict(path)
    state, layout, ignored = _canonical_names(found.state, found.layout)
    return checkpoints.load_into(
        model, state, path=path, layout=layout, strict=strict, required=("encoder.",), ignored=ignored
    )
