"""Triton's interpreter today: the defects it has without the repair, and that the repair mends each.

Run as a script, this file is the probe: one JSON object, defect -> "right", "wrong" or the name of an
exception.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

HERE = Path(__file__).resolve()
DEFECTS = ("loop_bound", "dot", "multiply", "scalar", "compare", "sum", "cast")


@triton.jit
def _loop_bound_kernel(x, out, n, SIDE: tl.constexpr):
    total = 0.0
    for i in range(0, n):
        total += tl.load(x + i).to(tl.float32)
    tl.store(out, total)


@triton.jit
def _dot_kernel(x, out, n, SIDE: tl.constexpr):
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    block = tl.load(x + at)
    tl.store(out + at, tl.dot(block, block))


@triton.jit
def _multiply_kernel(x, out, n, SIDE: tl.constexpr):
    at = tl.arange(0, SIDE * SIDE)
    block = tl.load(x + at)
    tl.store(out + at, (block * block).to(tl.float32))


@triton.jit
def _scalar_kernel(x, out, n, SIDE: tl.constexpr):
    at = tl.arange(0, SIDE * SIDE)
    tl.store(out + at, (tl.load(x + at) + 1.5).to(tl.float32))


@triton.jit
def _compare_kernel(x, out, n, SIDE: tl.constexpr):
    at = tl.arange(0, SIDE * SIDE)
    block = tl.load(x + at)
    other = tl.load(x + SIDE * SIDE - 1 - at)
    tl.store(out + at, tl.where(block < other, 1.0, 0.0))


@triton.jit
def _sum_kernel(x, out, n, SIDE: tl.constexpr):
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tl.store(out + tl.arange(0, SIDE), tl.sum(tl.load(x + at), 1).to(tl.float32))


@triton.jit
def _cast_kernel(x, out, n, SIDE: tl.constexpr):
    at = tl.arange(0, SIDE * SIDE)
    third = tl.load(x + at).to(tl.float32) / 3.0
    tl.store(out + at, third.to(tl.bfloat16).to(tl.float32))


def _expected(defect: str, x: torch.Tensor) -> torch.Tensor:
    wide, flat = x.float(), x.flatten()
    return {
        "loop_bound": lambda: wide.flatten()[:5].sum()[None],
        "dot": lambda: wide @ wide,
        "multiply": lambda: (flat * flat).float(),
        "scalar": lambda: (flat + 1.5).float(),
        "compare": lambda: (flat < flat.flip(0)).float(),
        "sum": lambda: wide.sum(1).bfloat16().float(),
        "cast": lambda: (wide.flatten() / 3.0).bfloat16().float(),
    }[defect]()


def _outcome(defect: str, kernel: Callable[..., None]) -> str:
    side = 16
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = _expected(defect, x)
    out = torch.zeros(expected.shape)
    try:
        kernel[(1,)](x, out, 5, SIDE=side)  # type: ignore[index]
    except Exception as error:  # whatever the interpreter raises is the finding
        return type(error).__name__
    return "right" if torch.allclose(out, expected, rtol=1e-6, atol=1e-6) else "wrong"


def _probe(repaired: bool) -> dict[str, str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE), *(["--repair"] if repaired else [])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def unrepaired() -> dict[str, str]:
    return _probe(repaired=False)


@pytest.fixture(scope="module")
def repaired() -> dict[str, str]:
    return _probe(repaired=True)


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_still_there(defect: str, unrepaired: dict[str, str]) -> None:
    if defect == "loop_bound" and np.lib.NumpyVersion(np.__version__) < "2.4.0":
        pytest.skip("NumPy before 2.4 still makes a number of a one-element array")
    assert unrepaired[defect] != "right", (
        f"Triton {triton.__version__} has healed '{defect}': remove its part of tests/triton_interpreter.py, "
        "and what kernels/_common.py does about it once the oldest supported Triton is healed too"
    )


@pytest.mark.parametrize("defect", DEFECTS)
def test_repair_mends(defect: str, repaired: dict[str, str]) -> None:
    assert repaired[defect] == "right"


def test_rounding_agrees_with_torch() -> None:
    from triton_interpreter import round_to_bfloat16, widen_bfloat16

    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.4028e38, 1e-40, 1.00390625, 1.01171875])
    values = torch.cat([special, torch.randn(10_000, generator=torch.Generator().manual_seed(0))])
    assert (widen_bfloat16(round_to_bfloat16(values.numpy())) == values.bfloat16().float().numpy()).all()
    assert np.isnan(widen_bfloat16(round_to_bfloat16(np.array([np.nan, -np.nan], dtype=np.float32)))).all()


if __name__ == "__main__":
    if "--repair" in sys.argv:
        from triton_interpreter import repair

        repair()
    print(json.dumps({defect: _outcome(defect, globals()[f"_{defect}_kernel"]) for defect in DEFECTS}))
