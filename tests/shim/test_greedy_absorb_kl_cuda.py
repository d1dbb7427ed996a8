"""CUDA greedy_absorb_kl on the host shim: the sequential rule on the adjacency, from lazily computed rows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import vidops

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "ssl_uvos"


def maps(n: int, cols: int, seed: int = 0, sharpness: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(n, cols, generator=generator, dtype=torch.float64) * sharpness, -1).float()


def check(p: torch.Tensor, tau: float) -> vidops.Absorption:
    """Equal to the rule on the ready adjacency, pairs within rounding of tau included."""
    adjacency = vidops.symmetric_kl_adjacency(p, tau, precision="exact", backend="cuda")
    expected = vidops.greedy_absorb(adjacency, backend="reference")
    found = vidops.greedy_absorb_kl(p, tau, backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return found


def quantile(p: torch.Tensor, part: float) -> float:
    return float(vidops.symmetric_kl(p.double(), backend="reference").quantile(part))


@pytest.mark.parametrize("part", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("n", "cols"), [(1, 1), (65, 9), (140, 20)])
def test_sizes(seeded: ModuleType, n: int, cols: int, part: float) -> None:
    p = maps(n, cols)
    check(p, quantile(p, part) + 1e-3)


@pytest.mark.parametrize("n", [128, 129, 300])
def test_rounds(shim: ModuleType, n: int) -> None:
    for seed in (3, 104):
        shim.set_seed(seed)
        found = check(maps(n, 12), -1.0)  # nobody is near: every round leaves the largest number of rows
        assert found.owner.tolist() == list(range(n))
        assert int(found.count) == n


def test_leaders_of_later_rounds(shim: ModuleType) -> None:
    """130 rows far from all, then copies of some of them and of one another."""
    shim.set_seed(2)
    far, new = maps(130, 30, sharpness=5.0), maps(6, 30, seed=9, sharpness=5.0)
    p = torch.cat([far, new, far[[0, 128, 129, 5]], new, new[[2]]])
    found = check(p, 1e-3)
    assert found.owner[136:].tolist() == [0, 128, 129, 5, 130, 131, 132, 133, 134, 135, 132]
    assert int(found.count) == 136


def test_rounds_after_the_last_row(shim: ModuleType) -> None:
    """Three rounds settle all rows, two more find none: they must not meet what an earlier round left behind."""
    shim.set_seed(4)
    far = maps(280, 12, sharpness=5.0)
    found = check(torch.cat([far, far[:1].expand(240, 12)]), 1e-6)
    assert int(found.count) == 280


def test_shared_tiles(seeded: ModuleType) -> None:
    """So many columns that several blocks share a tile, and a last share that ends inside a chunk."""
    p = maps(70, 1500)
    check(p, quantile(p, 0.05) + 1e-3)


def test_every_threshold(shim: ModuleType) -> None:
    shim.set_seed(100)
    p = maps(66, 40)
    ordered = vidops.symmetric_kl(p, backend="reference").triu(1).flatten()
    ordered = ordered[ordered > 0].sort().values
    for tau in ordered[:: len(ordered) // 8].tolist():
        check(p, tau)


def test_equal_rows(seeded: ModuleType) -> None:
    p = maps(1, 40).expand(70, 40)
    assert vidops.greedy_absorb_kl(p, 0.0, backend="cuda").owner.unique().tolist() == [0]
    assert int(vidops.greedy_absorb_kl(p, -1e-3, backend="cuda").count) == 70


def test_rows_without_a_number(seeded: ModuleType) -> None:
    p = maps(140, 20)
    p[3], p[139, 0] = torch.nan, torch.nan
    found = vidops.greedy_absorb_kl(p, 1e9, backend="cuda")
    assert found.owner.unique().tolist() == [0, 3, 139]
    assert found.label.unique().tolist() == [0, 1, 2]


def test_strides_and_half(shim: ModuleType) -> None:
    part = maps(80, 66)[::2, 3:50]
    tau = quantile(part, 0.2)
    found, expected = check(part, tau), vidops.greedy_absorb_kl(part.contiguous(), tau, backend="cuda")
    assert torch.equal(found.label, expected.label)
    check(part.half(), tau)


def test_no_rows(shim: ModuleType) -> None:
    found = vidops.greedy_absorb_kl(maps(1, 3)[:0], 1.0, backend="cuda")
    assert found.owner.shape == found.label.shape == (0,)
    assert int(found.count) == 0


@pytest.mark.parametrize("file", ["cluster_tau05", "cluster_multilevel", "cluster_wide_margin"])
def test_golden(shim: ModuleType, file: str) -> None:
    """First window of a clustering golden: its map through adjacency, means and greedy absorption."""
    arrays = np.load(GOLDEN / f"{file}.npz")
    q, k = (torch.from_numpy(arrays[name]).float() for name in ("in.q", "in.k"))
    tau, window = float(arrays["cfg.tau"]), int(arrays["cfg.window"])
    rows = window * q.shape[2]
    p, log_p = vidops.attention_head_mean(
        q.transpose(0, 1).flatten(1, 2), k.transpose(0, 1).flatten(1, 2), return_log=True, backend="reference"
    )
    p, log_p = p[:rows], log_p[:rows]
    adjacency = vidops.symmetric_kl_adjacency(p, tau, log_p=log_p, backend="cuda")
    means = vidops.neighbour_mean(adjacency, p, backend="reference")
    found = vidops.greedy_absorb_kl(means, tau, backend="cuda")
    assert found.owner.tolist() == arrays["out.first_hierarchy_owner"][:rows].tolist()
