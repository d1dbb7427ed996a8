"""Head-averaged softmax map, Eq. E1 of Ding et al., ECCV 2024 (arXiv 2311.17893)."""

from __future__ import annotations

import math

import torch

from vidops.reference.dropout import dropout_factor


def attention_head_mean(
    q: torch.Tensor, k: torch.Tensor, scale: float, dropout_p: float, seed: int, with_log: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B,H,N,D), k (B,H,M,D) -> P (B,N,M), log P (B,N,M) or (0,), lse (B,H,N).

    log P = logsumexp_h(s_h - lse_h) - log H is finite wherever the logits are, unlike the logarithm of P. A map
    with dropout has exact zeros, so asking for its logarithm is a ValueError.
    """
    if with_log and dropout_p > 0:
        raise ValueError("log_p: a map with dropout has no logarithm; ask for one or the other")
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(dtype) @ k.to(dtype).transpose(-2, -1)) * scale
    lse = torch.logsumexp(logits, dim=-1)
    log_heads = logits - lse[..., None]
    log_p = torch.logsumexp(log_heads, dim=1) - math.log(q.shape[1])
    if dropout_p > 0:
        # The map of a training step: mean of the dropped, rescaled weights (sheet 2.2).
        p = (log_heads.exp() * dropout_factor(logits.shape, dropout_p, seed, dtype, q.device)).mean(dim=1)
    else:
        p = log_p.exp()
    return p, log_p if with_log else log_p.new_empty(0), lse


def attention_head_mean_backward(
    grad_p: torch.Tensor, q: torch.Tensor, k: torch.Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of q and k from that of P: the part of `video_attention_backward` that the map contributes."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide_q, wide_k = q.to(dtype), k.to(dtype)
    weights = ((wide_q @ wide_k.transpose(-2, -1)) * scale).softmax(-1)
    grad_weights = grad_p[:, None] / q.shape[1]
    if dropout_p > 0:
        grad_weights = grad_weights * dropout_factor(weights.shape, dropout_p, seed, dtype, q.device)
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
    return (grad_logits @ wide_k).to(q.dtype), (grad_logits.transpose(-2, -1) @ wide_q).to(k.dtype)
