"""Triton `bipartite_match`: section 3 of Bolya et al., ICLR 2023 (arXiv 2210.09461), no matrix of cosines stored."""

import torch
import triton
import triton.language as tl

from vidops.kernels import _common
from vidops.kernels._common import bound, cdiv, launch
from vidops.kernels._tokens import (
    ascending_ranks,
    cosines,
    order_key,
    product_constants,
    row_tile,
    unit_cosine,
    unit_rows,
    unit_width,
    value_of,
)


@triton.jit
def _bipartite_match_unit_kernel(
    metric, unit, m_item, m_row, m_col, tokens, rows, d,
    WIDTH: tl.constexpr, A: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    keys = metric + row // tokens * m_item + row % tokens * m_row
    unit_rows(keys, m_col, row < rows, unit + row * WIDTH, d, WIDTH, A, STEP, ACC)


@triton.jit
def _bipartite_match_best_kernel(
    unit, similarity, partner, even, odd, tiles, class_token, distill_token,
    A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
    SPLIT: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """The largest cosine of A even tokens with the odd ones, and the first of those that attain it.

    Cosines are float64 and rounded once, so that all tokens that have an equal one are equally similar, and go by
    position; where they stay float64, that with the winner is taken again.
    """
    KEY: tl.constexpr = tl.int64 if OUT == tl.float64 else tl.int32
    NONE: tl.constexpr = -(2**63) if OUT == tl.float64 else -(2**31)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * A + tl.arange(0, A)
    base = unit + item * (even + odd) * WIDTH
    best = tl.full([A], NONE, KEY)
    winner = tl.full([A], -1, tl.int32)
    for start in range(0, odd, B):
        j = start + tl.arange(0, B)
        product = cosines(
            base, 2 * i, i < even, base, 2 * j + 1, j < odd, WIDTH, A, B, STEP, ACC, SPLIT
        ).to(OUT)  # fmt: skip
        product = tl.where((distill_token != 0) & (j == 0)[None, :], float("-inf"), product)
        key = tl.where((j < odd)[None, :], order_key(product), NONE)
        top = tl.max(key, 1)
        first = tl.min(tl.where(key == top[:, None], j[None, :], 2147483647), 1)
        winner = tl.where(top > best, first, winner)
        best = tl.maximum(top, best)
    value = value_of(best)
    if OUT == tl.float64:
        rows = base + (2 * i).to(tl.int64) * WIDTH, base + (2 * tl.maximum(winner, 0) + 1).to(tl.int64) * WIDTH
        cosine = unit_cosine(rows[0], rows[1], (i < even) & (winner >= 0), WIDTH, A, STEP)
        value = tl.where(value == float("-inf"), value, cosine)
    value = tl.where((winner < 0) | ((class_token != 0) & (i == 0)), float("-inf"), value)
    at = item * even + i
    tl.store(similarity + at, value, mask=i < even)
    tl.store(partner + at, winner.to(tl.int64), mask=i < even)


@triton.jit
def _bipartite_match_order_kernel(
    similarity, order, even, tiles, A: tl.constexpr, B: tl.constexpr
):
    item = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * A + tl.arange(0, A)
    rank = ascending_ranks(similarity + item * even, i, even, A, B)
    tl.store(order + item * even + rank, i.to(tl.int64), mask=i < even)


def best_partners(
    metric: torch.Tensor, class_token: bool, distill_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """metric (B, N, d) -> similarity, partner (B, ceil(N/2)). Scratch: unit keys in float64."""
    batch, tokens, d = metric.shape
    even, odd, width = (tokens + 1) // 2, tokens // 2, unit_width(d)
    dtype, acc = _common.accumulator(metric.dtype), torch.float64
    unit = metric.new_empty(batch, tokens, width, dtype=acc)
    a, step = row_tile(d, acc)
    launch(
        _bipartite_match_unit_kernel, cdiv(batch * tokens, a), metric, unit, *metric.stride(), tokens,
        batch * tokens, bound(d), WIDTH=width, A=a, STEP=step, ACC=_common.TL_DTYPE[acc], num_warps=4, num_stages=1,
    )  # fmt: skip
    similarity = metric.new_empty(batch, even, dtype=dtype)
    partner = metric.new_empty(batch, even, dtype=torch.int64)
    tiles = cdiv(even, 16)
    launch(
        _bipartite_match_best_kernel, batch * tiles, unit, similarity, partner, even, bound(odd), tiles,
        int(class_token), int(distill_token), A=16, B=16, OUT=_common.TL_DTYPE[dtype],
        **product_constants(width, acc), num_warps=4, num_stages=1,
    )  # fmt: skip
    return similarity, partner


def forward(
    metric: torch.Tensor, class_token: bool, distill_token: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """metric (B, N, d) -> order, similarity, partner, each (B, ceil(N/2))."""
    batch, tokens, _ = metric.shape
    even = (tokens + 1) // 2
    similarity, partner = best_partners(metric, class_token, distill_token)
    order = torch.empty_like(partner)
    tiles = cdiv(even, 64)
    launch(
        _bipartite_match_order_kernel, batch * tiles, similarity, order, bound(even), tiles, A=64, B=32,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return order, similarity, partner
