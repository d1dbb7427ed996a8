"""Losses of "Semantics Meets Temporal Correspondence", Eqs. E4 to E6 (Qian et al., ICCV 2023, arXiv 2308.09951).

They follow the authors' code. Tensors of the teacher take part as constants. All pairs of frames with the same
distance are handled together, as one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vidops.evaluation import assignment

# Up to this many instances all matchings are tried on the tensors' own device; 6! = 720.
ENUMERATED = 6


@dataclass(frozen=True)
class LossSettings:
    """Numbers of Eqs. E4 to E6; the defaults are the authors' latest.

    Args:
        area_probability: a token belongs to a semantic above this probability (first release: 0.5).
        area_share: an instance is valid when more than this share of the tokens belongs to its semantic,
        instance_cosine: and its cosine with the semantic's slot is above this.
        margin: cosine with other instances up to which they are not pushed away.
        temperature, sinkhorn_iters: of the transport between the features of two frames.
    """

    area_probability: float = 0.3
    area_share: float = 0.2
    instance_cosine: float = 0.5
    margin: float = 0.5
    temperature: float = 0.05
    sinkhorn_iters: int = 3


class Transport(NamedTuple):
    """Entropic transport between two sets of features, none of it with a gradient."""

    cost: torch.Tensor  # 1 - cosine (..., N, M)
    source: torch.Tensor  # L1 norms of the unit features (..., N); the marginals are these over their sum
    target: torch.Tensor  # (..., M)
    plan: torch.Tensor  # (..., N, M)


@torch.no_grad()
def transport_plan(source: torch.Tensor, target: torch.Tensor, settings: LossSettings | None = None) -> Transport:
    """Transport from features (..., N, C) to features (..., M, C); marginals are the L1 norms of the unit features."""
    settings = settings or LossSettings()
    unit_source, unit_target = (F.normalize(t, dim=-1, eps=1e-12) for t in (source, target))
    cost = 1 - unit_source @ unit_target.mT
    norms = unit_source.abs().sum(-1), unit_target.abs().sum(-1)
    mu, nu = (t / t.sum(-1, keepdim=True) for t in norms)
    kernel = (-cost / settings.temperature).exp()
    v = torch.ones_like(nu)
    u = torch.ones_like(mu)
    for _ in range(settings.sinkhorn_iters):
        u = mu / (kernel @ v[..., None]).squeeze(-1)
        v = nu / (kernel.mT @ u[..., None]).squeeze(-1)
    return Transport(cost, *norms, u[..., :, None] * kernel * v[..., None, :])


def separation_loss(dots: torch.Tensor) -> torch.Tensor:
    """E4: mean inner product of the maps of two semantics; 0 for a single one.

    `dots` (B, T, S, N) are semantic dots, before the softmax.
    """
    maps = F.normalize(dots.softmax(-2) + 1e-8, dim=-1, eps=1e-12)
    products = maps @ maps.mT
    count = dots.shape[-2]
    off_diagonal = products.sum((-2, -1)) - products.diagonal(dim1=-2, dim2=-1).sum(-1)
    return off_diagonal.mean() / max(count * (count - 1), 1)


def consistency_loss(
    dots: torch.Tensor,
    teacher_dots: torch.Tensor,
    teacher_features: torch.Tensor,
    settings: LossSettings | None = None,
) -> torch.Tensor:
    """E5: cross-entropy of the semantics of two frames along the transport between them; 0 for a single frame.

    Args:
        dots, teacher_dots: semantic dots (B, T, S, N).
        teacher_features: features of the frames before fusion (B, T, N, C).

    The map X of all pairs of tokens is never formed: sum X plan = sum_sn log p_s(n) (plan p')_s(n).
    """
    log_p = (dots.softmax(-2) + 1e-8).log()
    teacher = teacher_dots.detach().softmax(-2)
    frames = dots.shape[1]
    total = torch.zeros((), dtype=dots.dtype, device=dots.device)
    for distance in range(1, frames):
        other_p, other_features = (t.roll(-distance, dims=1) for t in (teacher, teacher_features.detach()))
        plan = transport_plan(teacher_features, other_features, settings).plan
        total = total - (log_p * (other_p @ plan.mT)).sum((-2, -1)).mean()
    return total / max(frames - 1, 1)


@torch.no_grad()
def valid_instances(
    dots: torch.Tensor, semantic: torch.Tensor, instance: torch.Tensor, settings: LossSettings | None = None
) -> torch.Tensor:
    """(B, T, S, P) bool: instances like their semantic (B, T, S, C), where that covers enough of the frame.

    `dots` (B, T, S, N) are semantic dots, `instance` (B, T, S, P, C) raw instance slots.
    """
    settings = settings or LossSettings()
    area = (dots.softmax(-2) > settings.area_probability).to(dots.dtype).mean(-1) > settings.area_share
    return area[..., None] & (instance_cosine(semantic, instance) > settings.instance_cosine)


def instance_cosine(semantic: torch.Tensor, instance: torch.Tensor) -> torch.Tensor:
    """Cosine (..., S, P) of semantic slots (..., S, C) and their instances (..., S, P, C)."""
    unit_semantic, unit_instance = (F.normalize(t, dim=-1, eps=1e-12) for t in (semantic, instance))
    return (unit_instance @ unit_semantic[..., None]).squeeze(-1)


@torch.no_grad()
def match_instances(similarity: torch.Tensor) -> torch.Tensor:
    """Columns (..., P) int64 of the one-to-one matching that maximises the total of `similarity` (..., P, P).

    Up to 6 instances all matchings are compared where the tensor lies, and ties go to the lexicographically lowest.
    Above that each matrix is solved on the CPU, by SciPy.
    """
    count = similarity.shape[-1]
    if count > ENUMERATED:
        matrices = similarity.double().cpu().flatten(0, -3).numpy()
        columns = torch.stack([torch.from_numpy(assignment(matrix)[1]) for matrix in matrices])
        return columns.view(similarity.shape[:-1]).to(similarity.device)
    orders = torch.tensor(list(permutations(range(count))), device=similarity.device)
    total = torch.stack([similarity[..., row, :][..., orders[:, row]] for row in range(count)]).sum(0)
    return orders[total.argmax(-1)]


def instance_loss(
    objects: torch.Tensor,
    teacher_objects: torch.Tensor,
    valid: torch.Tensor,
    teacher_valid: torch.Tensor,
    settings: LossSettings | None = None,
) -> torch.Tensor:
    """E6: matched instances of two frames attract, others repel; over all ordered pairs, equal frames included.

    Args:
        objects, teacher_objects: unit vectors of the instances (B, T, S, P, C).
        valid, teacher_valid: (B, T, S, P) bool.
    """
    settings = settings or LossSettings()
    similarity = objects[:, :, None] @ teacher_objects.detach()[:, None].mT  # (B, T, T', S, P, P')
    match = match_instances(similarity)[..., None]
    attract = similarity.gather(-1, match).squeeze(-1)
    excess = F.relu(similarity - settings.margin).scatter(-1, match, 0.0)
    repel = excess.sum(-1) / max(similarity.shape[-1] - 1, 1)
    shape = match.shape[:-1]
    own = valid[:, :, None].to(objects.dtype).expand(shape)
    matched = teacher_valid[:, None].to(objects.dtype).expand(shape).gather(-1, match.squeeze(-1))
    # The authors add 1e-10 to every entry, in float32: all it does is to make the loss 0 where no instance is valid.
    return (own * (repel - matched * attract)).sum() / own.sum().clamp_min(1e-10)
