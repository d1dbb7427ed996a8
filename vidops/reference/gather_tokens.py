"""Rows taken by index, and rows added up by index: each is the other's adjoint."""

from __future__ import annotations

import torch

from vidops.ops._checks import accumulation_dtype
from vidops.reference._rows import add_rows


def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (B, N, D), index (B, K) -> (B, K, D): row k is row ``index[k]`` of x."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def scatter_tokens(x: torch.Tensor, index: torch.Tensor, tokens: int) -> torch.Tensor:
    """x (B, K, D), index (B, K) -> (B, tokens, D): row n is the sum of the rows k with ``index[k] == n``."""
    batch, _, width = x.shape
    place = index + tokens * torch.arange(batch, device=x.device).unsqueeze(1)
    total = torch.zeros(batch * tokens, width, dtype=accumulation_dtype(x.dtype), device=x.device)
    total = add_rows(total, place.flatten(), x.flatten(0, 1).to(total.dtype))
    return total.to(x.dtype).view(batch, tokens, width)
