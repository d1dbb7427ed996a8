"""Mean row of every segment, sheet 2.5 step 3 (arXiv 2311.17893)."""

from __future__ import annotations

import torch

from vidops.reference._rows import add_rows


def segment_mean(x: torch.Tensor, label: torch.Tensor, num_segments: int) -> torch.Tensor:
    """x (n, M), label (n,) in [0, K) -> (K, M): plain means; a segment without rows is a row of zeros."""
    total = add_rows(x.new_zeros(num_segments, x.shape[1]), label, x)
    count = torch.bincount(label, minlength=num_segments).clamp(min=1)
    return total / count[:, None].to(x.dtype)
