"""The switches of the test suite itself: a run that covered nothing, or was asked for two things, is no success."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SWITCHES = ("VIDOPS_", "TRITON_INTERPRET")


def _pytest(*arguments, **environment):
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(SWITCHES)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=HERE.parent, env={**cleared, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("required,passes", [("reference,cpu", True), ("cpu,triton", False), ("cuda", False)])
def test_required_backends(required, passes):
    done = _pytest("tests/ops/test_clustering.py", "-k", "exact_ties or segment_mean", VIDOPS_TEST_REQUIRE=required)
    assert (done.returncode == 0) == passes, done.stdout
    assert ("VIDOPS_TEST_REQUIRE: no test passed on" in done.stdout) != passes


def test_skips_do_not_count():
    """Every test of this selection is skipped: it would be green without the requirement."""
    selection = ("tests/ops/test_backend_choice.py", "-k", "refuses_tensors_of_a_card")
    assert _pytest(*selection).returncode == 0
    assert _pytest(*selection, VIDOPS_TEST_REQUIRE="cpu").returncode != 0


def test_chosen_backends():
    done = _pytest("tests/ops/test_clustering.py", "--collect-only", VIDOPS_TEST_BACKENDS="cpu")
    assert done.returncode == 0 and "[cpu" in done.stdout and "[reference" not in done.stdout


@pytest.mark.parametrize(
    "environment,message",
    [
        ({"VIDOPS_TEST_DEVICE": "gpu"}, "expected cpu or cuda"),
        ({"VIDOPS_TEST_BACKENDS": "cpu,gpu"}, "unknown backend gpu"),
        ({"VIDOPS_TEST_DEVICE": "cuda", "TRITON_INTERPRET": "1"}, "exclude each other"),
        ({"VIDOPS_CUDA_SHIM": "1", "TRITON_INTERPRET": "1"}, "exclude each other"),
    ],
)
def test_switches_that_make_no_sense(environment, message):
    done = _pytest("tests/ops/test_clustering.py", "--collect-only", **environment)
    assert done.returncode != 0 and message in done.stdout + done.stderr
