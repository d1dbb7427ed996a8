"""Hub of `vidops.neighbour_mean`."""

from __future__ import annotations

from typing import Any

import torch

from vidops import _native, bits
from vidops._registry import Impl, Op, resolve
from vidops.ops import _backends, _checks
from vidops.reference.neighbour_mean import neighbour_mean as reference


def neighbour_mean(adjacency: torch.Tensor, p: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Normalised sum of the neighbouring rows of every row.

    ``S_i = sum_j A_ij p_j``, divided by its own total (Eq. E3 of Ding et al., ECCV 2024, arXiv 2311.17893).

    Args:
        adjacency: bit rows (n, ceil(n/64)) int64, see `symmetric_kl_adjacency`; bits beyond n must be zero.
        p: map (n, M), float16, bfloat16, float32 or float64 (halves are widened), on the same device.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        S (n, M), float64 for float64 maps, else float32. A row without neighbours is NaN (0/0), which a
        reflexive adjacency cannot have. Not differentiable.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank, shape or device.
        BackendError: no backend, or not the one asked for, can run the call; or a gradient is needed.

    `p` must be finite: a NaN or infinity makes its column of S undefined, in neighbours and others alike.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> vidops.neighbour_mean(torch.tensor([[3], [2]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    bits.check_adjacency("adjacency", adjacency)
    _checks.tensor("p", p, rank=2)
    if p.shape[0] != adjacency.shape[0]:
        raise ValueError(f"p: expected {adjacency.shape[0]} rows like adjacency, got shape {tuple(p.shape)}")
    if p.device != adjacency.device:
        raise ValueError(f"p: expected device {adjacency.device} like adjacency, got {p.device}")
    p = p.to(_checks.accumulation_dtype(p.dtype))
    return OP.call(adjacency, p, resolve(OP, backend, p))


def _fake(adjacency: Any, p: Any, backend: str) -> Any:
    return p.new_empty(p.shape)


def _cpu_forward(adjacency: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    mean = _fake(adjacency, p, "")
    views = [_native.view(t) for t in (adjacency, p, mean)]
    _native.C.neighbour_mean_forward_cpu(*views, _native.threads())
    return mean


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import neighbour_mean as kernel

    return kernel.forward(*args)


def _cuda_forward(adjacency: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    mean = _fake(adjacency, p, "")
    workspace = adjacency.new_empty(_native.C.neighbour_mean_workspace_cuda(p.shape[0]))
    views = [_native.view(t) for t in (adjacency, p, mean, workspace)]
    _native.C.neighbour_mean_forward_cuda(*views, *_native.stream(p))
    return mean


OP = Op(
    "neighbour_mean",
    schema="(Tensor adjacency, Tensor p, str backend) -> Tensor",
    fake=_fake,
    impls=(
        Impl("reference", reference, None, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, None, _backends.cpu_refuses),
        Impl("triton", _triton_forward, None, _backends.triton_refuses),
        Impl("cuda", _cuda_forward, None, _backends.cuda_refuses),
    ),
)
