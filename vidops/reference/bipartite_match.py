"""Bipartite matching of even with odd tokens, section 3 of Bolya et al., ICLR 2023 (arXiv 2210.09461)."""

from __future__ import annotations

import torch

from vidops.ops._checks import accumulation_dtype
from vidops.reference._tokens import best_partners, unit_rows


def bipartite_match(
    metric: torch.Tensor, class_token: bool, distill_token: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """metric (B, N, d) -> order, similarity and partner, each (B, ceil(N/2))."""
    dtype = accumulation_dtype(metric.dtype)
    return best_partners(unit_rows(metric), dtype, class_token=class_token, distill_token=distill_token)
