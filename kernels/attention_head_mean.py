"""Triton `attention_head_mean`: Eq. E1 of Ding et al., ECCV 2024 (arXiv 2311.17893).

Two kernels: the log-sum-exp of every head's row, then the map one tile at a time with the heads innermost, so
that no per-head map exists. Both backward kernels are those of `video_attention` without its value product.
"""

import math

import torch
import triton
import triton.language as tl

from vidops.kernels import _common, video_attention
from vidops.kernels._common import bound, cdiv, dropout_keep, launch, load_tile, matmul
from vidops.kernels._tiles import forward_tile, map_tile


@triton.jit
def _attention_head_mean_lse_kernel(
    q, k, lse,
    q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col,
    scale: tl.float64, N, M, tiles,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    DOT: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) // tiles
    rows = (tl.program_id(0) % tiles) * A + tl.arange(0, A)
    channel = tl.arange(0, WIDTH)
    q += (head // H).to(tl.int64) * q_batch + (head % H).to(tl.int64) * q_head
    k += (head // H).to(tl.int64) * k_batch + (head % H).to(tl.int64) * k_head
    queries = load_tile(q, rows, q_row, channel, q_col, (rows < N)[:, None] & (channel < D)[None, :])
    factor = tl.full([], scale, ACC)
    top = tl.full([A], float("-inf"), ACC)
    total = tl.zeros([A], ACC)
    for start in range(0, M, B):
        columns = start + tl.arange(0, B)
        keys = load_tile(k, columns, k_row, channel, k_col, (columns < M)[:, None] & (channel < D)[None, :])
        s = matmul(queries, tl.trans(keys.to(DOT)), tl.zeros([A, B], ACC), DOT, SPLIT) * factor
        s = tl.where((columns < M)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(s - higher[:, None]), 1)
        top = higher
    tl.store(lse + head.to(tl.int64) * N + rows, top + tl.log(total), mask=rows < N)


@triton.jit
def _attention_head_mean_map_kernel(
    q, k, lse, p, log_p,
    q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col,
    scale: tl.float64, keep_scale: tl.float64, log_heads: tl.float64, threshold: tl.uint32, seed: tl.int64,
    N, M, tiles_n, tiles_m,
    LOG: tl.constexpr, DROPOUT: tl.constexpr, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    # Neighbouring programs share a tile of keys, whose heads together are the larger operand.
    rows = (tile % tiles_n) * A + tl.arange(0, A)
    columns = (tile // tiles_n % tiles_m) * B + tl.arange(0, B)
    batch = (tile // tiles_n // tiles_m).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    ok_q = (rows < N)[:, None] & (channel < D)[None, :]
    ok_k = (columns < M)[:, None] & (channel < D)[None, :]
    factor = tl.full([], scale, ACC)
    # log P = logsumexp_h(s_h - lse_h) - log H, kept as (largest term, sum relative to it): one exponential
    # per term, and finite where the sum of the exponentials themselves would underflow.
    top = tl.full([A, B], float("-inf"), ACC)
    total = tl.zeros([A, B], ACC)
    dropped = tl.zeros([A, B], ACC)
    for head in range(0, H):
        h = tl.cast(head, tl.int64)
        queries = load_tile(q + batch * q_batch + h * q_head, rows, q_row, channel, q_col, ok_q)
        keys = load_tile(k + batch * k_batch + h * k_head, columns, k_row, channel, k_col, ok_k)
        row_lse = tl.load(lse + (batch * H + head) * N + rows, mask=rows < N, other=0.0)
        s = matmul(queries, tl.trans(keys.to(DOT)), tl.zeros([A, B], ACC), DOT, SPLIT) * factor - row_lse[:, None]
        if DROPOUT:
            element = ((batch * H + head) * N + rows.to(tl.int64)[:, None]) * M + columns[None, :]
            dropped += tl.where(dropout_keep(element, seed, threshold), tl.exp(s), 0.0)
        if LOG or not DROPOUT:
            ratio = tl.exp(-tl.abs(s - top))
            total = tl.where(s > top, total * ratio + 1.0, total + ratio)
            top = tl.where(s > top, s, top)
    at = (batch * N + rows.to(tl.int64)[:, None]) * M + columns[None, :]
    ok = (rows < N)[:, None] & (columns < M)[None, :]
    if DROPOUT:
        tl.store(p + at, dropped * tl.full([], keep_scale, ACC) / H, mask=ok)
    if LOG or not DROPOUT:
        log_mean = top + tl.log(total) - tl.full([], log_heads, ACC)
        if LOG:
            tl.store(log_p + at, log_mean, mask=ok)
        if not DROPOUT:
            tl.store(p + at, tl.exp(log_mean), mask=ok)


def log_sum_exp(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """q (B,H,N,D), k (B,H,M,D) -> lse (B,H,N) in accumulation dtype."""
    batch, heads, n, d = q.shape
    lse = q.new_empty(batch, heads, n, dtype=_common.accumulator(q.dtype))
    width = _common.padded(d)
    a, b, warps, stages = forward_tile(width, q, False)
    tiles = cdiv(n, a)
    launch(
        _attention_head_mean_lse_kernel, batch * heads * tiles, q, k, lse, *q.stride(), *k.stride(),
        scale, n, bound(k.shape[2]), tiles,
        H=heads, D=d, WIDTH=width, A=a, B=b, DOT=_common.operand(q.dtype),
        SPLIT=_common.split(q.dtype, width), ACC=_common.TL_DTYPE[lse.dtype], num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return lse


def head_mean(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, dropout_p: float, seed: int,
    with_log: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Map (B,N,M) and log map (B,N,M) or (0,) from contiguous log-sum-exps (B,H,N)."""
    batch, heads, n, d = q.shape
    m = k.shape[2]
    p = lse.new_empty(batch, n, m)
    log_p = lse.new_empty((batch, n, m) if with_log else (0,))
    width = _common.padded(d)
    a, b, warps, stages = map_tile(width, q, dropout_p > 0)
    tiles_n, tiles_m = cdiv(n, a), cdiv(m, b)
    launch(
        _attention_head_mean_map_kernel, batch * tiles_n * tiles_m, q, k, lse, p, log_p,
        *q.stride(), *k.stride(),
        scale, 1.0 / (1.0 - dropout_p), math.log(heads), _common.dropout_threshold(dropout_p), seed,
        n, m, tiles_n, tiles_m,
        LOG=with_log, DROPOUT=dropout_p > 0, H=heads, D=d, WIDTH=width, A=a, B=b,
        DOT=_common.operand(q.dtype), SPLIT=_common.split(q.dtype, width), ACC=_common.TL_DTYPE[lse.dtype],
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return p, log_p


def forward(
    q: torch.Tensor, k: torch.Tensor, scale: float, dropout_p: float, seed: int, with_log: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B,H,N,D), k (B,H,M,D) -> P (B,N,M), log P (B,N,M) or (0,), lse (B,H,N)."""
    if with_log and dropout_p > 0:
        raise ValueError("log_p: a map with dropout has no logarithm; ask for one or the other")
    lse = log_sum_exp(q, k, scale)
    p, log_p = head_mean(q, k, lse, scale, dropout_p, seed, with_log)
    return p, log_p, lse


def backward(
    grad_p: torch.Tensor, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, dropout_p: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """grad_p (B,N,M), holding the share of log P already -> grad_q (B,H,N,D), grad_k (B,H,M,D)."""
    grad_q, grad_k, _ = video_attention.gradients(None, grad_p, q, k, None, None, lse, scale, dropout_p, seed)
    return grad_q, grad_k
