"""Which backends this test process covers and where their tensors live: the one place that decides.

There are four ways to run ``tests/ops``, one process each because the switches are read at import:

* plain: `reference` and `cpu`, on CPU tensors;
* ``TRITON_INTERPRET=1``: `triton`, interpreted, on CPU tensors;
* ``VIDOPS_CUDA_SHIM=1``: `cuda`, its kernel sources compiled for the host (`cuda_shim`), on CPU tensors;
* ``VIDOPS_TEST_DEVICE=cuda``: `reference`, `triton` and `cuda` on the card, `cpu` on CPU tensors.

``VIDOPS_TEST_BACKENDS=cuda,reference`` leaves out the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHIM = os.environ.get("VIDOPS_CUDA_SHIM") == "1"
DEVICE = os.environ.get("VIDOPS_TEST_DEVICE", "cpu")
if DEVICE not in ("cpu", "cuda"):
    raise ValueError(f"VIDOPS_TEST_DEVICE: expected cpu or cuda, got {DEVICE!r}")
ONLY = [name for name in os.environ.get("VIDOPS_TEST_BACKENDS", "").split(",") if name]
if INTERPRETED + SHIM + (DEVICE == "cuda") > 1:
    raise ValueError("TRITON_INTERPRET=1, VIDOPS_CUDA_SHIM=1 and VIDOPS_TEST_DEVICE=cuda exclude each other")

if SHIM:
    import cuda_shim

    _installed = cuda_shim.install()  # in place until this is dropped

from vidops._registry import BACKENDS as ALL_BACKENDS  # noqa: E402
from vidops._registry import OPS  # noqa: E402

# Kernels run where they were not made for. What depends on torch's registration alone is left to the other processes.
EMULATED = INTERPRETED or SHIM


def device_for(backend: str) -> torch.device:
    """Where the tensors of a call on `backend` live."""
    return torch.device("cpu" if backend == "cpu" else DEVICE)


def _backends() -> list[str]:
    if INTERPRETED:
        return ["triton"]
    if SHIM:
        return ["cuda"]
    if unknown := set(ONLY) - set(ALL_BACKENDS):
        raise ValueError(f"VIDOPS_TEST_BACKENDS: unknown backend {', '.join(sorted(unknown))}")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("VIDOPS_TEST_DEVICE=cuda, but torch finds no card")

    def runs(backend: str) -> bool:
        probe = (torch.empty(1, device=device_for(backend)),)
        return any(op.refusal(backend, probe, needs_grad=False) is None for op in OPS.values())

    return [backend for backend in ALL_BACKENDS if runs(backend) and (not ONLY or backend in ONLY)]


BACKENDS = _backends()


def _missing(op: str, backend: str, gradient: bool) -> str | None:
    row = OPS[op].rows.get(backend)
    if row is None:
        return f"{op}: no {backend} row yet"
    if gradient and row.backward is None:
        return f"{op}: no {backend} backward yet"
    return None


def on_backends(*ops: str, gradient: bool = False) -> Callable[[Any], Any]:
    """Parametrise a test over `backend`; skipped, with the reason, where one of `ops` has no such row."""

    def case(backend: str) -> Any:
        reasons = [why for op in ops if (why := _missing(op, backend, gradient))]
        return pytest.param(backend, marks=[pytest.mark.skip(reason=reasons[0])] if reasons else [])

    return pytest.mark.parametrize("backend", [case(backend) for backend in BACKENDS])


def skip_missing(backend: str, op: str, gradient: bool = False) -> None:
    """The same for tests that are parametrised over ops."""
    if why := _missing(op, backend, gradient):
        pytest.skip(why)


def skip_dtype(backend: str, dtype: torch.dtype) -> None:
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("cuda refuses float64 by design")


def maps(n: int, m: int, dtype: torch.dtype = torch.float32, seed: int = 0, *, on: str = "cpu") -> torch.Tensor:
    """Rows (n, m) of a softmax, where `on` (a backend) wants them."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.softmax(torch.randn(n, m, generator=g, dtype=torch.float64) * 2, -1)
    return rows.to(device_for(on), dtype)


def heads(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, on: str = "cpu") -> torch.Tensor:
    """Normal values, where `on` (a backend) wants them."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(device_for(on), dtype)


def close(got: torch.Tensor, same_dtype_reference: torch.Tensor, exact: torch.Tensor, floor: float = 1e-6) -> None:
    """error(kernel) <= 2 error(reference in the same dtype) + floor, both against float64, relative to the largest."""
    assert exact.abs().max() > 0 and not torch.isnan(exact).any()
    size = exact.abs().max().clamp_min(1e-30)
    error = (got.double() - exact).abs().max() / size
    own = (same_dtype_reference.double() - exact).abs().max() / size
    assert error <= 2 * own + floor, (float(error), float(own))


def equal(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> bool:
    """Equal shapes, dtypes and bits of every pair; NaN equals NaN."""

    def bits(t: torch.Tensor) -> torch.Tensor:
        return t.detach().contiguous().flatten().view(torch.uint8)

    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
        for a, b in zip(left, right, strict=True)
    )
