"""One frame of label propagation, sheet 5 of Qian et al., ICCV 2023 (arXiv 2308.09951)."""

from __future__ import annotations

import torch

from vidops.ops._checks import accumulation_dtype


def label_propagation(
    query: torch.Tensor,
    context: torch.Tensor,
    labels: torch.Tensor,
    height: int,
    width: int,
    radius: float,
    top_k: int,
    temperature: float,
    unrestricted: int,
    repeats: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query (N,C), context (F,N,C), labels (F,N,L) -> soft labels (N,L), index (N,k), weight (N,k)."""
    acc = accumulation_dtype(query.dtype)
    frames, tokens, _ = context.shape
    affinity = query.to(acc) @ context.flatten(0, 1).to(acc).T
    copies = _copies(height, width, radius, frames, unrestricted, repeats, query.device)
    # NaN and -inf compare false: never chosen. Columns beyond the context make room for any k.
    copies = torch.where(affinity > -torch.inf, copies, 0)
    affinity = affinity.masked_fill(copies == 0, -torch.inf)
    spare = (0, max(0, top_k - frames * tokens))
    affinity = torch.nn.functional.pad(affinity, spare, value=-torch.inf)
    copies = torch.nn.functional.pad(copies, spare)

    value, index = affinity.sort(dim=1, descending=True, stable=True)
    value, index = value[:, :top_k], index[:, :top_k]
    copies = copies.gather(1, index)
    copies = torch.minimum(copies, (top_k - (copies.cumsum(1) - copies)).clamp_min(0))
    taken = copies > 0
    # The softmax over the k: a position that stands in several of the k places has several weights, here as one.
    weight = copies * ((value - value[:, :1]) / temperature).exp()
    weight = weight / weight.sum(1, keepdim=True)
    chosen = labels.flatten(0, 1)[torch.where(taken, index, 0)].masked_fill(~taken[..., None], 0.0)
    return (weight[..., None] * chosen).sum(1), torch.where(taken, index, -1), weight


def _copies(
    height: int, width: int, radius: float, frames: int, unrestricted: int, repeats: int, device: torch.device
) -> torch.Tensor:
    """How many candidates each context position is to each query, (N, F * N): none outside a frame's radius."""
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    distance = ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2).double().sqrt()
    near = (distance < radius).long()
    copies = near[:, None].repeat(1, frames, 1)
    copies[:, :unrestricted] = 1
    copies[:, 0] += repeats * near
    return copies.flatten(1)
