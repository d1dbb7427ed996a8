"""The nearest kept token of every place of a grid, for the dense windows of a pruned VideoSwin (arXiv 2308.04549)."""

from __future__ import annotations

import torch


def nearest_kept(keep: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """keep (B, K) raster indices -> (B, height * width): slot of the nearest, of those the lowest raster index."""
    place = torch.arange(height * width, device=keep.device)
    down = (place // width)[:, None] - (keep // width)[:, None, :]
    across = (place % width)[:, None] - (keep % width)[:, None, :]
    # One integer that orders by distance, then by raster index.
    return ((down**2 + across**2) * (height * width) + keep[:, None, :]).argmin(2)
