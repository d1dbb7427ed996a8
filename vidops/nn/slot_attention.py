"""Slot attention from Gaussian initial slots, with the names and signatures of the PyPI package `slot-attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import vidops
from vidops.nn._params import mlp, params_of
from vidops.ops._slot_params import SlotParams


class _GaussianSlots(nn.Module):
    """Initial slots mu + exp(logsigma) z, and the iterations; subclasses make the other weights."""

    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    gru: nn.GRUCell
    mlp: nn.Sequential
    norm_input: nn.LayerNorm
    norm_slots: nn.LayerNorm
    norm_pre_ff: nn.LayerNorm

    def __init__(self, num_slots: int, dim: int, iters: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.num_slots = num_slots
        self.iters = iters
        self.eps = eps
        self.scale = dim**-0.5
        self.slots_mu = nn.Parameter(torch.randn(1, 1, dim))
        self.slots_logsigma = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.xavier_uniform_(self.slots_logsigma)

    def _options(self) -> dict[str, Any]:
        return {"iters": self.iters}

    def _params(self) -> SlotParams:
        return params_of(
            norm_input=self.norm_input,
            norm_slots=self.norm_slots,
            q=self.to_q,
            k=self.to_k,
            v=self.to_v,
            merge=getattr(self, "combine_heads", None),
            gru=self.gru,
            mlp=(self.norm_pre_ff, self.mlp[0], self.mlp[2]),  # type: ignore[arg-type]
        )

    def forward(
        self,
        inputs: torch.Tensor,
        num_slots: int | None = None,
        *,
        noise: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """inputs (B, N, dim) -> slots (B, S, dim).

        `noise` (B, S, dim), standard normal, stands in for the draw from torch's generator.
        """
        count = self.num_slots if num_slots is None else num_slots
        if noise is None:
            noise = torch.randn(inputs.shape[0], count, self.dim, device=inputs.device, dtype=inputs.dtype)
        slots = self.slots_mu + self.slots_logsigma.exp() * noise
        options = {"scale": self.scale, "eps": self.eps, "ln_eps": self.norm_input.eps, "backend": backend}
        return vidops.slot_attention(inputs, slots, self._params(), **options, **self._options())


class SlotAttention(_GaussianSlots):
    """Locatello et al., NeurIPS 2020 (arXiv 2006.15055).

    >>> import torch, vidops
    >>> attention = vidops.nn.SlotAttention(num_slots=5, dim=16)
    >>> attention(torch.randn(2, 24, 16), backend="reference").shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self, num_slots: int, dim: int, iters: int = 3, eps: float = 1e-8, hidden_dim: int = 128, *, bias: bool = True
    ) -> None:
        super().__init__(num_slots, dim, iters, eps)
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = mlp(dim, max(dim, hidden_dim))
        self.norm_input = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_pre_ff = nn.LayerNorm(dim)


class ImplicitSlotAttention(SlotAttention):
    """The iteration as a fixed-point solver (Chang, Griffiths, Levine, NeurIPS 2022, arXiv 2207.00787).

    `iters` iterations without a gradient, then one more that is differentiated; the initial slots get no gradient.
    """

    def __init__(
        self, num_slots: int, dim: int, iters: int = 3, eps: float = 1e-8, hidden_dim: int = 128, *, bias: bool = False
    ) -> None:
        super().__init__(num_slots, dim, iters, eps, hidden_dim, bias=bias)

    def _options(self) -> dict[str, Any]:
        return {"iters": self.iters + 1, "grad_mode": "fixed_point"}


class MultiHeadSlotAttention(_GaussianSlots):
    """Several heads, each with its own softmax over slots, merged by a projection; scaled by ``dim ** -0.5``.

    >>> import torch, vidops
    >>> attention = vidops.nn.MultiHeadSlotAttention(num_slots=5, dim=16, heads=2, dim_head=8)
    >>> attention(torch.randn(2, 24, 16), num_slots=7, backend="reference").shape
    torch.Size([2, 7, 16])
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
    ) -> None:
        super().__init__(num_slots, dim, iters, eps)
        self.heads = heads
        self.norm_input = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head)
        self.to_k = nn.Linear(dim, heads * dim_head)
        self.to_v = nn.Linear(dim, heads * dim_head)
        self.combine_heads = nn.Linear(heads * dim_head, dim)
        self.gru = nn.GRUCell(dim, dim)
        self.norm_pre_ff = nn.LayerNorm(dim)
        self.mlp = mlp(dim, max(dim, hidden_dim))

    def _options(self) -> dict[str, Any]:
        return {"iters": self.iters, "heads": self.heads}
