"""Slot attention of Locatello et al., NeurIPS 2020 (arXiv 2006.15055), with the options of its published variants.

Nothing is absorbed, skipped or recomputed here, and gradients are those of autograd through what is written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vidops.ops._slot_params import SlotCall, SlotOptions, SlotParams, widened


def slot_attention(*args: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of the torch op -> slots (B, S, D), dots, attn, and the slots entering differentiated iterations."""
    inputs, slots, params, token_mask, slot_mask, options = SlotCall.of(*args)
    given, dtype = slots.dtype, torch.promote_types(slots.dtype, torch.float32)
    params = widened(params, dtype)
    x = _normalised(inputs.to(dtype), params, options.ln_eps)
    keys = _heads(F.linear(x, params.k_weight, params.k_bias), options.heads)
    values = _heads(F.linear(x, params.v_weight, params.v_bias), options.heads)

    initial = slots = slots.to(dtype)
    entering: list[torch.Tensor] = []
    dots = attn = slots.new_empty(0)
    for step in range(options.iters):
        if step == options.iters - 1 and options.grad_mode != "full":
            slots = slots.detach()
            if options.grad_mode == "bilevel":
                slots = slots + (initial - initial.detach())
        entering.append(slots.detach())
        normed = F.layer_norm(
            slots, slots.shape[-1:], params.norm_slots_weight, params.norm_slots_bias, options.ln_eps
        )
        q = _heads(F.linear(normed, params.q_weight, params.q_bias), options.heads)
        dots = options.scale * (q @ keys.transpose(-2, -1))
        if slot_mask is not None:
            dots = dots.masked_fill(slot_mask[:, None, :, None] != 0, -torch.inf)
        attn = softmax_over_slots(dots, options.groups, options.joint_heads)
        update = _weighted_mean(attn, values, token_mask, options)
        slots = _updated(slots, update, params, options)
    return (
        slots.to(given),
        (dots.squeeze(1) if options.heads == 1 else dots) if options.with_dots else dots.new_empty(0),
        attn.mean(1) if options.with_attn else attn.new_empty(0),
        torch.stack(entering if options.grad_mode == "full" else entering[-1:]),
    )


def row_statistics(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and reciprocal standard deviation over the last axis; of a variance that overflows the latter is 0."""
    mean = x.mean(-1)
    # On the CPU a tenth of the time of torch.var.
    deviation = torch.linalg.vector_norm(x - mean[..., None], dim=-1)
    return mean, (deviation.square() / x.shape[-1] + eps).rsqrt()


def _normalised(x: torch.Tensor, params: SlotParams, eps: float) -> torch.Tensor:
    """LayerNorm of the inputs, which PyTorch's own makes NaN or not by their width where the variance overflows."""
    mean, rstd = row_statistics(x, eps)
    x = (x - mean[..., None]) * rstd[..., None]
    if params.norm_input_weight is not None:
        x = x * params.norm_input_weight
    return x if params.norm_input_bias is None else x + params.norm_input_bias


def _heads(t: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, L, heads * d), head-major, to (B, heads, L, d)."""
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def softmax_over_slots(dots: torch.Tensor, groups: int, joint: bool) -> torch.Tensor:
    """dots (B, H, S, N): over the slots of each group, per head; `joint`: over all slots and heads at once."""
    if joint:
        return dots.flatten(1, 2).softmax(1).view_as(dots)
    return dots.unflatten(2, (groups, -1)).softmax(3).flatten(2, 3)


def per_slot(token_mask: torch.Tensor, slots: int) -> torch.Tensor:
    """(B, G, N) to (B, 1, S, N): the mask of a slot is that of its group, and of every head."""
    return token_mask.repeat_interleave(slots // token_mask.shape[1], dim=1)[:, None]


def _weighted_mean(
    attn: torch.Tensor, values: torch.Tensor, token_mask: torch.Tensor | None, options: SlotOptions
) -> torch.Tensor:
    """u_i = sum_j w_ij V_j / sum_j w_ij, heads concatenated: (B, S, Hv)."""
    weights = attn + options.eps_add
    if token_mask is not None:
        weights = weights * per_slot(token_mask.to(attn.dtype), attn.shape[2])
    weights = weights / (weights.sum(-1, keepdim=True) + options.denominator)
    return (weights @ values).transpose(1, 2).flatten(2)


def _updated(slots: torch.Tensor, update: torch.Tensor, params: SlotParams, options: SlotOptions) -> torch.Tensor:
    if params.merge_weight is not None:
        update = F.linear(update, params.merge_weight, params.merge_bias)
    if params.gru_weight_ih is None:
        slots = slots + update
    else:
        slots = _gru(update, slots, params)
    if params.mlp_weight1 is None:
        return slots
    assert params.mlp_weight2 is not None
    normed = F.layer_norm(slots, slots.shape[-1:], params.norm_mlp_weight, params.norm_mlp_bias, options.ln_eps)
    hidden = F.linear(normed, params.mlp_weight1, params.mlp_bias1)
    hidden = F.relu(hidden) if options.activation == "relu" else F.gelu(hidden)
    return slots + F.linear(hidden, params.mlp_weight2, params.mlp_bias2)


def _gru(update: torch.Tensor, slots: torch.Tensor, params: SlotParams) -> torch.Tensor:
    """r, z = sigmoid(W u + U s);  n = tanh(W u + r (U s));  (1 - z) n + z s."""
    assert params.gru_weight_ih is not None and params.gru_weight_hh is not None
    from_update = F.linear(update, params.gru_weight_ih, params.gru_bias_ih).chunk(3, -1)
    from_slots = F.linear(slots, params.gru_weight_hh, params.gru_bias_hh).chunk(3, -1)
    reset, keep = (torch.sigmoid(a + b) for a, b in zip(from_update[:2], from_slots[:2], strict=True))
    candidate = torch.tanh(from_update[2] + reset * from_slots[2])
    return (1 - keep) * candidate + keep * slots
