"""Test-only repair of Triton's interpreter, which is wrong in known ways (Triton 3.6, NumPy 2.4).

What is wrong without it, each shown by `test_triton_interpreter.py`:

* a kernel argument is no loop bound under NumPy >= 2.4 (triton-lang/triton#9171);
* bfloat16 is kept as its bit pattern, and `tl.dot`, arithmetic, comparisons and sums run on those integers
  (triton-lang/triton#11584, #4972);
* casts of float32 to bfloat16 truncate where a GPU rounds to the nearest, ties to even (#10945).

The kernels of vidops avoid all of this, so they are right without the repair, and users who set
TRITON_INTERPRET need none. With it, tests may also run kernels that do use bfloat16 arithmetic.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_to_bfloat16(value: np.ndarray) -> np.ndarray:
    """float32 values -> bfloat16 bit patterns (uint16), to nearest, ties to even; NaN stays NaN."""
    value = np.ascontiguousarray(value, dtype=np.float32)
    bits = value.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    # Adding to the pattern of a NaN could turn it into an infinity or wrap around.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(value), quiet, rounded).astype(np.uint16)


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) -> float32 values."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle(widen_bfloat16(handle.data), tl.float32)


def _narrowed(value: np.ndarray) -> Any:
    return interpreter.TensorHandle(round_to_bfloat16(value), tl.bfloat16)


def _wrap_binary(builder: type, name: str, compute: Callable[..., np.ndarray], comparison: bool) -> None:
    original = getattr(builder, name)

    def call(self: Any, left: Any, right: Any) -> Any:
        if not (_is_bfloat16(left) and _is_bfloat16(right)):
            return original(self, left, right)
        result = compute(_widened(left).data, _widened(right).data)
        return interpreter.TensorHandle(result, tl.int1) if comparison else _narrowed(result)

    setattr(builder, name, call)


def repair() -> None:
    """Apply the repair to this process, once; later calls do nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "vidops_repaired", False):
        return
    builder.vidops_repaired = True  # type: ignore[attr-defined]

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_with_index

    create_dot = builder.create_dot

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return create_dot(self, _widened(a), _widened(b), d, precision, imprecise)

    builder.create_dot = dot

    cast = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        target = dst_type.scalar
        if target == tl.bfloat16 and not _is_bfloat16(src):
            return _narrowed(src.data.astype(np.float32))
        if _is_bfloat16(src) and target != tl.bfloat16:
            wide = _widened(src)
            return wide if target == tl.float32 else cast(self, wide, dst_type)
        return cast(self, src, dst_type)

    builder.cast_impl = cast_impl

    def get_bf16(self: Any, value: float) -> Any:
        return _narrowed(np.array([value], dtype=np.float32))

    builder.get_bf16 = get_bf16

    for name, arithmetic in (
        ("create_fadd", np.add),
        ("create_fsub", np.subtract),
        ("create_fmul", np.multiply),
        ("create_fdiv", np.divide),
    ):
        _wrap_binary(builder, name, arithmetic, comparison=False)
    for name, compare in (
        ("create_fcmpOLT", np.less),
        ("create_fcmpOLE", np.less_equal),
        ("create_fcmpOGT", np.greater),
        ("create_fcmpOGE", np.greater_equal),
        ("create_fcmpOEQ", np.equal),
        ("create_fcmpUNE", np.not_equal),
    ):
        _wrap_binary(builder, name, compare, comparison=True)

    reduce_sum = interpreter.ReduceOps.sum

    def sum_(self: Any, block: Any) -> Any:
        if block.dtype != tl.bfloat16:
            return reduce_sum(self, block)
        total = np.sum(widen_bfloat16(block.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(round_to_bfloat16(np.asarray(total)), tl.bfloat16)

    interpreter.ReduceOps.sum = sum_
