"""Hub of `vidops.greedy_absorb_kl`."""

from __future__ import annotations

from typing import Any

import torch

from vidops import _native
from vidops._registry import Impl, Op, resolve
from vidops.ops import _backends, _checks
from vidops.ops.greedy_absorb import Absorption, fake_absorption
from vidops.reference.greedy_absorb_kl import greedy_absorb_kl as reference


def greedy_absorb_kl(
    p: torch.Tensor, tau: float, *, log_p: torch.Tensor | None = None, backend: str | None = None
) -> Absorption:
    """Greedy absorption of the rows of a map that lie within `tau` in symmetrised KL.

    The same as ``greedy_absorb(symmetric_kl_adjacency(p, tau, precision="exact"))`` (sheet 2.5 step 3 and 2.6;
    Ding et al., ECCV 2024, arXiv 2311.17893), but distances are computed lazily: only rows of candidates that
    are still unabsorbed, against the rows still alive.

    Args:
        p: map (n, M), float16, bfloat16, float32 or float64 (halves are widened).
        tau: threshold in nats, finite.
        log_p: logarithm of `p`, when already known.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        `Absorption(owner, label, count)`, see `greedy_absorb`. Not differentiable.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape, no column.
        BackendError: no backend, or not the one asked for, can run the call; or a gradient is needed.

    A row with NaN leads, and absorbs only itself.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> p = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.4, 0.6]])
    >>> vidops.greedy_absorb_kl(p, 0.5).label.tolist()
    [0, 1, 0]
    """
    p, log_p = _checks.map_and_log("p", p, log_p, rank=2)
    tau = _checks.number("tau", tau)
    return Absorption(*OP.call(p, log_p, tau, resolve(OP, backend, p, log_p)))


def _fake(p: Any, log_p: Any, tau: float, backend: str) -> Any:
    return fake_absorption(p)


def _cpu_forward(p: torch.Tensor, log_p: torch.Tensor, tau: float) -> tuple[torch.Tensor, ...]:
    out = fake_absorption(p)
    _native.C.greedy_absorb_kl_forward_cpu(*(_native.view(t) for t in (p, log_p, *out)), tau, _native.threads())
    return out


def _cuda_forward(p: torch.Tensor, log_p: torch.Tensor, tau: float) -> tuple[torch.Tensor, ...]:
    out = fake_absorption(p)
    workspace = p.new_empty(_native.C.greedy_absorb_kl_workspace_cuda(*p.shape), dtype=torch.int64)
    views = [_native.view(t) for t in (p, log_p, *out, workspace)]
    _native.C.greedy_absorb_kl_forward_cuda(*views, tau, *_native.stream(p))
    return out


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import greedy_absorb_kl as kernel

    return kernel.forward(*args)


OP = Op(
    "greedy_absorb_kl",
    schema="(Tensor p, Tensor log_p, float tau, str backend) -> (Tensor owner, Tensor label, Tensor count)",
    fake=_fake,
    impls=(
        Impl("reference", reference, None, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, None, _backends.cpu_refuses),
        Impl("triton", _triton_forward, None, _backends.triton_refuses),
        Impl("cuda", _cuda_forward, None, _backends.cuda_refuses),
    ),
)
