"""Devices whose blocks get 99 KB of shared memory (sm_86, sm_89) run the same kernels with fewer stages or tiles."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import vidops

MOST, LESS = 227 * 1024, 99 * 1024


@pytest.fixture
def small(shim: ModuleType) -> Iterator[ModuleType]:
    shim.set_shared_limit(LESS)
    yield shim
    shim.set_shared_limit(MOST)


def maps(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).mul(2).softmax(-1)


@pytest.mark.parametrize("seed", [0, 3, 101])
def test_distances(small: ModuleType, seed: int) -> None:
    small.set_seed(seed)
    p, x = maps(140, 200), maps(90, 200)
    exact = vidops.symmetric_kl(p.double(), x.double(), backend="reference")
    assert (vidops.symmetric_kl(p, x, backend="cuda") - exact).abs().max() < 2e-5
    tau = float(vidops.symmetric_kl(p, backend="reference").median())
    for precision in ("filtered", "exact"):
        found = vidops.symmetric_kl_adjacency(p, tau, precision=precision, backend="cuda")
        small.set_shared_limit(MOST)
        assert torch.equal(found, vidops.symmetric_kl_adjacency(p, tau, precision=precision, backend="cuda"))
        small.set_shared_limit(LESS)
    found = vidops.greedy_absorb_kl(p, tau, backend="cuda")
    assert torch.equal(found.owner, vidops.greedy_absorb_kl(p, tau, backend="reference").owner)
    assert torch.equal(vidops.assign_rows(p, x, backend="cuda"), exact.argmin(1))


@pytest.mark.parametrize("channels", [48, 64, 80])
def test_attention(small: ModuleType, channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    q, k, v = (torch.randn(1, 2, n, channels, generator=generator) for n in (70, 90, 90))
    want = vidops.attention_head_mean(q.double(), k.double(), backend="reference")
    assert (vidops.attention_head_mean(q, k, backend="cuda") - want).abs().max() < 2e-6
    out = vidops.video_attention(q, k, v, need="map", backend="cuda")[0]
    want = vidops.video_attention(q.double(), k.double(), v.double(), need="map", backend="reference")[0]
    assert (out - want).abs().max() < 1e-5


def test_what_does_not_fit_is_refused(small: ModuleType) -> None:
    small.set_shared_limit(48 * 1024)
    with pytest.raises((small.ArgumentError, small.Fault), match="shared memory"):
        vidops.symmetric_kl(maps(10, 20), backend="cuda")
