"""Which backend runs a call, and what a refusal says."""

from __future__ import annotations

import pytest
import torch
from matrix import DEVICE, EMULATED, heads, maps

import vidops
from vidops._registry import Op

pytestmark = pytest.mark.skipif(EMULATED, reason="there, other backends than the tested one take CPU tensors too")


def test_refusal_lists_every_reason():
    with pytest.raises(vidops.BackendError) as caught:
        vidops.attention_head_mean(torch.ones(1, 2, 3), torch.ones(1, 2, 3), backend="triton")
    text = str(caught.value)
    assert all(f"  {name}:" in text for name in vidops.BACKENDS)


def test_gradient_needed_is_refused():
    p = maps(4, 3).requires_grad_(True)
    with pytest.raises(vidops.BackendError, match="not differentiable"):
        vidops.greedy_absorb_kl(p, 1.0)
    with torch.no_grad():
        vidops.greedy_absorb_kl(p, 1.0)


def test_authority():
    adjacency = torch.ones(1, 1, dtype=torch.int64)
    with vidops.use_backend("reference"):
        assert vidops.explain("greedy_absorb", adjacency).backend == "reference"
        assert vidops.explain("greedy_absorb", adjacency, backend="cpu").backend == "cpu"
        with vidops.use_backend("cpu", op="greedy_absorb"):
            assert vidops.explain("greedy_absorb", adjacency).backend == "cpu"
    assert vidops.explain("greedy_absorb", adjacency).backend == "cpu"
    with pytest.raises(ValueError, match="unknown backend"):
        vidops.greedy_absorb(adjacency, backend="gpu")


def test_explaining_a_composition_lists_its_ops():
    q, p = torch.ones(1, 1, 2, 3), torch.full((1, 2, 3), 1 / 3)
    plan = vidops.explain("hierarchical_cluster", q, q)
    assert plan.op == "hierarchical_cluster" and plan.backend == "cpu"
    ran = []
    choose = Op.choose

    def recording(self, *args):
        ran.append(self.name)
        return choose(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "choose", recording)
        vidops.hierarchical_cluster(q, q)
        assert list(dict.fromkeys(ran)) == [part.op for part in plan.parts]
        ran.clear()
        vidops.hierarchical_cluster_map(p)
        assert list(dict.fromkeys(ran)) == [part.op for part in vidops.explain("hierarchical_cluster_map", p).parts]
    assert {part.backend for part in plan.parts} == {"cpu"} and "triton" in plan.refusals
    assert all(f"  {part.op}: cpu" in str(plan) for part in plan.parts)


def test_explaining_joins_backends_that_differ_and_shows_a_missing_one():
    q = torch.ones(1, 1, 2, 3)
    with vidops.use_backend("reference", op="neighbour_mean"):
        assert vidops.explain("hierarchical_cluster", q, q).backend == "cpu+reference"
    refused = vidops.explain("hierarchical_cluster", q, q, backend="triton")
    assert refused.backend is None and "attention_head_mean: " in refused.refusals["triton"]
    q.requires_grad_(True)
    plan = vidops.explain("hierarchical_cluster", q, q)
    assert plan.backend is None and [part.backend for part in plan.parts] == ["cpu"] + [None] * 5


def test_the_cpu_backend_refuses_tensors_of_a_card():
    if DEVICE != "cuda":
        pytest.skip("needs a card")
    q = heads(2, 3, 4).cuda()
    with pytest.raises(vidops.BackendError, match="needs CPU tensors"):
        vidops.attention_head_mean(q, q, backend="cpu")
