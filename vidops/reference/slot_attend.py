"""One pass of slot attention over the tokens: what a backend of `vidops.slot_attention` implements.

`keys` (B, Hk, N, Dk) and `values` (B, Hv, N, Dv) serve all H heads where Hk or Hv is 1. With `mean` and `rstd` (B, N)
they are raw rows, used as ``(x - mean) * rstd``. q (B, H, S, Dk) carries the scale, c (B, H, S) is added to its dots.
"""

from __future__ import annotations

import torch

from vidops.reference.slot_attention import per_slot, softmax_over_slots


def _rows(x: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    x = x.to(dtype)
    if mean is None or rstd is None:
        return x
    return (x - mean[:, None, :, None]) * rstd[:, None, :, None]


def _maps(
    keys: torch.Tensor,
    q: torch.Tensor,
    c: torch.Tensor,
    token_mask: torch.Tensor | None,
    slot_mask: torch.Tensor | None,
    groups: int,
    joint: bool,
    eps_add: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dots, their softmax a and the weights (a + eps_add) * mask, each (B, H, S, N)."""
    dots = q @ keys.transpose(-2, -1) + c[..., None]
    if slot_mask is not None:
        dots = dots.masked_fill(slot_mask[:, None, :, None], -torch.inf)
    attn = softmax_over_slots(dots, groups, joint)
    weights = attn + eps_add
    return dots, attn, weights if token_mask is None else weights * per_slot(token_mask, q.shape[2])


def attend_forward(
    keys: torch.Tensor,
    values: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    q: torch.Tensor,
    c: torch.Tensor,
    token_mask: torch.Tensor | None,
    slot_mask: torch.Tensor | None,
    groups: int,
    joint: bool,
    eps_add: float,
    with_dots: bool,
    with_attn: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """num = sum_j w_ij V_j (B, H, S, Dv), den = sum_j w_ij (B, H, S), and dots and softmax (B, H, S, N) if asked."""
    wide_keys, wide_values = (_rows(t, mean, rstd, q.dtype) for t in (keys, values))
    dots, attn, weights = _maps(wide_keys, q, c, token_mask, slot_mask, groups, joint, eps_add)
    return weights @ wide_values, weights.sum(-1), dots if with_dots else None, attn if with_attn else None


def attend_backward(
    grad_num: torch.Tensor,
    grad_den: torch.Tensor,
    grad_dots: torch.Tensor | None,
    grad_attn: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    q: torch.Tensor,
    c: torch.Tensor,
    token_mask: torch.Tensor | None,
    slot_mask: torch.Tensor | None,
    groups: int,
    joint: bool,
    eps_add: float,
    grad_keys: torch.Tensor,
    grad_values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of q and c; those of the rows used as keys and values are added to `grad_keys` and `grad_values`."""
    wide_keys, wide_values = (_rows(t, mean, rstd, q.dtype) for t in (keys, values))
    _, attn, weights = _maps(wide_keys, q, c, token_mask, slot_mask, groups, joint, eps_add)
    grad_weights = grad_num @ wide_values.transpose(-2, -1) + grad_den[..., None]
    if token_mask is not None:
        grad_weights = grad_weights * per_slot(token_mask, q.shape[2])
    grad_softmax = grad_weights if grad_attn is None else grad_weights + grad_attn
    moved = attn * grad_softmax
    if joint:
        total = moved.sum((1, 2), keepdim=True)
    else:
        grouped = moved.unflatten(2, (groups, -1))
        total = grouped.sum(3, keepdim=True).expand_as(grouped).flatten(2, 3)
    grad = moved - attn * total
    if grad_dots is not None:
        grad = grad + grad_dots
    _add_over_heads(grad_keys, grad.transpose(-2, -1) @ q)
    _add_over_heads(grad_values, weights.transpose(-2, -1) @ grad_num)
    return grad @ wide_keys, grad.sum(-1)


def _add_over_heads(buffer: torch.Tensor, grad: torch.Tensor) -> None:
    buffer += grad.sum(1, keepdim=True) if buffer.shape[1] == 1 else grad
