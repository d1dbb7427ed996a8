"""Nearest centroid of every token's attention row, Eq. E4 of Ding et al., ECCV 2024 (arXiv 2311.17893)."""

from __future__ import annotations

import torch

from vidops.reference.assign_rows import assign_rows
from vidops.reference.attention_head_mean import attention_head_mean


def assign_clusters(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    centroids: torch.Tensor,
    log_centroids: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """q (H,N,D), k (H,M,D), centroids (K,M) -> label (N,). `lse` only saves work; it changes no result."""
    p, log_p, _ = attention_head_mean(q[None], k[None], scale, 0.0, 0, with_log=True)
    return assign_rows(p[0], log_p[0], centroids, log_centroids)
