"""`vidops.sta_prune`: a composition of `sta_score` and `gather_tokens`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vidops._registry import COMPOSITIONS
from vidops.ops.gather_tokens import gather_tokens
from vidops.ops.sta_score import StaScores, check, sta_score


class Pruned(NamedTuple):
    """`x` (B, T K, D), the kept tokens; `keep` (B, T, K) int64, the index of each inside its own group; `scores`,
    all that `sta_score` found."""

    x: torch.Tensor
    keep: torch.Tensor
    scores: StaScores


def sta_prune(
    x: torch.Tensor,
    metric: torch.Tensor,
    num_frames: int,
    r: int,
    reverse: bool = False,
    *,
    first_frame_pruned: bool = False,
    backend: str | None = None,
) -> Pruned:
    """Drops the r tokens of every frame that the frames before, and the tokens' own activation, make redundant.

    Semantic-aware temporal accumulation of Ding et al., ICCV 2023 (arXiv 2308.04549), as in its published code:
    `sta_score` decides, and the kept tokens are gathered, frames in temporal order, inside a frame the least redundant
    first (not in raster order). Kept tokens are not changed.

    Args:
        x: tokens (B, T N, D), frame-major, as a transformer block puts them out; float16, bfloat16, float32 or
            float64; T, N, D >= 1.
        metric: keys of that block (B, T N, d), averaged over heads; dtype and device of `x`.
        num_frames: T, the groups; later calls of the published schedule take two, then four frames as one group.
        r: tokens to drop from every group, 0 <= r < N. Nothing is dropped, and nothing moved, for 0.
        reverse: process the last group first; the output stays in temporal order.
        first_frame_pruned: as Algorithm 1 of the paper; see `sta_score`.
        backend: forced on both ops; default: the first that can run.

    Returns:
        `Pruned`, K = N - r; differentiable in `x` (dropped tokens have gradient zero), the decisions are constants.

    Raises: as `sta_score`.

    >>> import torch, vidops
    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]).view(1, 8, 1)
    >>> vidops.sta_prune(x, torch.ones(1, 8, 2), num_frames=2, r=2).x.flatten().tolist()
    [2.0, 4.0, 4.0, 3.0]
    """
    check(x, metric, num_frames, r, reverse, first_frame_pruned)
    scores = sta_score(
        x.detach(), metric.detach(), num_frames, r, reverse, first_frame_pruned=first_frame_pruned, backend=backend
    )
    if r == 0:
        tokens = x.shape[1] // num_frames
        keep = torch.arange(tokens, device=x.device).expand(x.shape[0], num_frames, tokens)
        return Pruned(x, keep, scores)
    kept = gather_tokens(x.unflatten(1, (num_frames, -1)), scores.keep, backend=backend)
    return Pruned(kept.flatten(1, 2), scores.keep, scores)


COMPOSITIONS[sta_prune] = ("sta_score", "gather_tokens")
