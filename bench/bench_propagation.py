"""``pytest bench/bench_propagation.py --benchmark-only``: label propagation beside its eager form; the finer grid with
``-m slow``. `propagation.py` as a script interleaves them and is what may be quoted."""

from __future__ import annotations

import propagation
import pytest
import torch

WORKLOADS = [propagation.SHORT, pytest.param(propagation.LONG, marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", ["eager", "cpu"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_propagation(benchmark, workload, name):
    torch.set_num_threads(1)
    frame = propagation.frame(workload)
    call, rows = propagation.variants(frame, workload)[name], propagation.clear(frame, workload)
    found = propagation.error(call(), propagation.eager(frame, workload)[0], rows)
    benchmark.group = workload.name
    benchmark.extra_info.update(error_against_eager=found, compared=int(rows.sum()), threads=1)
    assert found <= propagation.LIMIT, "FAILED: wrong, so it gets no time"
    benchmark.pedantic(call, rounds=3 if workload is propagation.SHORT else 1)
