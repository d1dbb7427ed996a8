"""Mean of neighbouring attention rows, Eq. E3 of Ding et al., ECCV 2024 (arXiv 2311.17893)."""

from __future__ import annotations

import torch

from vidops.bits import unpack_adjacency


def neighbour_mean(adjacency: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Bit rows (n, ceil(n/64)), p (n, M) -> S (n, M): S_i = sum_j A_ij p_j, then S_i / sum_c S_ic."""
    total = unpack_adjacency(adjacency).to(p.dtype) @ p
    return total / total.sum(-1, keepdim=True)
