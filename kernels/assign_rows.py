"""Triton `assign_rows`: Eq. E4 of Ding et al., ECCV 2024 (arXiv 2311.17893), for rows already there."""

import torch
import triton
import triton.language as tl

from vidops.kernels._common import LANES, TL_DTYPE, bound, cdiv, divergence, launch


@triton.jit
def _assign_rows_fwd_kernel(
    p, log_p, x, log_x, label,
    p_row, p_col, lp_row, lp_col, x_row, x_col, lx_row, lx_col,
    n, K, M,
    A: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * A + tl.arange(0, A)
    best = tl.full([A], float("inf"), ACC)
    winner = tl.zeros([A], tl.int32)
    for first in range(0, K, B):
        k = first + tl.arange(0, B)
        distance = divergence(
            p, log_p, p_row, p_col, lp_row, lp_col, rows, rows < n,
            x, log_x, x_row, x_col, lx_row, lx_col, k, k < K,
            M, A, B, LANES, ACC,
        )  # fmt: skip
        # NaN compares false, so a distance that is none never wins.
        distance = tl.where((k < K)[None, :] & (distance < float("inf")), distance, float("inf"))
        nearest = tl.min(distance, 1)
        at = tl.min(tl.where(distance == nearest[:, None], k[None, :], 2147483647), 1)
        winner = tl.where(nearest < best, at, winner)
        best = tl.minimum(nearest, best)
    tl.store(label + rows, winner.to(tl.int64), mask=rows < n)


def forward(
    p: torch.Tensor, log_p: torch.Tensor, centroids: torch.Tensor, log_centroids: torch.Tensor
) -> torch.Tensor:
    """p, log_p (n, M), centroids, log_centroids (K, M), float32 or float64 -> label (n,) int64."""
    n, columns = p.shape
    label = p.new_empty(n, dtype=torch.int64)
    side = 8 if p.dtype == torch.float64 else 16
    launch(
        _assign_rows_fwd_kernel, cdiv(n, side), p, log_p, centroids, log_centroids, label,
        *p.stride(), *log_p.stride(), *centroids.stride(), *log_centroids.stride(),
        n, bound(centroids.shape[0]), bound(columns),
        A=side, B=side, LANES=LANES, ACC=TL_DTYPE[p.dtype], num_warps=8, num_stages=1,
    )  # fmt: skip
    return label
