"""The same call gives the same bits: on a second run, and on any number of threads."""

from __future__ import annotations

import pytest
import torch
from matrix import BACKENDS, equal, heads, on_backends
from op_cases import NAMES, agree, case

import vidops


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_same_bits(name, backend):
    sample = case(name, backend)
    runs = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        runs.append(sample.through_torch(backend))
    assert equal(runs[1], runs[2])
    assert (equal if sample.repeats_bits(backend) else agree)(runs[0], runs[1])


@pytest.mark.usefixtures("threads")
@on_backends("attention_head_mean", gradient=True)
def test_same_bits_through_autograd(backend):
    q, k = heads(1, 3, 70, 16, on=backend), heads(1, 3, 90, 16, seed=1, on=backend)
    runs = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        leaf = q.clone().requires_grad_(True)
        p = vidops.attention_head_mean(leaf, k, backend=backend)
        p.square().sum().backward()
        runs.append((p.detach(), leaf.grad))
    assert equal(runs[1], runs[2])
    if backend != "reference":  # a BLAS may split its sums by threads
        assert equal(runs[0], runs[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_runs_when_determinism_is_demanded(name, backend):
    """No implementation uses an operator that PyTorch calls nondeterministic."""
    sample = case(name, backend)
    torch.use_deterministic_algorithms(True)
    try:
        got = sample.through_torch(backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert agree(got, sample.through_torch(backend))
