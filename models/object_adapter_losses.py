"""Losses of "Rethinking Image-to-Video Adaptation" (Qian, Ding, Lin, ECCV 2024, arXiv 2407.06871), sheet 3.6.

A mean over an empty set (no other slot, no sample of another class) is 0 and stays differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class LossSettings:
    """Weights of the four terms, the margin of the hinges, and the two temperatures of the distillation."""

    classification: float = 1.0
    diversity: float = 0.05
    state_change: float = 0.2
    distillation: float = 0.2
    margin: float = 0.3
    slot_temperature: float = 0.1
    temperature: float = 0.07


def slot_masks(dots: torch.Tensor) -> torch.Tensor:
    """Masks (..., S, N) of dots (..., S, N): softmax over the slots, plus the constant of the slot attention."""
    return dots.softmax(-2) + 1e-8


def _mean_between_slots(values: torch.Tensor) -> torch.Tensor:
    """Mean of values (..., S, S) over all ordered pairs of two different slots."""
    slots = values.shape[-1]
    same = torch.eye(slots, dtype=torch.bool, device=values.device)
    count = values.numel() // slots * (slots - 1)
    return values.masked_fill(same, 0).sum() / max(count, 1)


def _mean_where(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean of values (B, n, R, S) over the pairs (B, n) of samples that are `chosen`."""
    # Not by boolean indexing, whose size the host would have to wait for.
    count = chosen.sum() * values.shape[2] * values.shape[3]
    return values.masked_fill(~chosen[:, :, None, None], 0).sum() / count.clamp_min(1)


def mask_diversity_loss(dots: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the masks of two slots of a frame, for dots (B, T, S, N)."""
    if dots.dim() != 4:
        raise ValueError(f"dots: expected shape (B, T, S, N), got {tuple(dots.shape)}")
    unit = F.normalize(slot_masks(dots), dim=-1, eps=1e-12)
    return _mean_between_slots(unit @ unit.transpose(-1, -2))


def state_change_loss(
    state: torch.Tensor,
    label: torch.Tensor,
    permutation: torch.Tensor,
    *,
    keys: torch.Tensor | None = None,
    key_label: torch.Tensor | None = None,
    settings: LossSettings | None = None,
) -> torch.Tensor:
    """State changes of videos of one class attract, those of other classes and of other objects repel.

    Args:
        state: embeddings (B, R, S, O) of R frame pairs, of any length.
        label: classes (B,) int64.
        permutation: (R,) int64, the frame pair whose key each frame pair meets.
        keys, key_label: states (n, R, S, O) and classes (n,) of the batches of all ranks, default those of this one.
            No gradient reaches `keys`.
        settings: default `LossSettings()`.
    """
    settings = settings or LossSettings()
    if state.dim() != 4:
        raise ValueError(f"state: expected shape (B, R, S, O), got {tuple(state.shape)}")
    if (keys is None) != (key_label is None):
        raise ValueError("keys, key_label: expected both or neither")
    keys, key_label = (state if keys is None else keys), (label if key_label is None else key_label)
    if keys.shape[1:] != state.shape[1:]:
        raise ValueError(f"keys: expected shape (n, *{tuple(state.shape[1:])}), got {tuple(keys.shape)}")
    if label.shape != state.shape[:1] or key_label.shape != keys.shape[:1]:
        raise ValueError(f"label, key_label: expected one class for each of {len(state)} and {len(keys)} videos")
    if permutation.shape != state.shape[1:2]:
        raise ValueError(f"permutation: expected shape ({state.shape[1]},), got {tuple(permutation.shape)}")
    query = F.normalize(state, dim=-1, eps=1e-12)
    key = F.normalize(keys.detach(), dim=-1, eps=1e-12)[:, permutation]
    cosine = torch.einsum("brso,nrso->bnrs", query, key)
    same = label[:, None] == key_label
    repel = _mean_where(F.relu(cosine - settings.margin), ~same)
    between = F.relu(query @ query.detach().transpose(-1, -2) - settings.margin)
    return repel + _mean_between_slots(between) - _mean_where(cosine, same)


def distillation_loss(
    embedding: torch.Tensor, teacher: torch.Tensor, settings: LossSettings | None = None
) -> torch.Tensor:
    """InfoNCE, both ways, between the objects of a frame and the teacher's embedding of the same frame.

    Args:
        embedding: unit object embeddings (B, T, S, O).
        teacher: unit image embeddings (B, T, O).
        settings: default `LossSettings()`.
    """
    settings = settings or LossSettings()
    if embedding.dim() != 4 or teacher.shape != (*embedding.shape[:2], embedding.shape[3]):
        raise ValueError(
            "embedding, teacher: expected shapes (B, T, S, O) and (B, T, O), "
            f"got {tuple(embedding.shape)} and {tuple(teacher.shape)}"
        )
    cosine = torch.einsum("btso,pto->bpts", embedding, teacher)
    weight = (cosine / settings.slot_temperature).softmax(-1)
    logit = (weight * cosine).sum(-1) / settings.temperature  # (B, B, T)
    own = logit.diagonal(dim1=0, dim2=1).T
    return (logit.logsumexp(1) - own).mean() + (logit.logsumexp(0) - own).mean()
