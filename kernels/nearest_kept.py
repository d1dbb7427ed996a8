"""Triton `nearest_kept`: the fill of section 3.3 of Ding et al., ICCV 2023 (arXiv 2308.04549)."""

import torch
import triton
import triton.language as tl

from vidops.kernels._common import bound, cdiv, launch


@triton.jit
def _nearest_kept_kernel(
    keep, source, k_item, k_row, height, width, K, tiles,
    P: tl.constexpr, B: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    """The smallest (squared distance, raster index), as one integer, of P places over all kept tokens."""
    FAR: tl.constexpr = 2**63 - 1 if INT == tl.int64 else 2**31 - 1
    places = height * width
    item = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles * P + tl.arange(0, P)
    y, x = (place // width).to(INT), (place % width).to(INT)
    least = tl.full([P, B], FAR, INT)
    slot = tl.full([P, B], 2147483647, tl.int32)
    for start in range(0, K, B):
        k = start + tl.arange(0, B)
        token = tl.load(keep + item * k_item + k.to(tl.int64) * k_row, mask=k < K, other=-1)
        ok = (token >= 0) & (token < places)
        raster = tl.where(ok, token, 0).to(tl.int32)
        down = y[:, None] - (raster // width).to(INT)[None, :]
        across = x[:, None] - (raster % width).to(INT)[None, :]
        order = (down * down + across * across) * places + raster.to(INT)[None, :]
        nearer = ok[None, :] & (order < least)
        least = tl.where(nearer, order, least)
        slot = tl.where(nearer, k[None, :], slot)
    nearest = tl.min(least, 1)
    first = tl.min(tl.where(least == nearest[:, None], slot, 2147483647), 1)
    first = tl.where(nearest == FAR, -1, first)
    tl.store(source + item * places + place, first.to(tl.int64), mask=place < places)


def forward(keep: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """keep (B, K) int64 -> source (B, height * width) int64: slots of K, -1 where no token is on the grid."""
    places = height * width
    source = keep.new_empty(keep.shape[0], places)
    largest = ((height - 1) ** 2 + (width - 1) ** 2 + 1) * places
    p, b = 64, 32
    tiles = cdiv(places, p)
    launch(
        _nearest_kept_kernel, keep.shape[0] * tiles, keep, source, *keep.stride(), height, width,
        bound(keep.shape[1]), tiles, P=p, B=b, INT=tl.int32 if largest < 2**31 else tl.int64,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return source
