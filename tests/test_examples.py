"""Every example runs as its own text says, and what it trains gets better."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    call = [sys.executable, str(EXAMPLES / name), *arguments]
    # One thread: two of them wait for each other at every small op when the machine has other work.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(group) for group in found.groups()]


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(TESTED)


def test_ssl_uvos_synthetic():
    first, last = numbers(r"loss ([\d.]+) -> ([\d.]+)", run("ssl_uvos_synthetic.py", "--steps", "6"))
    assert last < first


def test_smtc_discovery():
    text = run("smtc_discovery.py")
    before = numbers(r"before training: ([\d.]+), ([\d.]+)", text)
    after = numbers(r"after training: ([\d.]+), ([\d.]+)", text)
    assert min(after) > 0.5 > min(before)


@pytest.mark.parametrize("steps, least, most", [(0, 0.1, 0.4), (300, 0.8, 1.0)])
def test_object_adapter_motion(steps, least, most):
    (accuracy,) = numbers(r"accuracy ([\d.]+)", run("object_adapter_motion.py", "--steps", str(steps)))
    assert least <= accuracy <= most


def test_sta_pruning():
    text = run("sta_pruning.py")
    first, last = numbers(r"loss ([\d.]+) -> ([\d.]+)", text)
    assert last < 0.2 * first
    found = re.findall(r"r +(\d+): +(\d+) of 128 tokens, .* accuracy ([\d.]+)", text)
    assert [(int(r), int(left)) for r, left, _ in found] == [(0, 128), (2, 100), (4, 72), (6, 44), (8, 16)]
    assert min(float(accuracy) for *_, accuracy in found) > 0.9


TESTED = ("object_adapter_motion.py", "smtc_discovery.py", "ssl_uvos_synthetic.py", "sta_pruning.py")
