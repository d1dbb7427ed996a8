"""What the kernels of token pruning share: unit keys and their products, numbers as integers, and ranks.

Decisions hang on these figures, and equal tokens have to get equal bits: no sum here depends on where a row lies.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vidops.kernels import _common
from vidops.kernels._common import load_tile, matmul

_LAST32 = tl.constexpr(2**31 - 1)
_LAST64 = tl.constexpr(2**63 - 1)


@triton.jit
def order_key(value):
    """Integers that order as float32 or float64 numbers do: zeros of both signs are equal, NaN is the largest."""
    if value.dtype == tl.float64:
        bits = tl.where(value == 0.0, 0.0, value).to(tl.int64, bitcast=True)
        return tl.where(value == value, bits ^ ((bits >> 63) & _LAST64), _LAST64)
    else:
        bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
        return tl.where(value == value, bits ^ ((bits >> 31) & _LAST32), _LAST32)


@triton.jit
def value_of(key):
    if key.dtype == tl.int64:
        return (key ^ ((key >> 63) & _LAST64)).to(tl.float64, bitcast=True)
    else:
        return (key ^ ((key >> 31) & _LAST32)).to(tl.float32, bitcast=True)


@triton.jit
def ascending_ranks(values, at, count, A: tl.constexpr, B: tl.constexpr):
    """How many of `count` numbers come before the A at `at`, by (number, index) with NaN last.

    Comparing all with all takes as long as the sums that a score comes from, and needs neither a block that is a
    power of two nor keys that hold both parts, which float64 has no room for.
    """
    own = order_key(tl.load(values + at, mask=at < count, other=0.0))
    before = tl.zeros([A, B], tl.int32)
    for start in range(0, count, B):
        j = start + tl.arange(0, B)
        other = order_key(tl.load(values + j, mask=j < count, other=float("nan")))
        less = other[None, :] < own[:, None]
        ahead = (other[None, :] == own[:, None]) & (j[None, :] < at[:, None])
        before += (less | ahead).to(tl.int32)
    return tl.sum(before, 1)


@triton.jit
def unit_rows(
    keys, stride, ok, unit, d,
    WIDTH: tl.constexpr, A: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes A rows at `unit`, WIDTH long and zero past d, over their Euclidean norm; a row of zeros stays zero.

    float64 has room for the squares of every narrower type; of its own the largest magnitude is taken out first.
    """
    top = tl.full([A], 1.0, tl.float64)
    if ACC == tl.float64:
        largest = tl.zeros([A, STEP], tl.float64)
        for start in range(0, d, STEP):
            channel = start + tl.arange(0, STEP)
            inside = ok[:, None] & (channel < d)[None, :]
            value = tl.load(keys[:, None] + channel.to(tl.int64)[None, :] * stride, mask=inside, other=0.0)
            largest = tl.maximum(largest, tl.abs(value))
        top = tl.max(largest, 1)
        top = tl.where(top > 2.2250738585072014e-308, top, 2.2250738585072014e-308)
    squares = tl.zeros([A, STEP], tl.float64)
    for start in range(0, d, STEP):
        channel = start + tl.arange(0, STEP)
        inside = ok[:, None] & (channel < d)[None, :]
        value = tl.load(keys[:, None] + channel.to(tl.int64)[None, :] * stride, mask=inside, other=0.0)
        value = value.to(ACC).to(tl.float64)
        if ACC == tl.float64:
            value = value / top[:, None]
        squares += value * value
    norm = tl.sqrt(tl.sum(squares, 1))
    factor = 1.0 / tl.where(norm == 0.0, 1.0, norm)
    for start in range(0, WIDTH, STEP):
        channel = start + tl.arange(0, STEP)
        inside = ok[:, None] & (channel < d)[None, :]
        value = tl.load(keys[:, None] + channel.to(tl.int64)[None, :] * stride, mask=inside, other=0.0)
        value = value.to(ACC).to(tl.float64)
        if ACC == tl.float64:
            value = value / top[:, None]
        value = (value * factor[:, None]).to(ACC)
        tl.store(unit[:, None] + channel[None, :], value, mask=ok[:, None] & (channel < WIDTH)[None, :])


@triton.jit
def unit_cosine(
    left, right, ok, WIDTH: tl.constexpr, A: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Cosines of A pairs of float64 rows that `unit_rows` wrote: the same sum for equal pairs, which a product of
    matrices need not have."""
    cross = tl.zeros([A, STEP], tl.float64)
    left_square = tl.zeros([A, STEP], tl.float64)
    right_square = tl.zeros([A, STEP], tl.float64)
    for start in range(0, WIDTH, STEP):
        channel = start + tl.arange(0, STEP)
        inside = ok[:, None] & (channel < WIDTH)[None, :]
        a = tl.load(left[:, None] + channel[None, :], mask=inside, other=0.0)
        b = tl.load(right[:, None] + channel[None, :], mask=inside, other=0.0)
        cross += a * b
        left_square += a * a
        right_square += b * b
    size = tl.sqrt(tl.sum(left_square, 1) * tl.sum(right_square, 1))
    return tl.sum(cross, 1) / tl.where(size == 0.0, 1.0, size)


@triton.jit
def cosines(
    left, rows, ok_rows, right, others, ok_others,
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Products (A, B) of rows that `unit_rows` wrote; zero where a row is not `ok`."""
    product = tl.zeros([A, B], ACC)
    for start in range(0, WIDTH, STEP):
        channel = start + tl.arange(0, STEP)
        inside = (channel < WIDTH)[None, :]
        a = load_tile(left, rows, WIDTH, channel, 1, ok_rows[:, None] & inside)
        b = load_tile(right, others, WIDTH, channel, 1, ok_others[:, None] & inside)
        product = matmul(a, tl.trans(b), product, ACC, SPLIT)
    return product


def unit_width(d: int) -> int:
    """Row length of unit keys: whole vectors of the memory, and of what a matrix instruction takes."""
    return _common.cdiv(d, 16) * 16


def row_tile(d: int, acc: torch.dtype) -> tuple[int, int]:
    """(rows, channels at a time) of a program that reads whole rows of d channels."""
    step = min(256, _common.padded(d))
    return min(64, (512 if acc == torch.float64 else 1024) // step), step


def product_constants(width: int, acc: torch.dtype) -> dict[str, Any]:
    """The constants of `cosines` but its tile: all products here are of float32, or of float64."""
    return {
        "WIDTH": width, "STEP": min(32, width), "ACC": _common.TL_DTYPE[acc], "SPLIT": acc == torch.float32,
    }  # fmt: skip
