"""CUDA neighbour_mean on the host shim, against float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import vidops

# Where every schedule would be slow.
FEW = pytest.mark.parametrize("seed", [0, 101, 104], ids=lambda seed: f"seed{seed}")


def relation(n: int, density: float) -> torch.Tensor:
    near = torch.rand(n, n, generator=torch.Generator().manual_seed(n)) < density
    return near | torch.eye(n, dtype=torch.bool)


def maps(n: int, m: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n * 1000 + m)
    return torch.softmax(torch.randn(n, m, generator=generator, dtype=torch.float64) * 2, -1)


def check(near: torch.Tensor, p: torch.Tensor) -> None:
    adjacency = vidops.pack_adjacency(near)
    exact = vidops.neighbour_mean(adjacency, p, backend="reference")
    own = vidops.neighbour_mean(adjacency, p.float(), backend="reference")
    padded_bits = torch.full((len(near), adjacency.shape[1] + 1), -1, dtype=torch.int64)
    padded_bits[:, :-1] = adjacency
    padded_p = torch.full((len(p), p.shape[1] + 3), torch.nan)
    padded_p[:, 1:-2] = p
    found = vidops.neighbour_mean(adjacency, p.float(), backend="cuda")
    size = exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (own - exact).abs().max() + 1e-6 * size
    # Small entries are as good as large ones: nothing is lost to a common scale.
    assert ((found - exact).abs() / exact).max() <= 1e-6
    again = vidops.neighbour_mean(padded_bits[:, :-1], padded_p[:, 1:-2], backend="cuda")
    assert torch.equal(found, again)


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (33, 5), (64, 65), (130, 33)])
def test_sizes(seeded: ModuleType, n: int, m: int, density: float) -> None:
    check(relation(n, density), maps(n, m))


@FEW
def test_tile_edges(shim: ModuleType, seed: int) -> None:
    shim.set_seed(seed)
    check(relation(200, 0.1), maps(200, 129))


@FEW
def test_hub_rows(shim: ModuleType, seed: int) -> None:
    """One row that everybody knows beside rows that know nobody: lists of words of every length."""
    shim.set_seed(seed)
    near = torch.eye(300, dtype=torch.bool)
    near[299] = True
    near[:130, 7] = True
    check(near, maps(300, 20))


@FEW
def test_equal_rows(shim: ModuleType, seed: int) -> None:
    """Groups that know each other and some that are alone: few distinct rows, in more than one tile and pass."""
    shim.set_seed(seed)
    group = torch.randint(0, 5, (1100,), generator=torch.Generator().manual_seed(0))
    group[::7] = torch.arange(5, 5 + len(group[::7]))
    near = group[:, None] == group
    p = maps(1100, 5)
    check(near, p)
    found = vidops.neighbour_mean(vidops.pack_adjacency(near), p.float(), backend="cuda")
    first = near.int().argmax(1)
    assert len(first.unique()) == 163 and torch.equal(found, found[first])


def test_directed_rows_are_read(seeded: ModuleType) -> None:
    near = torch.zeros(70, 70, dtype=torch.bool)
    near[torch.arange(70), (torch.arange(70) * 37 + 5) % 70] = True
    p = maps(70, 40).float()
    found = vidops.neighbour_mean(vidops.pack_adjacency(near), p, backend="cuda")
    expected = p[(torch.arange(70) * 37 + 5) % 70]
    assert torch.allclose(found, expected / expected.sum(-1, keepdim=True), rtol=5e-7, atol=0)


def test_values_of_any_size(shim: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.exp(torch.randn(100, 70, generator=generator, dtype=torch.float64) * 8)
    check(relation(100, 0.2), p.float().double())


def test_no_neighbour_is_nan(shim: ModuleType) -> None:
    near = torch.eye(40, dtype=torch.bool)
    near[3] = False
    found = vidops.neighbour_mean(vidops.pack_adjacency(near), maps(40, 9).float(), backend="cuda")
    assert found.isnan().all(1).nonzero().flatten().tolist() == [3]


def test_not_a_number_stays_with_its_neighbours(seeded: ModuleType) -> None:
    near, p = relation(70, 0.05), maps(70, 40).float()
    near[:, [4, 37]] = torch.eye(70, dtype=torch.bool)[:, [4, 37]]
    near[20, 4] = near[66, 37] = True
    adjacency = vidops.pack_adjacency(near)
    want = vidops.neighbour_mean(adjacency, p, backend="cuda")
    p[4, 3], p[37, 39] = torch.nan, torch.inf
    found = vidops.neighbour_mean(adjacency, p, backend="cuda")
    hit = [4, 20, 37, 66]
    assert found.isnan().all(1).nonzero().flatten().tolist() == hit
    found[hit] = want[hit]
    assert torch.equal(found, want)


def test_halves_are_widened(shim: ModuleType) -> None:
    near, p = relation(40, 0.2), maps(40, 9).bfloat16()
    adjacency = vidops.pack_adjacency(near)
    found = vidops.neighbour_mean(adjacency, p, backend="cuda")
    assert torch.equal(found, vidops.neighbour_mean(adjacency, p.float(), backend="cuda"))


def test_nothing(shim: ModuleType) -> None:
    none = torch.zeros(0, 0, dtype=torch.int64)
    assert vidops.neighbour_mean(none, torch.ones(0, 3), backend="cuda").shape == (0, 3)
    assert vidops.neighbour_mean(torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 0), backend="cuda").shape == (1, 0)
