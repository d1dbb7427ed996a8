"""Triton `neighbour_mean`: Eq. E3 of Ding et al., ECCV 2024 (arXiv 2311.17893).

The adjacency bits, exact in any format, are the left operand of a matrix product with P. In float32 P is
split into three bfloat16 parts, which together hold all of its digits: three tensor-core products instead of
one without them. Blocks of 32 columns without a single neighbour in a tile of rows are left out of the
product.
"""

import torch
import triton
import triton.language as tl

from vidops.kernels._common import TL_DTYPE, bound, capability, cdiv, interpreted, launch, load_tile


@triton.jit
def _neighbour_mean_blocks_kernel(
    words, blocks, used, word_row, word_col, n, n_words, A: tl.constexpr, C: tl.constexpr
):
    """Per tile of A rows: which 32-column words have a bit in any row, in order, and how many."""
    tile = tl.program_id(0)
    rows = tile * A + tl.arange(0, A)
    found = 0
    for start in range(0, n_words, C):
        column = start + tl.arange(0, C)
        ok = (rows < n)[:, None] & (column < n_words)[None, :]
        bits = load_tile(words, rows, word_row, column, word_col, ok)
        some = tl.max((bits != 0).to(tl.int32), 0)
        place = found + tl.cumsum(some, 0) - 1
        tl.store(blocks + tl.cast(tile, tl.int64) * n_words + place, column, mask=some != 0)
        found += tl.sum(some, 0)
    tl.store(used + tile, found)


@triton.jit
def _neighbour_mean_total_kernel(p, total, p_row, p_col, M, C: tl.constexpr, ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([C], ACC)
    for start in range(0, M, C):
        column = start + tl.arange(0, C)
        acc += tl.load(p + row * p_row + column.to(tl.int64) * p_col, mask=column < M, other=0.0)
    tl.store(total + row, tl.sum(acc, 0))


@triton.jit
def _neighbour_mean_norm_kernel(
    words, total, norm, word_row, word_col, n, n_words, C: tl.constexpr, ACC: tl.constexpr
):
    """sum_c S_ic = sum_j A_ij sum_c p_jc: the total of a row of S before the row itself is known."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    acc = tl.zeros([C, 32], ACC)
    for start in range(0, n_words, C):
        word = start + tl.arange(0, C)
        bits = tl.load(words + row * word_row + word.to(tl.int64) * word_col, mask=word < n_words, other=0)
        near = ((bits[:, None] >> lane[None, :]) & 1) != 0
        column = word[:, None] * 32 + lane[None, :]
        acc += tl.load(total + column, mask=near & (column < n), other=0.0)
    tl.store(norm + row, tl.sum(tl.sum(acc, 1), 0))


@triton.jit
def _neighbour_mean_fwd_kernel(
    words, blocks, used, norm, p, out, word_row, word_col, p_row, p_col, n, n_words, M, tiles,
    A: tl.constexpr, B: tl.constexpr, PARTS: tl.constexpr, STATIC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // tiles
    rows = tile * A + tl.arange(0, A)
    columns = (tl.program_id(0) % tiles) * B + tl.arange(0, B)
    lane = tl.arange(0, 32)
    acc = tl.zeros([A, B], ACC)
    count = tl.load(used + tile)
    # The interpreter needs a bound that is no tensor: it walks over all words and masks the surplus.
    for step in range(0, n_words if STATIC else count):
        here = step < count
        word = tl.load(blocks + tl.cast(tile, tl.int64) * n_words + step, mask=here, other=0)
        at = rows.to(tl.int64) * word_row + tl.cast(word, tl.int64) * word_col
        bits = tl.load(words + at, mask=(rows < n) & here, other=0)
        near = (bits[:, None] >> lane[None, :]) & 1
        j = word * 32 + lane
        x = load_tile(p, j, p_row, columns, p_col, (j < n)[:, None] & (columns < M)[None, :])
        if PARTS == 1:
            acc = tl.dot(near.to(ACC), x, acc, input_precision="ieee", out_dtype=ACC)
        else:
            left = near.to(tl.bfloat16)
            for _ in tl.static_range(PARTS):
                part = x.to(tl.bfloat16)
                acc = tl.dot(left, part, acc)
                x -= part.to(tl.float32)
    scale = tl.load(norm + rows, mask=rows < n, other=1.0)
    at = rows.to(tl.int64)[:, None] * M + columns[None, :]
    tl.store(out + at, acc / scale[:, None], mask=(rows < n)[:, None] & (columns < M)[None, :])


def forward(adjacency: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """adjacency (n, ceil(n/64)) int64, p (n, M), float32 or float64 -> S (n, M)."""
    n, columns = p.shape
    out = p.new_empty(n, columns)
    if out.numel() == 0:
        return out
    if adjacency.stride(1) != 1:
        adjacency = adjacency.contiguous()
    words = adjacency.view(torch.int32)
    n_words = words.shape[1]
    acc = TL_DTYPE[p.dtype]
    double = p.dtype == torch.float64
    # Three parts of P in registers beside a 128 x 128 accumulator fit where the matrix unit reads shared
    # memory.
    rows, width = (32, 32) if double else (128, 128 if capability(p) >= (9, 0) else 64)
    tiles_n, tiles_m = cdiv(n, rows), cdiv(columns, width)
    blocks = words.new_empty(tiles_n, n_words)
    used = words.new_empty(tiles_n)
    total, norm = p.new_empty(n), p.new_empty(n)
    launch(
        _neighbour_mean_blocks_kernel, tiles_n, words, blocks, used, *words.stride(), n, bound(n_words),
        A=rows, C=32, num_warps=4, num_stages=1,
    )  # fmt: skip
    launch(
        _neighbour_mean_total_kernel, n, p, total, *p.stride(), bound(columns),
        C=1024, ACC=acc, num_warps=4, num_stages=1,
    )  # fmt: skip
    launch(
        _neighbour_mean_norm_kernel, n, words, total, norm, *words.stride(), n, bound(n_words),
        C=32, ACC=acc, num_warps=4, num_stages=1,
    )  # fmt: skip
    launch(
        _neighbour_mean_fwd_kernel, tiles_n * tiles_m, words, blocks, used, norm, p, out,
        *words.stride(), *p.stride(), n, bound(n_words), columns, tiles_m,
        A=rows, B=width, PARTS=1 if double or interpreted() else 3,
        STATIC=interpreted(), ACC=acc, num_warps=4 if double else 8, num_stages=3,
    )  # fmt: skip
    return out
