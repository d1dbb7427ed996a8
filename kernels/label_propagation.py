"""Triton `label_propagation`: one frame of sheet 5 of Qian et al., ICCV 2023 (arXiv 2308.09951), no affinity stored.

A candidate is one 64-bit integer: the affinity's bits, made to order like integers, above the complement of its
index. Integers that are larger are better, ties included, so the k best are kept by integer comparisons alone and
the order in which candidates come does not matter. Programs that share a patch of queries take a part of the context
each; a second kernel merges their lists and makes the weights, a third one gathers the labels.
"""

import math

import torch
import triton
import triton.language as tl

from vidops.kernels import _common
from vidops.kernels._common import bound, cdiv, launch, load_tile, matmul

_EMPTY = tl.constexpr(-(2**63))  # also with a place number added it is below every candidate
_LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _encode(value, index):
    """Keys of affinities that are neither NaN nor -inf; zeros of both signs are equal."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & _LAST)
    return (ordered.to(tl.int64) << 32) | (index ^ _LAST).to(tl.int64)  # a smaller index is better


@triton.jit
def _value_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & _LAST)).to(tl.float32, bitcast=True)


@triton.jit
def _index_of(key):
    return (key & _LAST).to(tl.int32) ^ _LAST


@triton.jit
def _is_empty(key):
    return (key >> 32) == (_EMPTY >> 32)


@triton.jit
def _no_candidates(A: tl.constexpr, PLACES: tl.constexpr, K: tl.constexpr):
    """A lists of K different empty keys; the padding is larger than all, so that it is never replaced."""
    place = tl.arange(0, PLACES).to(tl.int64)
    keys = tl.where(place < K, place + _EMPTY, -(_EMPTY + 1))
    return tl.zeros([A, PLACES], tl.int64) + keys[None, :]


@triton.jit
def _insert(best, keys):
    """The best of both: while a row's largest key beats the smallest that it holds, it takes its place."""
    top, floor = tl.max(keys, 1), tl.min(best, 1)
    while tl.max((top > floor).to(tl.int32), 0) > 0:
        replaced = (best == floor[:, None]) & (top > floor)[:, None]
        best = tl.where(replaced, top[:, None], best)
        keys = tl.where(keys == top[:, None], _EMPTY, keys)
        top, floor = tl.max(keys, 1), tl.min(best, 1)
    return best


@triton.jit
def _label_propagation_scan_kernel(
    query, context, found, q_row, q_col, c_frame, c_row, c_col,
    height, width, limit, reach, unrestricted, parts, band, splits, patches_x,
    D: tl.constexpr, K: tl.constexpr, PLACES: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Keys (splits, N, PLACES) of the K best of a patch of queries in one part of the context: a band of an
    unrestricted frame, or what is within reach of another."""
    A: tl.constexpr = TALL * WIDE
    split = tl.program_id(0) % splits
    patch = tl.program_id(0) // splits
    y0, x0 = patch // patches_x * TALL, patch % patches_x * WIDE
    lane = tl.arange(0, A)
    y, x = y0 + lane // WIDE, x0 + lane % WIDE
    inside = (y < height) & (x < width)
    n = tl.where(inside, y * width + x, 0)

    free = split < unrestricted * parts
    frame = tl.where(free, split // parts, split - unrestricted * parts + unrestricted)
    low_y = tl.where(free, split % parts * band, tl.maximum(y0 - reach, 0))
    end_y = tl.minimum(tl.where(free, low_y + band, y0 + TALL + reach), height)
    low_x = tl.where(free, 0, tl.maximum(x0 - reach, 0))
    end_x = tl.where(free, width, tl.minimum(x0 + WIDE + reach, width))
    across = end_x - low_x
    count = (end_y - low_y) * across

    base = context + frame.to(tl.int64) * c_frame
    best = _no_candidates(A, PLACES, K)
    start = 0
    while start < count:
        p = start + tl.arange(0, B)
        my, mx = low_y + p // across, low_x + p % across
        m = my * width + mx
        affinity = tl.zeros([A, B], tl.float32)
        for d in range(0, D, STEP):
            channel = d + tl.arange(0, STEP)
            ok_q = inside[:, None] & (channel < D)[None, :]
            ok_c = (p < count)[:, None] & (channel < D)[None, :]
            queries = load_tile(query, n, q_row, channel, q_col, ok_q)
            positions = load_tile(base, m, c_row, channel, c_col, ok_c)
            affinity = matmul(queries, tl.trans(positions.to(DOT)), affinity, DOT, False)
        dy, dx = my[None, :] - y[:, None], mx[None, :] - x[:, None]
        ok = inside[:, None] & (p < count)[None, :] & (free | (dy * dy + dx * dx < limit))
        # NaN compares false.
        ok = ok & (affinity > float("-inf"))
        keys = tl.where(ok, _encode(affinity, (frame * height * width + m)[None, :]), _EMPTY)
        best = _insert(best, keys)
        start += B
    place = tl.arange(0, PLACES)
    at = (split.to(tl.int64) * height * width + n.to(tl.int64)[:, None]) * PLACES + place[None, :]
    # Numbered empty keys would be taken for candidates when lists are merged.
    best = tl.where(_is_empty(best), _EMPTY, best)
    tl.store(found + at, best, mask=inside[:, None] & (place < K)[None, :])


@triton.jit
def _next_match(
    left, before, n, width, tokens, limit, repeats, largest, temperature: tl.float64, K: tl.constexpr
):
    """Takes the largest key off `left`: the rest, its index (-1 once K places are taken), copies and weight."""
    top = tl.max(left, 1)
    left = tl.where(left == top[:, None], _EMPTY, left)
    index = _index_of(top)
    m = index % tokens
    dy, dx = m // width - n // width, m % width - n % width
    copied = (index < tokens) & (dy * dy + dx * dx < limit)
    copies = tl.where(copied, 1 + repeats, 1)
    copies = tl.where(_is_empty(top), 0, tl.minimum(copies, K - before))
    weight = tl.exp((_value_of(top) - largest) / tl.full([], temperature, tl.float32))
    return left, tl.where(copies > 0, index, -1), copies, tl.where(copies > 0, copies * weight, 0.0)


@triton.jit
def _label_propagation_merge_kernel(
    found, index, weight, N, width, limit, repeats, splits, temperature: tl.float64,
    K: tl.constexpr, PLACES: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The K best of all parts, in order, and their softmax."""
    n = tl.program_id(0) * A + tl.arange(0, A)
    place = tl.arange(0, PLACES)
    ok = (n < N)[:, None] & (place < K)[None, :]
    best = _no_candidates(A, PLACES, K)
    for split in range(0, splits):
        at = (tl.cast(split, tl.int64) * N + n.to(tl.int64)[:, None]) * PLACES + place[None, :]
        best = _insert(best, tl.load(found + at, mask=ok, other=_EMPTY))
    best = tl.where((place < K)[None, :], best, _EMPTY)
    largest = _value_of(tl.max(best, 1))
    total = tl.zeros([A], tl.float32)
    left, before = best, tl.zeros([A], tl.int32)
    for _ in range(0, K):
        left, _, copies, w = _next_match(left, before, n, width, N, limit, repeats, largest, temperature, K)
        before += copies
        total += w
    total = tl.where(n < N, total, 1.0)
    left, before = best, tl.zeros([A], tl.int32)
    for i in range(0, K):
        left, at, copies, w = _next_match(left, before, n, width, N, limit, repeats, largest, temperature, K)
        before += copies
        out = n.to(tl.int64) * K + i
        tl.store(index + out, at.to(tl.int64), mask=n < N)
        tl.store(weight + out, w / total, mask=n < N)  # none found: 0 / 0


@triton.jit
def _label_propagation_gather_kernel(
    index, weight, labels, out, l_frame, l_row, l_col, N, L, blocks,
    K: tl.constexpr, A: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // blocks * A + tl.arange(0, A)
    c = tl.program_id(0) % blocks * C + tl.arange(0, C)
    acc = tl.zeros([A, C], tl.float32)
    for i in range(0, K):
        at = tl.load(index + n.to(tl.int64) * K + i, mask=n < N, other=-1)
        w = tl.load(weight + n.to(tl.int64) * K + i, mask=n < N, other=0.0)
        rows = at // N * l_frame + at % N * l_row
        ok = (at >= 0)[:, None] & (c < L)[None, :]
        acc += w[:, None] * tl.load(labels + rows[:, None] + c.to(tl.int64)[None, :] * l_col, mask=ok, other=0.0)
    tl.store(out + n.to(tl.int64)[:, None] * L + c[None, :], acc, mask=(n < N)[:, None] & (c < L)[None, :])


def forward(
    query: torch.Tensor, context: torch.Tensor, labels: torch.Tensor, height: int, width: int, limit: int,
    top_k: int, temperature: float, unrestricted: int, repeats: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """query (N,C), context (F,N,C), labels (F,N,L) float32; squared distances from `limit` on are outside.

    -> out (N,L), index (N,k), weight (N,k). Scratch: k keys of 8 bytes, k a power of two, per query and part.
    """
    n, channels = query.shape
    frames, _, count = context.shape[0], context.shape[1], labels.shape[2]
    out = labels.new_empty(n, count)
    index, weight = labels.new_empty(n, top_k, dtype=torch.int64), labels.new_empty(n, top_k)
    places = max(2, _power_of_two(top_k))
    tall, wide, b, step, warps = _tile(places, query.dtype)
    reach = _reach(limit)
    # A band of an unrestricted frame is as much work as a window of another.
    window = min(height, tall + 2 * reach) * min(width, wide + 2 * reach)
    band = max(1, min(height, window // width))
    parts = cdiv(height, band)
    splits = unrestricted * parts + frames - unrestricted
    patches_x = cdiv(width, wide)
    found = index.new_empty(splits, n, places)
    launch(
        _label_propagation_scan_kernel, cdiv(height, tall) * patches_x * splits, query, context, found,
        *query.stride(), *context.stride(), height, width, limit, reach, unrestricted, parts, band, splits, patches_x,
        D=channels, K=top_k, PLACES=places, TALL=tall, WIDE=wide, B=b, STEP=min(step, _common.padded(channels)),
        DOT=_common.operand(query.dtype), num_warps=warps, num_stages=1,
    )  # fmt: skip
    launch(
        _label_propagation_merge_kernel, cdiv(n, 16), found, index, weight, n, width, limit, repeats, bound(splits),
        temperature, K=top_k, PLACES=places, A=16, num_warps=4, num_stages=1,
    )  # fmt: skip
    columns = min(64, _power_of_two(count))
    blocks = cdiv(count, columns)
    launch(
        _label_propagation_gather_kernel, cdiv(n, 32) * blocks, index, weight, labels, out, *labels.stride(),
        n, count, blocks, K=top_k, A=32, C=columns, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out, index, weight


def _power_of_two(count: int) -> int:
    """The smallest that is not less."""
    return 1 << (count - 1).bit_length()


def _reach(limit: int) -> int:
    """The largest x >= 0 with x * x < limit."""
    return math.isqrt(limit - 1)


def _tile(places: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(rows and columns of a patch of queries, context positions, channels at a time, warps)."""
    if dtype == torch.float32:
        return 4, 8, 64, 32, 8
    return (4, 8, 64, 64, 8) if places <= 64 else (4, 4, 64, 32, 4)
