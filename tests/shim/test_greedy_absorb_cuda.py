"""CUDA greedy_absorb on the host shim, under every schedule."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import vidops

SIZES = (1, 33, 64, 65, 130)
DENSITIES = (0.0, 0.02, 0.3, 1.0)


def relation(n: int, density: float, *, symmetric: bool = True) -> torch.Tensor:
    near = torch.rand(n, n, generator=torch.Generator().manual_seed(n)) < density
    return near.triu() | near.triu().T if symmetric else near


def check(near: torch.Tensor) -> None:
    adjacency = vidops.pack_adjacency(near)
    padded = torch.full((len(near), adjacency.shape[1] + 1), -1, dtype=torch.int64)
    padded[:, :-1] = adjacency
    expected = vidops.greedy_absorb(adjacency, backend="reference")
    for form in (adjacency, padded[:, :-1]):
        found = vidops.greedy_absorb(form, backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("n", SIZES)
def test_symmetric(seeded: ModuleType, n: int, density: float) -> None:
    check(relation(n, density))


def test_rows_are_read(seeded: ModuleType) -> None:
    check(relation(130, 0.03, symmetric=False))  # the diagonal is not set either


@pytest.mark.parametrize("density", DENSITIES)
def test_more_words_than_one_pass(shim: ModuleType, density: float) -> None:
    for seed in (0, 4, 103):
        shim.set_seed(seed)
        check(relation(700, density))
