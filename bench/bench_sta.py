"""``pytest bench/bench_sta.py --benchmark-only``: token pruning beside its eager forms. As a script `sta.py`
interleaves them and is what may be quoted."""

from __future__ import annotations

import pytest
import sta
import torch


@pytest.mark.parametrize("name", ["eager", "eager, lean", "merging, eager", "merging, cpu", "cpu"])
@pytest.mark.parametrize("workload", sta.WORKLOADS[1:4], ids=lambda w: w.name)
def test_sta(benchmark, workload, name):
    torch.set_num_threads(1)
    with torch.inference_mode():
        calls = sta.variants(workload)
        benchmark.group = workload.name
        assert not sta.differing(name, calls), "FAILED: other tokens, so it gets no time"
        benchmark.pedantic(calls[name], rounds=5, warmup_rounds=1)
