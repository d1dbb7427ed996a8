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


def video_attention_backward(
    grad_out: torch.Tensor,
    grad_map: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v from those of the output and of the head-mean map (sheet 8.4).

    With the dropout factor m: dP_h = (dO_h v_h^T + dMap / H) m, dS_h = P_h (dP_h - sum_j P_h dP_h).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide_q, wide_k, wide_v, wide_grad = (t.to(dtype) for t in (q, k, v, grad_out))
    weights = ((wide_q @ wide_k.transpose(-2, -1)) * scale).softmax(-1)
    grad_weights = wide_grad @ wide_v.transpose(-2, -1)
    if grad_map is not None:
        grad_weights = grad_weights + grad_map[:, None] / q.shape[1]
    dropped = weights
    if dropout_p > 0:
        factor = dropout_factor(weights.shape, dropout_p, seed, dtype, q.device)
        grad_weights, dropped = grad_weights * factor, weights * factor
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
    return (
        (grad_logits @ wide_k).to(q.dtype),
        (grad_logits.transpose(-2, -1) @ wide_q).to(k.dtype),
        (dropped.transpose(-2, -1) @ wide_grad).to(v.dtype),
    )
