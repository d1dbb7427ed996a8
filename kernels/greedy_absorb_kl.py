"""Triton `greedy_absorb_kl`: greedy absorption on D(p, p) <= tau without the matrix D.

Sheet 2.6 of Ding et al., ECCV 2024 (arXiv 2311.17893). Each step takes the next 32 rows that nobody has
absorbed, computes their distances to all rows still alive, lets 32-bit masks decide which of them lead, and
absorbs. The host enqueues as many steps as the worst case needs; those after the last row has an owner return
at once. Distances are the direct form of `symmetric_kl_adjacency`, so both agree on every pair.
"""

import torch
import triton
import triton.language as tl

from vidops.kernels._common import LANES, TL_DTYPE, bound, cdiv, divergence, launch

_BLOCK = 32  # candidates of a step: the bits of a mask


@triton.jit
def _greedy_absorb_kl_distance_kernel(
    p, log_p, label, candidates, state, near, p_row, p_col, lp_row, lp_col, tau: tl.float64, n, M, parts,
    A: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Bytes near[j, c / 8]: bit c % 8 is [D(candidate c, row j) <= tau], for rows j that are alive."""
    part = tl.program_id(0) % parts
    count = tl.load(state)
    if part * A >= count:
        return
    j = tl.program_id(0) // parts * A + tl.arange(0, A)
    alive = tl.load(label + j, mask=j < n, other=0) < 0
    if tl.max(alive.to(tl.int32), 0) == 0:
        return
    slot = part * A + tl.arange(0, A)
    i = tl.load(candidates + slot, mask=slot < count, other=0)
    distance = divergence(
        p, log_p, p_row, p_col, lp_row, lp_col, i, slot < count,
        p, log_p, p_row, p_col, lp_row, lp_col, j, alive, M, A, A, LANES, ACC,
    )  # fmt: skip
    hit = (distance <= tl.full([], tau, ACC)) & (slot < count)[:, None]
    bits = tl.reshape(hit.to(tl.int32), [A // 8, 8, A]) << tl.arange(0, 8)[None, :, None]
    at = near + j.to(tl.int64)[None, :] * 4 + (part * (A // 8) + tl.arange(0, A // 8))[:, None]
    tl.store(at, tl.sum(bits, 1).to(tl.uint8), mask=alive[None, :])


@triton.jit
def _greedy_absorb_kl_absorb_kernel(
    owner, label, candidates, state, next_candidates, next_state, near, total, n, C: tl.constexpr
):
    """One program: which candidates lead, who is absorbed, and the next candidates.

    `candidates` and `state` (their number, leaders so far) are read here and written into the other pair of
    buffers, so that no thread can read what another has already replaced.
    """
    count = tl.load(state)
    if count == 0:
        tl.store(next_state, 0)
        tl.store(next_state + 1, tl.load(state + 1))
        return
    leaders_before = tl.load(state + 1)
    lead = 0
    for c in tl.static_range(32):
        row = tl.load(candidates + c, mask=c < count, other=0)
        # Only earlier bits of `lead` are set yet: near none of those, the candidate leads.
        leads = (c < count) & ((tl.load(near + row) & lead) == 0)
        lead = lead | (leads.to(tl.int32) << c)
    # Everything before the first candidate has an owner.
    start = tl.load(candidates)
    found = 0
    while start < n:
        j = start + tl.arange(0, C)
        alive = tl.load(label + j, mask=j < n, other=0) < 0
        mask = tl.load(near + j, mask=alive, other=0) & lead
        of = tl.full([C], -1, tl.int32)
        rank = tl.zeros([C], tl.int32)
        before = leaders_before
        for c in tl.static_range(32):
            row = tl.load(candidates + c, mask=c < count, other=0)
            leads = ((lead >> c) & 1) != 0
            taken = leads & alive & (of < 0) & ((((mask >> c) & 1) != 0) | (j == row))
            of = tl.where(taken, row, of)
            rank = tl.where(taken, before, rank)
            before += leads.to(tl.int32)
        absorbed = of >= 0
        tl.store(owner + j, of.to(tl.int64), mask=absorbed)
        tl.store(label + j, rank.to(tl.int64), mask=absorbed)
        left = (alive & (of < 0)).to(tl.int32)
        place = found + tl.cumsum(left, 0) - 1
        tl.store(next_candidates + place, j, mask=(left != 0) & (place < 32))
        found += tl.sum(left, 0)
        start += C
    number = leaders_before
    for c in tl.static_range(32):
        number += (lead >> c) & 1
    tl.store(next_state, tl.minimum(found, 32))
    tl.store(next_state + 1, number)
    tl.store(total, number.to(tl.int64))


def forward(
    p: torch.Tensor, log_p: torch.Tensor, tau: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p, log_p (n, M), float32 or float64 -> owner (n,), label (n,), count (), int64. No host sync."""
    n, columns = p.shape
    owner = p.new_empty(n, dtype=torch.int64)
    label = p.new_full((n,), -1, dtype=torch.int64)
    count = p.new_zeros((), dtype=torch.int64)
    near = p.new_empty(n, 4, dtype=torch.uint8)
    candidates = p.new_zeros(2, _BLOCK, dtype=torch.int32)
    state = p.new_zeros(2, 4, dtype=torch.int32)
    # The first step takes the first rows as they come.
    first = min(n, _BLOCK)
    candidates[0, :first] = torch.arange(first, dtype=torch.int32, device=p.device)
    state[0, 0].fill_(first)  # an assignment would copy from the host, and wait
    side = 8 if p.dtype == torch.float64 else 16
    parts = _BLOCK // side
    for step in range(cdiv(n, _BLOCK)):
        now, then = step % 2, (step + 1) % 2
        launch(
            _greedy_absorb_kl_distance_kernel, cdiv(n, side) * parts,
            p, log_p, label, candidates[now], state[now], near,
            *p.stride(), *log_p.stride(), tau, n, bound(columns), parts,
            A=side, LANES=LANES, ACC=TL_DTYPE[p.dtype], num_warps=8, num_stages=1,
        )  # fmt: skip
        launch(
            _greedy_absorb_kl_absorb_kernel, 1, owner, label, candidates[now], state[now], candidates[then],
            state[then], near.view(torch.int32), count, n, C=2048, num_warps=8, num_stages=1,
        )  # fmt: skip
    return owner, label, count
