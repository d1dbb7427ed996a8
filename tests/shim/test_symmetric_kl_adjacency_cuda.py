"""CUDA symmetric_kl_adjacency on the host shim: filtered and exact take the same decisions, which are right."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import vidops


def maps(n: int, cols: int, seed: int = 0, sharpness: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(n, cols, generator=generator, dtype=torch.float64) * sharpness, -1).float()


def both(p: torch.Tensor, tau: float, log_p: torch.Tensor | None = None) -> torch.Tensor:
    """The relation, after checks that hold for every input."""
    bits = [
        vidops.symmetric_kl_adjacency(p, tau, log_p=log_p, precision=precision, backend="cuda")
        for precision in ("filtered", "exact")
    ]
    assert torch.equal(*bits)
    relation = vidops.unpack_adjacency(bits[0])
    assert torch.equal(bits[0], vidops.pack_adjacency(relation))  # bits beyond n are zero
    assert torch.equal(relation, relation.T)
    assert relation.diagonal().all()
    return relation


def check(p: torch.Tensor, tau: float, safe: float = 1e-4) -> None:
    distance = vidops.symmetric_kl(p.double(), backend="reference")
    expected = (distance <= tau).fill_diagonal_(True)
    clear = ((distance - tau).abs() > safe) | torch.eye(len(p), dtype=torch.bool)
    relation = both(p, tau)
    assert torch.equal(relation[clear], expected[clear])


def quantile(p: torch.Tensor, part: float) -> float:
    return float(vidops.symmetric_kl(p.double(), backend="reference").quantile(part))


@pytest.mark.parametrize(("n", "cols"), [(1, 1), (33, 8), (65, 70), (129, 33)])
def test_sizes(seeded: ModuleType, n: int, cols: int) -> None:
    p = maps(n, cols)
    check(p, quantile(p, 0.3) + 1e-3)


@pytest.mark.parametrize("n", [2, 63, 64, 127, 128, 191, 193, 200])
def test_word_and_tile_edges(shim: ModuleType, n: int) -> None:
    shim.set_seed(n)
    p = maps(n, 20)
    check(p, quantile(p, 0.5))


@pytest.mark.parametrize("sharpness", [0.05, 1.0, 6.0])
def test_every_threshold(shim: ModuleType, sharpness: float) -> None:
    shim.set_seed(102)
    p = maps(50, 130, sharpness=sharpness)
    # The distances themselves as thresholds: some pair is always within rounding of tau.
    ordered = vidops.symmetric_kl(p, backend="reference").triu(1).flatten()
    ordered = ordered[ordered > 0].sort().values
    for tau in ordered[:: len(ordered) // 12].tolist():
        check(p, tau, safe=2e-5 * float(ordered[-1]))


def test_thresholds_beside_direct_values(shim: ModuleType) -> None:
    """One unit in the last place of tau decides a pair whose distance it is."""
    shim.set_seed(1)
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.75, 0.25], [0.5, 0.5]])
    log_p = torch.tensor([[-1.0, -1.0], [-2.0, -0.5], [-0.5, -2.0], [-1.0, -1.0]])  # any log map is allowed
    relation = both(p, 0.375, log_p)  # 0.25 * 1 + 0.25 * 0.5 exactly
    assert relation.tolist() == [
        [True, True, True, True], [True, True, False, True], [True, False, True, True], [True, True, True, True],
    ]  # fmt: skip
    below = float(torch.nextafter(torch.tensor(0.375), torch.tensor(0.0)))
    assert both(p, below, log_p)[0].tolist() == [True, False, False, True]


def test_equal_rows(shim: ModuleType) -> None:
    shim.set_seed(3)
    p = maps(1, 40).expand(70, 40)
    assert both(p, 0.0).all()  # every pair is within rounding of tau
    assert both(p, -1e-3).sum() == 70


def test_rows_without_a_number(seeded: ModuleType) -> None:
    p = maps(70, 20)
    p[3], p[68, 2], p[40, 5] = torch.nan, torch.nan, torch.inf
    alone = torch.zeros(70, dtype=torch.bool)
    alone[[3, 40, 68]] = True
    relation = both(p, 1e9)
    assert torch.equal(relation, ~(alone[:, None] | alone[None, :]) | torch.eye(70, dtype=torch.bool))


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e4, 1e20])
def test_unnormalised_rows(shim: ModuleType, scale: float) -> None:
    shim.set_seed(104)
    p = maps(40, 30) * scale
    p[::3] *= 7
    tau = quantile(p, 0.4)
    check(p, tau, safe=1e-5 * tau)


def test_one_row_far_above_the_others(shim: ModuleType) -> None:
    """It takes the range of the 16-bit operands; the bound has to notice what the other rows lose."""
    shim.set_seed(0)
    p = maps(40, 30)
    p[7] *= 1e12
    tau = quantile(p[:7], 0.5)
    check(p, tau)


def test_strides_and_half(shim: ModuleType) -> None:
    wide = maps(80, 66)
    part = wide[::2, 3:50]
    tau = quantile(part, 0.3)
    relation = both(part, tau)
    assert torch.equal(relation, both(part.contiguous(), tau))
    check(part.half().float(), tau)
    assert torch.equal(both(part.half(), tau), both(part.half().float(), tau))


def test_underflow_given_by_its_logarithm(shim: ModuleType) -> None:
    log_p = torch.log_softmax(torch.randn(40, 30, generator=torch.Generator().manual_seed(5)) * 60, -1)
    p = log_p.exp()
    assert (p == 0).any()
    distance = vidops.symmetric_kl(p.double(), log_p=log_p.double(), backend="reference")
    tau = float(distance.quantile(0.4)) + 1e-3
    expected = (distance <= tau).fill_diagonal_(True)
    clear = (distance - tau).abs() > 1e-3
    assert torch.equal(both(p, tau, log_p)[clear], expected[clear])
