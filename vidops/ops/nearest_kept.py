"""Hub of `vidops.nearest_kept`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vidops import _native
from vidops._registry import Impl, Op, resolve
from vidops.ops import _backends, _checks, _tokens
from vidops.reference.nearest_kept import nearest_kept as reference


def nearest_kept(keep: torch.Tensor, grid: tuple[int, int], *, backend: str | None = None) -> torch.Tensor:
    """Of every place of a grid, which of the kept tokens is nearest.

    Nearest in squared Euclidean distance on the grid, of those equally near the one of the lowest raster index: how
    a pruned VideoSwin fills its windows (Ding et al., ICCV 2023, arXiv 2308.04549, section 3.3).

    Args:
        keep: raster indices (..., K) int64 of the kept tokens, in any order, in [0, h w); K >= 1. Others are an error
            on CPU tensors, and not checked on CUDA tensors (that would be a host sync): no place takes them there.
        grid: (h, w), both >= 1, h w < 2^20.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        (..., h w) int64, indices into the K axis: ``gather_tokens(x, nearest_kept(keep, grid))`` is `nearest_fill`.
        Not differentiable.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape, an index out of range.
        BackendError: no backend, or not the one asked for, can run the call.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> vidops.nearest_kept(torch.tensor([0, 5]), (2, 3)).view(2, 3).tolist()
    [[0, 0, 1], [0, 1, 1]]
    """
    height, width = checked_grid(grid)
    if not isinstance(keep, torch.Tensor):
        raise TypeError(f"keep: expected a torch.Tensor, got {type(keep).__name__}")
    _tokens.indices("keep", keep, keep, keep.shape[:-1], "(..., kept)")
    if keep.dim() == 0 or keep.shape[-1] == 0:
        raise ValueError(f"keep: expected at least one kept token, got shape {tuple(keep.shape)}")
    name = resolve(OP, backend, keep)
    rows = _checks.one_batch(keep, 2)
    _tokens.check_range("keep", rows, height * width, name)
    return _checks.like_lead(OP.call(rows, height, width, name), keep.shape[:-1])


def checked_grid(grid: Any) -> tuple[int, int]:
    if not isinstance(grid, Sequence) or isinstance(grid, str) or len(grid) != 2:
        raise TypeError(f"grid: expected a pair (height, width), got {grid!r}")
    height, width = (_checks.integer("grid", side, 1) for side in grid)
    if height * width >= 2**20:
        raise ValueError(f"grid: expected fewer than 2^20 places, got {height} x {width}")
    return height, width


def _fake(keep: Any, height: Any, width: Any, backend: str) -> Any:
    return keep.new_empty(keep.shape[0], height * width)


def _cpu_forward(keep: torch.Tensor, height: int, width: int) -> torch.Tensor:
    source = _fake(keep, height, width, "")
    _native.C.nearest_kept_forward_cpu(*(_native.view(t) for t in (keep, source)), width, _native.threads())
    return source


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import nearest_kept as kernel

    return kernel.forward(*args)


def _cuda_forward(keep: torch.Tensor, height: int, width: int) -> torch.Tensor:
    source = _fake(keep, height, width, "")
    _native.C.nearest_kept_forward_cuda(*(_native.view(t) for t in (keep, source)), width, *_native.stream(keep))
    return source


OP = Op(
    "nearest_kept",
    schema="(Tensor keep, SymInt height, SymInt width, str backend) -> Tensor",
    fake=_fake,
    # Integers.
    autocast_fp32=False,
    impls=(
        Impl("reference", reference, None, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, None, _backends.cpu_refuses),
        Impl("triton", _triton_forward, None, _backends.triton_refuses),
        Impl("cuda", _cuda_forward, None, _backends.cuda_refuses_in_any_dtype),
    ),
)
