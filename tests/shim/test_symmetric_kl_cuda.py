"""CUDA symmetric_kl on the host shim: float32-class errors against float64, exact symmetry, goldens."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import vidops

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "ssl_uvos"


def maps(*shape: int, seed: int = 0, sharpness: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(*shape, generator=generator, dtype=torch.float64) * sharpness, -1).float()


def check(p: torch.Tensor, q: torch.Tensor | None = None, absolute: float = 1e-12) -> None:
    """At most twice the error of the reference in float32, relative to the entropies that cancel."""
    exact = vidops.symmetric_kl(p.double(), None if q is None else q.double(), backend="reference")
    own = vidops.symmetric_kl(p, q, backend="reference")
    got = vidops.symmetric_kl(p, q, backend="cuda")
    terms = torch.cat([p.flatten(0, -2), (p if q is None else q).flatten(0, -2)])
    size = (terms * terms.log()).sum(-1).abs().max().double()
    error, reference = (got - exact).abs().max(), (own - exact).abs().max()
    print(f"error {error:.2e}, reference {reference:.2e}, entropy {size:.2e}")
    assert error <= 2 * reference + 1e-6 * size + absolute
    if q is None:
        assert torch.equal(got, got.transpose(-2, -1))


@pytest.mark.parametrize(("n", "m", "cols"), [(1, 1, 1), (3, 129, 8), (65, 7, 70), (130, 33, 129)])
def test_two_sets(seeded: ModuleType, n: int, m: int, cols: int) -> None:
    check(maps(n, cols), maps(m, cols, seed=3))


@pytest.mark.parametrize(("n", "cols"), [(1, 5), (17, 64), (130, 33)])
def test_one_set(seeded: ModuleType, n: int, cols: int) -> None:
    check(maps(n, cols))


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 8.0])
def test_several_runs_of_the_accumulator(shim: ModuleType, sharpness: float) -> None:
    shim.set_seed(4)
    check(maps(150, 200, sharpness=sharpness), maps(140, 200, seed=3, sharpness=sharpness))


def test_batches_and_strides(shim: ModuleType) -> None:
    shim.set_seed(2)
    p, q = maps(3, 20, 46), maps(3, 9, 46, seed=1)
    check(p, q)
    together = vidops.symmetric_kl(p, q, backend="cuda")
    alone = torch.stack([vidops.symmetric_kl(x, y, backend="cuda") for x, y in zip(p, q, strict=True)])
    assert torch.equal(together, alone)
    wide = maps(40, 66)
    part = wide[::2, 5:50]
    found = vidops.symmetric_kl(part, backend="cuda")
    assert torch.equal(found, vidops.symmetric_kl(part.contiguous(), backend="cuda"))


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e5, 1e20])
def test_unnormalised_rows(shim: ModuleType, scale: float) -> None:
    shim.set_seed(101)
    p, q = maps(20, 40) * scale, maps(9, 40, seed=1) * scale * 3
    check(p, q, absolute=0)


def test_nan_stays_in_its_row(seeded: ModuleType) -> None:
    p, q = maps(20, 40), maps(9, 40, seed=1)
    clean = vidops.symmetric_kl(p, q, backend="cuda")
    p[3, 7], q[5, 0] = torch.nan, torch.nan
    found = vidops.symmetric_kl(p, q, backend="cuda")
    lost = torch.zeros_like(found, dtype=torch.bool)
    lost[3], lost[:, 5] = True, True
    assert torch.equal(found.isnan(), lost)
    assert torch.allclose(found[~lost], clean[~lost], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_are_widened(shim: ModuleType, dtype: torch.dtype) -> None:
    p = maps(20, 40).to(dtype)
    assert torch.equal(vidops.symmetric_kl(p, backend="cuda"), vidops.symmetric_kl(p.float(), backend="cuda"))


def test_empty(shim: ModuleType) -> None:
    p = maps(4, 5)
    assert vidops.symmetric_kl(p, p[:0], backend="cuda").shape == (4, 0)
    assert vidops.symmetric_kl(p[:0], backend="cuda").shape == (0, 0)


def test_gradient(shim: ModuleType) -> None:
    grads = []
    for backend in ("cuda", "reference"):
        p, q = maps(6, 9).requires_grad_(), maps(4, 9, seed=1).requires_grad_()
        vidops.symmetric_kl(p, q, backend=backend).square().sum().backward()
        grads.append((p.grad, q.grad))
    for got, expected in zip(*grads, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_golden(shim: ModuleType) -> None:
    arrays = np.load(GOLDEN / "kl_distance.npz")
    for name, p, q in (("PQ", "P", "Q"), ("PP", "P", None), ("UQ", "P_unnormalised", "Q")):
        p, q = (None if side is None else torch.from_numpy(arrays[f"in.{side}"]).float() for side in (p, q))
        expected = torch.from_numpy(arrays[f"out.{name}"])
        assert (vidops.symmetric_kl(p, q, backend="cuda") - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_logarithm_of_negative_zero(shim: ModuleType) -> None:
    """As log_softmax writes that of a one: it is not the largest magnitude, whatever its bits."""
    p = torch.eye(5, 40) * 0.999 + 0.001 / 40
    p[0] = torch.eye(40)[0]
    log_p = p.clamp_min(1e-30).log()
    want = vidops.symmetric_kl(p, log_p=log_p, backend="cuda")
    assert (log_p == 0).any() and want.isfinite().all()
    assert torch.equal(vidops.symmetric_kl(p, log_p=torch.where(log_p == 0, -0.0, log_p), backend="cuda"), want)
