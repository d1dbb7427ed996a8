"""Hub of `vidops.segment_mean`."""

from __future__ import annotations

from typing import Any

import torch

from vidops import _native
from vidops._registry import Impl, Op, resolve
from vidops.ops import _backends, _checks
from vidops.reference.segment_mean import segment_mean as reference


def segment_mean(
    x: torch.Tensor, label: torch.Tensor, num_segments: int, *, backend: str | None = None
) -> torch.Tensor:
    """Plain mean of the rows of every segment, added in row order: the same bits on every run.

    Sheet 2.5 step 3 (Ding et al., ECCV 2024, arXiv 2311.17893): a cluster is represented by the unweighted mean
    of its members.

    Args:
        x: rows (n, M), float16, bfloat16, float32 or float64 (halves are widened).
        label: segment of each row (n,) int64 in [0, num_segments); other values are an error on CPU tensors, and
            not checked on CUDA tensors (that would be a host sync): such rows are left out there.
        num_segments: K >= 0.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        Means (K, M), float64 for float64 rows, else float32; a segment without rows is a row of zeros.
        Not differentiable.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape, a label out of range.
        BackendError: no backend, or not the one asked for, can run the call; or a gradient is needed.

    NaN in a row makes its segment's column NaN.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> vidops.segment_mean(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]), 2).tolist()
    [[2.0], [5.0]]
    """
    _checks.tensor("x", x, rank=2)
    _checks.tensor("label", label, rank=1, floating=False)
    if label.dtype != torch.int64:
        raise TypeError(f"label: expected int64, got {label.dtype}")
    _checks.shape("label", label, (x.shape[0],), "(rows of x,)")
    if label.device != x.device:
        raise ValueError(f"label: expected device {x.device} like x, got {label.device}")
    num_segments = _checks.integer("num_segments", num_segments, 0)
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    name = resolve(OP, backend, x)
    # The native CPU code checks each label as it counts it.
    if label.device.type == "cpu" and name != "cpu" and not torch.compiler.is_compiling() and label.numel():
        low, high = torch.aminmax(label)
        if low < 0 or high >= num_segments:
            raise ValueError(f"label: expected values in [0, {num_segments}), got {int(low)} to {int(high)}")
    return OP.call(x, label, num_segments, name)


def _fake(x: Any, label: Any, num_segments: Any, backend: str) -> Any:
    return x.new_empty(num_segments, x.shape[1])


def _cpu_forward(x: torch.Tensor, label: torch.Tensor, num_segments: int) -> torch.Tensor:
    mean = _fake(x, label, num_segments, "")
    _native.C.segment_mean_forward_cpu(*(_native.view(t) for t in (x, label, mean)), _native.threads())
    return mean


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import segment_mean as kernel

    return kernel.forward(*args)


def _cuda_forward(x: torch.Tensor, label: torch.Tensor, num_segments: int) -> torch.Tensor:
    mean = _fake(x, label, num_segments, "")
    workspace = label.new_empty(_native.C.segment_mean_workspace_cuda(x.shape[0], num_segments))
    views = [_native.view(t) for t in (x, label, mean, workspace)]
    _native.C.segment_mean_forward_cuda(*views, *_native.stream(x))
    return mean


OP = Op(
    "segment_mean",
    schema="(Tensor x, Tensor label, SymInt num_segments, str backend) -> Tensor",
    fake=_fake,
    impls=(
        Impl("reference", reference, None, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, None, _backends.cpu_refuses),
        Impl("triton", _triton_forward, None, _backends.triton_refuses),
        Impl("cuda", _cuda_forward, None, _backends.cuda_refuses),
    ),
)
