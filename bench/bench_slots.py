"""``pytest bench/bench_slots.py --benchmark-only``: slot attention beside the public algorithm, eager and compiled.
`slots.py` as a script interleaves them and is what may be quoted."""

from __future__ import annotations

import functools

import pytest
import slots
import torch


@pytest.mark.parametrize("name", ["eager", "eager+compile", "lucidrains", "cpu"])
@pytest.mark.parametrize("kind", list(slots.PASSES))
@pytest.mark.parametrize("workload", slots.WORKLOADS, ids=lambda w: w.name)
def test_slots(benchmark, workload, kind, name):
    torch.set_num_threads(1)
    case = slots.case(workload)
    form = slots.forms(workload)[name]
    if isinstance(form, str):
        pytest.skip(form)
    call = functools.partial(slots.PASSES[kind], form, case)
    found = slots.error(call(), slots.exact(case, kind))
    benchmark.group = f"{workload.name}, {kind}"
    benchmark.extra_info.update(error_against_float64=found, threads=1)
    assert found <= slots.LIMIT, "FAILED: wrong, so it gets no time"
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
