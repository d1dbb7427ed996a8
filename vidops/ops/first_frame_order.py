"""`vidops.first_frame_order`: the drop order of a frame with none before it, from `bipartite_match`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vidops._registry import COMPOSITIONS
from vidops.ops.bipartite_match import bipartite_match


class FrameOrder(NamedTuple):
    """`order` (B, N) int64, tokens that are dropped last first; `similarity` (B, ceil(N/2)) of the even tokens."""

    order: torch.Tensor
    similarity: torch.Tensor


def first_frame_order(metric: torch.Tensor, *, backend: str | None = None) -> FrameOrder:
    """The order in which the first frame of a clip loses its tokens: from the end.

    Odd tokens in the order of their positions, then the even ones ascending by their largest cosine with an odd one,
    equal ones by position: the even tokens that are most like an odd one go first (Ding et al., ICCV 2023, arXiv
    2308.04549, section 3.2, with the matching of Bolya et al., arXiv 2210.09461).

    Args:
        metric: keys (B, N, d), float16, bfloat16, float32 or float64, not normalised; N, d >= 1.
        backend: as in `bipartite_match`.

    Returns:
        `FrameOrder`. Not differentiable.

    Raises: as `bipartite_match`.

    >>> import torch, vidops
    >>> keys = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    >>> vidops.first_frame_order(keys).order.tolist()
    [[1, 3, 2, 0]]
    """
    found = bipartite_match(metric, backend=backend)
    odd = torch.arange(1, metric.shape[1], 2, device=metric.device).expand(metric.shape[0], -1)
    return FrameOrder(torch.cat([odd, 2 * found.order], 1), found.similarity)


COMPOSITIONS[first_frame_order] = ("bipartite_match",)
