"""SwinTransformer3d of torchvision: tokens go after each merging of patches, windows stay whole.

Section 3.3 of Ding et al., ICCV 2023 (arXiv 2308.04549), as in `vidops.models.video_swin`, which says what the paper
leaves open. Matched by the class name SwinTransformer3d in a module's bases.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from vidops.ops import _checks
from vidops.patching._patch import Change, Family, Options, Patch, PatchError, lookup, mro_names, site_of
from vidops.patching._swap import Swapped

FAMILY = "torchvision SwinTransformer3d"
STAGES = 4
DEFAULT_CLIP = (32, 224, 224)

Size = tuple[int, int, int]


class SwinStage(Swapped):
    """Of the Sequential of a stage's blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, H, W, C) -> the same; in the last stage, once pruned, (B, T, 1, K, C)."""
        from vidops.models.video_swin import prune

        patch, stage, _ = site_of(self)
        drop = patch.drops[stage]
        if drop == 0:
            return super().forward(x)
        grid = cast(Size, tuple(x.shape[1:4]))
        tokens, kept = prune(x.flatten(2, 3), drop, grid, reverse=stage == 2, backend=patch.backend)
        for block in self.children():
            tokens = block(tokens, grid, kept)
        if stage == STAGES - 1:
            # Norm and mean follow: over the tokens left.
            return tokens.unsqueeze(2)
        return kept.fill(tokens, patch.backend).unflatten(2, grid[1:])


class SwinBlock(Swapped):
    attn: Any
    norm1: Any
    norm2: Any
    mlp: Any
    stochastic_depth: Any

    def forward(self, x: torch.Tensor, grid: Size | None = None, kept: Any = None) -> torch.Tensor:
        """Tokens (B, T, H, W, C), or those kept of them (B, T, K, C)."""
        if grid is None:
            return super().forward(x)
        update = _window_attention(self.attn, self.norm1(x), grid, kept, site_of(self).patch.backend)
        x = x + self.stochastic_depth(update)
        return x + self.stochastic_depth(self.mlp(self.norm2(x)))


def _windows(attn: Any, grid: Size) -> tuple[Size, Size]:
    """Window and shift as the grid allows."""
    pairs = list(zip(grid, attn.window_size, strict=True))
    window = tuple(min(have, size) for have, size in pairs)
    shift = tuple(
        0 if have <= size else by for (have, size), by in zip(pairs, attn.shift_size, strict=True)
    )
    return cast(Size, window), cast(Size, shift)


def _window_attention(attn: Any, x: torch.Tensor, grid: Size, kept: Any, backend: str | None) -> torch.Tensor:
    """Kept tokens (B, T, K, C) -> their update (B, T, K, C) of a ShiftedWindowAttention3d over the filled grid."""
    from vidops.models.video_swin import MASKED, from_windows, shift_mask, to_windows

    window, shift = _windows(attn, grid)
    qkv = kept.fill(attn.qkv(x), backend).unflatten(2, grid[1:])
    padded = cast(Size, tuple(-(-have // size) * size for have, size in zip(grid, window, strict=True)))
    if padded != grid:
        # The unpatched layer pads the input of the projection with zeros, so what it pads with here is the bias.
        bias = qkv.new_zeros(()) if attn.qkv.bias is None else attn.qkv.bias.to(qkv.dtype)
        whole = bias.expand(len(qkv), *padded, qkv.shape[-1]).clone()
        whole[:, : grid[0], : grid[1], : grid[2]] = qkv
        qkv = whole
    if any(shift):
        qkv = qkv.roll([-by for by in shift], (1, 2, 3))
    q, k, v = to_windows(qkv, window).unflatten(3, (3, attn.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    bias = attn.get_relative_position_bias(list(window)).to(q.dtype)
    dropout = attn.attention_dropout if attn.training else 0.0
    mask = shift_mask(padded, window, shift)
    # The fused kernels take four axes. Masks are the same for all clips, and not copied for each.
    if mask is None:
        joined = (t.flatten(0, 1) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*joined, attn_mask=bias, dropout_p=dropout).unflatten(0, q.shape[:2])
    else:
        bias = bias + (mask.to(q) * MASKED).unsqueeze(1)
        clips = [
            F.scaled_dot_product_attention(*clip, attn_mask=bias, dropout_p=dropout)
            for clip in zip(q, k, v, strict=True)
        ]
        out = torch.stack(clips) if clips else q
    out = from_windows(out.transpose(2, 3).flatten(3), window, padded)
    if any(shift):
        out = out.roll(shift, (1, 2, 3))
    out = out[:, : grid[0], : grid[1], : grid[2]].flatten(2, 3)
    return F.dropout(attn.proj(kept.take(out, backend)), attn.dropout, attn.training)


class SwinPatch(Patch):
    """`drops` of every frame in the four stages: none, r, 1.5 r / 4 and 2 r / 16."""

    drops: tuple[int, ...]

    def __init__(self, stages: list[list[Any]], dim: int, patch: Size, clip: Size, r: Any, *args: Any) -> None:
        super().__init__(*args)
        self.dim = dim
        self.volume = 3 * math.prod(patch)
        self.depths = [len(blocks) for blocks in stages]
        self.hidden = [blocks[0].mlp[0].out_features for blocks in stages]
        grid = tuple(-(-size // by) for size, by in zip(clip, patch, strict=True))
        self.grids: list[Size] = []
        for _ in stages:
            self.grids.append(cast(Size, grid))
            grid = (grid[0], -(-grid[1] // 2), -(-grid[2] // 2))
        self.windows = [
            math.prod(_windows(blocks[0].attn, grid)[0]) for blocks, grid in zip(stages, self.grids, strict=True)
        ]
        self.set_r(r)

    def set_r(self, value: Any) -> None:
        r = _checks.integer("r", value, 0)
        drops = (0, r, 3 * r // 8, r // 8)
        for stage, (drop, grid) in enumerate(zip(drops, self.grids, strict=True)):
            if drop >= grid[1] * grid[2]:
                raise PatchError(
                    f"r: stage {stage + 1} drops {drop} of every frame's tokens, expected fewer than the "
                    f"{grid[1] * grid[2]} that it has; got r = {r}"
                )
        self.drops, self.r = drops, r

    def _kept(self, drops: tuple[int, ...]) -> list[int]:
        return [math.prod(grid) - grid[0] * drop for grid, drop in zip(self.grids, drops, strict=True)]

    def tokens(self) -> tuple[int, ...]:
        return tuple(self._kept(self.drops))

    def gmacs(self, unpatched: bool) -> float:
        total = math.prod(self.grids[0]) * self.volume * self.dim
        for stage, kept in enumerate(self._kept((0,) * STAGES if unpatched else self.drops)):
            dim, places = self.dim << stage, math.prod(self.grids[stage])
            block = kept * (4 * dim**2 + 2 * dim * self.hidden[stage]) + 2 * places * self.windows[stage] * dim
            total += self.depths[stage] * block
            if stage < STAGES - 1:
                total += math.prod(self.grids[stage + 1]) * 8 * dim**2
        return total / 1e9


def _matches(module: nn.Module) -> bool:
    return "SwinTransformer3d" in mro_names(module)


def _build(root: nn.Module, target: nn.Module, r: Any, options: Options) -> Patch:
    if options.method == "tome":
        raise PatchError(f"{FAMILY}: merged tokens have no place in its windows; use method 'sta'")
    options.refuse(FAMILY, proportional="nothing is merged", num_frames="say clip_size=(frames, height, width)")
    clip = DEFAULT_CLIP if options.clip_size is None else options.clip_size
    if not isinstance(clip, tuple) or len(clip) != 3:
        raise PatchError(f"clip_size: expected (frames, height, width), got {clip!r}")
    for size in clip:
        _checks.integer("clip_size", size, 1)
    features = list(lookup(target, "features").children())
    if len(features) != 2 * STAGES - 1:
        raise PatchError(f"{type(target).__name__}: expected {STAGES} stages, got {(len(features) + 1) // 2}")
    stages = [list(stage.children()) for stage in features[::2]]
    for block in (block for blocks in stages for block in blocks):
        if type(block).__name__ != "SwinTransformerBlock":
            raise PatchError(f"{type(target).__name__}: a block is a {type(block).__name__}, not SwinTransformerBlock")
        for path in ("attn.get_relative_position_bias", "attn.qkv", "norm1", "norm2", "mlp", "stochastic_depth"):
            lookup(block, path)
    names = {module: name for name, module in root.named_modules()}
    changes = []
    for number, blocks in enumerate(stages):
        if number:
            stage = features[2 * number]
            changes.append(Change(names[stage], stage, SwinStage, number))
            changes += [Change(names[block], block, SwinBlock, number, counted=False) for block in blocks]
    projection = lookup(target, "patch_embed.proj")
    patch = cast(Size, tuple(projection.kernel_size))
    return SwinPatch(stages, projection.out_channels, patch, clip, r, target, FAMILY, options, changes, "clip")


VIDEO_SWIN = Family("SwinTransformer3d (torchvision)", _matches, _build)
