"""What the authors' training recipes share: parameter groups for AdamW, and the learning rate.

>>> from vidops.models.recipe import cosine_lr, encoder_lr
>>> cosine_lr(0, total=10_000, base=2e-5, final=2e-6), cosine_lr(10_000, total=10_000, base=2e-5, final=2e-6)
(2e-05, 2e-06)
>>> encoder_lr(2_999, 2e-5), encoder_lr(3_000, 2e-5)
(0.0, 2e-07)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.1, *, undecayed: Iterable[str] = (), encoder: str | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters for AdamW: `weight_decay` on matrices, none on biases and 1-D parameters.

    Args:
        model: parameters with ``requires_grad=False`` are left out.
        weight_decay: of the matrices.
        undecayed: names of further parameters without decay, such as embeddings.
        encoder: prefix of parameters that get groups of their own, so that their learning rate can be another.

    Returns the group with decay and the one without, then, with `encoder`, its two; each has a "name".
    """
    exempt = set(undecayed)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    unknown = exempt - {name for name, _ in model.named_parameters()}
    if unknown:
        raise ValueError(f"undecayed: no parameters of the model: {', '.join(sorted(unknown))}")

    def split(title: str, inside: bool) -> list[dict[str, Any]]:
        own = [(name, p) for name, p in trainable if (encoder is not None and name.startswith(encoder)) == inside]
        plain = {name for name, p in own if p.dim() <= 1 or name.endswith(".bias") or name in exempt}
        return [
            {
                "name": f"{title}, decayed",
                "params": [p for name, p in own if name not in plain],
                "weight_decay": weight_decay,
            },
            {"name": f"{title}, plain", "params": [p for name, p in own if name in plain], "weight_decay": 0.0},
        ]

    return split("model", False) + (split("encoder", True) if encoder is not None else [])


def cosine_lr(iteration: int, *, total: int, base: float, final: float) -> float:
    """Learning rate on a cosine from `base` to `final` over `total` iterations, no warm-up."""
    progress = min(max(iteration, 0), total) / total
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def encoder_lr(iteration: int, lr: float, *, start: int = 3_000, factor: float = 0.01) -> float:
    """Learning rate of an encoder that rests for `start` iterations and then learns at `factor` of the model's `lr`."""
    return 0.0 if iteration < start else factor * lr
