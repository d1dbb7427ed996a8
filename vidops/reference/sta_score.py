"""Scores of semantic-aware temporal accumulation, Ding et al., ICCV 2023 (arXiv 2308.04549), and what they keep."""

from __future__ import annotations

import torch

from vidops.ops._checks import accumulation_dtype
from vidops.reference._tokens import ascending, best_partners, products, unit_rows


def activation_of(x: torch.Tensor) -> torch.Tensor:
    """Eq. 4: x (B, T, N, D) -> the summed magnitudes of a token, from 0 to 1 over the tokens of its group."""
    total = x.double().abs().sum(-1)
    low, high = total.aminmax(dim=-1, keepdim=True)
    spread = high - low
    return torch.where(spread == 0, 0.0, (total - low) / spread)


def sta_score(
    x: torch.Tensor, metric: torch.Tensor, num_frames: int, r: int, reverse: bool, first_frame_pruned: bool
) -> tuple[torch.Tensor, ...]:
    """x (B, T N, D), metric (B, T N, d) -> keep (B, T, K), activation, acc, score (B, T, N), order, similarity."""
    dtype = accumulation_dtype(x.dtype)
    tokens = x.shape[1] // num_frames
    kept = tokens - r
    unit = unit_rows(metric).unflatten(1, (num_frames, tokens))
    activation = activation_of(x.unflatten(1, (num_frames, tokens))).to(dtype)
    acc, score = torch.zeros_like(activation), torch.zeros_like(activation)
    keep = torch.empty(*acc.shape[:2], kept, dtype=torch.int64, device=x.device)
    frames = list(range(num_frames))
    if reverse:
        frames.reverse()

    # The first group: even tokens that are most like an odd one go first.
    even, similarity, _ = best_partners(unit[:, frames[0]], dtype)
    odd = torch.arange(1, tokens, 2, device=x.device).expand(len(x), -1)
    order = torch.cat([odd, 2 * even], 1)
    keep[:, frames[0]] = order[:, :kept]
    # The published code refers to all tokens of the first group, Algorithm 1 of the paper to those it keeps.
    refer = order[:, :kept] if first_frame_pruned else order
    weight = torch.full_like(refer, 1.0 / kept if first_frame_pruned else 1.0, dtype=torch.float64)

    for previous, t in zip(frames, frames[1:], strict=False):
        before = unit[:, previous].gather(1, refer.unsqueeze(-1).expand(-1, -1, unit.shape[-1]))
        transition = products(unit[:, t], before, dtype).softmax(1)  # Eq. 3: over the tokens of this group
        total = products(transition, weight.unsqueeze(1), dtype).squeeze(-1)
        acc[:, t] = total.to(dtype)
        score[:, t] = acc[:, t] * (1 - activation[:, t])  # Eq. 5
        refer = ascending(score[:, t])[:, :kept]
        keep[:, t] = refer
        carried = total.gather(1, refer)
        weight = carried / carried.sum(1, keepdim=True)
    return keep, activation, acc, score, order, similarity
