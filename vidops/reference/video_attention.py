"""Attention of the spatio-temporal block, sheet 2.2 of Ding et al., ECCV 2024 (arXiv 2311.17893)."""

from __future__ import annotations

import torch

from vidops.reference.dropout import dropout_factor


def video_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout_p: float, seed: int, with_map: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B,H,N,D), k, v (B,H,M,D) -> out (B,H,N,D), map (B,N,M) or (0,), lse (B,H,N)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(dtype) @ k.to(dtype).transpose(-2, -1)) * scale
    lse = torch.logsumexp(logits, dim=-1)
    weights = (logits - lse[..., None]).exp()
    if dropout_p > 0:
        weights = weights * dropout_factor(logits.shape, dropout_p, seed, dtype, q.device)
    out = (weights @ v.to(dtype)).to(q.dtype)
    return out, weights.mean(dim=1) if with_map else weights.new_empty(0), lse
