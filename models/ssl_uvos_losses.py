"""Losses of "Betrayed by Attention", Eqs. E6 and E7 (Ding et al., ECCV 2024, arXiv 2311.17893).

Both work on the rows of the sampled patches only. Neither the pool of slots (a copy of every slot per query)
nor the pool of maps (a copy of the whole map per query) is ever built: similarities are taken against all
patches once and then picked, and only the map rows of the chosen positives and negatives are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class LossSettings:
    """Numbers of Eqs. E6 and E7; the defaults are the paper's.

    `semantic_positives` first and `semantic_negatives` last patches in the order of the sampled patch's
    attention enter E6, `motion_positives` and `motion_negatives` enter E7. A frame with fewer patches gives
    all it has.
    """

    samples: int = 8
    semantic_positives: int = 30
    semantic_negatives: int = 200
    motion_positives: int = 10
    motion_negatives: int = 50
    positive_cosine: float = 0.9
    negative_cosine: float = 0.1
    motion_margin: float = 1.0

    def __post_init__(self) -> None:
        for name in (
            "samples",
            "semantic_positives",
            "semantic_negatives",
            "motion_positives",
            "motion_negatives",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def sample_patches(patches: int, samples: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Positions (samples,) int64 drawn uniformly without replacement; all of them when there are fewer."""
    return torch.randperm(patches, generator=generator)[:samples]


def _checked(attention: torch.Tensor, frames: int, sample: torch.Tensor) -> torch.Tensor:
    """The map (B, T*HW, T*HW) viewed as (B, T, HW, T*HW)."""
    if attention.dim() != 3 or attention.shape[1] != attention.shape[2] or attention.shape[1] % frames:
        raise ValueError(
            f"attention: expected shape (B, T*HW, T*HW) with T = {frames}, got {tuple(attention.shape)}"
        )
    if sample.dim() != 1 or sample.dtype != torch.int64 or len(sample) == 0:
        raise ValueError(
            f"sample: expected int64 patch positions (n,), got {sample.dtype} {tuple(sample.shape)}"
        )
    return attention.unflatten(1, (frames, -1))


def _descending(scores: torch.Tensor) -> torch.Tensor:
    # Stable, so that patches with equal attention are ordered alike on every device.
    return torch.sort(scores.detach(), dim=-1, descending=True, stable=True).indices


def semantic_loss(
    attention: torch.Tensor, slot: torch.Tensor, sample: torch.Tensor, settings: LossSettings | None = None
) -> torch.Tensor:
    """Semantic consistency, Eq. E6, a scalar; its gradient reaches `slot` only.

    Args:
        attention: A (B, T*HW, T*HW), index t*HW + patch.
        slot: block output tokens (B, T, HW, C).
        sample: patch positions (n,) int64, shared by all frames and clips.
        settings: numbers of the loss, default `LossSettings()`.
    """
    settings = settings or LossSettings()
    if slot.dim() != 4:
        raise ValueError(f"slot: expected shape (B, T, HW, C), got {tuple(slot.shape)}")
    frames, patches = slot.shape[1:3]
    rows = _checked(attention, frames, sample)[:, :, sample]
    order = _descending(rows.unflatten(-1, (frames, patches)))  # (B, T, n, T, HW)
    unit = F.normalize(slot, dim=-1, eps=1e-12)
    cosine = torch.einsum("bsnc,btpc->bsntp", unit[:, :, sample], unit)
    positive = cosine.gather(-1, order[..., : settings.semantic_positives])
    negative = cosine.gather(-1, order[..., -settings.semantic_negatives :])
    attract = F.relu(settings.positive_cosine - positive).mean()
    return attract + F.relu(negative - settings.negative_cosine).mean()


def _l1_normalised(rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows, p=1.0, dim=-1, eps=1e-12)


def motion_loss(
    attention: torch.Tensor, frames: int, sample: torch.Tensor, settings: LossSettings | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic motion consistency with entropy normalisation, Eq. E7.

    Args:
        attention: A (B, T*HW, T*HW).
        frames: T.
        sample: patch positions (n,) int64.
        settings: numbers of the loss, default `LossSettings()`.

    Returns:
        The scalar loss, whose gradient reaches the rows of the positives and negatives, and the weights
        (B, T, n) of the sampled patches, which sum to one over n and carry no gradient.
    """
    settings = settings or LossSettings()
    rows = _checked(attention, frames, sample)
    batch, _, patches, columns = rows.shape
    query = rows.detach()[:, :, sample]  # (B, T, n, T*HW)
    own = query.unflatten(-1, (frames, patches))
    own = own.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # (B, T, n, HW): the source frame's own columns
    order = _descending(own)
    positives = order[..., : settings.motion_positives]
    negatives = order[..., -settings.motion_negatives :]
    chosen = torch.cat([positives, negatives], dim=-1)  # (B, T, n, chosen)
    picked = rows.gather(2, chosen.flatten(2)[..., None].expand(-1, -1, -1, columns))
    picked = picked.view(batch, frames, len(sample), -1, columns)

    query = _l1_normalised(query)
    score = torch.einsum("bsnc,bsnjc->bsnj", query, (_l1_normalised(picked) + 1e-10).log())
    positive, negative = score.split([positives.shape[-1], negatives.shape[-1]], dim=-1)
    margin = F.relu(negative[..., :, None] - positive[..., None, :] + settings.motion_margin)
    # Peaked maps have the higher negative entropy and so the larger weight.
    weight = (query * (query + 1e-10).log()).sum(-1).softmax(-1)
    return (weight[..., None, None] * margin).sum(2).mean(), weight
