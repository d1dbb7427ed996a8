"""float32 products of the Triton kernels are float32 products on a tensor core too, as far as a model of one tells.

The interpreter's own `tl.dot` is an ordinary float32 product. Run as a script under TRITON_INTERPRET=1, this file
replaces it by the model, reads arrays from argv[1] and writes what the kernels make of them to argv[2].
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS, DEPTH, COLUMNS = 32, 64, 32
STEP = 8  # columns of one TF32 instruction; of bfloat16 twice as many


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 -> float64, without the 13 bits that a tensor core does not read."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def cut_to_24_bits(x: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Towards zero, to the last place of a float32 as large as `largest`."""
    place = np.ldexp(1.0, np.maximum(np.frexp(largest)[1] - 24, -149))
    return np.trunc(x / place) * place


def cut_to_bf16(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def tensor_core(a: np.ndarray, b: np.ndarray, acc: np.ndarray, step: int = STEP) -> np.ndarray:
    """acc + a @ b as the least exact of the published models has it.

    Products are exact. Those of a step and the accumulator are aligned to the largest of them and cut to 24 bits, then
    added; the sum is cut to float32. Cards differ in keeping one to three bits more.
    """
    a, b, acc = cut_to_tf32(a), cut_to_tf32(b), acc.astype(np.float64)
    for k in range(0, a.shape[1], step):
        terms = a[:, k : k + step, None] * b[None, k : k + step]
        terms = np.concatenate([terms, acc[:, None]], 1)
        sums = terms.sum(1)
        finite = np.isfinite(sums)
        aligned = cut_to_24_bits(np.where(finite[:, None], terms, 0), np.abs(terms).max(1, keepdims=True)).sum(1)
        aligned = cut_to_24_bits(aligned, aligned)
        sums = np.where(finite & (np.abs(aligned) <= np.finfo(np.float32).max), aligned, sums)
        acc = np.where(np.abs(sums) > np.finfo(np.float32).max, np.copysign(np.inf, sums), sums)
    return acc.astype(np.float32)


@triton.jit
def _parts_kernel(x, high, low, parts: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    first, second = parts(tl.load(x + at))
    tl.store(high + at, first)
    tl.store(low + at, second)


@triton.jit
def _three_parts_kernel(x, high, middle, low, parts: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    first, second, third = parts(tl.load(x + at))
    tl.store(high + at, first)
    tl.store(middle + at, second)
    tl.store(low + at, third)


@triton.jit
def _product_kernel(
    a, b, out, matmul: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, depth = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :], tl.arange(0, DEPTH)
    left = tl.load(a + row * DEPTH + depth[None, :])
    right = tl.load(b + depth[:, None] * COLUMNS + column)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    tl.store(out + row * COLUMNS + column, matmul(left, right, acc, tl.float32, True))


@triton.jit
def _unrounded_kernel(
    a, b, out, matmul: tl.constexpr, cut: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, depth = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :], tl.arange(0, DEPTH)
    left = cut(tl.load(a + row * DEPTH + depth[None, :]))
    right = tl.load(b + depth[:, None] * COLUMNS + column)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    tl.store(out + row * COLUMNS + column, matmul(left, right, acc, tl.bfloat16))


def _bit_patterns() -> np.ndarray:
    """float32 values of all exponents and signs, and what lies at the ends."""
    bits = np.random.default_rng(0).integers(0, 2**32, 4096 - 8, dtype=np.uint32)
    ends = [0, 0x80000000, 1, 0x007FFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7FEFFF, 0x3F7FFFFF]
    x = np.concatenate([bits, np.array(ends, dtype=np.uint32)]).view(np.float32)
    return np.where(np.isfinite(x), x, np.float32(1))


def _operands() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    g = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return g.standard_normal(shape).astype(np.float32)

    a, b = normal(ROWS, DEPTH), normal(DEPTH, COLUMNS)
    uneven = 10.0 ** (np.arange(DEPTH) % 40 - 20)
    softmax = np.exp(4 * normal(ROWS, DEPTH))
    cases = {
        "normal": (a, b),
        "weights": (softmax / softmax.sum(1, keepdims=True), b),
        "positive": (np.abs(a), np.abs(b)),
        "large": (a * np.float32(1e30), b * np.float32(1e-30)),
        "tiny": (a * np.float32(1e-32), b * np.float32(1e32)),
        "uneven": (a * uneven, b / uneven[:, None]),
    }
    special_a, special_b = a.copy(), b.copy()
    special_a[1, 5], special_a[2, 6], special_a[3, 7], special_a[4, [8, 9]] = np.inf, -np.inf, np.nan, [np.inf, -np.inf]
    special_b[5, 3], special_b[11, 4], special_b[12, 5] = 0, np.nan, np.inf
    special_a[5, 12], special_a[6, 12] = 0, 1
    special_a[7].view(np.uint32)[0], special_b[:, 6] = 0x7FFFFFFF, 1  # the NaN that a card makes; no low part
    cases["special"] = (special_a, special_b)
    # One product of each sum overflows, by far.
    over_a, over_b = a.copy(), b.copy()
    over_a[:, 0] = np.where(np.arange(ROWS) % 2, -1e30, 1e30)
    over_b[0, ::2] = 3e30
    cases["overflow"] = (over_a, over_b)
    return {name: (x.astype(np.float32), y.astype(np.float32)) for name, (x, y) in cases.items()}


OPERANDS = _operands()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("products")
    given = {f"{side}_{name}": array for name, pair in OPERANDS.items() for side, array in zip("ab", pair, strict=True)}
    np.savez(folder / "given.npz", x=_bit_patterns(), **given)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, str(folder / "given.npz"), str(folder / "found.npz")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    with np.load(folder / "found.npz") as arrays:
        return dict(arrays)


def test_two_parts_hold_every_bit(found):
    x, high, low = _bit_patterns(), found["high"], found["low"]
    assert np.array_equal(high.astype(np.float64) + low, x.astype(np.float64))
    assert not (high.view(np.uint32) & 0x1FFF).any() and np.isfinite(high).all()
    rounded = np.abs(x) < 3.4e38
    assert (np.abs(low[rounded]) <= np.ldexp(1.0, np.maximum(np.frexp(x[rounded])[1] - 12, -137))).all()
    # What the tensor core drops of `low`, as the documented bound has it.
    lost = np.abs(low - cut_to_tf32(low))
    assert (lost[rounded] < np.maximum(2.0**-23 * np.abs(x[rounded].astype(np.float64)), 2.0**-136)).all()


def test_three_parts_hold_every_bit(found):
    x, parts = _bit_patterns().astype(np.float64), [found[f"part_{i}"].astype(np.float64) for i in range(3)]
    assert (np.abs(sum(parts) - x) < 2.0**-133).all()
    large = np.abs(x) >= 2.0**-110
    assert large.any() and np.array_equal(sum(parts)[large], x[large])


def _errors(a: np.ndarray, b: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Largest error relative to sum |a b|, and that of an ordinary float32 product."""
    exact, size = a.astype(np.float64) @ b.astype(np.float64), np.abs(a).astype(np.float64) @ np.abs(b)
    return float((np.abs(got - exact) / size).max()), float((np.abs(a @ b - exact) / size).max())


# Steps of eight columns, each cutting nine terms and the sum by less than 2^-23 of it.
SUMS = DEPTH // STEP * 10 * 2.0**-23


@pytest.mark.parametrize("name", ["normal", "weights", "positive", "large", "tiny", "uneven"])
def test_products_are_those_of_float32(found, name):
    a, b = OPERANDS[name]
    error, own = _errors(a, b, found[f"out_{name}"])
    assert error <= 2.0**-21 + SUMS
    assert error <= 2 * own + 1e-6  # the rule for every kernel
    error, own = _errors(cut_to_bf16(a), b, found[f"unrounded_{name}"])
    assert error <= SUMS and error <= 2 * own + 1e-6


def test_the_model_tells_tf32_from_float32():
    a, b = OPERANDS["normal"]
    acc = np.zeros((ROWS, COLUMNS), dtype=np.float32)
    assert _errors(a, b, tensor_core(a, b, acc))[0] > 1e-4
    a = cut_to_bf16(a)
    assert _errors(a, b, tensor_core(a, cut_to_bf16(b), acc, 2 * STEP))[0] > 1e-4


@pytest.mark.parametrize("kind", ["out", "unrounded"])
@pytest.mark.parametrize("name", ["special", "overflow"])
def test_nan_infinity_and_overflow_are_those_of_float32(found, name, kind):
    a, b = OPERANDS[name]
    a = a if kind == "out" else cut_to_bf16(a)
    with np.errstate(all="ignore"):
        want = (a.astype(np.float64) @ b).astype(np.float32)
    got = found[f"{kind}_{name}"]
    assert np.array_equal(np.isnan(got), np.isnan(want)) and np.isnan(want).any() == (name == "special")
    infinite = np.isinf(want)
    assert infinite.any() and np.array_equal(got[infinite], want[infinite])
    assert np.isfinite(got[~infinite & ~np.isnan(want)]).all()


def _write(given: str, out: str) -> None:
    from triton.runtime import interpreter

    from vidops.kernels._common import bf16_parts, matmul, matmul_unrounded, tf32_parts, upper_half

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16:
            assert b.dtype.scalar == tl.bfloat16
            wide = ((t.data.astype(np.uint32) << 16).view(np.float32) for t in (a, b))
            return interpreter.TensorHandle(tensor_core(*wide, acc.data, 2 * STEP), acc.dtype.scalar)
        assert str(input_precision).endswith("TF32"), input_precision
        return interpreter.TensorHandle(tensor_core(a.data, b.data, acc.data), acc.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
    with np.load(given) as arrays:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    x = tensors.pop("x")
    high, low = torch.empty_like(x), torch.empty_like(x)
    _parts_kernel[(1,)](x, high, low, parts=tf32_parts, SIZE=len(x))
    results = {"high": high.numpy(), "low": low.numpy()}
    parts = torch.empty(3, len(x), dtype=torch.bfloat16)
    _three_parts_kernel[(1,)](x, *parts, parts=bf16_parts, SIZE=len(x))
    results |= {f"part_{i}": part.float().numpy() for i, part in enumerate(parts)}
    for name in OPERANDS:
        product = torch.empty(ROWS, COLUMNS)
        _product_kernel[(1,)](
            tensors[f"a_{name}"], tensors[f"b_{name}"], product, matmul=matmul, ROWS=ROWS, DEPTH=DEPTH, COLUMNS=COLUMNS
        )
        results[f"out_{name}"] = product.numpy()
        unrounded = torch.empty(ROWS, COLUMNS)
        _unrounded_kernel[(1,)](
            tensors[f"a_{name}"], tensors[f"b_{name}"], unrounded, matmul=matmul_unrounded, cut=upper_half, ROWS=ROWS,
            DEPTH=DEPTH, COLUMNS=COLUMNS,
        )  # fmt: skip
        results[f"unrounded_{name}"] = unrounded.numpy()
    np.savez(out, **results)


if __name__ == "__main__":
    _write(sys.argv[1], sys.argv[2])
