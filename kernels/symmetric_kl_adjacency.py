"""Triton `symmetric_kl_adjacency`: bits [D <= tau], Eq. E2 of Ding et al., ECCV 2024 (arXiv 2311.17893).

Exact: every pair by the direct form. Filtered: two bfloat16 products per pair, and the direct form for the
pairs that they leave open. A pair is left open unless its filtered distance is farther from tau than a proven
bound of the error (see `_symmetric_kl_adjacency_rows_kernel`), so both ways give the same bits.
"""

import torch
import triton
import triton.language as tl

from vidops.kernels import _common
from vidops.kernels._common import LANES, TL_DTYPE, bound, cdiv, divergence, launch, pack_bytes

_SIDE = 128  # tile side of the filter
_DEPTH = 64  # the filter's operands are padded to a multiple of this many columns


@triton.jit
def _symmetric_kl_adjacency_exact_kernel(
    p, log_p, out, p_row, p_col, lp_row, lp_col, out_row, tau: tl.float64, n, M, tiles,
    A: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tile_i = tl.program_id(0) // tiles
    tile_j = tl.program_id(0) % tiles
    if tile_j < tile_i:
        return
    i = tile_i * A + tl.arange(0, A)
    j = tile_j * A + tl.arange(0, A)
    distance = divergence(
        p, log_p, p_row, p_col, lp_row, lp_col, i, i < n, p, log_p, p_row, p_col, lp_row, lp_col, j, j < n,
        M, A, A, LANES, ACC,
    )  # fmt: skip
    near = (distance <= tl.full([], tau, ACC)) | (i[:, None] == j[None, :])
    near = near & (i < n)[:, None] & (j < n)[None, :]
    byte = tl.arange(0, A // 8)
    at = i.to(tl.int64)[:, None] * out_row + tile_j * (A // 8) + byte[None, :]
    tl.store(out + at, pack_bytes(near, A, A), mask=(i < n)[:, None])
    if tile_i != tile_j:
        at = j.to(tl.int64)[:, None] * out_row + tile_i * (A // 8) + byte[None, :]
        tl.store(out + at, pack_bytes(tl.trans(near), A, A), mask=(j < n)[:, None])


@triton.jit
def _symmetric_kl_adjacency_columns_kernel(
    p, log_p, centre, weight, p_row, p_col, lp_row, lp_col, n, M, R: tl.constexpr, C: tl.constexpr
):
    """Column means of log P and of |P|. Any finite centre and positive weight is valid, these are tight; a
    row with NaN or infinity must not spoil them for all others."""
    columns = tl.program_id(0) * C + tl.arange(0, C)
    logs = tl.zeros([R, C], tl.float32)
    mass = tl.zeros([R, C], tl.float32)
    for start in range(0, n, R):
        rows = start + tl.arange(0, R)
        ok = (rows < n)[:, None] & (columns < M)[None, :]
        x = _common.load_tile(log_p, rows, lp_row, columns, lp_col, ok)
        logs += tl.where(tl.abs(x) < float("inf"), x, 0.0)
        x = tl.abs(_common.load_tile(p, rows, p_row, columns, p_col, ok))
        mass += tl.where(x < float("inf"), x, 0.0)
    tl.store(centre + columns, tl.sum(logs, 0) / n, mask=columns < M)
    tl.store(weight + columns, tl.maximum(tl.sum(mass, 0) / n, 1e-30), mask=columns < M)


@triton.jit
def _symmetric_kl_adjacency_rows_kernel(
    p, log_p, centre, weight, low_p, low_log, norms, p_row, p_col, lp_row, lp_col, n, M, padded,
    C: tl.constexpr,
):  # fmt: skip
    """bfloat16 operands of the filter and, per row, what bounds its error.

    Subtracting one vector from all log rows changes no distance; with l = log p - centre the logarithms are
    of order one and so are the products. Write p^, l^ for the bfloat16 values. Each cross term of D_ij is off
    by sum p_i (l_j - l^_j) + sum (p_i - p^_i) l^_j, at most |p_i|/ |l_j - l^_j|* + |p_i - p^_i|/ |l^_j|* by
    Cauchy-Schwarz with the weights w of the columns: |x|/ = sqrt(sum x^2 / w), |x|* = sqrt(sum x^2 w). Stored
    per row: sum p l, |p|/, |l^|*, and the relative error |p - p^|/ / |p|/ + |l - l^|* / |l^|*.
    """
    row = tl.program_id(0).to(tl.int64)
    entropy = tl.zeros([C], tl.float32)
    mass = tl.zeros([C], tl.float32)
    log_error = tl.zeros([C], tl.float32)
    mass_error = tl.zeros([C], tl.float32)
    log_size = tl.zeros([C], tl.float32)
    for start in range(0, padded, C):
        columns = start + tl.arange(0, C)
        wide = columns.to(tl.int64)
        x = tl.load(p + row * p_row + wide * p_col, mask=columns < M, other=0.0)
        logs = tl.load(log_p + row * lp_row + wide * lp_col, mask=columns < M, other=0.0)
        logs -= tl.load(centre + columns, mask=columns < M, other=0.0)
        root = tl.sqrt(tl.load(weight + columns, mask=columns < M, other=1.0))
        low_x = x.to(tl.bfloat16)
        low_logs = logs.to(tl.bfloat16)
        tl.store(low_p + row * padded + columns, low_x, mask=columns < padded)
        tl.store(low_log + row * padded + columns, low_logs, mask=columns < padded)
        seen = low_logs.to(tl.float32)
        entropy += x * logs
        x_error = (x - low_x.to(tl.float32)) / root
        logs_error = (logs - seen) * root
        x = x / root
        seen = seen * root
        mass += x * x
        mass_error += x_error * x_error
        log_error += logs_error * logs_error
        log_size += seen * seen
    # Sizes are kept away from zero, which only widens the bound, so that the ratios exist.
    size_p = tl.sqrt(tl.sum(mass, 0)) + 1e-12
    size_log = tl.sqrt(tl.sum(log_size, 0)) + 1e-12
    error = tl.sqrt(tl.sum(mass_error, 0)) / size_p + tl.sqrt(tl.sum(log_error, 0)) / size_log
    tl.store(norms + row, tl.sum(entropy, 0))
    tl.store(norms + n + row, size_p)
    tl.store(norms + 2 * n + row, size_log)
    tl.store(norms + 3 * n + row, error)


@triton.jit
def _symmetric_kl_adjacency_filter_kernel(
    low_p, low_log, norms, out, open_pairs, out_row, open_row, tau: tl.float64, n, padded, tiles,
    A: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # Tiles of GROUP tile rows are visited together: their operands stay in L2.
    tile = tl.program_id(0)
    first = tile // (GROUP * tiles) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    tile_i = first + tile % (GROUP * tiles) % height
    tile_j = tile % (GROUP * tiles) // height
    if tile_j < tile_i:
        return
    i = tile_i * A + tl.arange(0, A)
    j = tile_j * A + tl.arange(0, A)
    # Rows past the end repeat the last one instead of masking every load; their results are masked below.
    safe_i = tl.minimum(i, n - 1)
    safe_j = tl.minimum(j, n - 1)
    column = tl.arange(0, K)
    at_i = safe_i.to(tl.int64)[:, None] * padded + column[None, :]
    at_j = safe_j.to(tl.int64)[:, None] * padded + column[None, :]
    cross = tl.zeros([A, A], tl.float32)
    for start in range(0, padded, K):
        left = tl.load(low_p + at_i + start).to(DOT)
        right = tl.load(low_log + at_j + start).to(DOT)
        cross = tl.dot(left, tl.trans(right), cross, input_precision="ieee")
        left = tl.load(low_log + at_i + start).to(DOT)
        right = tl.load(low_p + at_j + start).to(DOT)
        cross = tl.dot(left, tl.trans(right), cross, input_precision="ieee")
    size_i = tl.load(norms + n + safe_i)
    size_j = tl.load(norms + n + safe_j)
    logs_i = tl.load(norms + 2 * n + safe_i)
    logs_j = tl.load(norms + 2 * n + safe_j)
    # The relative errors of rows differ little, so one for the whole tile costs nothing.
    error_i = tl.load(norms + 3 * n + safe_i)
    error_j = tl.load(norms + 3 * n + safe_j)
    error = tl.max(tl.maximum(error_i, error_j), 0) * 1.01
    # Second part: rounding of the sums, here, in the entropies, in the norms and in the direct form itself.
    # At most padded / 8 accumulation steps, each off by 2^-22 of a partial sum of absolute values.
    sums = (padded // 8 + 64) * 2.384185791015625e-07
    band = (size_i[:, None] * logs_j[None, :] + size_j[None, :] * logs_i[:, None]) * error
    band += (size_i[:, None] + size_j[None, :]) * (logs_i[:, None] + logs_j[None, :]) * sums
    gap = tl.load(norms + safe_i)[:, None] + tl.load(norms + safe_j)[None, :] - cross
    gap -= tl.full([], tau, tl.float32)
    inside = (i < n)[:, None] & (j < n)[None, :]
    same = i[:, None] == j[None, :]
    # NaN compares false: such pairs are left open too.
    certain = tl.abs(gap) > band
    near = ((certain & (gap < 0)) | same) & inside
    undecided = inside & (certain == 0) & (i[:, None] < j[None, :])
    byte = tl.arange(0, A // 8)
    at = i.to(tl.int64)[:, None] * open_row + tile_j * (A // 8) + byte[None, :]
    tl.store(open_pairs + at, pack_bytes(undecided, A, A), mask=(i < n)[:, None])
    at_byte = tile_j * (A // 8) + byte[None, :]
    at = i.to(tl.int64)[:, None] * out_row + at_byte
    tl.store(out + at, pack_bytes(near, A, A), mask=(i < n)[:, None] & (at_byte < out_row))
    if tile_i != tile_j:
        at_byte = tile_i * (A // 8) + byte[None, :]
        at = j.to(tl.int64)[:, None] * out_row + at_byte
        tl.store(out + at, pack_bytes(tl.trans(near), A, A), mask=(j < n)[:, None] & (at_byte < out_row))


@triton.jit
def _symmetric_kl_adjacency_recheck_kernel(
    p, log_p, open_pairs, out, p_row, p_col, lp_row, lp_col, out_row, open_row, tau: tl.float64, M, groups,
    A: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Decide the open pairs of WORDS words of one row by the direct form, 32 columns at a time."""
    row = tl.program_id(0) // groups
    # Tiles below the diagonal were never written.
    begin = tl.maximum((tl.program_id(0) % groups) * WORDS, row // A * (A // 32))
    end = tl.minimum((tl.program_id(0) % groups + 1) * WORDS, open_row)
    open_pairs += row.to(tl.int64) * open_row
    word = begin + tl.arange(0, WORDS)
    if tl.max((tl.load(open_pairs + word, mask=word < end, other=0) != 0).to(tl.int32), 0) != 0:
        lane = tl.arange(0, 32)
        here = row + tl.zeros([1], tl.int32)
        at = begin
        while at < end:
            bits = tl.load(open_pairs + at)
            if bits != 0:
                undecided = ((bits >> lane) & 1) != 0
                j = at * 32 + lane
                distance = divergence(
                    p, log_p, p_row, p_col, lp_row, lp_col, here, here >= 0,
                    p, log_p, p_row, p_col, lp_row, lp_col, j, undecided, M, 1, 32, LANES, tl.float32,
                )  # fmt: skip
                near = undecided & (tl.reshape(distance, [32]) <= tl.full([], tau, tl.float32))
                found = tl.sum(near.to(tl.int32) << lane, 0)
                # Atomic, because rows of one diagonal tile meet in the same words; or commutes, so the result
                # is the same in every order.
                tl.atomic_or(out + row.to(tl.int64) * out_row + at, found)
                bit = (tl.zeros([32], tl.int32) + 1) << (row % 32)
                tl.atomic_or(out + j.to(tl.int64) * out_row + row // 32, bit, mask=near)
            at += 1


def forward(p: torch.Tensor, log_p: torch.Tensor, tau: float, filtered: bool) -> torch.Tensor:
    """p, log_p (n, M), float32 or float64 -> bit rows (n, ceil(n/64)) int64. float64 is never filtered."""
    n, columns = p.shape
    out = p.new_zeros(n, cdiv(n, 64), dtype=torch.int64)
    if n == 0:
        return out
    strides = (*p.stride(), *log_p.stride())
    if p.dtype == torch.float64 or not filtered:
        side = 8 if p.dtype == torch.float64 else 16
        tiles = cdiv(n, side)
        launch(
            _symmetric_kl_adjacency_exact_kernel, tiles * tiles, p, log_p, out.view(torch.uint8), *strides,
            8 * out.shape[1], tau, n, bound(columns), tiles,
            A=side, LANES=LANES, ACC=TL_DTYPE[p.dtype], num_warps=8, num_stages=1,
        )  # fmt: skip
        return out
    centre, weight = p.new_empty(columns), p.new_empty(columns)
    launch(
        _symmetric_kl_adjacency_columns_kernel, cdiv(columns, 64), p, log_p, centre, weight, *strides,
        bound(n), columns, R=16, C=64, num_warps=4, num_stages=1,
    )  # fmt: skip
    padded = cdiv(columns, _DEPTH) * _DEPTH
    low_p, low_log = (p.new_empty(n, padded, dtype=torch.bfloat16) for _ in range(2))
    norms = p.new_empty(4, n)
    launch(
        _symmetric_kl_adjacency_rows_kernel, n, p, log_p, centre, weight, low_p, low_log, norms, *strides,
        n, columns, bound(padded), C=1024, num_warps=4, num_stages=1,
    )  # fmt: skip
    tiles = cdiv(n, _SIDE)
    open_pairs = p.new_empty(n, tiles * _SIDE // 32, dtype=torch.int32)
    depth = 64 if _common.capability(p) >= (9, 0) else 32
    launch(
        _symmetric_kl_adjacency_filter_kernel, tiles * tiles, low_p, low_log, norms, out.view(torch.uint8),
        open_pairs.view(torch.uint8), 8 * out.shape[1], 4 * open_pairs.shape[1], tau, n, bound(padded), tiles,
        A=_SIDE, K=depth, GROUP=8, DOT=_common.operand(torch.bfloat16), num_warps=8, num_stages=3,
    )  # fmt: skip
    words = 32
    groups = cdiv(open_pairs.shape[1], words)
    launch(
        _symmetric_kl_adjacency_recheck_kernel, n * groups, p, log_p, open_pairs, out.view(torch.int32),
        *strides, 2 * out.shape[1], open_pairs.shape[1], tau, bound(columns), groups,
        A=_SIDE, WORDS=words, LANES=LANES, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out
