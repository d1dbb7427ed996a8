"""Triton `symmetric_kl`: Eq. E2 of Ding et al., ECCV 2024 (arXiv 2311.17893), in its direct form."""

import torch
import triton
import triton.language as tl

from vidops.kernels._common import LANES, TL_DTYPE, bound, cdiv, divergence, launch


@triton.jit
def _symmetric_kl_fwd_kernel(
    p, log_p, q, log_q, out,
    p_batch, p_row, p_col, lp_batch, lp_row, lp_col, q_batch, q_row, q_col, lq_batch, lq_row, lq_col,
    n, m, M, tiles_n, tiles_m,
    SAME: tl.constexpr, A: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tile_m = tile % tiles_m
    tile_n = tile // tiles_m % tiles_n
    batch = (tile // tiles_m // tiles_n).to(tl.int64)
    # A set compared with itself: the tile on or above the diagonal also writes its mirror image.
    if SAME:
        if tile_m < tile_n:
            return
    rows = tile_n * A + tl.arange(0, A)
    others = tile_m * B + tl.arange(0, B)
    distance = divergence(
        p + batch * p_batch, log_p + batch * lp_batch, p_row, p_col, lp_row, lp_col, rows, rows < n,
        q + batch * q_batch, log_q + batch * lq_batch, q_row, q_col, lq_row, lq_col, others, others < m,
        M, A, B, LANES, ACC,
    )  # fmt: skip
    out += batch * n * m
    rows_wide = rows.to(tl.int64)[:, None]
    others_wide = others.to(tl.int64)[None, :]
    ok = (rows < n)[:, None] & (others < m)[None, :]
    tl.store(out + rows_wide * m + others_wide, distance, mask=ok)
    if SAME:
        tl.store(out + others_wide * n + rows_wide, distance, mask=ok)


def forward(
    p: torch.Tensor, log_p: torch.Tensor, q: torch.Tensor, log_q: torch.Tensor, same: bool
) -> torch.Tensor:
    """p, log_p (B, n, M), q, log_q (B, m, M), float32 or float64 -> D (B, n, m)."""
    batch, n, columns = p.shape
    m = q.shape[1]
    out = p.new_empty(batch, n, m)
    side = 8 if p.dtype == torch.float64 else 16
    tiles_n, tiles_m = cdiv(n, side), cdiv(m, side)
    launch(
        _symmetric_kl_fwd_kernel, batch * tiles_n * tiles_m, p, log_p, q, log_q, out,
        *p.stride(), *log_p.stride(), *q.stride(), *log_q.stride(),
        n, m, bound(columns), tiles_n, tiles_m,
        SAME=same, A=side, B=side, LANES=LANES, ACC=TL_DTYPE[p.dtype], num_warps=8, num_stages=1,
    )  # fmt: skip
    return out
