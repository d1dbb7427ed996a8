"""Triton `assign_clusters`: Eq. E4 of Ding et al., ECCV 2024 (arXiv 2311.17893), on maps never stored.

Tiles of P are rebuilt from queries, keys and log-sum-exps, and contracted with the centroids at once. D
without the token's own entropy, which no centroid changes, is sum_c X log X - sum_c P log X - sum_c log P X;
subtracting one vector from log X and log P alike changes no D and keeps the sums small.
"""

import math

import torch
import triton
import triton.language as tl

from vidops.kernels import _common
from vidops.kernels._common import bound, cdiv, launch, load_tile, matmul
from vidops.kernels._tiles import warp_groups
from vidops.kernels.attention_head_mean import log_sum_exp


@triton.jit
def _assign_clusters_centre_kernel(
    log_x, centre, x_row, x_col, K, M, C: tl.constexpr, ACC: tl.constexpr
):
    """Column means of log X over the centroids where it is finite."""
    columns = tl.program_id(0) * C + tl.arange(0, C)
    acc = tl.zeros([C], ACC)
    for k in range(0, K):
        at = tl.cast(k, tl.int64) * x_row + columns.to(tl.int64) * x_col
        logs = tl.load(log_x + at, mask=columns < M, other=0.0)
        acc += tl.where(tl.abs(logs) < float("inf"), logs, 0.0)
    tl.store(centre + columns, acc / K, mask=columns < M)


@triton.jit
def _assign_clusters_entropy_kernel(
    x, log_x, centre, entropy, x_row, x_col, lx_row, lx_col, M, C: tl.constexpr, ACC: tl.constexpr
):
    k = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([C], ACC)
    for start in range(0, M, C):
        columns = start + tl.arange(0, C)
        wide = columns.to(tl.int64)
        a = tl.load(x + k * x_row + wide * x_col, mask=columns < M, other=0.0)
        logs = tl.load(log_x + k * lx_row + wide * lx_col, mask=columns < M, other=0.0)
        acc += a * (logs - tl.load(centre + columns, mask=columns < M, other=0.0))
    tl.store(entropy + k, tl.sum(acc, 0))


@triton.jit
def _assign_clusters_fwd_kernel(
    q, k, lse, x, log_x, centre, entropy, distance,
    q_head, q_row, q_col, k_head, k_row, k_col, l_head, l_row, x_row, x_col, lx_row, lx_col,
    scale: tl.float64, log_heads: tl.float64, N, M, K, tiles,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """D, up to the token's entropy, of A tokens and C centroids, with the keys streamed B at a time."""
    rows = (tl.program_id(0) // tiles) * A + tl.arange(0, A)
    clusters = (tl.program_id(0) % tiles) * C + tl.arange(0, C)
    channel = tl.arange(0, WIDTH)
    ok_q = (rows < N)[:, None] & (channel < D)[None, :]
    factor = tl.full([], scale, ACC)
    cross = tl.zeros([A, C], ACC)
    for start in range(0, M, B):
        columns = start + tl.arange(0, B)
        ok_k = (columns < M)[:, None] & (channel < D)[None, :]
        top = tl.full([A, B], float("-inf"), ACC)
        total = tl.zeros([A, B], ACC)
        for head in range(0, H):
            h = tl.cast(head, tl.int64)
            queries = load_tile(q + h * q_head, rows, q_row, channel, q_col, ok_q)
            keys = load_tile(k + h * k_head, columns, k_row, channel, k_col, ok_k)
            row_lse = tl.load(lse + h * l_head + rows.to(tl.int64) * l_row, mask=rows < N, other=0.0)
            s = matmul(queries, tl.trans(keys.to(DOT)), tl.zeros([A, B], ACC), DOT, SPLIT)
            s = s * factor - row_lse[:, None]
            ratio = tl.exp(-tl.abs(s - top))
            total = tl.where(s > top, total * ratio + 1.0, total + ratio)
            top = tl.where(s > top, s, top)
        log_mean = top + tl.log(total) - tl.full([], log_heads, ACC)
        inside = (columns < M)[None, :]
        middle = tl.load(centre + columns, mask=columns < M, other=0.0)
        ok = (columns < M)[:, None] & (clusters < K)[None, :]
        masses = load_tile(x, columns, x_col, clusters, x_row, ok)
        logs = load_tile(log_x, columns, lx_col, clusters, lx_row, ok)
        logs = tl.where(ok, logs - middle[:, None], 0.0)
        cross = matmul(tl.where(inside, tl.exp(log_mean), 0.0), logs, cross, ACC, SPLIT)
        cross = matmul(tl.where(inside, log_mean - middle[None, :], 0.0), masses, cross, ACC, SPLIT)
    own = tl.load(entropy + clusters, mask=clusters < K, other=0.0)
    at = rows.to(tl.int64)[:, None] * K + clusters[None, :]
    tl.store(distance + at, own[None, :] - cross, mask=(rows < N)[:, None] & (clusters < K)[None, :])


@triton.jit
def _assign_clusters_argmin_kernel(
    distance, label, N, K, A: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr
):
    rows = tl.program_id(0) * A + tl.arange(0, A)
    best = tl.full([A], float("inf"), ACC)
    winner = tl.zeros([A], tl.int32)
    for first in range(0, K, C):
        k = first + tl.arange(0, C)
        d = load_tile(distance, rows, K, k, 1, (rows < N)[:, None] & (k < K)[None, :])
        # NaN compares false, so a distance that is none never wins.
        d = tl.where((k < K)[None, :] & (d < float("inf")), d, float("inf"))
        nearest = tl.min(d, 1)
        at = tl.min(tl.where(d == nearest[:, None], k[None, :], 2147483647), 1)
        winner = tl.where(nearest < best, at, winner)
        best = tl.minimum(nearest, best)
    tl.store(label + rows, winner.to(tl.int64), mask=rows < N)


def forward(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, centroids: torch.Tensor, log_centroids: torch.Tensor,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """q (H,N,D), k (H,M,D), lse (H,N) or (0,), centroids (K,M) in accumulation dtype -> label (N,) int64.

    The only intermediate of size N is N x K distances.
    """
    heads, n, d = q.shape
    m, count = k.shape[1], centroids.shape[0]
    label = q.new_empty(n, dtype=torch.int64)
    if n == 0:
        return label
    if lse.dim() == 1:
        lse = log_sum_exp(q[None], k[None], scale)[0]
    acc = _common.TL_DTYPE[centroids.dtype]
    centre, entropy = centroids.new_empty(m), centroids.new_empty(count)
    distance = centroids.new_empty(n, count)
    launch(
        _assign_clusters_centre_kernel, cdiv(m, 128), log_centroids, centre, *log_centroids.stride(),
        bound(count), m, C=128, ACC=acc, num_warps=4, num_stages=1,
    )  # fmt: skip
    launch(
        _assign_clusters_entropy_kernel, count, centroids, log_centroids, centre, entropy,
        *centroids.stride(), *log_centroids.stride(), bound(m), C=1024, ACC=acc, num_warps=4, num_stages=1,
    )  # fmt: skip
    width = _common.padded(d)
    a, b, c, warps = _tile(width, q)
    tiles = cdiv(count, c)
    launch(
        _assign_clusters_fwd_kernel, cdiv(n, a) * tiles, q, k, lse, centroids, log_centroids, centre, entropy,
        distance, *q.stride(), *k.stride(), *lse.stride(), *centroids.stride(), *log_centroids.stride(),
        scale, math.log(heads), n, bound(m), count, tiles, H=heads, D=d, WIDTH=width, A=a, B=b, C=c,
        DOT=_common.operand(q.dtype), SPLIT=_common.split(q.dtype, width), ACC=acc, num_warps=warps, num_stages=1,
    )  # fmt: skip
    launch(
        _assign_clusters_argmin_kernel, cdiv(n, 64), distance, label, n, bound(count),
        A=64, C=32, ACC=acc, num_warps=4, num_stages=1,
    )  # fmt: skip
    return label


def _tile(width: int, q: torch.Tensor) -> tuple[int, int, int, int]:
    """(tokens, keys, centroids, warps)."""
    if q.dtype == torch.float64:
        return (16, 16, 16, 4) if width <= 256 else (8, 16, 32, 8)
    if _common.split(q.dtype, width):
        return (64 if warp_groups(q) else 32, 32, 64, 8)
    if q.dtype == torch.float32:
        return (32, 32, 64, 4) if width <= 128 else (16, 16, 32, 4)
    return (64, 32, 64, 8) if width <= 256 else (32, 32, 64, 8)
