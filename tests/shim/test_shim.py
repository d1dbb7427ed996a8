"""CUDA kernels on the host shim against naive references, and proof that the shim finds planted faults."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from shim_build import GXX, SEEDS, Shim, ShimError, build

pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    return Shim(build(tmp_path_factory.mktemp("shim")))


def faulty(tmp_path_factory: pytest.TempPathFactory, macro: str) -> Shim:
    return Shim(build(tmp_path_factory.mktemp("fault"), f"-D{macro}"))


def packed(dense: np.ndarray, padding: int = 0) -> np.ndarray:
    n = len(dense)
    words = (n + 63) // 64
    bits = np.zeros((n, words * 64), dtype=np.uint8)
    bits[:, :n] = dense
    store = np.full((n, words + padding), -1, dtype=np.int64)
    store[:, :words] = np.packbits(bits, axis=1, bitorder="little").view(np.int64)
    return store[:, :words]


def sequential(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    n = len(dense)
    owner, label, count = np.full(n, -1), np.full(n, -1), 0
    for i in range(n):
        if owner[i] >= 0:
            continue
        members = (owner < 0) & (dense[i] | (np.arange(n) == i))
        owner[members], label[members] = i, count
        count += 1
    return owner, label, count


def graphs() -> Iterator[tuple[str, np.ndarray]]:
    random = np.random.default_rng(5)
    for n in (1, 33, 64, 65, 130, 700):
        for density in (0.0, 0.02, 0.3, 1.0):
            upper = np.triu(random.random((n, n)) < density)
            yield f"symmetric-{n}-{density}", upper | upper.T | np.eye(n, dtype=bool)
    yield "row-read", random.random((130, 130)) < 0.03  # not symmetric, diagonal not set


GRAPHS = dict(graphs())


@pytest.mark.parametrize("name", GRAPHS)
def test_greedy_absorb(shim: Shim, name: str) -> None:
    expected = sequential(GRAPHS[name])
    for seed in SEEDS if len(GRAPHS[name]) <= 130 else SEEDS[::4]:
        owner, label, count = shim.greedy_absorb(packed(GRAPHS[name], padding=seed % 2), seed)
        np.testing.assert_array_equal(owner, expected[0])
        np.testing.assert_array_equal(label, expected[1])
        assert count == expected[2]


@pytest.mark.parametrize(("rows", "cols", "segments"), [(1, 1, 1), (33, 70, 5), (65, 200, 70), (130, 129, 3)])
def test_segment_mean(shim: Shim, rows: int, cols: int, segments: int) -> None:
    random = np.random.default_rng(rows)
    x = random.standard_normal((rows, cols + 3)).astype(np.float32)[:, :cols]
    label = random.integers(0, segments, rows)
    expected = np.zeros((segments, cols), dtype=np.float32)
    for k in range(segments):
        members = x[label == k]
        for row in members:  # in index order, in single precision: the result must agree bit for bit
            expected[k] += row
        if len(members):
            expected[k] /= np.float32(len(members))
    for seed in SEEDS:
        np.testing.assert_array_equal(shim.segment_mean(x, label, segments, seed), expected)


def bfloat_operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    a = random.integers(-8, 9, (16, 64)).astype(np.float32)  # exact in bfloat16
    b = random.integers(-8, 9, (64, 16)).astype(np.float32)
    high = [np.ascontiguousarray((v.view(np.uint32) >> 16).astype(np.uint16)) for v in (a, b)]
    return high[0], high[1], a @ b[:, :8]


def test_tensor_core_wrappers(shim: Shim) -> None:
    a, b, expected = bfloat_operands()
    for seed in SEEDS:
        np.testing.assert_array_equal(shim.selfcheck(a, b, seed), expected)


def test_divergent_barrier_is_reported(shim: Shim) -> None:
    for seed in SEEDS:
        with pytest.raises(ShimError, match="barrier after some threads have left"):
            shim.divergent(seed)


def test_too_small_workspace_is_refused(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "_workspace", lambda *_: np.zeros(1, dtype=np.int64))
    with pytest.raises(ShimError, match="workspace must hold"):
        shim.greedy_absorb(packed(GRAPHS["symmetric-130-0.02"]), 0)


def test_missing_barrier_is_caught(tmp_path_factory: pytest.TempPathFactory) -> None:
    broken = faulty(tmp_path_factory, "VIDOPS_FAULT_MISSING_BARRIER")
    dense = GRAPHS["symmetric-700-0.02"]
    expected = sequential(dense)[0]
    caught = 0
    for seed in SEEDS:
        try:
            caught += not np.array_equal(broken.greedy_absorb(packed(dense), seed)[0], expected)
        except ShimError:
            caught += 1
    assert caught > 0


def test_missing_copy_wait_is_caught(tmp_path_factory: pytest.TempPathFactory) -> None:
    broken = faulty(tmp_path_factory, "VIDOPS_FAULT_MISSING_WAIT")
    a, b, expected = bfloat_operands()
    for seed in (0, 2, 4):  # even seeds copy as late as allowed
        assert not np.array_equal(broken.selfcheck(a, b, seed), expected)


@pytest.mark.parametrize("planted", [False, True])
def test_out_of_bounds_read_is_caught(tmp_path: Path, planted: bool) -> None:
    flags = ["-fsanitize=address", "--param", "asan-stack=0"]
    library = build(tmp_path, *flags, *(["-DVIDOPS_FAULT_OUT_OF_BOUNDS"] if planted else []))
    runtime = subprocess.run([str(GXX), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {**os.environ, "LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    script = Path(__file__).with_name("run_selfcheck.py")
    result = subprocess.run(
        [sys.executable, str(script), str(library)], env=environment, capture_output=True, text=True, check=False
    )
    if planted:
        assert result.returncode != 0
        assert "heap-buffer-overflow" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert float(result.stdout) == 64.0
