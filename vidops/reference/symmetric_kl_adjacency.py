"""Thresholded symmetrised KL divergence as bit rows: A = [D <= tau], sheet 2.5 step 1 (arXiv 2311.17893)."""

from __future__ import annotations

import torch

from vidops.bits import pack_adjacency
from vidops.reference.symmetric_kl import symmetric_kl


def symmetric_kl_adjacency(p: torch.Tensor, log_p: torch.Tensor, tau: float, filtered: bool) -> torch.Tensor:
    """p, log_p (n, M) -> bit rows (n, ceil(n/64)) int64, reflexive and symmetric. `filtered` changes no result."""
    near = symmetric_kl(p, log_p, p, log_p, same=True) <= tau
    near.fill_diagonal_(True)
    return pack_adjacency(near)
