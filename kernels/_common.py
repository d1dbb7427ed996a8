"""What every Triton kernel of vidops shares: launching, dtype rules and small device helpers.

Two rules keep the kernels right both compiled and interpreted (``TRITON_INTERPRET=1``). bfloat16 is only ever
a stored value or an operand of `matmul`: the interpreter computes on the bit patterns of bfloat16 and
truncates where a GPU rounds. And a run-time loop bound goes through `bound`, because the interpreter cannot
make a Python number of a kernel argument with recent NumPy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

# Lanes of a direct divergence sum, see `divergence`. A constant of the library: it fixes the order of
# additions.
LANES = 64

TL_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (decided by TRITON_INTERPRET when a kernel is defined)."""
    return bool(triton.knobs.runtime.interpret)


def bound(size: int) -> Any:
    """`size` as a run-time loop bound of a kernel.

    The interpreter turns plain integers into one-element arrays, which NumPy >= 2.4 refuses as a loop bound
    (triton-lang/triton#9171); a constexpr passes through unchanged and behaves as the number it holds.
    """
    return tl.constexpr(size) if interpreted() else size


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(dtype: torch.dtype) -> Any:
    """The type of `matmul` operands for inputs of `dtype`: the same, but float32 for interpreted bfloat16."""
    return tl.float32 if dtype == torch.bfloat16 and interpreted() else TL_DTYPE[dtype]


def split(dtype: torch.dtype, width: int) -> bool:
    """Whether products of heads of `width` (see `padded`) split float32 for the tensor cores, see `matmul`."""
    return dtype == torch.float32 and width <= 64


def stored(dtype: torch.dtype) -> torch.dtype:
    """The type a kernel should store for a result of `dtype`; `.to(dtype)` after it costs nothing else.

    Interpreted stores of bfloat16 truncate, so there the rounding is left to torch.
    """
    return torch.float32 if dtype == torch.bfloat16 and interpreted() else dtype


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as the tests that compile without a GPU see it."""

    kernel: Any
    grid: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int | None


_recorded: list[Launch] | None = None
_recorded_capability = (9, 0)


@contextmanager
def recording(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Collect launches instead of making them, as a device of `capability` would receive them.

    Tensors may be on the meta device. Results of the launchers are then unwritten memory.
    """
    global _recorded, _recorded_capability
    saved = _recorded, _recorded_capability
    _recorded, _recorded_capability = [], capability
    try:
        yield _recorded
    finally:
        _recorded, _recorded_capability = saved


def capability(t: torch.Tensor) -> tuple[int, int]:
    """Compute capability of the device of `t`."""
    if t.is_cuda:
        return torch.cuda.get_device_capability(t.device)
    return _recorded_capability


def launch(
    kernel: Any, grid: int, *args: Any, num_warps: int, num_stages: int, registers: int | None = None, **constants: Any
) -> None:  # fmt: skip
    """Run `kernel` on the device of its tensors, where Triton itself would take the current device.

    Grids have one dimension, the only one with room for 2^31 programs. `registers` of a thread at most; without a
    limit the assembler guesses how many warps should share a multiprocessor, and may spill to reach its guess.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constants, num_warps, num_stages, registers))
        return
    if grid == 0:
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    options = {"num_warps": num_warps, "num_stages": num_stages, **constants}
    if registers is not None:
        options["maxnreg"] = registers
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[(grid,)](*args, **options)
    else:
        kernel[(grid,)](*args, **options)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded(head_size: int) -> int:
    """Head size as a tile side: a power of two, at least what a matrix instruction needs."""
    return max(16, 1 << (head_size - 1).bit_length())


@triton.jit
def tf32_parts(x):
    """float32 x as high + low: high has the 11 significant bits that TF32 keeps, rounded to nearest.

    NaN, infinity and what would round to infinity are cut instead, lest the carry change what they are.
    """
    half = tl.where(tl.abs(x) < 3.4e38, 0x1000, 0)
    high = ((x.to(tl.int32, bitcast=True) + half) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def matmul(a, b, acc, DOT: tl.constexpr, SPLIT: tl.constexpr):
    """acc + a @ b; float32 products run on the tensor cores as three of TF32, which lose no more than float32.

    The part of x that is left of `low` when the tensor core cuts it to TF32 is below 2^-23 |x|, low by low below
    2^-22 |a b|, so the products are off by 2^-21 sum |a b| at most, mostly by far less. Tensor cores cut their sums
    too, hence only those of one tile: acc is added in float32, to nearest. TF32 has float32's exponents; parts
    below 2^-136 are lost, which only matters where |x| < 2^-113.
    Where an operand is infinite or a product overflows, the low parts make NaN or the other infinity: float32's
    own result is that of the high parts.
    """
    if SPLIT:
        tl.static_assert(DOT == tl.float32)
        a_high, a_low = tf32_parts(a.to(DOT))
        b_high, b_low = tf32_parts(b.to(DOT))
        cross = tl.dot(a_low, b_high, input_precision="tf32")
        cross = tl.dot(a_high, b_low, cross, input_precision="tf32")
        cross = tl.where(tl.abs(cross) < float("inf"), cross, 0.0)
        return acc + tl.dot(a_high, b_high, cross, input_precision="tf32")
    else:
        return tl.dot(a.to(DOT), b.to(DOT), acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def upper_half(x):
    """float32 x as bfloat16, its lower 16 bits cut off."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def bf16_parts(x):
    """float32 x as high + middle + low, bfloat16 of 8 significant bits each: all 24 that it has, above 2^-133.

    Cut by their bits: no instruction rounds, and no pass of the compiler may take x - high for zero.
    """
    rest = x - (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    last = rest - (rest.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    return upper_half(x), upper_half(rest), upper_half(last)


@triton.jit
def matmul_unrounded(a, b, acc, DOT: tl.constexpr):
    """acc + a @ b for a in DOT and b in the accumulator's type, none of whose bits is lost.

    Beside bfloat16, tensor cores multiply by the three parts of b; sums, infinity and overflow are as in `matmul`.
    """
    if DOT == tl.bfloat16:
        high, middle, low = bf16_parts(b)
        small = tl.dot(a.to(DOT), low)
        small = tl.dot(a.to(DOT), middle, small)
        small = tl.where(tl.abs(small) < float("inf"), small, 0.0)
        return acc + tl.dot(a.to(DOT), high, small)
    else:
        return matmul(a, b, acc, DOT, False)


@triton.jit
def load_tile(ptr, rows, stride_row, cols, stride_col, ok):
    """Two-dimensional tile at (rows, cols), zero where not `ok`; offsets in 64 bits."""
    offset = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    return tl.load(ptr + offset, mask=ok, other=0.0)


@triton.jit
def dropout_keep(element, seed, threshold):
    """Whether `element` (an int64 counter) survives: Philox-4x32-10, key `seed`, first word >= threshold."""
    low = (element & 0xFFFFFFFF).to(tl.uint32)
    high = (element >> 32).to(tl.uint32)
    zero = low * 0
    word, _, _, _ = tl.philox(seed, low, high, zero, zero, 10)
    return word >= tl.full([], threshold, tl.uint32)


def dropout_threshold(p: float) -> int:
    return int(p * 2**32)


@triton.jit
def fold(x, A: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr):
    """Sum (A, B, LANES) over its last axis as a fixed binary tree: the same bits in every kernel."""
    tl.static_assert(LANES == 64)
    for half in tl.static_range(6):
        even, odd = tl.split(tl.reshape(x, [A, B, 32 >> half, 2]))
        x = even + odd
    return tl.reshape(x, [A, B])


@triton.jit
def divergence(
    p, log_p, p_row, p_col, lp_row, lp_col, rows, ok_rows,
    q, log_q, q_row, q_col, lq_row, lq_col, others, ok_others,
    M, A: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Direct form of Eq. E2: sum_c (p_ic - q_jc) (log p_ic - log q_jc) for A rows and B others.

    Has no cancellation between entropies and cross terms, is exactly symmetric in its two rows, and adds in
    an order that depends on the row length alone. Hence two kernels that decide about the same pair agree.
    """
    lane = tl.arange(0, LANES)
    at_p = rows.to(tl.int64)[:, None, None] * p_row
    at_lp = rows.to(tl.int64)[:, None, None] * lp_row
    at_q = others.to(tl.int64)[None, :, None] * q_row
    at_lq = others.to(tl.int64)[None, :, None] * lq_row
    acc = tl.zeros([A, B, LANES], ACC)
    for start in range(0, M, LANES):
        c = (start + lane)[None, None, :]
        ok_p = ok_rows[:, None, None] & (c < M)
        ok_q = ok_others[None, :, None] & (c < M)
        c = c.to(tl.int64)
        a = tl.load(p + at_p + c * p_col, mask=ok_p, other=0.0)
        la = tl.load(log_p + at_lp + c * lp_col, mask=ok_p, other=0.0)
        b = tl.load(q + at_q + c * q_col, mask=ok_q, other=0.0)
        lb = tl.load(log_q + at_lq + c * lq_col, mask=ok_q, other=0.0)
        acc += (a - b) * (la - lb)
    return fold(acc, A, B, LANES)


@triton.jit
def pack_bytes(near, A: tl.constexpr, B: tl.constexpr):
    """Booleans (A, B) -> bit bytes (A, B / 8): bit b of byte w is column 8 w + b, as in int64 bit rows."""
    bits = tl.reshape(near.to(tl.int32), [A, B // 8, 8]) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, 2).to(tl.uint8)
