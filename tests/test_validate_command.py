"""What `python -m vidops validate` does with backends that have some of the ops."""

import shutil
from pathlib import Path

import pytest
import torch

from vidops._registry import NO_IMPLEMENTATION, OPS, BackendError
from vidops.validation import command

GOLDEN = Path(__file__).parent / "golden" / "ssl_uvos"


@pytest.fixture
def folder(tmp_path):
    """Two cases: one that needs `symmetric_kl` and one that does not."""
    for name in ("kl_distance", "greedy_absorb"):
        shutil.copy(GOLDEN / f"{name}.npz", tmp_path)
    return tmp_path


@pytest.fixture
def cpu_without_distance(monkeypatch):
    monkeypatch.delitem(OPS["symmetric_kl"].rows, "cpu")


def _validate(folder, *options):
    return command.main([str(folder), "--slug", "ssl_uvos", *options])


def test_a_backend_runs_the_cases_it_can(folder, cpu_without_distance, capsys):
    assert "cpu" in command.partly_runnable() and "cpu" not in command.runnable()
    assert _validate(folder) == 0
    out = capsys.readouterr().out
    lines = {tuple(line.split()[:2]): line for line in out.splitlines()}
    assert "not implemented on cpu: vidops.symmetric_kl" in lines["ssl_uvos/kl_distance", "cpu"]
    assert "ok" in lines["ssl_uvos/greedy_absorb", "cpu"] and "ok" in lines["ssl_uvos/kl_distance", "reference"]
    assert "3 passed, 0 failed, 1 not implemented yet" in out


def test_strict_makes_it_a_failure(folder, cpu_without_distance):
    assert _validate(folder, "--backend", "cpu", "--strict") == 1
    assert _validate(folder, "--backend", "cpu") == 0


def test_another_refusal_is_a_failure(folder, monkeypatch, capsys):
    row = OPS["symmetric_kl"].rows["cpu"]
    refusing = type(row)(row.backend, row.forward, row.backward, lambda tensors: "too many columns for a test")
    monkeypatch.setitem(OPS["symmetric_kl"].rows, "cpu", refusing)
    assert _validate(folder, "--backend", "cpu") == 1
    assert "too many columns for a test" in capsys.readouterr().out


def test_the_error_carries_the_reason(cpu_without_distance):
    import vidops

    with pytest.raises(BackendError) as caught:
        vidops.symmetric_kl(torch.ones(2, 2), backend="cpu")
    assert caught.value.reason == NO_IMPLEMENTATION
