"""Hub of `vidops.assign_clusters`."""

from __future__ import annotations

from typing import Any

import torch

from vidops import _native
from vidops._registry import Impl, Op, resolve
from vidops.ops import _backends, _checks
from vidops.ops.assign_rows import checked_centroids
from vidops.reference.assign_clusters import assign_clusters as reference


def assign_clusters(
    q: torch.Tensor,
    k: torch.Tensor,
    centroids: torch.Tensor,
    *,
    scale: float | None = None,
    lse: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Nearest centroid, in symmetrised KL, of every token's head-averaged attention row.

    ``label_n = argmin_k D(X_k, P_n)`` with P of `attention_head_mean`, the smallest k on exact ties (Eq. E4 of
    Ding et al., ECCV 2024, arXiv 2311.17893). Keys are streamed: nothing of size N x M is written.

    Args:
        q: queries (H, N, D), float16, bfloat16, float32 or float64.
        k: keys (H, M, D), dtype and device of `q`; M >= 1.
        centroids: X (K, M), K >= 1, float64 for float64 queries, else float32.
        scale: factor on the logits (default ``D ** -0.5``).
        lse: log-sum-exps (H, N) of `attention_head_mean`, when already known: saves one pass over the keys.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        Labels (N,) int64. Not differentiable.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape, no key, head, channel or centroid.
        BackendError: no backend, or not the one asked for, can run the call; or a gradient is needed.

    A centroid with NaN never wins; a token with a NaN attention row gets label 0.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> q, k = torch.randn(2, 5, 4), torch.randn(2, 7, 4)
    >>> rows = vidops.attention_head_mean(q, k)
    >>> vidops.assign_clusters(q, k, rows[[3, 1]])[[1, 3]].tolist()
    [1, 0]
    """
    _checks.attention_pair(q, k, rank=(3, 3))
    factor = _checks.scale(scale, q.shape[-1])
    centroids, log_centroids = checked_centroids(centroids, q, k.shape[-2], "keys of k")
    if lse is None:
        lse = centroids.new_empty(0)
    else:
        _checks.tensor("lse", lse, rank=2)
        _checks.same("lse", lse, "centroids", centroids)
        _checks.shape("lse", lse, tuple(q.shape[:2]), "(heads, queries)")
    name = resolve(OP, backend, q, k, centroids)
    return OP.call(q, k, lse, centroids, log_centroids, factor, name)


def _fake(q: Any, k: Any, lse: Any, centroids: Any, log_centroids: Any, scale: float, backend: str) -> Any:
    return q.new_empty(q.shape[1], dtype=torch.int64)


def _cpu_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    centroids: torch.Tensor,
    log_centroids: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    q, k = _backends.upcast(q, k)
    label = _fake(q, k, lse, centroids, log_centroids, scale, "")
    views = [_native.view(t) for t in (q, k, lse, centroids, log_centroids, label)]
    _native.C.assign_clusters_forward_cpu(*views, scale, _native.threads())
    return label


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import assign_clusters as kernel

    return kernel.forward(*args)


def _cuda_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    centroids: torch.Tensor,
    log_centroids: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    label = _fake(q, k, lse, centroids, log_centroids, scale, "")
    single, automatic = q.dtype == torch.float32, 0  # as many rows at a time as the launcher sees fit
    words = _native.C.assign_clusters_workspace_cuda(*q.shape, k.shape[1], centroids.shape[0], single, automatic)
    workspace = label.new_empty(words)
    views = [_native.view(t) for t in (q, k, lse, centroids, log_centroids, label, workspace)]
    _native.C.assign_clusters_forward_cuda(*views, scale, automatic, *_native.stream(q))
    return label


OP = Op(
    "assign_clusters",
    schema="(Tensor q, Tensor k, Tensor lse, Tensor centroids, Tensor log_centroids, float scale, str backend)"
    " -> Tensor",
    fake=_fake,
    # Not float32 under autocast: labels follow the precision of the queries they are given.
    autocast_fp32=False,
    impls=(
        Impl("reference", reference, None, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, None, _backends.cpu_refuses),
        Impl("triton", _triton_forward, None, _backends.triton_refuses),
        Impl("cuda", _cuda_forward, None, _backends.cuda_refuses),
    ),
)
