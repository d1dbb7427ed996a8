"""``pytest bench --benchmark-only``: one group per step of the clustering window, peers in the same run.

pytest-benchmark runs members one after the other; ``python bench/ratios.py`` interleaves them and is what may be
quoted. The group "overhead" compares a call on tiny inputs with a bare torch op that runs the same backend function,
and allows it 10 us more.
"""

from __future__ import annotations

import statistics
import time

import overhead
import pytest
import torch
from workload import LIMITS, error, groups, window

WALK = ("eager", "lean loop", "cpu", "cpu, kernel only")
NAMES = {
    "map": ("eager", "eager+compile", "cpu"),
    "distance": ("eager", "eager+compile", "cpu exact", "cpu filtered"),
    "distance, every 10th row": ("eager", "scipy rel_entr", "sklearn pairwise", "cpu"),
    "neighbour mean": ("eager", "scipy sparse", "cpu"),
    "second distance + greedy": ("eager", "cpu"),
    "greedy walk": WALK,
    "greedy walk, n 7200": WALK,
    "window": ("eager", "cpu exact", "cpu filtered"),
    "assign": ("eager", "cpu"),
}
ALLOWED = 10e-6


@pytest.fixture(scope="module")
def variants():
    torch.set_num_threads(1)
    return groups(window())


@pytest.mark.parametrize("group,name", [(group, name) for group, names in NAMES.items() for name in names])
def test_step(benchmark, variants, group, name):
    call = variants[group][name]
    if isinstance(call, str):
        pytest.skip(call)
    found = error(call(), variants[group]["eager"]())
    benchmark.group = group
    benchmark.extra_info.update(error_against_eager=found, threads=1)
    assert found <= LIMITS.get(group, 0.0), "FAILED: wrong, so it gets no time"
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


def _usual(call, calls: int = 300, rounds: int = 9) -> float:
    """CPU seconds of one call, median over rounds."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            call()
        times.append((time.process_time() - start) / calls)
    return statistics.median(times)


@pytest.mark.parametrize("name", list(overhead.calls()))
def test_host_overhead(benchmark, name):
    torch.set_num_threads(1)
    calls = overhead.calls()[name]
    benchmark.group = "overhead"
    with torch.inference_mode():
        more = _usual(calls.ours) - _usual(calls.same_work)
        benchmark.extra_info.update(more_than_a_bare_op_us=more * 1e6)
        assert more <= ALLOWED, f"FAILED: {more * 1e6:.1f} us more than a bare torch op"
        benchmark.pedantic(calls.ours, rounds=20, iterations=200, warmup_rounds=1)
