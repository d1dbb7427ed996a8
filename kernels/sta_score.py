"""Triton `sta_score`: sheet 2.2 to 2.4 of Ding et al., ICCV 2023 (arXiv 2308.04549), in six launches a stage.

The softmax of Eq. 3 runs over the tokens of the current group, so neither a transition's exponentials (cosines need
no maximum taken off) nor its normalisers depend on what was pruned before: all pairs of groups are computed at once.
What is left is serial, one program per clip: weighted sums of kept rows of exponentials, and a ranking. That program
reads the exponentials from a workspace, because to rebuild them takes d multiplications and one exp each, on a single
multiprocessor, where a read takes four bytes that are still in the L2 cache.
"""

import torch
import triton
import triton.language as tl

from vidops.kernels import _common
from vidops.kernels._common import TL_DTYPE, bound, cdiv, launch
from vidops.kernels._tokens import (
    ascending_ranks,
    cosines,
    product_constants,
    row_tile,
    unit_rows,
    unit_width,
)
from vidops.kernels.bipartite_match import best_partners

# Bytes of exponentials held at once (or one pair of groups of one clip, if that is more); more pairs take more rounds.
_WORKSPACE = 2**27


@triton.jit
def _sta_score_tokens_kernel(
    x, metric, mass, unit, x_item, x_row, x_col, m_item, m_row, m_col, tokens, rows, D, d,
    A: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Unit keys, and sum_c |x_c| in float64: a spread that is small beside the sums is all that counts of them."""
    row = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    ok = row < rows
    item, token = row // tokens, row % tokens
    at = x + item * x_item + token * x_row
    total = tl.zeros([A, C], tl.float64)
    for start in range(0, D, C):
        channel = start + tl.arange(0, C)
        inside = ok[:, None] & (channel < D)[None, :]
        value = tl.load(at[:, None] + channel.to(tl.int64)[None, :] * x_col, mask=inside, other=0.0)
        total += tl.abs(value.to(ACC)).to(tl.float64)
    tl.store(mass + row, tl.sum(total, 1), mask=ok)
    unit_rows(metric + item * m_item + token * m_row, m_col, ok, unit + row * WIDTH, d, WIDTH, A, STEP, ACC)


@triton.jit
def _sta_score_activation_kernel(
    mass, activation, tokens, C: tl.constexpr
):
    """Eq. 4: sums of a group from 0 to 1, or 0 where all are equal; one that is NaN makes all NaN."""
    base = tl.program_id(0).to(tl.int64) * tokens
    low = tl.full([C], float("inf"), tl.float64)
    high = tl.full([C], float("-inf"), tl.float64)
    none = tl.zeros([C], tl.int32)
    for start in range(0, tokens, C):
        i = start + tl.arange(0, C)
        value = tl.load(mass + base + i, mask=i < tokens, other=0.0)
        none = none | (value != value).to(tl.int32)
        value = tl.where(value == value, value, 0.0)
        low = tl.where((i < tokens) & (value < low), value, low)
        high = tl.where((i < tokens) & (value > high), value, high)
    lowest, spread = tl.min(low, 0), tl.max(high, 0) - tl.min(low, 0)
    lowest = tl.where(tl.max(none, 0) > 0, float("nan"), lowest)
    spread = tl.where(spread == 0.0, 1.0, spread)
    for start in range(0, tokens, C):
        i = start + tl.arange(0, C)
        value = tl.load(mass + base + i, mask=i < tokens, other=0.0)
        tl.store(activation + base + i, (value - lowest) / spread, mask=i < tokens)


@triton.jit
def _sta_score_transition_kernel(
    unit, exps, shares, first_item, first_pair, T, N, padded, pairs, tiles, first, way,
    A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """exp of the cosines of A tokens of a group with all of the next one, N rows `padded` long, and 1 / their sums.

    Sums are float64 from here on, as in the scan: what tells tokens apart is then the keys, not the order of terms.
    """
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    j = tl.program_id(0) % tiles * A + tl.arange(0, A)
    group = (first_item + pair // pairs) * T + first + way * (first_pair + pair % pairs)
    left = unit + group * N * WIDTH
    right = unit + (group + way) * N * WIDTH
    total = tl.zeros([A, B], tl.float64)
    for start in range(0, padded, B):
        i = start + tl.arange(0, B)
        value = tl.exp(cosines(left, j, j < N, right, i, i < N, WIDTH, A, B, STEP, ACC, SPLIT))
        at = (pair * N + j)[:, None] * padded + i[None, :]
        tl.store(exps + at, value, mask=(j < N)[:, None] & (i < padded)[None, :])
        total += tl.where((i < N)[None, :], value, 0.0).to(tl.float64)
    tl.store(shares + pair * N + j, 1.0 / tl.sum(total, 1), mask=j < N)


@triton.jit
def _sta_score_scan_kernel(
    exps, shares, activation, similarity, keep, acc, score, order, refer, weight, whole,
    first_item, first_pair, last_pair, T, N, padded, even, odd, kept, pruned, first, way,
    A: tl.constexpr, B: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Walks over the groups of one clip. Between two of them there are only `refer`, the tokens referred to, their
    `weight`, and what the weights add up to, `whole`; other threads read what one has written, hence the barriers.
    """
    local = tl.program_id(0).to(tl.int64)
    item = first_item + local
    refer += item * N
    weight += item * N
    if first_pair == 0:
        group = item * T + first
        for start in range(0, odd, A):
            i = start + tl.arange(0, A)
            token = 2 * i + 1
            tl.store(order + item * N + i, token.to(tl.int64), mask=i < odd)
            tl.store(refer + i, token, mask=i < odd)
            tl.store(keep + group * kept + i, token.to(tl.int64), mask=i < tl.minimum(odd, kept))
        for start in range(0, even, R):
            i = start + tl.arange(0, R)
            place = odd + ascending_ranks(similarity + item * even, i, even, R, 32)
            tl.store(order + item * N + place, (2 * i).to(tl.int64), mask=i < even)
            tl.store(refer + place, 2 * i, mask=i < even)
            tl.store(keep + group * kept + place, (2 * i).to(tl.int64), mask=(i < even) & (place < kept))
        for start in range(0, N, A):
            i = start + tl.arange(0, A)
            tl.store(weight + i, tl.full([A], 1.0, ACC), mask=i < N)
            tl.store(acc + group * N + i, tl.zeros([A], ACC), mask=i < N)
            tl.store(score + group * N + i, tl.zeros([A], ACC), mask=i < N)
        # The tokens of the first group have weight 1 each, or as a whole where only those that it keeps count.
        tl.store(whole + item, tl.where(tl.full([], pruned, tl.int32) != 0, kept, 1).to(tl.float64))
        tl.debug_barrier()

    for pair in range(first_pair, last_pair):
        group = item * T + first + way * (pair + 1)
        slot = local * (last_pair - first_pair) + (pair - first_pair)
        every = (tl.full([], pair, tl.int32) == 0) & (tl.full([], pruned, tl.int32) == 0)
        count = tl.where(every, N, kept)
        scale = tl.load(whole + item)
        for start in range(0, padded, A):
            i = start + tl.arange(0, A)
            total = tl.zeros([B, A], tl.float64)
            p = 0
            while p < count:
                at = p + tl.arange(0, B)
                token = tl.load(refer + at, mask=at < count, other=0).to(tl.int64)
                part = tl.load(weight + at, mask=at < count, other=0.0).to(tl.float64)
                part *= tl.load(shares + slot * N + token, mask=at < count, other=0.0)
                rows = (slot * N + token) * padded
                ok = (at < count)[:, None] & (i < padded)[None, :]
                value = tl.load(exps + rows[:, None] + i[None, :], mask=ok, other=0.0)
                total += part[:, None] * value.to(tl.float64)
                p += B
            value = (tl.sum(total, 0) / scale).to(ACC)
            active = tl.load(activation + group * N + i, mask=i < N, other=0.0)
            tl.store(acc + group * N + i, value, mask=i < N)
            tl.store(score + group * N + i, value * (1.0 - active), mask=i < N)
        tl.debug_barrier()
        carried = tl.zeros([R], tl.float64)
        for start in range(0, N, R):
            i = start + tl.arange(0, R)
            rank = ascending_ranks(score + group * N, i, N, R, 32)
            value = tl.load(acc + group * N + i, mask=i < N, other=0.0)
            stays = (i < N) & (rank < kept)
            tl.store(keep + group * kept + rank, i.to(tl.int64), mask=stays)
            tl.store(refer + rank, i, mask=stays)
            tl.store(weight + rank, value, mask=stays)
            carried += tl.where(stays, value.to(tl.float64), 0.0)
        tl.store(whole + item, tl.sum(carried, 0))
        tl.debug_barrier()


def forward(
    x: torch.Tensor, metric: torch.Tensor, num_frames: int, r: int, reverse: bool, first_frame_pruned: bool
) -> tuple[torch.Tensor, ...]:
    """x (B, T N, D), metric (B, T N, d) -> keep (B, T, K), activation, acc, score (B, T, N), order, similarity.

    Scratch: unit keys, and one exponential for every pair of tokens of neighbouring groups, see `_WORKSPACE`.
    """
    batch, rows, width = x.shape
    d = metric.shape[2]
    tokens = rows // num_frames
    kept, even, odd, pairs = tokens - r, (tokens + 1) // 2, tokens // 2, num_frames - 1
    dtype = _common.accumulator(x.dtype)
    keep = x.new_empty(batch, num_frames, kept, dtype=torch.int64)
    activation, acc, score = (x.new_empty(batch, num_frames, tokens, dtype=dtype) for _ in range(3))
    order = x.new_empty(batch, tokens, dtype=torch.int64)

    unit = x.new_empty(batch, rows, unit_width(d), dtype=dtype)
    mass = x.new_empty(batch, num_frames, tokens, dtype=torch.float64)
    a, step = row_tile(d, dtype)
    launch(
        _sta_score_tokens_kernel, cdiv(batch * rows, a), x, metric, mass, unit, *x.stride(), *metric.stride(),
        rows, batch * rows, bound(width), bound(d), A=a, C=min(_common.padded(width), 1024 // a), WIDTH=unit.shape[2],
        STEP=step, ACC=TL_DTYPE[dtype], num_warps=4, num_stages=1,
    )  # fmt: skip
    launch(
        _sta_score_activation_kernel, batch * num_frames, mass, activation, bound(tokens), C=256, num_warps=4,
        num_stages=1,
    )  # fmt: skip
    # Groups in the order of processing are first, first + way, ...
    first, way = (pairs, -1) if reverse else (0, 1)
    group = slice(first * tokens, (first + 1) * tokens)
    similarity, _ = best_partners(metric[:, group], False, False)

    refer = order.new_empty(batch, tokens, dtype=torch.int32)
    weight, whole = acc.new_empty(batch, tokens), mass.new_empty(batch)
    # Rows of whole vectors of the memory.
    padded = cdiv(tokens, 16) * 16
    item_pairs = max(1, _WORKSPACE // (tokens * padded * dtype.itemsize))
    for first_item, items, first_pair, last_pair in _rounds(batch, pairs, item_pairs):
        count = items * (last_pair - first_pair)
        exps, shares = acc.new_empty(count, tokens, padded), mass.new_empty(count, tokens)
        a, b = (16, 16) if dtype == torch.float64 else (32, 64)
        tiles = cdiv(tokens, a)
        launch(
            _sta_score_transition_kernel, count * tiles, unit, exps, shares, first_item, first_pair, num_frames,
            tokens, bound(padded), last_pair - first_pair, tiles, first, way, A=a, B=b,
            **product_constants(unit.shape[2], dtype), num_warps=4, num_stages=1,
        )  # fmt: skip
        a, ranked, b = _scan_tile(tokens, dtype)
        launch(
            _sta_score_scan_kernel, items, exps, shares, activation, similarity, keep, acc, score, order, refer, weight,
            whole, first_item, bound(first_pair), bound(last_pair), num_frames, bound(tokens), bound(padded),
            bound(even), bound(odd), kept, int(first_frame_pruned), first, way,
            A=a, B=b, R=ranked, ACC=TL_DTYPE[dtype], num_warps=16, num_stages=1,
        )  # fmt: skip
    return keep, activation, acc, score, order, similarity


def _rounds(batch: int, pairs: int, item_pairs: int) -> list[tuple[int, int, int, int]]:
    """(first item, items, first pair, pair after the last) of launches that hold `item_pairs` pairs of an item."""
    items = max(1, min(batch, item_pairs))
    each = max(1, min(pairs, item_pairs // items))
    return [
        (item, min(items, batch - item), pair, min(pair + each, pairs))
        for item in range(0, batch, items)
        for pair in range(0, max(1, pairs), each)
    ]


def _scan_tile(tokens: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(tokens of the group, those of them ranked at a time, tokens referred to) for 16 warps: a block does all there
    is to do for a clip, and has to keep enough loads in flight alone."""
    a = int(max(32, min(512, triton.next_power_of_2(tokens))))
    return a, min(256, a), min(64, (4096 if dtype == torch.float64 else 8192) // a)
