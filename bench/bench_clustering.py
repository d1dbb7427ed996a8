"""``pytest bench --benchmark-only``: one group per step of the clustering window, peers in the same run.

pytest-benchmark runs members one after the other; ``python bench/ratios.py`` interleaves them and is what may be
quoted.
"""

import pytest
import torch
from workload import LIMITS, error, groups, window


@pytest.fixture(scope="module")
def variants():
    torch.set_num_threads(1)
    return groups(window())


NAMES = {
    "map": ("eager", "eager+compile", "cpu"),
    "distance": ("eager", "eager+compile", "cpu exact", "cpu filtered"),
    "neighbour mean": ("eager", "cpu"),
    "second distance + greedy": ("eager", "cpu"),
    "greedy walk": ("eager", "cpu"),
    "window": ("eager", "cpu exact", "cpu filtered"),
    "assign": ("eager", "cpu"),
}


@pytest.mark.parametrize("group,name", [(group, name) for group, names in NAMES.items() for name in names])
def test_step(benchmark, variants, group, name):
    call = variants[group][name]
    found = error(call(), variants[group]["eager"]())
    benchmark.group = group
    benchmark.extra_info.update(error_against_eager=found, threads=1)
    assert found <= LIMITS.get(group, 0.0), "FAILED: wrong, so it gets no time"
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
