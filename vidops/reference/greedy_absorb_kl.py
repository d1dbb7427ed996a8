"""Greedy absorption of rows nearer than tau in symmetrised KL, sheet 2.5-2.6 (arXiv 2311.17893)."""

from __future__ import annotations

import torch

from vidops.reference.greedy_absorb import greedy_absorb
from vidops.reference.symmetric_kl_adjacency import symmetric_kl_adjacency


def greedy_absorb_kl(
    p: torch.Tensor, log_p: torch.Tensor, tau: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p, log_p (n, M) -> owner (n,), label (n,), count (): `greedy_absorb` of [D(p, p) <= tau]."""
    return greedy_absorb(symmetric_kl_adjacency(p, log_p, tau, filtered=False))
