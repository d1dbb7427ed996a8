"""Hub of `vidops.sta_score`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from vidops import _native
from vidops._registry import Impl, Op, resolve
from vidops.ops import _backends, _checks, _tokens
from vidops.reference.sta_score import sta_score as reference

# Of a group: what a block of the CUDA kernel orders in shared memory. Doubles take twice as much.
MAX_TOKENS, MAX_DOUBLES = 4096, 2048


class StaScores(NamedTuple):
    """What `sta_score` decides and from what: `keep` (B, T, K) int64, indices inside the own group, in the order of
    the output; `activation`, `acc`, `score` (B, T, N), zero in acc and score for the first processed group; of that
    group `first_order` (B, N) int64, whose first K it keeps, and `first_similarity` (B, ceil(N/2))."""

    keep: torch.Tensor
    activation: torch.Tensor
    acc: torch.Tensor
    score: torch.Tensor
    first_order: torch.Tensor
    first_similarity: torch.Tensor


def sta_score(
    x: torch.Tensor,
    metric: torch.Tensor,
    num_frames: int,
    r: int,
    reverse: bool = False,
    *,
    first_frame_pruned: bool = False,
    backend: str | None = None,
) -> StaScores:
    """Which tokens of a clip semantic-aware temporal accumulation keeps, and why.

    Groups are processed in temporal order, or backward. In the first one the even tokens that are most like an odd
    one are dropped (`first_frame_order`). In every other one ``acc = softmax(cos(m_t, m_p)) s``, the softmax over the
    tokens of this group, p the tokens the group before keeps, s what they have accumulated (as a share, all one for
    the tokens of the first group), and ``score = acc (1 - activation)``, the activation being ``sum_c |x_c|`` from 0
    to 1 over the group: the r highest scores are dropped (Eqs. 3 to 5 of Ding et al., ICCV 2023, arXiv 2308.04549, as
    in the published code).

    Args:
        x: tokens (B, T N, D), frame-major, float16, bfloat16, float32 or float64; T, N, D >= 1.
        metric: keys (B, T N, d) averaged over heads, not normalised, dtype and device of `x`; d >= 1.
        num_frames: T, the groups; it divides the tokens.
        r: tokens to drop from every group, 0 <= r < N.
        reverse: process the last group first.
        first_frame_pruned: as Algorithm 1 of the paper, refer in the second group only to those K tokens of the first
            that it keeps, each with weight 1 / K; default: to all of them with weight 1, as the published code.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        `StaScores`, K = N - r; figures are float64 for float64 tokens, else float32. Not differentiable: decisions
        are constants.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank, shape or range.
        BackendError: no backend, or not the one asked for, can run the call; or a gradient is needed (detach first).

    Equal scores go by index, equal similarities by position: a duplicate that comes first is kept first. A group
    whose tokens are all equally active has activation 0, a key of zeros has cosine 0 with every other. What is not
    finite becomes NaN and spreads as in arithmetic, and a group without scores keeps its first tokens: a key takes the
    scores of its group and of those after it, a NaN in a token those of its group, an infinity in a token its own
    score, which sorts last. Halves are read as they are and computed in float32.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> x = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [1.0], [2.0], [3.0], [4.0]]])
    >>> vidops.sta_score(x, torch.ones(1, 8, 2), num_frames=2, r=2).keep.tolist()  # equal keys: activation decides
    [[[1, 3], [3, 2]]]
    """
    check(x, metric, num_frames, r, reverse, first_frame_pruned)
    name = resolve(OP, backend, shown(x, num_frames), metric)
    return StaScores(*OP.call(x, metric, num_frames, r, reverse, first_frame_pruned, name))


def shown(x: torch.Tensor, num_frames: int) -> torch.Tensor:
    """What backends refuse by: groups only where one is too large for some."""
    most = MAX_DOUBLES if x.dtype == torch.float64 else MAX_TOKENS
    return x.unflatten(1, (num_frames, -1)) if x.shape[1] > most * num_frames else x


def check(x: Any, metric: Any, num_frames: Any, r: Any, reverse: Any, first_frame_pruned: Any) -> None:
    _tokens.keys("x", x)
    _tokens.keys("metric", metric)
    _checks.same("metric", metric, "x", x)
    batch, total = x.shape[:2]
    _checks.shape("metric", metric, (batch, total, metric.shape[2]), "(batch of x, tokens of x, channels)")
    _checks.integer("num_frames", num_frames, 1)
    if total % num_frames:
        raise ValueError(f"num_frames: expected a divisor of the {total} tokens, got {num_frames}")
    if _checks.integer("r", r, 0) >= total // num_frames:
        raise ValueError(f"r: expected fewer than the {total // num_frames} tokens of a group, got {r}")
    _tokens.flag("reverse", reverse)
    _tokens.flag("first_frame_pruned", first_frame_pruned)


def fake(
    x: Any, metric: Any, num_frames: Any, r: Any, reverse: bool, first_frame_pruned: bool, backend: str
) -> Any:
    batch, tokens = x.shape[0], x.shape[1] // num_frames
    dtype = _checks.accumulation_dtype(x.dtype)
    figures = [x.new_empty(batch, num_frames, tokens, dtype=dtype) for _ in range(3)]
    return (
        x.new_empty(batch, num_frames, tokens - r, dtype=torch.int64),
        *figures,
        x.new_empty(batch, tokens, dtype=torch.int64),
        x.new_empty(batch, (tokens + 1) // 2, dtype=dtype),
    )


def _cpu_forward(
    x: torch.Tensor, metric: torch.Tensor, num_frames: int, r: int, reverse: bool, first_frame_pruned: bool
) -> tuple[torch.Tensor, ...]:
    results = fake(x, metric, num_frames, r, reverse, first_frame_pruned, "")
    views = [_native.view(t) for t in (*_backends.upcast(x, metric), *results)]
    _native.C.sta_score_forward_cpu(*views, reverse, first_frame_pruned, _native.threads())
    return results


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import sta_score as kernel

    return kernel.forward(*args)


def _cuda_forward(
    x: torch.Tensor, metric: torch.Tensor, num_frames: int, r: int, reverse: bool, first_frame_pruned: bool
) -> tuple[torch.Tensor, ...]:
    results = fake(x, metric, num_frames, r, reverse, first_frame_pruned, "")
    device, stream = _native.stream(x)
    sizes = x.shape[0], num_frames, x.shape[1] // num_frames, metric.shape[2]
    workspace = results[0].new_empty(_native.C.sta_score_workspace_cuda(*sizes, x.dtype == torch.float64))
    views = [_native.view(t) for t in (x, metric, *results, workspace)]
    _native.C.sta_score_forward_cuda(*views, reverse, first_frame_pruned, device, stream)
    return results


def _large(tensors: Sequence[torch.Tensor]) -> str | None:
    if tensors[0].dim() != 4:
        return None
    return f"a block sorts at most {MAX_TOKENS} tokens of a group, {MAX_DOUBLES} in float64"


def _cuda_refuses(tensors: Sequence[torch.Tensor]) -> str | None:
    return _backends.cuda_refuses_in_any_dtype(tensors) or _large(tensors)


OP = Op(
    "sta_score",
    schema="(Tensor x, Tensor metric, SymInt num_frames, SymInt r, bool reverse, bool first_frame_pruned, str backend)"
    " -> (Tensor keep, Tensor activation, Tensor acc, Tensor score, Tensor first_order, Tensor first_similarity)",
    fake=fake,
    # Not float32 under autocast: the kernels read halves, and compute in float32.
    autocast_fp32=False,
    impls=(
        Impl("reference", reference, None, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, None, _backends.cpu_refuses),
        Impl("triton", _triton_forward, None, _backends.triton_refuses),
        Impl("cuda", _cuda_forward, None, _cuda_refuses),
    ),
)
