"""Hub of `vidops.symmetric_kl_adjacency`."""

from __future__ import annotations

from typing import Any

import torch

from vidops import _native, bits
from vidops._registry import Impl, Op, resolve
from vidops.ops import _backends, _checks
from vidops.reference.symmetric_kl_adjacency import symmetric_kl_adjacency as reference


def symmetric_kl_adjacency(
    p: torch.Tensor,
    tau: float,
    *,
    log_p: torch.Tensor | None = None,
    precision: str = "filtered",
    backend: str | None = None,
) -> torch.Tensor:
    """Which rows of a map lie within `tau` of each other in symmetrised KL, as bit rows.

    ``A[i, j] = D(p_i, p_j) <= tau`` (step 1 of the first hierarchy, sheet 2.5; Ding et al., ECCV 2024,
    arXiv 2311.17893), with the diagonal set and A exactly symmetric; D itself is never stored.

    Args:
        p: map (n, M), float16, bfloat16, float32 or float64 (halves are widened).
        tau: threshold in nats, finite.
        log_p: logarithm of `p`, when already known.
        precision: ``"filtered"`` decides in 16-bit products and recomputes every pair whose rounding bound reaches tau;
            ``"exact"`` computes all pairs in the map's precision; on the CPU with AMX and on CUDA a float32 product
            is the sum of three 16-bit ones of split operands, within the error bound of the plain product. Pairs
            whose bound reaches tau are recomputed here too, so that both take the same decisions.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        Bit rows (n, ceil(n/64)) int64: bit j % 64 of word j // 64 in row i (`vidops.unpack_adjacency`).
        Not differentiable.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape, no column, unknown precision.
        BackendError: no backend, or not the one asked for, can run the call; or a gradient is needed.

    A row with NaN is nobody's neighbour but its own.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> p = torch.tensor([[0.5, 0.5], [0.4, 0.6], [0.9, 0.1]])
    >>> vidops.symmetric_kl_adjacency(p, 0.5).tolist()
    [[3], [3], [4]]
    """
    p, log_p = _checks.map_and_log("p", p, log_p, rank=2)
    tau = _checks.number("tau", tau)
    _checks.choice("precision", precision, ("filtered", "exact"))
    name = resolve(OP, backend, p, log_p)
    return OP.call(p, log_p, tau, precision == "filtered", name)


def _fake(p: Any, log_p: Any, tau: float, filtered: bool, backend: str) -> Any:
    return p.new_empty(p.shape[0], bits.words(p.shape[0]), dtype=torch.int64)


def _cpu_forward(p: torch.Tensor, log_p: torch.Tensor, tau: float, filtered: bool) -> torch.Tensor:
    adjacency = _fake(p, log_p, tau, filtered, "")
    views = [_native.view(t) for t in (p, log_p, adjacency)]
    _native.C.symmetric_kl_adjacency_forward_cpu(*views, tau, filtered, _native.threads())
    return adjacency


def _cuda_forward(p: torch.Tensor, log_p: torch.Tensor, tau: float, filtered: bool) -> torch.Tensor:
    adjacency = _fake(p, log_p, tau, filtered, "")
    workspace = adjacency.new_empty(_native.C.symmetric_kl_adjacency_workspace_cuda(*p.shape, filtered))
    views = [_native.view(t) for t in (p, log_p, adjacency, workspace)]
    _native.C.symmetric_kl_adjacency_forward_cuda(*views, tau, filtered, *_native.stream(p))
    return adjacency


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import symmetric_kl_adjacency as kernel

    return kernel.forward(*args)


OP = Op(
    "symmetric_kl_adjacency",
    schema="(Tensor p, Tensor log_p, float tau, bool filtered, str backend) -> Tensor",
    fake=_fake,
    impls=(
        Impl("reference", reference, None, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, None, _backends.cpu_refuses),
        Impl("triton", _triton_forward, None, _backends.triton_refuses),
        Impl("cuda", _cuda_forward, None, _backends.cuda_refuses),
    ),
)
