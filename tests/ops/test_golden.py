"""The shipped golden files pass on every backend this process can run."""

import os
from pathlib import Path

import pytest

from vidops.validation.case import Case
from vidops.validation.command import KINDS, kind_of, main, runnable

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*/*.npz"))


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _cases():
    for path in FILES:
        for backend in runnable():
            if INTERPRETED and backend != "triton":
                continue  # the compiled run of the suite has them
            # Interpreting 288 x 288 distances several times over takes many minutes.
            slow = backend == "triton" and INTERPRETED and path.stat().st_size > 150_000 and "cluster" in path.stem
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(path, backend, id=f"{path.parent.name}-{path.stem}-{backend}", marks=marks)


@pytest.mark.parametrize("path,backend", list(_cases()))
def test_golden(path, backend):
    kinds = KINDS[path.parent.name]
    checks = kinds[kind_of(path.stem, kinds)](Case.load(path), backend)
    assert checks
    assert not [check for check in checks if not check.ok]


def test_expected_backends_ran():
    assert set(runnable()) >= ({"reference", "cpu", "triton"} if INTERPRETED else {"reference", "cpu"})
    assert FILES


def test_unknown_kind_fails(tmp_path, capsys):
    folder = tmp_path / "ssl_uvos"
    folder.mkdir()
    (folder / "surprise.npz").write_bytes(b"not an archive")
    assert main([str(tmp_path)]) == 1
    assert "unknown kind" in capsys.readouterr().out


def test_malformed_file_fails(tmp_path, capsys):
    folder = tmp_path / "ssl_uvos"
    folder.mkdir()
    (folder / "kl_distance.npz").write_bytes(b"not an archive")
    assert main([str(tmp_path), "--backend", "reference"]) == 1
    assert "GoldenError" in capsys.readouterr().out
