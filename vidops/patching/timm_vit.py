"""VisionTransformer of timm, which sees one frame at a time: a batch is clips x frames for "sta".

Matched by the class name VisionTransformer in a module's bases; then it must have the attributes of timm's (others
share the name), and its blocks must be timm's plain Block with its Attention.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from vidops.ops import _checks
from vidops.patching._patch import (
    Change,
    Family,
    Options,
    Patch,
    PatchError,
    StaPatch,
    TomePatch,
    lookup,
    mro_names,
    site_of,
)
from vidops.patching._schedule import Sizes, prune_blocks
from vidops.patching._swap import Swapped

FAMILY = "timm VisionTransformer"


class StaBlock(Swapped):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        patch, call, tap = site_of(self)
        x = super().forward(x, *args, **kwargs)
        keys, stage = tap.taken(), patch.stages[call]
        if stage.drop == 0:
            return x
        frames, prefix = stage.groups, patch.sizes.prefix
        if x.shape[0] % frames:
            raise ValueError(f"the batch: expected clips x {frames} frames, got {x.shape[0]} images")
        special, tokens = x[:, :prefix], x[:, prefix:]
        metric = keys.detach().mean(1)[:, prefix:]
        clips = (t.unflatten(0, (-1, frames)).flatten(1, 2) for t in (tokens, metric))
        tokens = patch.prune(*clips, stage).unflatten(1, (frames, -1)).flatten(0, 1)
        return torch.cat([special, tokens], 1) if prefix else tokens


class TomeBlock(Swapped):
    norm1: Any
    attn: Any
    ls1: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    ls2: Any
    drop_path2: Any

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        patch, block, tap = site_of(self)
        if not patch.active():
            x = super().forward(x, *args, **kwargs)
            tap.take()
            return x
        if any(value is not None and value is not False for value in (*args, *kwargs.values())):
            raise ValueError("attn_mask, is_causal: tokens that are merged have no place in a mask; set r = 0 for it")
        size = patch.sizes_of(x, block)
        # The logarithm of the sizes as timm's additive mask is proportional attention.
        weighted = {"attn_mask": size.log().mT.unsqueeze(1)} if patch.proportional and size is not None else {}
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **weighted)))
        x, size = patch.merge(x, tap.taken().detach().mean(1), size, block)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return patch.carry(x, size, block)


def _matches(module: nn.Module) -> bool:
    return "VisionTransformer" in mro_names(module)


def _check(target: Any, proportional: bool) -> None:
    for path in ("blocks", "patch_embed.num_patches", "num_prefix_tokens", "global_pool", "embed_dim"):
        lookup(target, path)
    for number, block in enumerate(target.blocks):
        for path, wanted in (("", "Block"), ("attn", "Attention")):
            found = type(lookup(block, path) if path else block).__name__
            if found != wanted:
                raise PatchError(
                    f"{type(target).__name__}: blocks.{number}{'.' + path if path else ''} is a {found}, expected "
                    f"timm's {wanted}"
                )
        for path in ("attn.k_norm", "norm1", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"):
            lookup(block, path)
        if proportional and "attn_mask" not in inspect.signature(block.attn.forward).parameters:
            raise PatchError("proportional: needs an attention that takes attn_mask, as of timm 1.0.9; or say False")
    if target.global_pool == "token" and target.num_prefix_tokens == 0:
        raise PatchError(f"{type(target).__name__}: the head reads the first token, which is not protected")
    pool = getattr(target, "attn_pool", None)
    if getattr(pool, "pos_embed", None) is not None:
        raise PatchError(f"{type(target).__name__}: its attention pooling adds a position to every token of the grid")


def _build(root: nn.Module, target: Any, r: Any, options: Options) -> Patch:
    options.refuse(FAMILY, clip_size="the image size is the model's")
    sta = options.method == "sta"
    proportional = options.proportional is not False and not sta
    _check(target, proportional)
    blocks = list(target.blocks)
    frames = 1
    if sta:
        options.refuse(FAMILY, proportional="nothing is merged")
        if options.num_frames is None:
            raise PatchError(
                f"num_frames: {type(target).__name__} sees single images; say how many form a clip (a batch is then "
                "clips x num_frames), or use method 'tome'"
            )
        frames = _checks.integer("num_frames", options.num_frames, 1)
    else:
        options.refuse(FAMILY, num_frames="every image is merged alone")
    projection = lookup(target, "patch_embed.proj")
    weights = [p.numel() for p in blocks[0].mlp.parameters() if p.dim() == 2]
    sizes = Sizes(
        depth=len(blocks),
        dim=target.embed_dim,
        # What two matrices of as many weights have; a gated MLP has three.
        hidden=sum(weights) // (2 * target.embed_dim),
        frames=frames,
        tokens=target.patch_embed.num_patches,
        patch=projection.weight[0].numel(),
        prefix=target.num_prefix_tokens,
        joint=False,
    )
    names = {module: name for name, module in root.named_modules()}
    numbers = prune_blocks(len(blocks)) if sta else range(len(blocks))
    changes = [
        Change(names[blocks[number]], blocks[number], StaBlock if sta else TomeBlock, index, blocks[number].attn.k_norm)
        for index, number in enumerate(numbers)
    ]
    if sta:
        return StaPatch(sizes, r, target, FAMILY, options, changes, "image")
    return TomePatch(sizes, r, proportional, target, FAMILY, options, changes, "image")


TIMM_VIT = Family("VisionTransformer (timm)", _matches, _build)
