"""The shipped golden files pass on every backend this process can run."""

from pathlib import Path

import numpy as np
import pytest
from matrix import BACKENDS, DEVICE, EMULATED, INTERPRETED, ONLY, SHIM, device_for

from vidops.validation import outcomes, slot_attention, smtc_model, smtc_ops, ssl_uvos_model, ssl_uvos_ops, sta_ops
from vidops.validation.case import Case
from vidops.validation.command import KINDS, MODEL_OPS, kind_of, main, runnable

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*/*.npz"))


def _cases():
    for path in FILES:
        kinds = KINDS[path.parent.name]
        ready = runnable(kinds[kind_of(path.stem, kinds)].ops)
        for backend in (b for b in BACKENDS if b in ready):
            # Emulating 288 x 288 distances several times over takes many minutes, frames of 196 tokens take some.
            large = path.stat().st_size > 150_000 and ("cluster" in path.stem or path.parent.name == "sta")
            slow = EMULATED and large
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(path, backend, id=f"{path.parent.name}-{path.stem}-{backend}", marks=marks)


@pytest.mark.parametrize("path,backend", list(_cases()))
def test_golden(path, backend, monkeypatch):
    if SHIM:  # where backend cuda takes CPU tensors
        for module in (outcomes, slot_attention, smtc_model, smtc_ops, ssl_uvos_model, ssl_uvos_ops, sta_ops):
            monkeypatch.setattr(module, "device_of", device_for)
    kinds = KINDS[path.parent.name]
    checks = kinds[kind_of(path.stem, kinds)].run(Case.load(path), backend)
    assert checks
    assert not [check for check in checks if not check.ok]


@pytest.mark.skipif(SHIM, reason="the shim runs the kinds whose ops have a cuda row")
def test_expected_backends_ran():
    compiled = {"reference", "cpu"} | ({"triton"} if DEVICE == "cuda" else set())
    expected = {"triton"} if INTERPRETED else compiled & set(ONLY or compiled)
    assert set(BACKENDS) >= expected and set(runnable(MODEL_OPS)) >= expected
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


def _damaged(path, kind, arrays):
    """Writes a file named like a golden one and damaged in one way."""
    if kind == "truncated":
        np.savez(path, **arrays)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "flipped":
        np.savez_compressed(path, **arrays)
        content = bytearray(path.read_bytes())
        content[200:230] = bytes(30)
        path.write_bytes(bytes(content))
    elif kind == "one array":
        with path.open("wb") as file:
            np.save(file, next(iter(arrays.values())))
    else:
        changed = {
            "missing": {name: a for name, a in arrays.items() if name != "in.P"},
            "pickled": {**arrays, "in.P": np.array([{}], dtype=object)},
            "wrong shape": {**arrays, "in.P": arrays["in.P"][:, :-1]},
            "wrong rank": {**arrays, "in.P": arrays["in.P"][0]},
            "words": {**arrays, "in.P": np.full(arrays["in.P"].shape, "x")},
            "nothing expected": {name: a for name, a in arrays.items() if not name.startswith("out.")},
            "other result": {**arrays, "out.PQ": arrays["out.PQ"] + 1},
            "not a number": {**arrays, "out.PQ": arrays["out.PQ"] * np.nan},
            "other size": {**arrays, "out.PQ": arrays["out.PQ"][:-1]},
            "empty": {},
        }[kind]
        np.savez(path, **changed)


@pytest.mark.parametrize(
    "kind",
    [
        "truncated", "flipped", "one array", "missing", "pickled", "wrong shape", "wrong rank", "words",
        "nothing expected", "other result", "not a number", "other size", "empty",
    ],
)  # fmt: skip
def test_damaged_files_fail(tmp_path, capsys, kind):
    folder = tmp_path / "ssl_uvos"
    folder.mkdir()
    arrays = Case.load(GOLDEN / "ssl_uvos" / "kl_distance.npz").arrays
    np.savez(folder / "kl_distance_good.npz", **arrays)
    _damaged(folder / "kl_distance_bad.npz", kind, arrays)
    assert main([str(tmp_path), "--backend", "reference"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("FAILED") == 1 and "1 passed, 1 failed" in printed.out and printed.err == ""


@pytest.mark.parametrize("arguments", [["absent"], ["."], [".", "--slug", "ssl_uvos"]])
def test_folders_without_golden_files(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("vidops validate: ")
