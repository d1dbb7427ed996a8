"""Triton `gather_tokens` and `scatter_tokens`: rows taken by index, and rows added up by index in their order."""

import torch
import triton
import triton.language as tl

from vidops.kernels import _common
from vidops.kernels._common import TL_DTYPE, bound, cdiv, launch, load_tile


@triton.jit
def _gather_tokens_kernel(
    x, index, out, x_item, x_row, x_col, i_item, i_row, N, D, K, tiles, columns,
    A: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Rows of zeros where the index is none of a row."""
    item = (tl.program_id(0) // (tiles * columns)).to(tl.int64)
    k = tl.program_id(0) // columns % tiles * A + tl.arange(0, A)
    column = tl.program_id(0) % columns * C + tl.arange(0, C)
    row = tl.load(index + item * i_item + k.to(tl.int64) * i_row, mask=k < K, other=-1)
    inside = (column < D)[None, :]
    found = ((row >= 0) & (row < N))[:, None] & inside
    value = load_tile(x + item * x_item, row, x_row, column, x_col, found)
    at = (item * K + k)[:, None] * D + column[None, :]
    tl.store(out + at, value, mask=(k < K)[:, None] & inside)


@triton.jit
def _scatter_tokens_kernel(
    x, index, out, x_item, x_row, x_col, i_item, i_row, N, D, K, tiles, columns,
    A: tl.constexpr, C: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A rows of the sum look for themselves in the index, and add what they find in the order of k.

    So the additions of a row depend on its own indices alone, and no other program touches it.
    """
    item = (tl.program_id(0) // (tiles * columns)).to(tl.int64)
    n = tl.program_id(0) // columns % tiles * A + tl.arange(0, A)
    column = tl.program_id(0) % columns * C + tl.arange(0, C)
    inside = (column < D)[None, :]
    total = tl.zeros([A, C], ACC)
    for start in range(0, K, B):
        k = start + tl.arange(0, B)
        place = tl.load(index + item * i_item + k.to(tl.int64) * i_row, mask=k < K, other=-1)
        left = tl.where(place[None, :] == n[:, None], k[None, :], 2147483647)
        row = tl.min(left, 1)
        while tl.min(row, 0) < 2147483647:
            found = row < 2147483647
            rows = tl.where(found, row, 0)
            total += load_tile(x + item * x_item, rows, x_row, column, x_col, found[:, None] & inside).to(ACC)
            left = tl.where(left == row[:, None], 2147483647, left)
            row = tl.min(left, 1)
    at = (item * N + n)[:, None] * D + column[None, :]
    tl.store(out + at, total, mask=(n < N)[:, None] & inside)


def _columns(width: int, most: int) -> int:
    return int(max(16, min(most, triton.next_power_of_2(width))))


def gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (B, N, D), index (B, K) int64 -> (B, K, D)."""
    batch, n, d = x.shape
    k = index.shape[1]
    out = x.new_empty(batch, k, d)
    if d == 0:
        return out
    c = _columns(d, 1024)
    a = min(64, 4096 // c)
    tiles, columns = cdiv(k, a), cdiv(d, c)
    launch(
        _gather_tokens_kernel, batch * tiles * columns, x, index, out, *x.stride(), *index.stride(), n, d, k,
        tiles, columns, A=a, C=c, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def scatter(x: torch.Tensor, index: torch.Tensor, tokens: int) -> torch.Tensor:
    """x (B, K, D), index (B, K) int64 -> (B, tokens, D); indices that are none of a row are left out."""
    batch, k, d = x.shape
    out = x.new_empty(batch, tokens, d, dtype=_common.stored(x.dtype))
    if d == 0:
        return out.to(x.dtype)
    c = _columns(d, 256)
    a = 16
    tiles, columns = cdiv(tokens, a), cdiv(d, c)
    launch(
        _scatter_tokens_kernel, batch * tiles * columns, x, index, out, *x.stride(), *index.stride(), tokens, d,
        bound(k), tiles, columns, A=a, C=c, B=64, ACC=TL_DTYPE[_common.accumulator(x.dtype)],
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return out.to(x.dtype)
