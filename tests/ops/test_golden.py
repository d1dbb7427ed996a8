"""The shipped golden files pass on every backend this process can run."""

from pathlib import Path

import pytest

from vidops.validation.case import Case
from vidops.validation.command import KINDS, kind_of, main, runnable

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*/*.npz"))


@pytest.mark.parametrize("backend", runnable())
@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_golden(path, backend):
    kinds = KINDS[path.parent.name]
    checks = kinds[kind_of(path.stem, kinds)](Case.load(path), backend)
    assert checks
    assert not [check for check in checks if not check.ok]


def test_expected_backends_ran():
    import os

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    assert set(runnable()) >= ({"reference", "cpu", "triton"} if interpreted else {"reference", "cpu"})
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
