"""Hub of `vidops.sta_prune`: the rows of `sta_score` and `gather_tokens`, and one kernel on CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vidops import _native
from vidops._registry import BACKENDS, Backward, Impl, Op, resolve
from vidops.ops import _backends
from vidops.ops import gather_tokens as gathering
from vidops.ops import sta_score as scoring
from vidops.ops.sta_score import StaScores, check, shown, sta_score


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
    As `sta_score` decides; the kept tokens are gathered, frames in temporal order, inside a frame the least redundant
    first (not in raster order). Kept tokens are not changed.

    Args:
        x: tokens (B, T N, D), frame-major, as a transformer block puts them out; float16, bfloat16, float32 or
            float64; T, N, D >= 1.
        metric: keys of that block (B, T N, d), averaged over heads; dtype and device of `x`.
        num_frames: T, the groups; later calls of the published schedule take two, then four frames as one group.
        r: tokens to drop from every group, 0 <= r < N. Nothing is dropped, and nothing moved, for 0.
        reverse: process the last group first; the output stays in temporal order.
        first_frame_pruned: as Algorithm 1 of the paper; see `sta_score`.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        `Pruned`, K = N - r; differentiable in `x` (dropped tokens have gradient zero), the decisions are constants.

    Raises: as `sta_score`.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]).view(1, 8, 1)
    >>> vidops.sta_prune(x, torch.ones(1, 8, 2), num_frames=2, r=2).x.flatten().tolist()
    [2.0, 4.0, 4.0, 3.0]
    """
    check(x, metric, num_frames, r, reverse, first_frame_pruned)
    batch, tokens = x.shape[0], x.shape[1] // num_frames
    if r == 0:
        scores = sta_score(
            x.detach(), metric.detach(), num_frames, 0, reverse, first_frame_pruned=first_frame_pruned, backend=backend
        )
        return Pruned(x, torch.arange(tokens, device=x.device).expand(batch, num_frames, tokens), scores)
    metric = metric.detach()
    name = resolve(OP, backend, shown(x, num_frames), metric)
    kept, *scores = OP.call(x, metric, num_frames, r, reverse, first_frame_pruned, name)
    return Pruned(kept, scores[0], StaScores(*scores))


def _new_kept(x: Any, num_frames: Any, r: Any) -> Any:
    return x.new_empty(x.shape[0], x.shape[1] - num_frames * r, x.shape[2])


def _fake(x: Any, metric: Any, num_frames: Any, r: Any, *options: Any) -> Any:
    return _new_kept(x, num_frames, r), *scoring.fake(x, metric, num_frames, r, *options)


def _fake_backward(grad: Any, keep: Any, tokens: Any, backend: str) -> Any:
    return grad.new_empty(grad.shape[0], keep.shape[1] * tokens, grad.shape[2])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, num_frames, *_, ctx.backend = inputs
    _, keep, *figures = output
    ctx.tokens = x.shape[1] // num_frames
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(keep, *figures)
    ctx.save_for_backward(keep)


def _gradient(ctx: Any, grad: Any, *_: Any) -> Any:
    (keep,) = ctx.saved_tensors
    if grad is not None:
        grad = torch.ops.vidops.sta_prune_backward(grad, keep, ctx.tokens, ctx.backend)
    return grad, *(None,) * 6


def _cpu_forward(x: torch.Tensor, metric: torch.Tensor, num_frames: int, r: int, *options: bool) -> Any:
    results = _fake(x, metric, num_frames, r, *options, "")
    kept, *scores = results
    views = [_native.view(t) for t in (x, kept, *_backends.upcast(x, metric), *scores)]
    _native.C.sta_prune_forward_cpu(*views, *options, _native.threads())
    return results


def _forward(score: Callable[..., Any], gather: Callable[..., Any]) -> Callable[..., Any]:
    """Where the two are kernels of their own."""

    def forward(x: torch.Tensor, metric: torch.Tensor, num_frames: int, *options: Any) -> Any:
        keep, *figures = score(x, metric, num_frames, *options)
        groups = x.unflatten(1, (num_frames, -1)).flatten(0, 1)
        kept = gather(groups, keep.flatten(0, 1))
        return kept.view(x.shape[0], num_frames * keep.shape[2], x.shape[2]), keep, *figures

    return forward


def _backward(scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def backward(grad: torch.Tensor, keep: torch.Tensor, tokens: int) -> torch.Tensor:
        batch, groups, kept = keep.shape
        rows = scatter(grad.reshape(batch * groups, kept, grad.shape[2]), keep.flatten(0, 1), tokens)
        return rows.view(batch, groups * tokens, grad.shape[2])

    return backward


def _impl(backend: str) -> Impl:
    score, rows = scoring.OP.rows[backend], gathering.OP.rows[backend]
    assert rows.backward is not None
    forward = _cpu_forward if backend == "cpu" else _forward(score.forward, rows.forward)
    return Impl(backend, forward, _backward(rows.backward), score.refuses)


OP = Op(
    "sta_prune",
    schema="(Tensor x, Tensor metric, SymInt num_frames, SymInt r, bool reverse, bool first_frame_pruned, str backend)"
    " -> (Tensor kept, Tensor keep, Tensor activation, Tensor acc, Tensor score, Tensor first_order,"
    " Tensor first_similarity)",
    fake=_fake,
    # As `sta_score` and `gather_tokens`.
    autocast_fp32=False,
    backward=Backward(
        schema="(Tensor grad, Tensor keep, SymInt tokens, str backend) -> Tensor",
        fake=_fake_backward,
        setup_context=_setup_context,
        gradient=_gradient,
    ),
    impls=tuple(_impl(backend) for backend in BACKENDS),
)
