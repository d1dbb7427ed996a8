"""CUDA assign_rows on the host shim, against float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch.utils.dlpack import to_dlpack

import vidops

# Where every schedule would be slow.
FEW = pytest.mark.parametrize("seed", [0, 101, 104], ids=lambda seed: f"seed{seed}")


def maps(n: int, m: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(n, m, generator=generator) * spread, -1)


def check(p: torch.Tensor, x: torch.Tensor) -> None:
    exact = vidops.symmetric_kl(p.double(), x.double(), backend="reference")
    labels = vidops.assign_rows(p, x, backend="cuda")
    # What the label costs beyond the nearest centroid, and rows whose choice no rounding can change.
    excess = exact.gather(1, labels[:, None])[:, 0] - exact.amin(1)
    assert float(excess.max()) <= 1e-6 * float(exact.max().clamp_min(1))
    two = exact.sort(1).values
    clear = two[:, 1] - two[:, 0] > 2e-6 if len(x) > 1 else torch.ones(len(p), dtype=torch.bool)
    assert torch.equal(labels[clear], exact.argmin(1)[clear])
    assert clear.float().mean() > 0.9


@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (33, 5, 3), (65, 70, 65), (40, 200, 7)])
def test_sizes(seeded: ModuleType, n: int, m: int, k: int) -> None:
    check(maps(n, m, 0), maps(k, m, 1))


@FEW
def test_tile_edges(shim: ModuleType, seed: int) -> None:
    shim.set_seed(seed)
    check(maps(130, 136, 0), maps(130, 136, 1))


def test_close_centroids_are_told_apart(shim: ModuleType) -> None:
    """Differences far below float16's: the exact stage must decide among many."""
    p, middle = maps(20, 90, 0), maps(1, 90, 1)
    x = middle * (1 + 1e-4 * torch.randn(40, 90, generator=torch.Generator().manual_seed(2)))
    exact = vidops.symmetric_kl(p.double(), x.double(), backend="reference")
    assert float((exact.amax(1) - exact.amin(1)).max()) < 0.003  # within the error of a float16 score
    check(p, x)


def test_concentrated_rows(shim: ModuleType) -> None:
    """Logarithms to -80: nothing is lost to the largest of them."""
    check(maps(50, 60, 0, spread=20.0), maps(9, 60, 1, spread=20.0))


def test_smallest_of_equal_centroids(seeded: ModuleType) -> None:
    x = maps(5, 20, 1)
    labels = vidops.assign_rows(maps(40, 20, 0), torch.cat([x, x, x]), backend="cuda")
    assert torch.equal(labels, vidops.assign_rows(maps(40, 20, 0), x, backend="reference"))


def test_not_a_number(seeded: ModuleType) -> None:
    p, x = maps(40, 20, 0), maps(6, 20, 1)
    want = vidops.assign_rows(p, x[[1, 3, 4, 5]], backend="reference")
    p[3, 7] = p[38, 0] = torch.nan
    x[0] = x[2, 19] = torch.nan
    expected = torch.tensor([1, 3, 4, 5])[want]
    expected[[3, 38]] = 0
    assert torch.equal(vidops.assign_rows(p, x, backend="cuda"), expected)
    assert vidops.assign_rows(p, x[:1], backend="cuda").tolist() == [0] * 40


def test_unnormalised_and_strided(shim: ModuleType) -> None:
    wide = torch.full((60, 53), torch.nan)
    scale = torch.logspace(-6, 6, 60)[:, None]
    wide[:, 1:51] = maps(60, 50, 0) * scale
    x = maps(12, 50, 1) * scale[::5]
    check(wide[:, 1:51], x)
    halves = vidops.assign_rows(wide[:, 1:51].bfloat16(), x, backend="cuda")
    assert torch.equal(halves, vidops.assign_rows(wide[:, 1:51].bfloat16().float(), x, backend="cuda"))


def test_rows_far_above_the_centroids(shim: ModuleType) -> None:
    """Values that float16 cannot hold in the unit of the centroids."""
    p, x = maps(30, 40, 0), maps(6, 40, 1)
    p[::3] *= 1e4
    p[1::3] *= 1e9
    check(p, x)
    check(p, x * 1e-12)


def test_given_logarithms_are_used(shim: ModuleType) -> None:
    p, x = maps(30, 12, 0), maps(4, 12, 1)
    log_p = maps(30, 12, 5).log()
    expected = vidops.assign_rows(p.double(), x.double(), log_p=log_p.double(), backend="reference")
    assert torch.equal(vidops.assign_rows(p, x, log_p=log_p, backend="cuda"), expected)


@pytest.mark.parametrize("pass_rows", [1, 7, 128, 1000])
def test_rows_in_several_passes(shim: ModuleType, pass_rows: int) -> None:
    p, x = maps(20, 30, 0), maps(5, 30, 1)
    label = torch.full((20,), -1)
    workspace = torch.full((shim.assign_rows_workspace_cuda(20, 30, 5, pass_rows),), -1)
    tensors = (p, p.log(), x, x.log(), label, workspace)
    shim.assign_rows_forward_cuda(*map(to_dlpack, tensors), pass_rows, 0, 0)
    assert torch.equal(label, vidops.assign_rows(p, x, backend="reference"))


def test_no_row(shim: ModuleType) -> None:
    assert vidops.assign_rows(torch.ones(0, 3), torch.ones(2, 3), backend="cuda").shape == (0,)
