"""Corrector and predictor of SAVi: Kipf et al., ICLR 2022 (arXiv 2111.12594)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import vidops
from vidops.nn._params import params_of


class SlotCorrector(nn.Module):
    """Slot attention from predicted slots on one frame's features; ``w = a / (sum_j a + eps)``, one head, no biases.

    Args:
        dim: width of slots.
        input_dim: width of features (default: `dim`).
        qkv_size: width of queries, keys, values (default: `dim`).
        mlp_size: hidden width of a residual MLP; None for none.
    """

    def __init__(
        self,
        dim: int,
        input_dim: int | None = None,
        qkv_size: int | None = None,
        mlp_size: int | None = None,
        *,
        iters: int = 1,
        eps: float = 1e-8,
        ln_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        input_dim = dim if input_dim is None else input_dim
        qkv_size = dim if qkv_size is None else qkv_size
        self.iters = iters
        self.eps = eps
        self.scale = qkv_size**-0.5
        self.norm_inputs = nn.LayerNorm(input_dim, eps=ln_eps)
        self.norm_slots = nn.LayerNorm(dim, eps=ln_eps)
        self.q = nn.Linear(dim, qkv_size, bias=False)
        self.k = nn.Linear(input_dim, qkv_size, bias=False)
        self.v = nn.Linear(input_dim, qkv_size, bias=False)
        self.gru = nn.GRUCell(qkv_size, dim)
        self.mlp = None
        if mlp_size is not None:
            norm = nn.LayerNorm(dim, eps=ln_eps)
            self.mlp = nn.Sequential(norm, nn.Linear(dim, mlp_size), nn.ReLU(), nn.Linear(mlp_size, dim))

    def forward(
        self, slots: torch.Tensor, inputs: torch.Tensor, *, backend: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """slots (B, S, dim), inputs (B, N, input_dim) -> slots (B, S, dim), softmax of the last iteration (B, S, N)."""
        params = params_of(
            norm_input=self.norm_inputs,
            norm_slots=self.norm_slots,
            q=self.q,
            k=self.k,
            v=self.v,
            gru=self.gru,
            mlp=None if self.mlp is None else (self.mlp[0], self.mlp[1], self.mlp[3]),  # type: ignore[arg-type]
        )
        return vidops.slot_attention(
            inputs,
            slots,
            params,
            iters=self.iters,
            scale=self.scale,
            eps=self.eps,
            eps_in_denominator=True,
            ln_eps=self.norm_inputs.eps,
            return_attn=True,
            backend=backend,
        )


class SlotPredictor(nn.Module):
    """A post-norm transformer block over the slots of one frame: what starts the next frame."""

    def __init__(
        self, dim: int, heads: int = 4, qkv_size: int | None = None, mlp_size: int = 256, *, ln_eps: float = 1e-6
    ) -> None:
        super().__init__()
        qkv_size = dim if qkv_size is None else qkv_size
        if heads < 1 or qkv_size % heads:
            raise ValueError(f"heads: {qkv_size} channels do not split into {heads} heads")
        self.heads = heads
        self.q = nn.Linear(dim, qkv_size)
        self.k = nn.Linear(dim, qkv_size)
        self.v = nn.Linear(dim, qkv_size)
        self.out = nn.Linear(qkv_size, dim)
        self.norm1 = nn.LayerNorm(dim, eps=ln_eps)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_size), nn.ReLU(), nn.Linear(mlp_size, dim))
        self.norm2 = nn.LayerNorm(dim, eps=ln_eps)

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        """slots (B, S, dim) -> (B, S, dim)."""
        q, k, v = (part(slots).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        slots = self.norm1(slots + self.out(mixed))
        return self.norm2(slots + self.mlp(slots))
