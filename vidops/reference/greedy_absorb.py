"""Greedy absorption, sheet 2.6 and Eq. E5 of Ding et al., ECCV 2024 (arXiv 2311.17893)."""

from __future__ import annotations

import torch

from vidops.bits import unpack_adjacency


def greedy_absorb(adjacency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bit rows (n, ceil(n/64)) -> owner (n,), label (n,), count ().

    Rows are visited in index order; one that is not absorbed yet leads, and absorbs every row not yet absorbed
    among its neighbours, itself included.
    """
    near = unpack_adjacency(adjacency)
    n = near.shape[0]
    owner = torch.full((n,), -1, dtype=torch.int64, device=adjacency.device)
    label = torch.full_like(owner, -1)
    leaders = 0
    for i in range(n):
        if owner[i] >= 0:
            continue
        members = near[i] & (owner < 0)
        members[i] = True
        owner[members] = i
        label[members] = leaders
        leaders += 1
    return owner, label, torch.tensor(leaders, device=adjacency.device)
