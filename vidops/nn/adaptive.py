"""A choice, per input, of which slots to keep (Fan et al., CVPR 2024), as the PyPI package `slot-attention` has it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vidops.nn.slot_attention import MultiHeadSlotAttention, SlotAttention


def _log(t: torch.Tensor) -> torch.Tensor:
    return t.clamp(min=1e-20).log()


class AdaptiveSlotWrapper(nn.Module):
    """Slots of `slot_attn`, and for each a hard choice to keep it (1) or not (0) with a straight-through gradient."""

    def __init__(self, slot_attn: SlotAttention | MultiHeadSlotAttention, temperature: float = 1.0) -> None:
        super().__init__()
        self.slot_attn = slot_attn
        self.temperature = temperature
        self.pred_keep_slot = nn.Linear(slot_attn.dim, 2, bias=False)

    def forward(
        self, x: torch.Tensor, *, uniform: torch.Tensor | None = None, **slot_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, N, dim) -> slots (B, S, dim), keep (B, S); `slot_kwargs` are those of `slot_attn`.

        `uniform` (B, S, 2) in [0, 1) stands in for the draw from torch's generator.
        """
        slots = self.slot_attn(x, **slot_kwargs)
        logits = self.pred_keep_slot(slots) / self.temperature
        noise = -_log(-_log(torch.rand_like(logits) if uniform is None else uniform))
        hard = F.one_hot((logits + noise).argmax(-1), 2).to(logits.dtype)
        soft = logits.softmax(-1)
        return slots, (hard + soft - soft.detach())[..., -1]


class AdaptiveSlotAttention(AdaptiveSlotWrapper):
    """`AdaptiveSlotWrapper` around a `MultiHeadSlotAttention` of its own, with the state dict of the two.

    >>> import torch, vidops
    >>> attention = vidops.nn.AdaptiveSlotAttention(num_slots=6, dim=12, heads=2, dim_head=6)
    >>> slots, keep = attention(torch.randn(2, 18, 12), backend="reference")
    >>> slots.shape, keep.shape
    (torch.Size([2, 6, 12]), torch.Size([2, 6]))
    """

    def __init__(
        self,
        num_slots: int,
        dim: int,
        heads: int = 4,
        dim_head: int = 64,
        iters: int = 3,
        eps: float = 1e-8,
        hidden_dim: int = 128,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(MultiHeadSlotAttention(num_slots, dim, heads, dim_head, iters, eps, hidden_dim), temperature)
