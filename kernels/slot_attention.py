"""Triton `slot_attention`: one pass of slots over tokens, Locatello et al., NeurIPS 2020 (arXiv 2006.15055).

The softmax runs over slots, so a tile of tokens is complete by itself: dots, softmax, and the products of the
weights with the values all come from one read of the tile, and the backward recomputes the weights the same way.
Tokens stand in the rows of every product, where matrix instructions are wide; slots, few, in the columns. Tokens
are divided over programs, whose partial sums a second kernel adds in a fixed order.

Rows are (head, slot) pairs in head-major order. A *unit* is P successive rows that share a softmax: the slots of one
group of one head, or with a joint softmax all rows. Units are padded to P_PAD columns of a tile of R. Where one does
not fit into a tile, or spans heads with keys of their own, a pass of its own first finds the log-sum-exps (and in the
backward the softmax's correction) of its tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vidops.kernels import _common
from vidops.kernels._common import bound, cdiv, launch, matmul, matmul_unrounded

# Programs that a launch should have, by divided tokens: two for each multiprocessor of the largest cards. A constant
# of the library, because the division fixes the order of additions.
_PROGRAMS = 264


@triton.jit
def _tile_of(ptr, rows, stride, channel, ok):
    """Tile at a few rows from ptr, zero where not `ok`. Offsets in 32 bits: 64 would take registers that are short."""
    return tl.load(ptr + (rows[:, None] * stride + channel[None, :]), mask=ok, other=0.0)


@triton.jit
def _channels(ptr, rows, row_stride, ok_rows, D: tl.constexpr, CHUNK: tl.constexpr, TYPE: tl.constexpr):
    """Rows in TYPE, in a tuple of CHUNK channels each: no width is padded beyond a chunk."""
    tiles = ()
    for first in tl.static_range(0, D, CHUNK):
        channel = first + tl.arange(0, CHUNK)
        ok = ok_rows[:, None] & (channel < D)[None, :]
        tiles = tiles + (_tile_of(ptr, rows, row_stride, channel, ok).to(TYPE),)
    return tiles


@triton.jit
def _sum_channels(
    ptr, rows, row_stride, ok_rows, width, R: tl.constexpr, CHUNK: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr
):
    """Sum of every row over its channels; zero if tokens are not normalised."""
    total = tl.zeros([R], ACC)
    if NORM:
        for first in range(0, width, CHUNK):
            channel = first + tl.arange(0, CHUNK)
            ok = ok_rows[:, None] & (channel < width)[None, :]
            total += tl.sum(_tile_of(ptr, rows, row_stride, channel, ok), 1)
    return total


@triton.jit
def _inner(
    held_x, held_y, x, tokens, x_row, ok_t, y, rows, y_row, ok_r, width, T: tl.constexpr, R: tl.constexpr,
    CHUNK: tl.constexpr, HOLD: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Inner products (T, R) of tokens of x and rows of y: of the held chunks, or of chunks read for the purpose."""
    acc = tl.zeros([T, R], ACC)
    if HOLD:
        for i in tl.static_range(len(held_x)):
            acc = matmul_unrounded(held_x[i], tl.trans(held_y[i]), acc, DOT)
    else:
        for first in range(0, width, CHUNK):
            channel = first + tl.arange(0, CHUNK)
            inside = (channel < width)[None, :]
            left = _tile_of(x, tokens, x_row, channel, ok_t[:, None] & inside)
            right = _tile_of(y, rows, y_row, channel, ok_r[:, None] & inside)
            acc = matmul_unrounded(left, tl.trans(right), acc, DOT)
    return acc


@triton.jit
def _outer_sum(
    acc, held, x, tokens, x_row, ok_t, w, base, D: tl.constexpr, CHUNK: tl.constexpr, HOLD: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """acc + x^T w for tokens of x, by chunks of channels (CHUNK, R) from `base` on."""
    sums = ()
    for i in tl.static_range(len(acc)):
        if HOLD:
            tile = held[i]
        else:
            channel = base + i * CHUNK + tl.arange(0, CHUNK)
            tile = _tile_of(x, tokens, x_row, channel, ok_t[:, None] & (channel < D)[None, :]).to(DOT)
        sums = sums + (matmul_unrounded(tl.trans(tile), w, acc[i], DOT),)
    return sums


@triton.jit
def _zeros(D: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr):
    acc = ()
    for _ in tl.static_range(0, D, CHUNK):
        acc = acc + (tl.zeros([CHUNK, R], ACC),)
    return acc


@triton.jit
def _store_columns(acc, minus, out, rows, ok_r, base, D: tl.constexpr, CHUNK: tl.constexpr):
    """Write the chunks (CHUNK, R) of acc, less one number for each row, as rows of D channels."""
    for i in tl.static_range(len(acc)):
        channel = base + i * CHUNK + tl.arange(0, CHUNK)
        at = channel[:, None] + rows[None, :] * D
        tl.store(out + at, acc[i] - minus[None, :], mask=(channel < D)[:, None] & ok_r[None, :])


@triton.jit
def _over_members(x, T: tl.constexpr, R: tl.constexpr, P_PAD: tl.constexpr, MAX: tl.constexpr):
    """Maximum or sum over the columns of the same unit: (T, R), or of a tile that is one unit (T, 1)."""
    if P_PAD == R:
        return tl.max(x, 1, keep_dims=True) if MAX else tl.sum(x, 1, keep_dims=True)
    else:
        units = tl.reshape(x, [T, R // P_PAD, P_PAD])
        folded = tl.max(units, 2, keep_dims=True) if MAX else tl.sum(units, 2, keep_dims=True)
        return tl.reshape(tl.broadcast_to(folded, [T, R // P_PAD, P_PAD]), [T, R])


@triton.jit
def _normalised(products, mu, rho, sums, NORM: tl.constexpr):
    """Products of rows with raw tokens, and the sums of the rows -> products with the tokens (x - mu) rho."""
    if NORM:
        return (products - mu[:, None] * sums[None, :]) * rho[:, None]
    else:
        return products


@triton.jit
def _per_token(ptr, item, tokens, ok_t, N, T: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    if NORM:
        return tl.load(ptr + item * N + tokens, mask=ok_t, other=0.0)
    else:
        return tl.zeros([T], ACC)


@triton.jit
def _outside(slot_mask, item, rows, ok_r, S, SLOT_MASK: tl.constexpr):
    """The columns whose dots are -inf: padding and masked slots."""
    outside = ok_r == 0
    if SLOT_MASK:
        outside = outside | (tl.load(slot_mask + item * S + rows % S, mask=ok_r, other=0) != 0)
    return outside


@triton.jit
def _token_weights(
    token_mask, tokens, m_row, ok_t, rows, ok_r, m_group, S, PER_GROUP, GROUPS: tl.constexpr, ACC: tl.constexpr
):
    """Token mask of the rows' groups, (T, R) or, of the only group, (T, 1)."""
    at = tokens.to(tl.int64)[:, None] * m_row
    ok = ok_t[:, None]
    if GROUPS > 1:
        at += ((rows % S) // PER_GROUP).to(tl.int64)[None, :] * m_group
        ok = ok & ok_r[None, :]
    return tl.load(token_mask + at, mask=ok, other=0.0)


@triton.jit
def _map_tile(ptr, item, rows, tokens, ok, ROWS, N):
    """Tile (T, R) of a contiguous map (items, rows, tokens)."""
    at = (item * ROWS + rows.to(tl.int64))[None, :] * N + tokens[:, None]
    return tl.load(ptr + at, mask=ok, other=0.0)


@triton.jit
def _slot_attend_softmax_kernel(
    keys, values, mean, rstd, q, constant, token_mask, slot_mask, grad_num, grad_den, grad_attn, lse, correction,
    k_item, k_head, k_row, v_item, v_head, v_row, m_item, m_group, m_row, k_width, v_width,
    N, S, ROWS, HEAD_ROWS, PER_GROUP, UNITS, UNIT_ROWS, SEGMENT_ROWS, segment_blocks, blocks, tiles,
    NORM: tl.constexpr, TOKEN_MASK: tl.constexpr, SLOT_MASK: tl.constexpr, GRAD: tl.constexpr,
    GRAD_ATTN: tl.constexpr, GROUPS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of T tokens over one unit, R rows at a time, and in the backward the correction sum_i a da.

    A segment is what of the unit shares keys: all of it, or one head of a joint softmax.
    """
    tokens = (tl.program_id(0) % tiles) * T + tl.arange(0, T)
    unit = (tl.program_id(0) // tiles) % UNITS
    item = (tl.program_id(0) // tiles // UNITS).to(tl.int64)
    ok_t = tokens < N
    mu = _per_token(mean, item, tokens, ok_t, N, T, NORM, ACC)
    rho = _per_token(rstd, item, tokens, ok_t, N, T, NORM, ACC)
    q += item * ROWS * DK
    grad_num += item * ROWS * DV
    token_mask += item * m_item
    top = tl.full([T], float("-inf"), ACC)
    total = tl.zeros([T], ACC)
    weighted = tl.zeros([T], ACC)
    for block in range(0, blocks):
        first = unit * UNIT_ROWS + (block // segment_blocks) * SEGMENT_ROWS
        within = (block % segment_blocks) * R + tl.arange(0, R)
        rows = first + within
        ok_r = within < SEGMENT_ROWS
        head = (first // HEAD_ROWS).to(tl.int64)
        sums = _sum_channels(q, rows, DK, ok_r, k_width, R, CHUNK, NORM, ACC)
        x = keys + item * k_item + head * k_head
        s = _inner((), (), x, tokens, k_row, ok_t, q, rows, DK, ok_r, k_width, T, R, CHUNK, False, DOT, ACC)
        s = _normalised(s, mu, rho, sums, NORM)
        s += tl.load(constant + item * ROWS + rows, mask=ok_r, other=0.0)[None, :]
        s = tl.where(_outside(slot_mask, item, rows, ok_r, S, SLOT_MASK)[None, :], float("-inf"), s)
        higher = tl.maximum(top, tl.max(s, 1))
        # So far all slots may be masked, and a difference of infinities is no number.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - finite)
        e = tl.exp(s - finite[:, None])
        total = total * shrink + tl.sum(e, 1)
        top = higher
        if GRAD:
            sums = _sum_channels(grad_num, rows, DV, ok_r, v_width, R, CHUNK, NORM, ACC)
            x = values + item * v_item + head * v_head
            g = _inner((), (), x, tokens, v_row, ok_t, grad_num, rows, DV, ok_r, v_width, T, R, CHUNK, False, DOT, ACC)
            g = _normalised(g, mu, rho, sums, NORM)
            g += tl.load(grad_den + item * ROWS + rows, mask=ok_r, other=0.0)[None, :]
            if TOKEN_MASK:
                g *= _token_weights(token_mask, tokens, m_row, ok_t, rows, ok_r, m_group, S, PER_GROUP, GROUPS, ACC)
            if GRAD_ATTN:
                g += _map_tile(grad_attn, item, rows, tokens, ok_t[:, None] & ok_r[None, :], ROWS, N)
            weighted = weighted * shrink + tl.sum(e * g, 1)
    at = (item * UNITS + unit) * N + tokens
    tl.store(lse + at, top + tl.log(total), mask=ok_t)
    if GRAD:
        tl.store(correction + at, weighted / total, mask=ok_t)


@triton.jit
def _slot_attend_fwd_kernel(
    keys, values, mean, rstd, q, constant, token_mask, slot_mask, lse, num, den, dots, attn,
    k_item, k_head, k_row, v_item, v_head, v_row, m_item, m_group, m_row, k_width, v_width, eps: tl.float64,
    N, S, ROWS, HEAD_ROWS, PER_GROUP, UNITS, UNIT_ROWS, P, heads, shares, tiles, splits, items, span,
    NORM: tl.constexpr, SAME: tl.constexpr, TOKEN_MASK: tl.constexpr, SLOT_MASK: tl.constexpr,
    DOTS: tl.constexpr, ATTN: tl.constexpr, LSE: tl.constexpr, GROUPS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, T: tl.constexpr, R: tl.constexpr, P_PAD: tl.constexpr,
    CHUNK: tl.constexpr, SHARE: tl.constexpr, HOLD: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over `span` tokens of w V and of w, for one tile of rows of one head of keys."""
    base = (tl.program_id(0) % shares) * SHARE
    tile = (tl.program_id(0) // shares) % tiles
    split = (tl.program_id(0) // shares // tiles) % splits
    head = (tl.program_id(0) // shares // tiles // splits) % heads
    item = (tl.program_id(0) // shares // tiles // splits // heads).to(tl.int64)
    column = tl.arange(0, R)
    rows = head * HEAD_ROWS + (tile * (R // P_PAD) + column // P_PAD) * P + column % P_PAD
    ok_r = (column % P_PAD < P) & (rows < (head + 1) * HEAD_ROWS)
    keys += item * k_item + head.to(tl.int64) * k_head
    values += item * v_item + head.to(tl.int64) * v_head
    q += item * ROWS * DK
    token_mask += item * m_item
    outside = _outside(slot_mask, item, rows, ok_r, S, SLOT_MASK)
    constants = tl.load(constant + item * ROWS + rows, mask=ok_r, other=0.0)
    sums = _sum_channels(q, rows, DK, ok_r, k_width, R, CHUNK, NORM, ACC)
    held_q = _channels(q, rows, DK, ok_r, DK, CHUNK, ACC) if HOLD else ()
    floor = tl.full([], eps, ACC)
    lane = tl.arange(0, T)
    acc = _zeros(DV if DV < SHARE else SHARE, R, CHUNK, ACC)
    mass = tl.zeros([T, R], ACC)
    moved = tl.zeros([T, R], ACC)
    for start in range(0, span, T):
        first = split * span + start
        tokens = first + lane
        near = keys + tl.cast(first, tl.int64) * k_row
        far = values + tl.cast(first, tl.int64) * v_row
        ok_t = tokens < N
        ok = ok_t[:, None] & ok_r[None, :]
        held_k = _channels(near, lane, k_row, ok_t, DK, CHUNK, DOT) if HOLD else ()
        mu = _per_token(mean, item, tokens, ok_t, N, T, NORM, ACC)
        rho = _per_token(rstd, item, tokens, ok_t, N, T, NORM, ACC)
        s = _inner(held_k, held_q, near, lane, k_row, ok_t, q, rows, DK, ok_r, k_width, T, R, CHUNK, HOLD, DOT, ACC)
        s = _normalised(s, mu, rho, sums, NORM) + constants[None, :]
        s = tl.where(outside[None, :], float("-inf"), s)
        if LSE:
            at = (item * UNITS + rows // UNIT_ROWS)[None, :] * N + tokens[:, None]
            a = tl.exp(s - tl.load(lse + at, mask=ok, other=0.0))
        else:
            a = tl.exp(s - _over_members(s, T, R, P_PAD, True))
            a = a / _over_members(a, T, R, P_PAD, False)
        at = (item * ROWS + rows)[None, :] * N + tokens[:, None]
        if DOTS:
            tl.store(dots + at, s, mask=ok & (base == 0))
        if ATTN:
            tl.store(attn + at, a, mask=ok & (base == 0))
        w = a + floor
        if TOKEN_MASK:
            w *= _token_weights(token_mask, tokens, m_row, ok_t, rows, ok_r, m_group, S, PER_GROUP, GROUPS, ACC)
        w = tl.where(ok, w, 0.0)
        mass += w
        if NORM:
            w *= rho[:, None]
            moved += w * mu[:, None]
        if SAME:
            acc = _outer_sum(acc, held_k, near, lane, k_row, ok_t, w, base, DV, CHUNK, HOLD, DOT)
        else:
            held_v = _channels(far, lane, v_row, ok_t, DV, CHUNK, DOT) if HOLD else ()
            acc = _outer_sum(acc, held_v, far, lane, v_row, ok_t, w, base, DV, CHUNK, HOLD, DOT)
    at = (split * items + item) * ROWS
    _store_columns(acc, tl.sum(moved, 0), num + at * DV, rows, ok_r, base, DV, CHUNK)
    tl.store(den + at + rows, tl.sum(mass, 0), mask=ok_r & (base == 0))


@triton.jit
def _add_products(
    out, tokens, row, ok_t, first, w, y, w2, y2, D: tl.constexpr, CHUNK: tl.constexpr, TWO: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    channel = first + tl.arange(0, CHUNK)
    ok = ok_t[:, None] & (channel < D)[None, :]
    at = tokens[:, None] * row + channel[None, :]
    acc = tl.load(out + at, mask=ok, other=0.0)
    # Neither side is tokens: beside bfloat16 ones these are ordinary float32 products on the tensor cores.
    acc = matmul(w, y, acc, acc.dtype, DOT == tl.bfloat16)
    if TWO:
        acc = matmul(w2, y2, acc, acc.dtype, DOT == tl.bfloat16)
    tl.store(out + at, acc, mask=ok)


@triton.jit
def _add_outer(
    out, tokens, row, ok_t, w, held, y, w2, held2, y2, rows, ok_r, base, share, D: tl.constexpr, CHUNK: tl.constexpr,
    HOLD: tl.constexpr, TWO: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out += w y, and if TWO + w2 y2, for a tile of tokens: combinations of the rows of y."""
    if HOLD:
        for i in tl.static_range(len(held)):
            right = held2[i] if TWO else held[i]
            _add_products(out, tokens, row, ok_t, i * CHUNK, w, held[i], w2, right, D, CHUNK, TWO, DOT)
    else:
        for first in range(0, share, CHUNK):
            channel = base + first + tl.arange(0, CHUNK)
            ok = ok_r[:, None] & (channel < D)[None, :]
            left = _tile_of(y, rows, D, channel, ok)
            right = _tile_of(y2, rows, D, channel, ok) if TWO else left
            _add_products(out, tokens, row, ok_t, base + first, w, left, w2, right, D, CHUNK, TWO, DOT)


@triton.jit
def _slot_attend_bwd_kernel(
    keys, values, mean, rstd, q, constant, token_mask, slot_mask, lse, correction,
    grad_num, grad_den, grad_dots, grad_attn, grad_keys, grad_values, grad_q, grad_c,
    k_item, k_head, k_row, v_item, v_head, v_row, m_item, m_group, m_row, k_width, v_width,
    gk_item, gk_head, gk_row, gv_item, gv_head, gv_row, eps: tl.float64,
    N, S, ROWS, HEAD_ROWS, PER_GROUP, UNITS, UNIT_ROWS, P, first_head, heads, shares, k_share, v_share, tile, splits,
    items, span,
    NORM: tl.constexpr, SAME: tl.constexpr, TOKEN_MASK: tl.constexpr, SLOT_MASK: tl.constexpr,
    GRAD_DOTS: tl.constexpr, GRAD_ATTN: tl.constexpr, LSE: tl.constexpr, GROUPS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, T: tl.constexpr, R: tl.constexpr, P_PAD: tl.constexpr,
    CHUNK: tl.constexpr, SHARE: tl.constexpr, HOLD: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients from one tile of rows: sums over `span` tokens for queries, added in place for the tokens."""
    base = (tl.program_id(0) % shares) * SHARE
    split = (tl.program_id(0) // shares) % splits
    head = first_head + (tl.program_id(0) // shares // splits) % heads
    item = (tl.program_id(0) // shares // splits // heads).to(tl.int64)
    column = tl.arange(0, R)
    rows = head * HEAD_ROWS + (tile * (R // P_PAD) + column // P_PAD) * P + column % P_PAD
    ok_r = (column % P_PAD < P) & (rows < (head + 1) * HEAD_ROWS)
    keys += item * k_item + head.to(tl.int64) * k_head
    values += item * v_item + head.to(tl.int64) * v_head
    grad_keys += item * gk_item + head.to(tl.int64) * gk_head
    grad_values += item * gv_item + head.to(tl.int64) * gv_head
    q += item * ROWS * DK
    grad_num += item * ROWS * DV
    token_mask += item * m_item
    outside = _outside(slot_mask, item, rows, ok_r, S, SLOT_MASK)
    constants = tl.load(constant + item * ROWS + rows, mask=ok_r, other=0.0)
    grad_constants = tl.load(grad_den + item * ROWS + rows, mask=ok_r, other=0.0)
    q_sums = _sum_channels(q, rows, DK, ok_r, k_width, R, CHUNK, NORM, ACC)
    g_sums = _sum_channels(grad_num, rows, DV, ok_r, v_width, R, CHUNK, NORM, ACC)
    held_q = _channels(q, rows, DK, ok_r, DK, CHUNK, ACC) if HOLD else ()
    held_g = _channels(grad_num, rows, DV, ok_r, DV, CHUNK, ACC) if HOLD else ()
    floor = tl.full([], eps, ACC)
    lane = tl.arange(0, T)
    acc = _zeros(DK if DK < SHARE else SHARE, R, CHUNK, ACC)
    total = tl.zeros([T, R], ACC)
    moved = tl.zeros([T, R], ACC)
    for start in range(0, span, T):
        first = split * span + start
        tokens = first + lane
        near = keys + tl.cast(first, tl.int64) * k_row
        far = values + tl.cast(first, tl.int64) * v_row
        ok_t = tokens < N
        ok = ok_t[:, None] & ok_r[None, :]
        held_k = _channels(near, lane, k_row, ok_t, DK, CHUNK, DOT) if HOLD else ()
        held_v = held_k
        if HOLD and not SAME:
            held_v = _channels(far, lane, v_row, ok_t, DV, CHUNK, DOT)
        mu = _per_token(mean, item, tokens, ok_t, N, T, NORM, ACC)
        rho = _per_token(rstd, item, tokens, ok_t, N, T, NORM, ACC)
        s = _inner(held_k, held_q, near, lane, k_row, ok_t, q, rows, DK, ok_r, k_width, T, R, CHUNK, HOLD, DOT, ACC)
        s = _normalised(s, mu, rho, q_sums, NORM) + constants[None, :]
        s = tl.where(outside[None, :], float("-inf"), s)
        g = _inner(
            held_v, held_g, far, lane, v_row, ok_t, grad_num, rows, DV, ok_r, v_width, T, R, CHUNK, HOLD, DOT, ACC
        )
        g = _normalised(g, mu, rho, g_sums, NORM) + grad_constants[None, :]
        at = (item * UNITS + rows // UNIT_ROWS)[None, :] * N + tokens[:, None]
        if LSE:
            a = tl.exp(s - tl.load(lse + at, mask=ok, other=0.0))
        else:
            a = tl.exp(s - _over_members(s, T, R, P_PAD, True))
            a = a / _over_members(a, T, R, P_PAD, False)
        w = a + floor
        if TOKEN_MASK:
            m = _token_weights(token_mask, tokens, m_row, ok_t, rows, ok_r, m_group, S, PER_GROUP, GROUPS, ACC)
            w *= m
            g *= m
        w = tl.where(ok, w, 0.0)
        if GRAD_ATTN:
            g += _map_tile(grad_attn, item, rows, tokens, ok, ROWS, N)
        if LSE:
            g = a * (g - tl.load(correction + at, mask=ok, other=0.0))
        else:
            g = a * (g - _over_members(a * g, T, R, P_PAD, False))
        if GRAD_DOTS:
            g += _map_tile(grad_dots, item, rows, tokens, ok, ROWS, N)
        # A masked slot's dots are a constant.
        g = tl.where(ok_t[:, None] & (outside == 0)[None, :], g, 0.0)
        total += g
        into = grad_keys + tl.cast(first, tl.int64) * gk_row
        _add_outer(
            into, lane, gk_row, ok_t, g, held_q, q, w, held_g, grad_num, rows, ok_r, base, k_share, DK, CHUNK, HOLD,
            SAME, DOT,
        )  # fmt: skip
        if not SAME:
            into = grad_values + tl.cast(first, tl.int64) * gv_row
            _add_outer(
                into, lane, gv_row, ok_t, w, held_g, grad_num, w, held_g, grad_num, rows, ok_r, base, v_share, DV,
                CHUNK, HOLD, False, DOT,
            )  # fmt: skip
        if NORM:
            g *= rho[:, None]
            moved += g * mu[:, None]
        acc = _outer_sum(acc, held_k, near, lane, k_row, ok_t, g, base, DK, CHUNK, HOLD, DOT)
    at = (split * items + item) * ROWS
    _store_columns(acc, tl.sum(moved, 0), grad_q + at * DK, rows, ok_r, base, DK, CHUNK)
    tl.store(grad_c + at + rows, tl.sum(total, 0), mask=ok_r & (base == 0))


@triton.jit
def _slot_attend_sum_kernel(parts, more_parts, out, more_out, count, more, splits, C: tl.constexpr, ACC: tl.constexpr):
    """Sums over the division of the tokens, of two arrays at once, in the order of the tokens."""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    total = tl.zeros([C], ACC)
    more_total = tl.zeros([C], ACC)
    for split in range(0, splits):
        wide = tl.cast(split, tl.int64)
        total += tl.load(parts + wide * count + at, mask=at < count, other=0.0)
        more_total += tl.load(more_parts + wide * more + at, mask=at < more, other=0.0)
    tl.store(out + at, total, mask=at < count)
    tl.store(more_out + at, more_total, mask=at < more)


@dataclass(frozen=True)
class _Tile:
    tokens: int
    columns: int
    chunk: int
    share: int  # channels of num, or of the gradients, that one program sums; others compute the weights again
    hold: bool  # the tile of tokens, queries and gradients stay on the chip between their two uses
    warps: int
    stages: int
    registers: int | None = None  # of a thread at most


# Registers of a thread where products are scalar: 16 warps share a multiprocessor. Left to itself the assembler aims
# at more, and whether it spills for them changes with every option of the kernel.
_SCALAR_REGISTERS = 65536 // (16 * 32)
_ALL_REGISTERS = 255  # float64 takes two for each number: the assembler is to aim at no number of warps


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tile(width: int, columns: int, dtype: torch.dtype, backward: bool) -> _Tile:
    """A fixed table by width, `columns` (a power of two) that could use one tile, and dtype: no launch is ever timed.

    Chosen so that no kernel spills registers on sm_80 and sm_90. The scalar products of float16 and float32 hold a
    chunk of channels of both operands in registers; chunks of wide rows, which have more sums beside them, are of 32.
    """
    columns = max(16, columns)
    narrow = width <= 64
    chunk = _common.padded(width)
    if dtype == torch.float64:
        return _Tile(16, 16, min(16, chunk), 32, False, 4, 1, _ALL_REGISTERS)
    if dtype == torch.bfloat16 and backward:
        if narrow:
            return _Tile(32, 16, chunk, 64, False, 8, 2)
        return _Tile(32, 16, 64, 1024 if width <= 384 else 256, False, 8, 1)
    if dtype == torch.bfloat16:
        if narrow:
            return _Tile(64, 32, chunk, 64, False, 8, 2) if columns > 16 else _Tile(64, 16, chunk, 64, True, 4, 2)
        if width <= 384:
            return _Tile(64 if width <= 256 else 32, 16, 128, 1024, False, 8, 1)
        return _Tile(32, 16, 128, 512, False, 8, 1) if width <= 768 else _Tile(32, 16, 64, 256, False, 8, 2)
    if backward:
        return _Tile(16, 16, chunk if narrow else 32, 64, False, 8, 1, _SCALAR_REGISTERS)
    if narrow:
        return _Tile(64, 16, chunk, 64, False, 8, 1, _SCALAR_REGISTERS)
    return _Tile(16, 16, 32, 256, False, 8, 1, _SCALAR_REGISTERS)


class _Plan:
    """What the launches of one call share."""

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor | None,
        q: torch.Tensor, c: torch.Tensor, token_mask: torch.Tensor | None, slot_mask: torch.Tensor | None,
        groups: int, joint: bool, eps_add: float, backward: bool,
    ) -> None:  # fmt: skip
        self.same = values is keys
        self.items, self.heads, self.slots, self.dk = q.shape
        self.n, self.dv = values.shape[2:]
        self.rows = self.heads * self.slots
        self.key_heads = max(keys.shape[1], values.shape[1])
        # Keys that only some heads share would receive gradients from several programs at once.
        self.alone = keys.shape[1] != values.shape[1]
        self.head_rows = self.rows // self.key_heads
        self.groups, self.eps = groups, eps_add
        self.unit = self.rows if joint else self.slots // groups
        self.keys, self.values = _last_dense(keys), _last_dense(values)
        if self.same:
            self.values = self.keys
        self.q, self.c = q.contiguous(), c.contiguous()
        self.norm = mean is not None
        # Absent tensors are stood in for by present ones, which the kernels then never read.
        self.mean = self.q if mean is None else mean.contiguous()
        self.rstd = self.q if rstd is None else rstd.contiguous()
        # The compiler takes matrix operands that a load of bytes has touched for bytes, and fails on float64's.
        self.token_mask = self.q if token_mask is None else token_mask.to(q.dtype)
        self.slot_mask = self.q if slot_mask is None else slot_mask.to(torch.int32).contiguous()
        self.with_token_mask, self.with_slot_mask = token_mask is not None, slot_mask is not None
        segment = min(self.unit, self.head_rows)
        columns = _power_of_two(segment) * _power_of_two(self.head_rows // segment)
        self.tile = tile = _tile(max(self.dk, self.dv), columns, keys.dtype, backward)
        # A unit that no tile holds: its rows are then independent, given their log-sum-exp.
        self.split_units = self.unit > min(tile.columns, self.head_rows)
        per_tile = tile.columns
        if not self.split_units:
            per_tile = tile.columns // _power_of_two(self.unit) * self.unit
        self.tiles = cdiv(self.head_rows, per_tile)
        self.shares = cdiv(max(self.dk, self.dv) if backward else self.dv, tile.share)
        # The backward takes the tiles of rows that share keys one after the other.
        parallel = self.items * self.key_heads * self.shares * (1 if backward else self.tiles)
        steps = cdiv(self.n, tile.tokens)
        self.splits = max(1, min(_PROGRAMS // max(parallel, 1), cdiv(steps, 2)))
        self.span = cdiv(steps, self.splits) * tile.tokens
        self.splits = max(1, cdiv(self.n, self.span)) if self.span else 1

    def strides(self) -> tuple[int, ...]:
        group, row = self.token_mask.stride()[1:] if self.with_token_mask else (0, 0)
        item = self.token_mask.stride(0) if self.with_token_mask else 0
        return (*_walk(self.keys), *_walk(self.values), item, group, row, bound(self.dk), bound(self.dv))

    def sizes(self) -> tuple[int, ...]:
        units = self.rows // self.unit
        return self.n, self.slots, self.rows, self.head_rows, self.slots // self.groups, units, self.unit

    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values, self.mean, self.rstd, self.q, self.c, self.token_mask, self.slot_mask

    def constants(self) -> dict[str, Any]:
        """Constants of every kernel."""
        return {
            "NORM": self.norm, "TOKEN_MASK": self.with_token_mask, "SLOT_MASK": self.with_slot_mask,
            "GROUPS": self.groups, "DK": self.dk, "DV": self.dv, "T": self.tile.tokens, "R": self.tile.columns,
            "CHUNK": self.tile.chunk, "DOT": _operand(self.keys.dtype), "ACC": _common.TL_DTYPE[self.q.dtype],
            "num_warps": self.tile.warps, "num_stages": self.tile.stages, "registers": self.tile.registers,
        }  # fmt: skip

    def main_constants(self) -> dict[str, Any]:
        """The same of the kernels that walk over the tokens."""
        p_pad = self.tile.columns if self.split_units else _power_of_two(self.unit)
        return {
            **self.constants(), "SAME": self.same, "LSE": self.split_units, "P_PAD": p_pad, "HOLD": self.tile.hold,
            "SHARE": self.tile.share,
        }  # fmt: skip

    def members(self) -> int:
        """Rows of P_PAD columns of a tile."""
        return self.tile.columns if self.split_units else self.unit

    def softmax(
        self, grad_num: torch.Tensor, grad_den: torch.Tensor, grad_attn: torch.Tensor | None, backward: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-sum-exps and, in the backward, corrections of units that no tile holds; stand-ins for other units."""
        if not self.split_units:
            return self.c, self.c
        units = self.rows // self.unit
        lse = self.q.new_empty(self.items, units, self.n)
        correction = torch.empty_like(lse) if backward else lse
        segment = min(self.unit, self.head_rows)
        blocks = cdiv(segment, self.tile.columns)
        tiles = cdiv(self.n, self.tile.tokens)
        chunk = min(self.tile.chunk, 16 if self.keys.dtype == torch.bfloat16 else 32)
        launch(
            _slot_attend_softmax_kernel, self.items * units * tiles, *self.inputs(), grad_num, grad_den,
            grad_num if grad_attn is None else grad_attn, lse, correction, *self.strides(), *self.sizes(),
            segment, blocks, bound(blocks * (self.unit // segment)), tiles,
            GRAD=backward, GRAD_ATTN=grad_attn is not None,
            **{**self.constants(), "CHUNK": chunk, "num_warps": 4, "num_stages": 1},
        )  # fmt: skip
        return lse, correction


def _operand(dtype: torch.dtype) -> Any:
    """float16 values are multiplied as float32: weights of the size of eps and small gradients would underflow."""
    return tl.float32 if dtype == torch.float16 else _common.operand(dtype)


def _last_dense(t: torch.Tensor) -> torch.Tensor:
    """`t` or a copy with dense rows, close enough for the 32-bit offsets of a tile."""
    return t if t.stride(-1) == 1 and t.stride(-2) < 2**24 else t.contiguous()


def _walk(t: torch.Tensor) -> tuple[int, int, int]:
    """Strides by item, head and row; zero for a head that all share."""
    return t.stride(0), t.stride(1) if t.shape[1] > 1 else 0, t.stride(2)


def _summed(parts: torch.Tensor, more_parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the first dimension of both."""
    splits = parts.shape[0]
    if splits == 1:
        return parts[0], more_parts[0]
    out, more_out = torch.empty_like(parts[0]), torch.empty_like(more_parts[0])
    launch(
        _slot_attend_sum_kernel, cdiv(out.numel(), 512), parts, more_parts, out, more_out, out.numel(),
        more_out.numel(), bound(splits), C=512, ACC=_common.TL_DTYPE[out.dtype], num_warps=4, num_stages=1,
    )  # fmt: skip
    return out, more_out


def attend_forward(
    keys: torch.Tensor, values: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor | None,
    q: torch.Tensor, c: torch.Tensor, token_mask: torch.Tensor | None, slot_mask: torch.Tensor | None,
    groups: int, joint: bool, eps_add: float, with_dots: bool, with_attn: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Sums over tokens of w V and of w, and on request the dots and their softmax a; w = (a + eps_add) token_mask.

    keys (B,1|H,N,Dk), values (B,1|H,N,Dv), any strides but dense rows are read in place; with mean, rstd (B,N) a row
    x of either enters as (x - mean) rstd, and is read once where `values is keys`. q (B,H,S,Dk), c (B,H,S) in
    accumulation dtype, dots = q k + c. token_mask (B,G,N), slot_mask (B,S), true where a slot takes no part.
    -> num (B,H,S,Dv), den (B,H,S), dots and attn (B,H,S,N) or None.
    """
    plan = _Plan(keys, values, mean, rstd, q, c, token_mask, slot_mask, groups, joint, eps_add, False)
    items, heads, slots, _ = q.shape
    num = q.new_empty(plan.splits, items, heads, slots, plan.dv)
    den = q.new_empty(plan.splits, items, heads, slots)
    dots, attn = (q.new_empty(items, heads, slots, plan.n) if asked else None for asked in (with_dots, with_attn))
    lse, _ = plan.softmax(plan.q, plan.c, None, False)
    programs = items * plan.key_heads * plan.splits * plan.tiles * plan.shares
    launch(
        _slot_attend_fwd_kernel, programs, *plan.inputs(), lse, num, den,
        den if dots is None else dots, den if attn is None else attn, *plan.strides(), plan.eps, *plan.sizes(),
        plan.members(), plan.key_heads, plan.shares, plan.tiles, plan.splits, items, bound(plan.span),
        DOTS=with_dots, ATTN=with_attn, **plan.main_constants(),
    )  # fmt: skip
    return *_summed(num, den), dots, attn


def attend_backward(
    grad_num: torch.Tensor, grad_den: torch.Tensor, grad_dots: torch.Tensor | None, grad_attn: torch.Tensor | None,
    keys: torch.Tensor, values: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor | None,
    q: torch.Tensor, c: torch.Tensor, token_mask: torch.Tensor | None, slot_mask: torch.Tensor | None,
    groups: int, joint: bool, eps_add: float, grad_keys: torch.Tensor, grad_values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q and c; those of keys and values, of normalised rows if mean is given, are added in place.

    `grad_keys`, `grad_values` are shaped like keys and values, in accumulation dtype with dense rows, and the same
    tensor where `values is keys`.
    """
    plan = _Plan(keys, values, mean, rstd, q, c, token_mask, slot_mask, groups, joint, eps_add, True)
    items, heads, slots, _ = q.shape
    grad_num, grad_den = grad_num.contiguous(), grad_den.contiguous()
    maps = [None if g is None else g.contiguous() for g in (grad_dots, grad_attn)]
    grad_q = q.new_empty(plan.splits, items, heads, slots, plan.dk)
    grad_c = q.new_empty(plan.splits, items, heads, slots)
    lse, correction = plan.softmax(grad_num, grad_den, maps[1], True)
    shares = bound(min(plan.dk, plan.tile.share)), bound(min(plan.dv, plan.tile.share))
    together = 1 if plan.alone else plan.key_heads
    for first_head in range(0, plan.key_heads, together):
        for tile in range(plan.tiles):
            launch(
                _slot_attend_bwd_kernel, items * together * plan.splits * plan.shares, *plan.inputs(), lse, correction,
                grad_num, grad_den, *(grad_num if g is None else g for g in maps), grad_keys, grad_values,
                grad_q, grad_c, *plan.strides(), *_walk(grad_keys), *_walk(grad_values), plan.eps, *plan.sizes(),
                plan.members(), first_head, together, plan.shares, *shares, tile, plan.splits, items, bound(plan.span),
                GRAD_DOTS=grad_dots is not None, GRAD_ATTN=grad_attn is not None, **plan.main_constants(),
            )  # fmt: skip
    return _summed(grad_q, grad_c)
