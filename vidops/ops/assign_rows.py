"""Hub of `vidops.assign_rows`."""

from __future__ import annotations

from typing import Any

import torch

from vidops import _native
from vidops._registry import Impl, Op, resolve
from vidops.ops import _backends, _checks
from vidops.reference.assign_rows import assign_rows as reference


def assign_rows(
    p: torch.Tensor, centroids: torch.Tensor, *, log_p: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """Nearest centroid, in symmetrised KL, of every row of a given map.

    ``label_n = argmin_k D(X_k, p_n)``, the smallest k on exact ties (Eq. E4 of Ding et al., ECCV 2024,
    arXiv 2311.17893). `assign_clusters` does the same from queries and keys, without the map.

    Args:
        p: map (n, M), float16, bfloat16, float32 or float64 (halves are widened).
        centroids: X (K, M), K >= 1, same dtype and device.
        log_p: logarithm of `p`, when already known.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        Labels (n,) int64. Not differentiable.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape, no centroid, no column.
        BackendError: no backend, or not the one asked for, can run the call; or a gradient is needed.

    A centroid with NaN never wins; a row with NaN gets label 0.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> p = torch.tensor([[0.5, 0.5], [0.8, 0.2]])
    >>> vidops.assign_rows(p, torch.tensor([[0.9, 0.1], [0.4, 0.6]])).tolist()
    [1, 0]
    """
    p, log_p = _checks.map_and_log("p", p, log_p, rank=2)
    centroids, log_centroids = checked_centroids(centroids, p, p.shape[1], "columns of p")
    name = resolve(OP, backend, p, log_p, centroids)
    return OP.call(p, log_p, centroids, log_centroids, name)


def checked_centroids(
    centroids: Any, like: torch.Tensor, columns: int, meaning: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """X (K, columns) on the device of `like`, in accumulation dtype, with its logarithm."""
    centroids, log_centroids = _checks.map_and_log("centroids", centroids, None, rank=2)
    if centroids.dtype != _checks.accumulation_dtype(like.dtype):
        expected = _checks.accumulation_dtype(like.dtype)
        raise TypeError(f"centroids: expected dtype {expected}, got {centroids.dtype}")
    if centroids.device != like.device:
        raise ValueError(f"centroids: expected device {like.device}, got {centroids.device}")
    if centroids.shape[0] == 0 or centroids.shape[1] != columns:
        raise ValueError(f"centroids: expected shape (K >= 1, {meaning} = {columns}), got {tuple(centroids.shape)}")
    return centroids, log_centroids


def _fake(p: Any, log_p: Any, centroids: Any, log_centroids: Any, backend: str) -> Any:
    return p.new_empty(p.shape[0], dtype=torch.int64)


def _cpu_forward(
    p: torch.Tensor, log_p: torch.Tensor, centroids: torch.Tensor, log_centroids: torch.Tensor
) -> torch.Tensor:
    label = _fake(p, log_p, centroids, log_centroids, "")
    views = [_native.view(t) for t in (p, log_p, centroids, log_centroids, label)]
    _native.C.assign_rows_forward_cpu(*views, _native.threads())
    return label


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import assign_rows as kernel

    return kernel.forward(*args)


def _cuda_forward(
    p: torch.Tensor, log_p: torch.Tensor, centroids: torch.Tensor, log_centroids: torch.Tensor
) -> torch.Tensor:
    label = _fake(p, log_p, centroids, log_centroids, "")
    automatic = 0  # as many rows at a time as the launcher sees fit
    words = _native.C.assign_rows_workspace_cuda(*p.shape, centroids.shape[0], automatic)
    views = [_native.view(t) for t in (p, log_p, centroids, log_centroids, label, label.new_empty(words))]
    _native.C.assign_rows_forward_cuda(*views, automatic, *_native.stream(p))
    return label


OP = Op(
    "assign_rows",
    schema="(Tensor p, Tensor log_p, Tensor centroids, Tensor log_centroids, str backend) -> Tensor",
    fake=_fake,
    impls=(
        Impl("reference", reference, None, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, None, _backends.cpu_refuses),
        Impl("triton", _triton_forward, None, _backends.triton_refuses),
        Impl("cuda", _cuda_forward, None, _backends.cuda_refuses),
    ),
)
