"""Triton `greedy_absorb`: sheet 2.6 and Eq. E5 of Ding et al., ECCV 2024 (arXiv 2311.17893)."""

import torch
import triton
import triton.language as tl

from vidops.kernels._common import bound, cdiv, launch


@triton.jit
def _greedy_absorb_walk_kernel(
    words, leaders, count, word_row, word_col, n, n_words, blocks, WIDTH: tl.constexpr
):
    """One program finds the leaders, 32 rows at a time.

    Within a block only 32 words matter, and they are read whether their row leads or not, so the dependent
    part is a few integer operations per row. Full rows are then read for leaders alone.
    """
    lane = tl.arange(0, WIDTH)
    removed = tl.zeros([WIDTH], tl.int32)
    found = 0
    for block in range(0, blocks):
        gone = tl.sum(tl.where(lane == block, removed, 0), 0)
        lead = 0
        for bit in tl.static_range(32):
            row = block * 32 + bit
            own = tl.load(words + tl.cast(row, tl.int64) * word_row + block * word_col, mask=row < n, other=0)
            leads = (row < n) & (((gone >> bit) & 1) == 0)
            gone = tl.where(leads, gone | own, gone)
            lead = lead | (leads.to(tl.int32) << bit)
            tl.store(leaders + found, row.to(tl.int64), mask=leads)
            found += leads.to(tl.int32)
        for bit in tl.static_range(32):
            row = block * 32 + bit
            leads = ((lead >> bit) & 1) != 0
            at = tl.cast(row, tl.int64) * word_row + lane.to(tl.int64) * word_col
            removed |= tl.load(words + at, mask=leads & (lane < n_words), other=0)
    tl.store(count, found.to(tl.int64))


@triton.jit
def _greedy_absorb_owner_kernel(
    words, leaders, count, owner, label, word_row, word_col, n, L: tl.constexpr, C: tl.constexpr
):
    """Eq. E5: every row belongs to the first leader that is near it, a leader to itself."""
    column = tl.program_id(0) * C + tl.arange(0, C)
    word = (column // 32).to(tl.int64) * word_col
    found = tl.load(count).to(tl.int32)
    none = found
    rank = tl.full([C], 0, tl.int32) + none
    first = 0
    while (first < found) & (tl.max(rank, 0) == none):
        at = first + tl.arange(0, L)
        leader = tl.load(leaders + at, mask=at < found, other=-1)
        ok = (at < found)[:, None] & (column < n)[None, :]
        bits = tl.load(words + leader[:, None] * word_row + word[None, :], mask=ok, other=0)
        near = ((bits >> (column % 32)[None, :]) & 1) != 0
        hit = ok & (near | (leader[:, None] == column[None, :]))
        rank = tl.minimum(rank, tl.min(tl.where(hit, at[:, None], none), 0))
        rank = tl.where(column < n, rank, 0)
        first += L
    tl.store(owner + column, tl.load(leaders + rank, mask=column < n, other=0), mask=column < n)
    tl.store(label + column, rank.to(tl.int64), mask=column < n)


def forward(adjacency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """adjacency (n, ceil(n/64)) int64 -> owner (n,), label (n,), count (), int64. No host sync."""
    n = adjacency.shape[0]
    owner, label = (adjacency.new_empty(n) for _ in range(2))
    if n == 0:
        return owner, label, adjacency.new_zeros(())
    count = adjacency.new_empty(())
    leaders = adjacency.new_empty(n)
    if adjacency.stride(1) != 1:
        adjacency = adjacency.contiguous()
    words = adjacency.view(torch.int32)
    n_words = words.shape[1]
    launch(
        _greedy_absorb_walk_kernel, 1, words, leaders, count, *words.stride(), n, n_words, bound(cdiv(n, 32)),
        WIDTH=max(32, triton.next_power_of_2(n_words)), num_warps=8 if n > 8192 else 4, num_stages=1,
    )  # fmt: skip
    launch(
        _greedy_absorb_owner_kernel, cdiv(n, 128), words, leaders, count, owner, label, *words.stride(), n,
        L=16, C=128, num_warps=4, num_stages=1,
    )  # fmt: skip
    return owner, label, count
