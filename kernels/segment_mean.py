"""Triton `segment_mean`: cluster means, sheet 2.5 step 3 of Ding et al., ECCV 2024 (arXiv 2311.17893)."""

import torch
import triton
import triton.language as tl

from vidops.kernels._common import TL_DTYPE, cdiv, launch


@triton.jit
def _segment_mean_fwd_kernel(
    x, order, first, out, x_row, x_col, M, tiles, R: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr
):
    segment = tl.program_id(0) // tiles
    columns = (tl.program_id(0) % tiles) * C + tl.arange(0, C)
    begin = tl.load(first + segment)
    end = tl.load(first + segment + 1)
    # R running sums, folded at the end: the additions depend on the row order alone.
    total = tl.zeros([R, C], ACC)
    at = begin
    while at < end:
        position = at + tl.arange(0, R)
        row = tl.load(order + position, mask=position < end, other=0)
        ok = (position < end)[:, None] & (columns < M)[None, :]
        offset = row[:, None] * x_row + columns.to(tl.int64)[None, :] * x_col
        total += tl.load(x + offset, mask=ok, other=0.0).to(ACC)
        at += R
    count = tl.maximum(end - begin, 1).to(ACC)
    tl.store(out + segment.to(tl.int64) * M + columns, tl.sum(total, 0) / count, mask=columns < M)


def forward(x: torch.Tensor, label: torch.Tensor, num_segments: int) -> torch.Tensor:
    """x (n, M), float32 or float64, label (n,) int64 -> (K, M); labels out of range are left out."""
    columns = x.shape[1]
    out = x.new_empty(num_segments, columns)
    # A stable sort keeps the rows of a segment in index order; segment k then spans [first[k], first[k+1]).
    ordered, order = torch.sort(label, stable=True)
    edges = torch.arange(num_segments + 1, device=label.device)
    first = torch.searchsorted(ordered, edges)
    width = 128
    tiles = cdiv(columns, width)
    launch(
        _segment_mean_fwd_kernel, num_segments * tiles, x, order, first, out, *x.stride(), columns, tiles,
        R=8, C=width, ACC=TL_DTYPE[x.dtype], num_warps=4, num_stages=1,
    )  # fmt: skip
    return out
