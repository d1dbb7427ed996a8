"""Hub of `vidops.label_propagation`, and `vidops.propagate_labels`, which runs it over a clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch

from vidops import _native
from vidops._registry import COMPOSITIONS, Impl, Op, resolve
from vidops.ops import _backends, _checks
from vidops.reference.label_propagation import label_propagation as reference

MAX_TOP_K = 128  # what a kernel keeps in registers per query


class Matches(NamedTuple):
    """Whose labels a query took: `positions` (N, k) int64, as indices into the context's (F, N), best first, -1 where
    there is none; `weights` (N, k), whose rows sum to one."""

    positions: torch.Tensor
    weights: torch.Tensor


@overload
def label_propagation(
    query: torch.Tensor,
    context: torch.Tensor,
    labels: torch.Tensor,
    grid: tuple[int, int],
    *,
    top_k: int = 7,
    radius: float = 7.0,
    temperature: float = 0.2,
    unrestricted: int = 1,
    repeats: int = 0,
    return_matches: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def label_propagation(
    query: torch.Tensor,
    context: torch.Tensor,
    labels: torch.Tensor,
    grid: tuple[int, int],
    *,
    top_k: int = 7,
    radius: float = 7.0,
    temperature: float = 0.2,
    unrestricted: int = 1,
    repeats: int = 0,
    return_matches: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, Matches]: ...
def label_propagation(
    query: torch.Tensor,
    context: torch.Tensor,
    labels: torch.Tensor,
    grid: tuple[int, int],
    *,
    top_k: int = 7,
    radius: float = 7.0,
    temperature: float = 0.2,
    unrestricted: int = 1,
    repeats: int = 0,
    return_matches: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, Matches]:
    """Soft labels of one frame from its most similar context positions.

    ``label_n = sum_i w_i labels_i`` over the k context positions (f, m) of largest affinity ``<context_fm, query_n>``,
    w their softmax at a temperature; in all but the first `unrestricted` frames only positions at a Euclidean grid
    distance below `radius` take part (label propagation of sheet 5, Qian et al., ICCV 2023, arXiv 2308.09951).
    Affinities are not written: nothing of size N x F N exists, and restricted frames are read within the radius only.

    The choice: larger affinity first, then smaller index ``f * N + m``. An affinity is one sum per pair of vectors,
    accumulated in float32 (float64 for float64 features), in an order that its place does not change: equal vectors
    tie exactly, on every backend but the reference, whose BLAS need not keep that. Affinities nearer to each other
    than their rounding may be ordered differently by two backends, so that a label can differ by one weight where the
    k-th and the next affinity are that near; nothing else can. Compare labels, and the matches only where they are
    apart.

    Args:
        query: features (N, C) of the frame, float16, bfloat16, float32 or float64; taken as they are, so normalise
            them over the channels first if affinities are to be cosines.
        context: features (F, N, C) of the context frames, dtype and device of `query`; F >= 1, F * N < 2^31.
        labels: soft labels (F, N, L) of the context, L >= 1, float64 for float64 features, else float32 (halves are
            widened).
        grid: (h, w), the places of the N = h * w positions in row-major order; the same for all frames.
        top_k: k, 1 to 128; fewer are taken where fewer take part.
        radius: in grid units, > 0; positions at a distance of `radius` or more do not take part.
        temperature: > 0 (at least the smallest normal float32).
        unrestricted: number of leading context frames without a radius, 0 to F.
        repeats: of the first context frame, further copies under the radius: they count as positions of their own,
            right after the one they copy, but are neither stored nor compared again.
        return_matches: also return `Matches`. The copies that `repeats` adds to a position are one match with it.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` (no float64) or ``"cuda"``; default: the first that can run.

    Returns:
        Labels (N, L), dtype of `labels` (float32 for halves); with `return_matches` also the matches. Not
        differentiable.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank, shape or range.
        BackendError: no backend, or not the one asked for, can run the call; or a gradient is needed.

    Affinities that are NaN or -inf are never chosen; a query without any other gets labels NaN, and so does one with
    an affinity of +inf.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> context = torch.eye(4).expand(2, 4, 4)
    >>> labels = torch.tensor([[0.0], [1.0], [2.0], [3.0]]).expand(2, 4, 1)
    >>> vidops.label_propagation(torch.eye(4)[[3, 0, 1, 2]], context, labels, (2, 2), top_k=1).squeeze(1).tolist()
    [3.0, 0.0, 1.0, 2.0]
    """
    _check_features(query, context)
    frames, tokens, _ = context.shape
    labels = _checked_labels("labels", labels, query, rank=3)
    _checks.shape("labels", labels, (frames, tokens, labels.shape[2]), "(frames, positions, labels)")
    height, width = _checked_grid(grid, tokens)
    _check_choice(top_k, radius, temperature)
    if _checks.integer("unrestricted", unrestricted, 0) > frames:
        raise ValueError(f"unrestricted: expected at most the {frames} context frames, got {unrestricted}")
    _checks.integer("repeats", repeats, 0)
    name = resolve(OP, backend, query, context, labels)
    out, index, weight = OP.call(
        query, context, labels, height, width, float(radius), top_k, float(temperature), unrestricted, repeats, name
    )
    return (out, Matches(index, weight)) if return_matches else out


def _check_features(query: Any, context: Any) -> None:
    _checks.tensor("query", query, rank=2)
    _checks.tensor("context", context, rank=3)
    _checks.same("context", context, "query", query)
    if query.shape[0] == 0 or query.shape[1] == 0:
        raise ValueError(f"query: expected at least one position and channel, got shape {tuple(query.shape)}")
    frames = context.shape[0]
    _checks.shape("context", context, (frames, *query.shape), "(frames, positions of query, channels)")
    if frames == 0:
        raise ValueError("context: expected at least one frame, got none")
    if frames * query.shape[0] >= 2**31:
        raise ValueError(f"context: expected fewer than 2^31 positions, got {frames} x {query.shape[0]}")


def _checked_labels(name: str, labels: Any, features: torch.Tensor, rank: int) -> torch.Tensor:
    _checks.tensor(name, labels, rank=rank)
    if labels.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one label, got shape {tuple(labels.shape)}")
    labels = labels if labels.dtype in (torch.float32, torch.float64) else labels.float()
    expected = _checks.accumulation_dtype(features.dtype)
    if labels.dtype != expected:
        raise TypeError(f"{name}: expected dtype {expected} with features of {features.dtype}, got {labels.dtype}")
    if labels.device != features.device:
        raise ValueError(f"{name}: expected device {features.device} like the features, got {labels.device}")
    return labels


def _checked_grid(grid: Any, tokens: int) -> tuple[int, int]:
    if not isinstance(grid, Sequence) or isinstance(grid, str) or len(grid) != 2:
        raise TypeError(f"grid: expected a pair (height, width), got {grid!r}")
    height, width = (_checks.integer("grid", side, 1) for side in grid)
    if height * width != tokens:
        raise ValueError(f"grid: expected height * width = {tokens} positions, got {height} x {width}")
    return height, width


def _check_choice(top_k: Any, radius: Any, temperature: Any) -> None:
    if _checks.integer("top_k", top_k, 1) > MAX_TOP_K:
        raise ValueError(f"top_k: expected at most {MAX_TOP_K}, got {top_k}")
    _checks.number("radius", radius, positive=True)
    if _checks.number("temperature", temperature, positive=True) < torch.finfo(torch.float32).tiny:
        raise ValueError(f"temperature: expected at least the smallest normal float32, got {temperature}")


def propagate_labels(
    features: torch.Tensor,
    first_labels: torch.Tensor,
    *,
    n_context: int = 20,
    top_k: int = 7,
    radius: float = 7.0,
    temperature: float = 0.2,
    backend: str | None = None,
) -> torch.Tensor:
    """Labels of a whole clip from those of its first frame, one `label_propagation` per frame.

    The context of a frame is the first frame, unrestricted, and the `n_context` frames before it, under the radius;
    before the clip the first frame is repeated. Predictions are the soft labels of later contexts (label propagation
    of sheet 5, Qian et al., ICCV 2023, arXiv 2308.09951). The repeated frames are counted, not computed.

    Args:
        features: (T, h, w, C), float16, bfloat16, float32 or float64, normalised over the channels by the caller
            (for (T, C, h, w) pass ``x.movedim(1, -1)``); T, h, w, C >= 1.
        first_labels: soft labels (h, w, L) of the first frame, L >= 1, float64 for float64 features, else float32
            (halves are widened).
        n_context: frames before each frame in its context, >= 0.
        top_k, radius, temperature: as in `label_propagation`. The paper's: 7, 7, 0.2 for features at a sixteenth of
            the image, 28, 35, 0.2 at an eighth.
        backend: forced on every frame; default: the first that can run.

    Returns:
        Soft labels (T, h, w, L), those of the first frame as given. Not differentiable.

    Raises: as `label_propagation`.

    >>> import torch, vidops
    >>> step = torch.eye(3).view(3, 1, 3)
    >>> clip = torch.stack([step, step.roll(1, 0)])  # everything moves down by one
    >>> vidops.propagate_labels(clip, torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1), top_k=1)[1].flatten().tolist()
    [2.0, 0.0, 1.0]
    """
    _checks.tensor("features", features, rank=4)
    if features.numel() == 0:
        raise ValueError(f"features: expected at least one frame, position and channel, got {tuple(features.shape)}")
    frames, height, width, channels = features.shape
    first = _checked_labels("first_labels", first_labels, features, rank=3)
    _checks.shape("first_labels", first, (height, width, first.shape[2]), "(height, width, labels)")
    _checks.integer("n_context", n_context, 0)
    _check_choice(top_k, radius, temperature)
    rows = features.reshape(frames, height * width, channels)
    result = first.new_empty(frames, height * width, first.shape[2])
    result[0] = first.flatten(0, 1)
    # A context is a slice: from some frame on, the first one is moved along in front of the frames before the target,
    # into the place of one that no context needs any more.
    moves = frames > n_context + 2
    stored, soft = (rows.clone(), result.clone()) if moves else (rows, result)
    for t in range(1, frames):
        start = max(t - n_context, 1) - 1
        if start > 0:
            stored[start], soft[start] = rows[0], result[0]
        result[t] = label_propagation(
            rows[t], stored[start:t], soft[start:t], (height, width), top_k=top_k, radius=radius,
            temperature=temperature, repeats=max(0, n_context - t + 1), backend=backend,
        )  # fmt: skip
        soft[t] = result[t]
    return result.view(frames, height, width, -1)


COMPOSITIONS[propagate_labels] = ("label_propagation",)


def squared_limit(radius: float, height: int, width: int) -> int:
    """The smallest squared grid distance that is outside of `radius`: kernels compare integers."""
    beyond = height * height + width * width
    if radius >= math.sqrt(beyond):
        return beyond
    limit = max(1, math.ceil(radius * radius))
    # The square of a root is not the number again; the definition compares roots.
    while math.sqrt(limit - 1) >= radius:
        limit -= 1
    while math.sqrt(limit) < radius:
        limit += 1
    return limit


def _fake(
    query: Any,
    context: Any,
    labels: Any,
    height: Any,
    width: Any,
    radius: float,
    top_k: Any,
    temperature: float,
    unrestricted: Any,
    repeats: Any,
    backend: str,
) -> Any:
    return _new_results(query, labels, top_k)


def _new_results(query: Any, labels: Any, top_k: Any) -> tuple[Any, Any, Any]:
    tokens = query.shape[0]
    return (
        labels.new_empty(tokens, labels.shape[2]),
        labels.new_empty(tokens, top_k, dtype=torch.int64),
        labels.new_empty(tokens, top_k),
    )


def _cpu_forward(
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
) -> tuple[torch.Tensor, ...]:
    query, context = _backends.upcast(query, context)
    out, index, weight = _new_results(query, labels, top_k)
    views = [_native.view(t) for t in (query, context, labels, out, index, weight)]
    limit = squared_limit(radius, height, width)
    _native.C.label_propagation_forward_cpu(
        *views, width, limit, temperature, unrestricted, repeats, _native.threads()
    )
    return out, index, weight


def _triton_forward(
    query: torch.Tensor, context: torch.Tensor, labels: torch.Tensor, height: int, width: int, radius: float, *rest: Any
) -> Any:
    from vidops.kernels import label_propagation as kernel

    return kernel.forward(query, context, labels, height, width, squared_limit(radius, height, width), *rest)


def _triton_refuses(tensors: Sequence[torch.Tensor]) -> str | None:
    if tensors[0].dtype == torch.float64:
        return "float64 is not implemented in Triton: an affinity and its index share 64 bits"
    return _backends.triton_refuses(tensors)


def _cuda_forward(
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
) -> tuple[torch.Tensor, ...]:
    out, index, weight = _new_results(query, labels, top_k)
    device, stream = _native.stream(query)
    sizes = context.shape[0], query.shape[0], width, top_k, query.element_size()
    workspace = index.new_empty(_native.C.label_propagation_workspace_cuda(*sizes, device))
    views = [_native.view(t) for t in (query, context, labels, out, index, weight, workspace)]
    limit = squared_limit(radius, height, width)
    _native.C.label_propagation_forward_cuda(
        *views, width, limit, temperature, unrestricted, repeats, device, stream
    )
    return out, index, weight


OP = Op(
    "label_propagation",
    schema="(Tensor query, Tensor context, Tensor labels, SymInt height, SymInt width, float radius, SymInt top_k,"
    " float temperature, SymInt unrestricted, SymInt repeats, str backend) -> (Tensor labels, Tensor index,"
    " Tensor weight)",
    fake=_fake,
    # Not float32 under autocast: the choice follows the precision of the features it is given.
    autocast_fp32=False,
    impls=(
        Impl("reference", reference, None, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, None, _backends.cpu_refuses),
        Impl("triton", _triton_forward, None, _triton_refuses),
        Impl("cuda", _cuda_forward, None, _backends.cuda_refuses_in_any_dtype),
    ),
)
