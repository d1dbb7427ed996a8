"""Nearest centroid of every map row, Eq. E4 of Ding et al., ECCV 2024 (arXiv 2311.17893)."""

from __future__ import annotations

import torch

from vidops.reference.symmetric_kl import symmetric_kl


def assign_rows(
    p: torch.Tensor, log_p: torch.Tensor, centroids: torch.Tensor, log_centroids: torch.Tensor
) -> torch.Tensor:
    """p, log_p (n, M), centroids (K, M) -> label (n,): argmin_k D(X_k, p_n), the smallest k on exact ties.

    A distance that is NaN never wins; a row with no comparable centroid gets label 0.
    """
    distance = symmetric_kl(centroids, log_centroids, p, log_p, same=False)
    return distance.nan_to_num(nan=float("inf")).argmin(0)
