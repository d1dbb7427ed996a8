"""Small models for the tests of patching: those of other packages, and stand-ins in plain torch.

A stand-in has the classes' names and attributes, so that everything is tested where the packages are not installed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision_cpu import define_missing_ops


def package(name: str) -> Any:
    """The package, or a skip that says so."""
    define_missing_ops()
    return pytest.importorskip(name, reason=f"{name} is not installed; the stand-in is tested")


# VideoMAE


@dataclass
class VideoMAEConfig:
    image_size: int = 32
    patch_size: int = 8
    num_frames: int = 16
    tubelet_size: int = 2
    hidden_size: int = 32
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 64
    num_labels: int = 5
    layer_norm_eps: float = 1e-12
    use_mean_pooling: bool = True
    attention_probs_dropout_prob: float = 0.0
    old: bool = False  # as before transformers 5: `key` is not called, biases lie beside, layers put out tuples


class VideoMAESelfAttention(nn.Module):
    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        bias = not config.old
        self.query, self.value = nn.Linear(width, width, bias=bias), nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=False)
        if config.old:
            self.q_bias, self.v_bias = (nn.Parameter(torch.randn(width)) for _ in range(2))

    def forward(self, hidden_states: torch.Tensor) -> tuple[Any, ...]:
        if self.config.old:
            q = F.linear(hidden_states, self.query.weight, self.q_bias)
            k = F.linear(hidden_states, self.key.weight)
            v = F.linear(hidden_states, self.value.weight, self.v_bias)
        else:
            q, k, v = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        q, k, v = (t.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (out,) if self.config.old else (out, None)


class _Dense(nn.Module):
    def __init__(self, width: int, out: int, act: bool = False, residual: bool = False) -> None:
        super().__init__()
        self.dense = nn.Linear(width, out)
        self.act, self.residual = act, residual

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor | None = None) -> torch.Tensor:
        out = self.dense(hidden_states)
        out = F.gelu(out) if self.act else out
        return out + input_tensor if self.residual and input_tensor is not None else out


class VideoMAEAttention(nn.Module):
    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.attention = VideoMAESelfAttention(config)
        self.output = _Dense(config.hidden_size, config.hidden_size)
        self.old = config.old

    def forward(self, hidden_states: torch.Tensor) -> Any:
        found = self.attention(hidden_states)
        out = self.output(found[0], hidden_states)
        return (out, *found[1:]) if self.old else out


class VideoMAELayer(nn.Module):
    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = VideoMAEAttention(config)
        self.intermediate = _Dense(width, config.intermediate_size, act=True)
        self.output = _Dense(config.intermediate_size, width, residual=True)
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in "ab")

    def forward(self, hidden_states: torch.Tensor) -> Any:
        attended = self.attention(self.layernorm_before(hidden_states))
        rest = attended[1:] if isinstance(attended, tuple) else None
        x = (attended if rest is None else attended[0]) + hidden_states
        x = self.output(self.intermediate(self.layernorm_after(x)), x)
        return x if rest is None else (x, *rest)


class VideoMAEEncoder(nn.Module):
    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(VideoMAELayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layer:
            found = layer(hidden_states)
            hidden_states = found[0] if isinstance(found, tuple) else found
        return hidden_states


class VideoMAEPatchEmbeddings(nn.Module):
    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        size = (config.tubelet_size, config.patch_size, config.patch_size)
        self.num_patches = config.num_frames // size[0] * (config.image_size // size[1]) ** 2
        self.projection = nn.Conv3d(3, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(pixel_values.transpose(1, 2)).flatten(2).transpose(1, 2)


class VideoMAEEmbeddings(nn.Module):
    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.patch_embeddings = VideoMAEPatchEmbeddings(config)
        channel = torch.arange(config.hidden_size)
        angle = torch.arange(self.patch_embeddings.num_patches)[:, None] / 10000.0 ** (
            2 * (channel // 2) / config.hidden_size
        )
        self.position_embeddings = torch.where(channel % 2 == 0, angle.sin(), angle.cos())[None]

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        x = self.patch_embeddings(pixel_values)
        x = x + self.position_embeddings.to(x)
        return x if bool_masked_pos is None else x[~bool_masked_pos].unflatten(0, (len(x), -1))


class VideoMAEModel(nn.Module):
    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VideoMAEEmbeddings(config)
        self.encoder = VideoMAEEncoder(config)

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        return self.encoder(self.embeddings(pixel_values, bool_masked_pos))


class Classified(NamedTuple):
    logits: torch.Tensor


class VideoMAEForVideoClassification(nn.Module):
    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.config = config
        self.videomae = VideoMAEModel(config)
        self.fc_norm = nn.LayerNorm(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pixel_values: torch.Tensor) -> Classified:
        return Classified(self.classifier(self.fc_norm(self.videomae(pixel_values).mean(1))))


class VideoMAEForPreTraining(nn.Module):
    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.videomae = VideoMAEModel(config)


def _seeded(make: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*args, **kwargs).eval()


VIDEOMAE_SOURCES = ("stand-in", "stand-in before 5", "transformers")


def videomae(source: str, kind: str = "ForVideoClassification", **changes: Any) -> Any:
    """A VideoMAE with random weights; `kind` is what follows VideoMAE in the class name."""
    if source == "transformers":
        transformers = package("transformers")
        config = {name: value for name, value in vars(VideoMAEConfig()).items() if name != "old"}
        made = transformers.VideoMAEConfig(**config | changes)
        return _seeded(getattr(transformers, f"VideoMAE{kind}"), made)
    made = VideoMAEConfig(**{"old": source.endswith("before 5")} | changes)
    return _seeded(globals()[f"VideoMAE{kind}"], made)


def clips(count: int = 2, seed: int = 0) -> torch.Tensor:
    """(B, T, C, H, W), which is transformers' order."""
    return torch.randn(count, 16, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# timm's VisionTransformer


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.LayerNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, is_causal=is_causal
        )
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim, 2 * dim)
        self.ls1, self.ls2, self.drop_path1, self.drop_path2 = (nn.Identity() for _ in range(4))

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        embed_dim: int = 32,
        depth: int = 6,
        num_heads: int = 4,
        num_classes: int = 5,
        class_token: bool = True,
        reg_tokens: int = 0,
        global_pool: str = "token",
        qk_norm: bool = True,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        self.embed_dim, self.global_pool = embed_dim, global_pool
        self.num_prefix_tokens = class_token + reg_tokens
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim)
        self.prefix = nn.Parameter(torch.randn(1, self.num_prefix_tokens, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches, embed_dim))
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x) + self.pos_embed
        return self.norm(self.blocks(torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        return self.head(x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(1))


TIMM_SOURCES = ("stand-in", "timm")


def timm_vit(source: str, **changes: Any) -> Any:
    if source == "timm":
        make: Any = package("timm").models.vision_transformer.VisionTransformer
    else:
        make = VisionTransformer
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 4, "num_classes": 5}
    return _seeded(make, **sizes | {"qk_norm": True, "mlp_ratio": 2.0} | changes)


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# torchvision's SwinTransformer3d


class ShiftedWindowAttention3d(nn.Module):
    """Every pair of places by its own rule: same window, else nothing; -100 across the seams of the shift."""

    def __init__(self, dim: int, window_size: list[int], shift_size: list[int], num_heads: int) -> None:
        super().__init__()
        self.window_size, self.shift_size, self.num_heads = window_size, shift_size, num_heads
        self.attention_dropout = self.dropout = 0.0
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        area = math.prod(window_size)
        self.bias = nn.Parameter(torch.randn(1, num_heads, area, area))

    def get_relative_position_bias(self, window_size: list[int]) -> torch.Tensor:
        area = math.prod(window_size)
        return self.bias[:, :, :area, :area]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = list(x.shape[1:4])
        window = [min(have, size) for have, size in zip(grid, self.window_size, strict=True)]
        sizes = zip(grid, self.window_size, self.shift_size, strict=True)
        shift = [0 if have <= size else by for have, size, by in sizes]
        padded = [-(-have // size) * size for have, size in zip(grid, window, strict=True)]
        x = F.pad(x, (0, 0, 0, padded[2] - grid[2], 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
        x = x.roll([-by for by in shift], (1, 2, 3)).flatten(1, 3)
        place = torch.cartesian_prod(*(torch.arange(size) for size in padded))
        size, by, whole = (torch.tensor(values) for values in (window, shift, padded))
        number, inside = place // size, place % size
        region = (by > 0) & (place >= whole - by)
        same = (number[:, None] == number).all(-1)
        seam = (region[:, None] != region).any(-1).to(x)
        at = (inside[:, 0] * window[1] + inside[:, 1]) * window[2] + inside[:, 2]
        bias = self.get_relative_position_bias(window)[0][:, at][:, :, at].to(x) - 100 * seam
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).masked_fill(~same, -math.inf).softmax(-1)
        out = self.proj((weights @ v).transpose(1, 2).flatten(2)).unflatten(1, padded)
        return out.roll(shift, (1, 2, 3))[:, : grid[0], : grid[1], : grid[2]]


class SwinTransformerBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, window_size: list[int], shift_size: list[int]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ShiftedWindowAttention3d(dim, window_size, shift_size, num_heads)
        self.stochastic_depth = nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.stochastic_depth(self.attn(self.norm1(x)))
        return x + self.stochastic_depth(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        parts = [x[:, :, h::2, w::2] for w in (0, 1) for h in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class PatchEmbed3d(nn.Module):
    def __init__(self, patch_size: list[int], dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, dim, kernel_size=tuple(patch_size), stride=tuple(patch_size))  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 4, 1))


class SwinTransformer3d(nn.Module):
    def __init__(
        self,
        patch_size: list[int],
        embed_dim: int,
        depths: list[int],
        num_heads: list[int],
        window_size: list[int],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed3d(patch_size, embed_dim)
        parts: list[nn.Module] = []
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            if stage:
                parts.append(PatchMerging(embed_dim << stage - 1))
            shifts = [[size // 2 * (number % 2) for size in window_size] for number in range(depth)]
            blocks = (SwinTransformerBlock(embed_dim << stage, heads, list(window_size), shift) for shift in shifts)
            parts.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*parts)
        width = embed_dim << len(depths) - 1
        self.norm = nn.LayerNorm(width)
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.features(self.patch_embed(x)))
        return self.head(self.avgpool(x.permute(0, 4, 1, 2, 3)).flatten(1))


SWIN_SOURCES = ("stand-in", "torchvision")


def swin(source: str, **changes: Any) -> Any:
    if source == "torchvision":
        package("torchvision")
        from torchvision.models.video.swin_transformer import SwinTransformer3d as make
    else:
        make = SwinTransformer3d
    sizes = {"patch_size": [2, 4, 4], "embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]}
    model = _seeded(make, **sizes | {"window_size": [2, 4, 4], "num_classes": 5} | changes)
    # Its own start so small that neither a wrong bias nor a wrong token would show.
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "bias" in name or value.dim() > 1:
            value.data.normal_(std=0.5 if "bias" in name else value[0].numel() ** -0.5, generator=generator)
    return model


def swin_clips(size: tuple[int, int, int] = (4, 64, 64), seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
