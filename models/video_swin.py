"""VideoSwin that drops redundant tokens between its stages, and keeps its regular windows.

The second model of Ding et al., "Prune Spatio-temporal Tokens by Semantic-aware Temporal Accumulation", ICCV 2023,
arXiv 2308.04549, sections 3.3 and 4; there is no public code of it. After each merging of patches every frame loses
tokens. Norms, projections and MLPs see those that are left; before attention each other place of the grid is filled
with a copy of the nearest one, so windows stay as they were, and what attention gives there is thrown away.

What the paper leaves open is decided so: similarity is that of the merged tokens themselves; frames are processed
forward, backward, forward; kept tokens stay in raster order; the mean before the classifier is over the tokens left.

>>> import torch
>>> from vidops.models.video_swin import CONFIGS, VideoSwin, gflops
>>> with torch.device("meta"):
...     model = VideoSwin("swin_tiny")
>>> sum(p.numel() for p in model.parameters())
28158070
>>> [round(gflops(CONFIGS["swin_tiny"], r)) for r in (0, 192, 256, 320)]
[88, 67, 61, 54]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

import vidops
from vidops import checkpoints
from vidops.checkpoints import LoadReport
from vidops.models.vit import Mlp
from vidops.ops import _checks

Size = tuple[int, int, int]  # frames, rows, columns

STAGES = 4
MASKED = -100.0


@dataclass(frozen=True)
class VideoSwinConfig:
    """Sizes and numbers of the model; the defaults are those of VideoSwin-T.

    `frames` of `img_size` squared pixels are cut into patches of `patch` (frames, rows, columns). `window` is
    (frames, rows, columns) of tokens; where a grid is not larger along an axis, the window is the grid there and is not
    shifted. A larger grid is a multiple of the window. `r` is what `VideoSwin.r` starts with.

    Raises ValueError for sizes that do not fit, and an `r` that leaves a frame without tokens.
    """

    frames: int = 32
    img_size: int = 224
    patch: Size = (2, 4, 4)
    classes: int = 400
    dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: Size = (8, 7, 7)
    mlp_ratio: int = 4
    eps: float = 1e-5
    r: int = 0

    def __post_init__(self) -> None:
        for name, length in (("patch", 3), ("window", 3), ("depths", STAGES), ("heads", STAGES)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != length:
                raise ValueError(f"{name}: expected {length} integers, got {values!r}")
            for value in values:
                _checks.integer(name, value, 1)
        for name in ("frames", "img_size", "classes", "dim", "mlp_ratio"):
            _checks.integer(name, getattr(self, name), 1)
        if self.frames % self.patch[0]:
            raise ValueError(f"frames: expected a multiple of the patch's {self.patch[0]}, got {self.frames}")
        for side in self.patch[1:]:
            merged = side * 2 ** (STAGES - 1)
            if self.img_size % merged:
                raise ValueError(
                    f"img_size: expected a multiple of {merged}, so that patches of {side} pixels merge "
                    f"{STAGES - 1} times; got {self.img_size}"
                )
        for stage in range(STAGES):
            width, heads, grid = self.width(stage), self.heads[stage], self.grid(stage)
            if width % heads:
                raise ValueError(f"heads: {width} channels do not split into {heads} heads")
            for name, have, size in zip(("frames", "img_size", "img_size"), grid, self.window, strict=True):
                if have > size and have % size:
                    raise ValueError(
                        f"{name}: the grid {grid} of stage {stage + 1} is no multiple of the window {self.window}"
                    )
        self.drops()

    def width(self, stage: int) -> int:
        return self.dim * 2**stage

    def grid(self, stage: int) -> Size:
        """Frames, rows and columns of tokens in stage 0 to 3."""
        frames, rows, columns = (self.frames, self.img_size, self.img_size)
        t, h, w = self.patch
        return frames // t, rows // h // 2**stage, columns // w // 2**stage

    def windows(self, stage: int) -> tuple[Size, Size]:
        """Window and shift of a stage, both as its grid allows."""
        pairs = list(zip(self.grid(stage), self.window, strict=True))
        window = tuple(min(have, size) for have, size in pairs)
        shift = tuple(size // 2 if have > size else 0 for have, size in pairs)
        return cast(Size, window), cast(Size, shift)

    def drops(self, r: int | None = None) -> tuple[int, ...]:
        """Tokens that each frame lacks in stages 0 to 3: none, r, 1.5 r / 4 and 2 r / 16, rounded down; ValueError
        where a frame has no more.
        """
        r = _checks.integer("r", self.r if r is None else r, 0)
        found = (0, r, 3 * r // 8, r // 8)
        for stage, drop in enumerate(found):
            tokens = math.prod(self.grid(stage)[1:])
            if drop >= tokens:
                raise ValueError(f"r: {r} takes {drop} of the {tokens} tokens of a frame in stage {stage + 1}")
        return found

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], *, window: Size, **changes: Any) -> VideoSwinConfig:
        """The configuration of a full state dict. Of the window only its area leaves a trace there, of frames and image
        size none: name them.
        """
        tables = {
            tuple(name.split(".")[2:5:2]): len(value.mT)
            for name, value in state.items()
            if name.endswith(".relative_position_bias_table")
        }
        try:
            dim, _, *patch = state["backbone.patch_embed.proj.weight"].shape
            found: dict[str, Any] = {
                "patch": tuple(patch),
                "classes": len(state["cls_head.fc_cls.weight"]),
                "dim": dim,
                "depths": tuple(sum(at[0] == str(stage) for at in tables) for stage in range(STAGES)),
                "heads": tuple(tables[str(stage), "0"] for stage in range(STAGES)),
                "mlp_ratio": len(state["backbone.layers.0.blocks.0.mlp.fc1.weight"]) // dim,
            }
        except KeyError as error:
            raise ValueError(f"state: not a full VideoSwin state dict, {error.args[0]} is missing") from error
        return cls(window=window, **found | changes)


CONFIGS = {
    "swin_tiny": VideoSwinConfig(),
    "swin_small": VideoSwinConfig(depths=(2, 2, 18, 2)),
    "swin_base": VideoSwinConfig(dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
    # The model of Something-Something v2.
    "swin_base_window16": VideoSwinConfig(
        dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=(16, 7, 7), classes=174
    ),
    # For examples and tests: runs in milliseconds, same structure.
    "tiny": VideoSwinConfig(
        frames=8, img_size=64, classes=10, dim=8, depths=(2, 2, 2, 1), heads=(1, 2, 2, 4), window=(2, 4, 4)
    ),
}


def resolve_config(config: str | VideoSwinConfig) -> VideoSwinConfig:
    if isinstance(config, VideoSwinConfig):
        return config
    if config not in CONFIGS:
        raise ValueError(
            f"config: expected a VideoSwinConfig or one of {', '.join(map(repr, CONFIGS))}, got {config!r}"
        )
    return CONFIGS[config]


def gflops(config: str | VideoSwinConfig, r: int | None = None) -> float:
    """Multiply-adds of one clip in units of 10^9, as Table 3 counts: patches, merging, projections and MLPs of the
    tokens kept, attention of the whole grid; neither norms, classifier nor pruning.
    """
    c = resolve_config(config)
    places = math.prod(c.grid(0))
    total = places * 3 * math.prod(c.patch) * c.dim
    for stage, drop in enumerate(c.drops(r)):
        frames, rows, columns = c.grid(stage)
        dim, places = c.width(stage), frames * rows * columns
        kept = places - frames * drop
        window = math.prod(c.windows(stage)[0])
        total += c.depths[stage] * (kept * (4 + 2 * c.mlp_ratio) * dim**2 + 2 * places * window * dim)
        if stage < STAGES - 1:
            total += places // 4 * 8 * dim**2
    return total / 1e9


class Kept(NamedTuple):
    """Which tokens of a stage are left; K of the h w of a frame."""

    places: torch.Tensor  # (B, T, K) int64, raster, ascending
    source: torch.Tensor  # (B, T, h w) int64: of every place, which of the K is nearest

    def fill(self, x: torch.Tensor, backend: str | None) -> torch.Tensor:
        """(B, T, K, C) -> (B, T, h w, C), every place a copy of the nearest token."""
        return vidops.gather_tokens(x, self.source, backend=backend)

    def take(self, x: torch.Tensor, backend: str | None) -> torch.Tensor:
        """(B, T, h w, C) -> (B, T, K, C)."""
        return vidops.gather_tokens(x, self.places, backend=backend)

    @classmethod
    def of(cls, places: torch.Tensor, grid: tuple[int, int], backend: str | None) -> Kept:
        return cls(places, vidops.nearest_kept(places, grid, backend=backend))


def to_windows(x: torch.Tensor, window: Size) -> torch.Tensor:
    """(B, T, H, W, C) -> (B, windows, tokens of one, C)."""
    for axis, size in zip((1, 3, 5), window, strict=True):
        x = x.unflatten(axis, (-1, size))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(1, 3)


def from_windows(x: torch.Tensor, window: Size, grid: Size) -> torch.Tensor:
    """The inverse of `to_windows`."""
    counts = [have // size for have, size in zip(grid, window, strict=True)]
    x = x.unflatten(2, window).unflatten(1, counts).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)


def shift_mask(grid: Size, window: Size, shift: Size) -> torch.Tensor | None:
    """(windows, tokens, tokens) bool: pairs of a window that the cyclic shift made neighbours; None for no shift."""
    if not any(shift):
        return None
    region = torch.zeros(1, *grid, 1)
    parts = [
        (slice(0, -size), slice(-size, -by), slice(-by, None)) if by else (slice(None),)
        for size, by in zip(window, shift, strict=True)
    ]
    for number, (t, h, w) in enumerate(product(*parts)):
        region[:, t, h, w] = number
    region = to_windows(region, window)[0, :, :, 0]
    return region[:, None] != region[:, :, None]


def relative_positions(window: Size) -> torch.Tensor:
    """(W, W) int64: for query and key of a window the row of the bias table, raster over their offset's range."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in window))
    offset = places[:, None] - places[None]
    index = torch.zeros(offset.shape[:2], dtype=torch.int64)
    for axis, size in enumerate(window):
        index = index * (2 * size - 1) + offset[..., axis] + size - 1
    return index


class WindowAttention(nn.Module):
    """Attention inside windows, with a learned bias for every offset of two tokens."""

    relative_position_index: torch.Tensor

    def __init__(self, dim: int, heads: int, window: Size) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        rows = math.prod(2 * size - 1 for size in window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        self.register_buffer("relative_position_index", relative_positions(window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias(self, window: Size) -> torch.Tensor:
        """(heads, W, W) for a window that may be a part of the full one: the entries of its own offsets."""
        index = self.relative_position_index
        if window != self.window:
            inside = [slice(size) for size in window]
            index = index.unflatten(1, self.window).unflatten(0, self.window)[(*inside, *inside)]
            index = index.flatten(3, 5).flatten(0, 2)
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def forward(self, qkv: torch.Tensor, window: Size, shift: Size, mask: torch.Tensor | None) -> torch.Tensor:
        """qkv (B, T, H, W, 3 C), a projection of the whole grid -> (B, T, H, W, C), before the last projection."""
        grid = cast(Size, tuple(qkv.shape[1:4]))
        if any(shift):
            qkv = qkv.roll([-by for by in shift], (1, 2, 3))
        q, k, v = to_windows(qkv, window).unflatten(3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        added = self.bias(window).to(q.dtype)
        # The fused kernels take four axes. Masks are the same for all clips, and not copied for each.
        if mask is None:
            joined = (t.flatten(0, 1) for t in (q, k, v))
            out = F.scaled_dot_product_attention(*joined, attn_mask=added.unsqueeze(0)).unflatten(0, q.shape[:2])
        else:
            added = added + (mask.to(q.dtype) * MASKED).unsqueeze(1)
            clips = [F.scaled_dot_product_attention(*clip, attn_mask=added) for clip in zip(q, k, v, strict=True)]
            out = torch.stack(clips) if clips else q
        out = from_windows(out.transpose(2, 3).flatten(3), window, grid)
        return out.roll(shift, (1, 2, 3)) if any(shift) else out


class SwinBlock(nn.Module):
    """``x + Attn(LN1(x))``, then ``x + MLP(LN2(x))``."""

    def __init__(self, dim: int, heads: int, window: Size, *, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden)

    def forward(
        self,
        x: torch.Tensor,
        grid: Size,
        window: Size,
        shift: Size,
        mask: torch.Tensor | None,
        kept: Kept | None = None,
        *,
        backend: str | None = None,
    ) -> torch.Tensor:
        """Tokens (B, T, K, C) -> (B, T, K, C); all h w of a frame without `kept`."""
        qkv = self.attn.qkv(self.norm1(x))
        if kept is not None:
            qkv = kept.fill(qkv, backend)
        update = self.attn(qkv.unflatten(2, grid[1:]), window, shift, mask).flatten(2, 3)
        if kept is not None:
            update = kept.take(update, backend)
        x = x + self.attn.proj(update)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H, W, C) -> (B, T, H / 2, W / 2, 2 C)."""
        # Rows alternate faster than columns.
        parts = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class SwinStage(nn.Module):
    """Blocks of one grid, every second one with shifted windows, and the merging that closes them."""

    mask: torch.Tensor | None

    def __init__(self, config: VideoSwinConfig, stage: int) -> None:
        super().__init__()
        c, dim = config, config.width(stage)
        self.grid = c.grid(stage)
        self.window, self.shift = c.windows(stage)
        self.blocks = nn.ModuleList(
            SwinBlock(dim, c.heads[stage], c.window, hidden=c.mlp_ratio * dim, eps=c.eps)
            for _ in range(c.depths[stage])
        )
        self.downsample = PatchMerging(dim, c.eps) if stage < STAGES - 1 else None
        self.register_buffer("mask", shift_mask(self.grid, self.window, self.shift), persistent=False)

    def forward(self, x: torch.Tensor, kept: Kept | None, *, backend: str | None) -> torch.Tensor:
        """Tokens (B, T, K, C) -> the same, or all of the next grid (B, T, h w / 4, 2 C)."""
        for number, block in enumerate(self.blocks):
            odd = number % 2 == 1
            shift, mask = (self.shift, self.mask) if odd else ((0, 0, 0), None)
            x = block(x, self.grid, self.window, shift, mask, kept, backend=backend)
        if self.downsample is None:
            return x
        if kept is not None:
            x = kept.fill(x, backend)
        return self.downsample(x.unflatten(2, self.grid[1:])).flatten(2, 3)


class SwinPatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: Size, eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, dim, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) -> tokens (B, t, h w, C)."""
        return self.norm(self.proj(video).permute(0, 2, 3, 4, 1).flatten(2, 3))


class SwinBackbone(nn.Module):
    """Everything up to the last norm; `forward` also tells which tokens the stages kept."""

    def __init__(self, config: VideoSwinConfig) -> None:
        super().__init__()
        self.patch_embed = SwinPatchEmbed(config.dim, config.patch, config.eps)
        self.layers = nn.ModuleList(SwinStage(config, stage) for stage in range(STAGES))
        self.norm = nn.LayerNorm(config.width(STAGES - 1), eps=config.eps)

    def forward(
        self, video: torch.Tensor, drops: tuple[int, ...], backend: str | None
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Tokens (B, T, K, C) after the last norm; raster indices (B, T, K) of each stage's, None for all."""
        x = self.patch_embed(video)
        chosen: list[torch.Tensor | None] = []
        for number, stage in enumerate(self.layers):
            stage = cast(SwinStage, stage)
            kept = None
            if drops[number]:
                x, kept = prune(x, drops[number], stage.grid, reverse=number == 2, backend=backend)
            chosen.append(None if kept is None else kept.places)
            x = stage(x, kept, backend=backend)
        return self.norm(x), chosen


def prune(
    x: torch.Tensor, drop: int, grid: Size, *, reverse: bool, backend: str | None
) -> tuple[torch.Tensor, Kept]:
    """All tokens of a grid (B, T, h w, C) without the `drop` most redundant of each frame, the others in raster order.

    The tokens are their own keys: there are none yet after merging.
    """
    tokens = x.detach().flatten(1, 2)
    scores = vidops.sta_score(tokens, tokens, grid[0], drop, reverse, backend=backend)
    kept = Kept.of(scores.keep.sort(-1).values, grid[1:], backend)
    return kept.take(x, backend), kept


class SwinHead(nn.Module):
    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.fc_cls = nn.Linear(dim, classes)


class SwinTrace(NamedTuple):
    """All that one forward decided."""

    logits: torch.Tensor  # (B, classes)
    feature: torch.Tensor  # (B, C)
    kept: tuple[torch.Tensor | None, ...]  # of each stage raster indices (B, T, K) in a frame, ascending; None: all

    def mask(self, stage: int, grid: Size) -> torch.Tensor | None:
        """(B, T, h, w) bool: which tokens of a stage (0 to 3) are kept; None: all."""
        kept = self.kept[stage]
        if kept is None:
            return None
        found = kept.new_zeros(*kept.shape[:2], grid[1] * grid[2]).scatter_(2, kept, 1)
        return found.bool().unflatten(2, grid[1:])


class VideoSwin(nn.Module):
    """VideoSwin classifier, with pruning by semantic-aware temporal accumulation.

    Args:
        config: a name in `CONFIGS` or a `VideoSwinConfig`.

    `r`, the tokens of every frame that the second stage goes without, may be set at any time (the third goes without
    1.5 r / 4, the fourth without 2 r / 16); 0 is the model without pruning. A model made here has random weights;
    `from_pretrained` loads them.

    >>> import torch
    >>> from vidops.models.video_swin import VideoSwin
    >>> model = VideoSwin("tiny").eval()
    >>> model.r = 24
    >>> trace = model.trace(torch.randn(1, 3, 8, 64, 64))
    >>> [None if kept is None else kept.shape[2] for kept in trace.kept]
    [None, 40, 7, 1]
    """

    load_report: LoadReport | None = None

    def __init__(self, config: str | VideoSwinConfig = "swin_tiny") -> None:
        super().__init__()
        c = self.config = resolve_config(config)
        self._r = c.r
        self.backbone = SwinBackbone(c)
        self.cls_head = SwinHead(c.width(STAGES - 1), c.classes)
        for module in self.modules():
            if isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def r(self) -> int:
        return self._r

    @r.setter
    def r(self, value: int) -> None:
        self.config.drops(value)
        self._r = value

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: str | VideoSwinConfig = "swin_tiny",
        *,
        strict: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> VideoSwin:
        """A model with the weights of a local checkpoint, in eval mode; see `load_checkpoint`."""
        model = cls(config).to(dtype)
        model.load_checkpoint(path, strict=strict)
        return model.eval()

    def load_checkpoint(self, path: str | Path, *, strict: bool = True) -> LoadReport:
        """Load the authors' checkpoint of VideoSwin from a local file.

        With `strict` every parameter must be in the file and nothing else. Without it the classifier may be missing and
        further names are reported. Tables of relative positions must be those of the configuration's window. The report
        returned is kept as `load_report`.

        Raises CheckpointError (a ValueError) for every file that cannot be read or does not fit.
        """
        found = checkpoints.read_state_dict(path)
        state = checkpoints.without_prefix(found.state, "module.")
        self.load_report = checkpoints.load_into(
            self, state, path=path, layout=f"VideoSwin, {found.layout}", strict=strict, required=("backbone.",)
        )
        return self.load_report

    def features(self, video: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        """Normalised clips (B, 3, T, H, W) -> features (B, C): the mean over all tokens left, which are normed."""
        return self._features(video, backend)[0]

    def _features(
        self, video: torch.Tensor, backend: str | None
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        c = self.config
        expected = (3, c.frames, c.img_size, c.img_size)
        if video.dim() != 5 or tuple(video.shape[1:]) != expected:
            raise ValueError(f"video: expected shape (B, {str(expected)[1:]}, got {tuple(video.shape)}")
        tokens, chosen = self.backbone(video, c.drops(self._r), backend)
        return tokens.mean((1, 2)), chosen

    def forward(self, video: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        """Logits (B, classes).

        Args:
            video: clips (B, 3, T, H, W) of the configuration's sizes, normalised with ImageNet's statistics
                (`vidops.models.views` makes them from a decoded video).
            backend: backend of every vidops op, default chosen per op.
        """
        return self.cls_head.fc_cls(self.features(video, backend=backend))

    def trace(self, video: torch.Tensor, *, backend: str | None = None) -> SwinTrace:
        """As the forward, with the tokens that each stage kept."""
        feature, chosen = self._features(video, backend)
        return SwinTrace(self.cls_head.fc_cls(feature), feature, tuple(chosen))
