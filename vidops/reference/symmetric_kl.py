"""Symmetrised Kullback-Leibler divergence between rows, Eq. E2 of Ding et al., ECCV 2024 (arXiv 2311.17893)."""

from __future__ import annotations

import torch


def symmetric_kl(
    p: torch.Tensor, log_p: torch.Tensor, q: torch.Tensor, log_q: torch.Tensor, same: bool
) -> torch.Tensor:
    """p, log_p (..., n, M), q, log_q (..., m, M) -> D (..., n, m).

    D_ij = sum_c p_ic log p_ic + sum_c q_jc log q_jc - sum_c p_ic log q_jc - sum_c q_jc log p_ic
    """
    entropy_p = (p * log_p).sum(-1)
    entropy_q = (q * log_q).sum(-1)
    cross = p @ log_q.transpose(-2, -1) + log_p @ q.transpose(-2, -1)
    distance = entropy_p[..., :, None] + entropy_q[..., None, :] - cross
    # A BLAS may round the two halves differently; a set compared with itself is symmetric by definition.
    return (distance + distance.transpose(-2, -1)) / 2 if same else distance
