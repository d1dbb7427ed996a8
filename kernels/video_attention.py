"""Triton `video_attention`: attention of sheet 2.2 of Ding et al., ECCV 2024 (arXiv 2311.17893).

Streaming softmax after FlashAttention (Dao et al., 2022), with one dropout mask for the value product and the
head-mean map, and a backward that takes a gradient of both.
"""

import torch
import triton
import triton.language as tl

from vidops.kernels import _common
from vidops.kernels._common import bound, cdiv, dropout_keep, launch, load_tile, matmul
from vidops.kernels._tiles import backward_keys_tile, backward_queries_tile, forward_tile, warp_groups


@triton.jit
def _video_attention_fwd_kernel(
    q, k, v, out, lse,
    q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col, v_batch, v_head, v_row, v_col,
    scale: tl.float64, keep_scale: tl.float64, threshold: tl.uint32, seed: tl.int64, N, M, tiles,
    DROPOUT: tl.constexpr, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) // tiles
    rows = (tl.program_id(0) % tiles) * A + tl.arange(0, A)
    channel = tl.arange(0, WIDTH)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    ok_q = (rows < N)[:, None] & (channel < D)[None, :]
    queries = load_tile(q + b * q_batch + h * q_head, rows, q_row, channel, q_col, ok_q)
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    factor = tl.full([], scale, ACC)
    top = tl.full([A], float("-inf"), ACC)
    total = tl.zeros([A], ACC)
    acc = tl.zeros([A, WIDTH], ACC)
    for start in range(0, M, B):
        columns = start + tl.arange(0, B)
        ok_k = (columns < M)[:, None] & (channel < D)[None, :]
        keys = load_tile(k, columns, k_row, channel, k_col, ok_k)
        s = matmul(queries, tl.trans(keys.to(DOT)), tl.zeros([A, B], ACC), DOT, SPLIT) * factor
        s = tl.where((columns < M)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp(top - higher)
        w = tl.exp(s - higher[:, None])
        total = total * shrink + tl.sum(w, 1)
        if DROPOUT:
            element = (head.to(tl.int64) * N + rows.to(tl.int64)[:, None]) * M + columns[None, :]
            w = tl.where(dropout_keep(element, seed, threshold), w, 0.0)
        values = load_tile(v, columns, v_row, channel, v_col, ok_k)
        acc = matmul(w, values, acc * shrink[:, None], DOT, SPLIT)
        top = higher
    acc = acc / total[:, None]
    if DROPOUT:
        acc *= tl.full([], keep_scale, ACC)
    at = head.to(tl.int64) * N + rows.to(tl.int64)
    tl.store(out + at[:, None] * D + channel[None, :], acc.to(out.dtype.element_ty), mask=ok_q)
    tl.store(lse + at, top + tl.log(total), mask=rows < N)


@triton.jit
def _inner(
    left, right, FLIP: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """left (A, D) times the transpose of right (B, D).

    Without tensor cores the first operand of a product lives in registers, for a loop-invariant one all of
    its columns at once. FLIP puts the other one there, where `left` is the invariant. With tensor cores and
    float32, FLIP leaves the result where the next product, of its transpose, takes it from.
    """
    if FLIP:
        return tl.trans(matmul(right, tl.trans(left.to(DOT)), tl.zeros([B, A], ACC), DOT, SPLIT))
    else:
        return matmul(left, tl.trans(right.to(DOT)), tl.zeros([A, B], ACC), DOT, SPLIT)


@triton.jit
def _inner_streamed(
    left, rows, left_row, left_col, ok_rows, right, others, right_row, right_col, ok_others,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The same from memory, 64 channels at a time: for rows too long to be held on the chip twice."""
    acc = tl.zeros([A, B], ACC)
    for start in range(0, D, 64):
        channel = start + tl.arange(0, 64)
        inside = (channel < D)[None, :]
        x = load_tile(left, rows, left_row, channel, left_col, ok_rows[:, None] & inside)
        y = load_tile(right, others, right_row, channel, right_col, ok_others[:, None] & inside)
        acc = matmul(x, tl.trans(y.to(DOT)), acc, DOT, SPLIT)
    return acc


@triton.jit
def _weights_and_gradient(
    s, grad, grad_map, map_row, map_col, row_lse, rows, columns, ok, first, factor, share,
    keep_scale, threshold, seed, M, MAP: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of the softmax weights, of the weights as used (dropped and rescaled), and of their gradient.

    s = q k^T and grad = dO v^T; dP = (dO v^T + dMap / H) * mask / (1 - p). `first` is the flat index of row 0
    of this head.
    """
    w = tl.where(ok, tl.exp(s * factor - row_lse[:, None]), 0.0)
    if MAP:
        grad += load_tile(grad_map, rows, map_row, columns, map_col, ok).to(ACC) * share
    used = w
    if DROPOUT:
        element = (first + rows.to(tl.int64)[:, None]) * M + columns[None, :]
        mask = tl.where(dropout_keep(element, seed, threshold), keep_scale, 0.0)
        used = w * mask
        grad = grad * mask
    return w, used, grad


@triton.jit
def _video_attention_bwd_dq_kernel(
    grad_out, grad_map, q, k, v, out, lse, delta, grad_q,
    g_batch, g_head, g_row, g_col, map_batch, map_row, map_col,
    q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col, v_batch, v_head, v_row, v_col,
    o_batch, o_head, o_row, o_col,
    scale: tl.float64, share: tl.float64, keep_scale: tl.float64, threshold: tl.uint32, seed: tl.int64,
    N, M, tiles,
    OUT: tl.constexpr, MAP: tl.constexpr, DROPOUT: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    FLIP: tl.constexpr = DOT.primitive_bitwidth >= 32 and not SPLIT
    WIDE: tl.constexpr = ACC == tl.float64 and WIDTH > 256
    head = tl.program_id(0) // tiles
    rows = (tl.program_id(0) % tiles) * A + tl.arange(0, A)
    channel = tl.arange(0, WIDTH)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    first = head.to(tl.int64) * N
    ok_q = (rows < N)[:, None] & (channel < D)[None, :]
    row_lse = tl.load(lse + first + rows, mask=rows < N, other=0.0)
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    grad_out += b * g_batch + h * g_head
    out += b * o_batch + h * o_head
    grad_map += b * map_batch
    factor = tl.full([], scale, ACC)
    map_share = tl.full([], share, ACC)
    rescale = tl.full([], keep_scale, ACC)
    if not WIDE:
        queries = load_tile(q, rows, q_row, channel, q_col, ok_q)
    # delta = rowsum(P * dP): the value product's part is the inner product of dO and O; the map's part has no
    # such shortcut and takes a pass over the keys of its own.
    correction = tl.zeros([A], ACC)
    if OUT:
        grad_rows = load_tile(grad_out, rows, g_row, channel, g_col, ok_q)
        result = load_tile(out, rows, o_row, channel, o_col, ok_q)
        correction += tl.sum(grad_rows.to(ACC) * result.to(ACC), 1)
    if MAP:
        for start in range(0, M, B):
            columns = start + tl.arange(0, B)
            ok = (rows < N)[:, None] & (columns < M)[None, :]
            if WIDE:
                s = _inner_streamed(
                    q, rows, q_row, q_col, rows < N, k, columns, k_row, k_col, columns < M, D, A, B, DOT, SPLIT, ACC
                )
            else:
                ok_k = (columns < M)[:, None] & (channel < D)[None, :]
                s = _inner(queries, load_tile(k, columns, k_row, channel, k_col, ok_k), FLIP, A, B, DOT, SPLIT, ACC)
            w, _, grad = _weights_and_gradient(
                s, tl.zeros([A, B], ACC), grad_map, map_row, map_col, row_lse, rows, columns, ok, first,
                factor, map_share, rescale, threshold, seed, M, MAP, DROPOUT, ACC,
            )  # fmt: skip
            correction += tl.sum(w * grad, 1)
    tl.store(delta + first + rows, correction, mask=rows < N)
    acc = tl.zeros([A, WIDTH], ACC)
    for start in range(0, M, B):
        columns = start + tl.arange(0, B)
        ok_k = (columns < M)[:, None] & (channel < D)[None, :]
        ok = (rows < N)[:, None] & (columns < M)[None, :]
        keys = load_tile(k, columns, k_row, channel, k_col, ok_k)
        inner = tl.zeros([A, B], ACC)
        if WIDE:
            s = _inner_streamed(
                q, rows, q_row, q_col, rows < N, k, columns, k_row, k_col, columns < M, D, A, B, DOT, SPLIT, ACC
            )
            if OUT:
                inner = _inner_streamed(
                    grad_out, rows, g_row, g_col, rows < N, v, columns, v_row, v_col, columns < M,
                    D, A, B, DOT, SPLIT, ACC,
                )  # fmt: skip
        else:
            s = _inner(queries, keys, FLIP, A, B, DOT, SPLIT, ACC)
            if OUT:
                values = load_tile(v, columns, v_row, channel, v_col, ok_k)
                inner = _inner(grad_rows, values, FLIP, A, B, DOT, SPLIT, ACC)
        w, _, grad = _weights_and_gradient(
            s, inner, grad_map, map_row, map_col, row_lse, rows, columns, ok, first,
            factor, map_share, rescale, threshold, seed, M, MAP, DROPOUT, ACC,
        )  # fmt: skip
        acc = matmul(w * (grad - correction[:, None]), keys, acc, DOT, SPLIT)
    at = (first + rows.to(tl.int64))[:, None] * D + channel[None, :]
    tl.store(grad_q + at, (acc * factor).to(grad_q.dtype.element_ty), mask=ok_q)


@triton.jit
def _video_attention_bwd_dkv_kernel(
    grad_out, grad_map, q, k, v, lse, delta, grad_k, grad_v,
    g_batch, g_head, g_row, g_col, map_batch, map_row, map_col,
    q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col, v_batch, v_head, v_row, v_col,
    scale: tl.float64, share: tl.float64, keep_scale: tl.float64, threshold: tl.uint32, seed: tl.int64,
    N, M, tiles,
    KEYS: tl.constexpr, VALUES: tl.constexpr, OUT: tl.constexpr, MAP: tl.constexpr, DROPOUT: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    FLIP: tl.constexpr = SPLIT
    WIDE: tl.constexpr = ACC == tl.float64 and WIDTH > 256
    head = tl.program_id(0) // tiles
    columns = (tl.program_id(0) % tiles) * B + tl.arange(0, B)
    channel = tl.arange(0, WIDTH)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    first = head.to(tl.int64) * N
    ok_k = (columns < M)[:, None] & (channel < D)[None, :]
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    if not WIDE:
        keys = load_tile(k, columns, k_row, channel, k_col, ok_k)
        if OUT:
            values = load_tile(v, columns, v_row, channel, v_col, ok_k)
    q += b * q_batch + h * q_head
    grad_out += b * g_batch + h * g_head
    grad_map += b * map_batch
    factor = tl.full([], scale, ACC)
    map_share = tl.full([], share, ACC)
    rescale = tl.full([], keep_scale, ACC)
    acc_k = tl.zeros([B, WIDTH], ACC)
    acc_v = tl.zeros([B, WIDTH], ACC)
    for start in range(0, N, A):
        rows = start + tl.arange(0, A)
        ok_q = (rows < N)[:, None] & (channel < D)[None, :]
        ok = (rows < N)[:, None] & (columns < M)[None, :]
        if not WIDE:
            queries = load_tile(q, rows, q_row, channel, q_col, ok_q)
        row_lse = tl.load(lse + first + rows, mask=rows < N, other=0.0)
        correction = tl.load(delta + first + rows, mask=rows < N, other=0.0)
        if OUT and not WIDE:
            grad_rows = load_tile(grad_out, rows, g_row, channel, g_col, ok_q)
        inner = tl.zeros([A, B], ACC)
        if WIDE:
            s = _inner_streamed(
                q, rows, q_row, q_col, rows < N, k, columns, k_row, k_col, columns < M, D, A, B, DOT, SPLIT, ACC
            )
            if OUT:
                inner = _inner_streamed(
                    grad_out, rows, g_row, g_col, rows < N, v, columns, v_row, v_col, columns < M,
                    D, A, B, DOT, SPLIT, ACC,
                )  # fmt: skip
        else:
            s = _inner(queries, keys, FLIP, A, B, DOT, SPLIT, ACC)
            if OUT:
                inner = _inner(grad_rows, values, FLIP, A, B, DOT, SPLIT, ACC)
        w, used, grad = _weights_and_gradient(
            s, inner, grad_map, map_row, map_col, row_lse, rows, columns, ok, first,
            factor, map_share, rescale, threshold, seed, M, MAP, DROPOUT, ACC,
        )  # fmt: skip
        if KEYS:
            if WIDE:
                queries = load_tile(q, rows, q_row, channel, q_col, ok_q)
            acc_k = matmul(tl.trans((w * (grad - correction[:, None])).to(DOT)), queries, acc_k, DOT, SPLIT)
        if VALUES:
            if WIDE:
                grad_rows = load_tile(grad_out, rows, g_row, channel, g_col, ok_q)
            acc_v = matmul(tl.trans(used.to(DOT)), grad_rows, acc_v, DOT, SPLIT)
    at = (head.to(tl.int64) * M + columns.to(tl.int64)[:, None]) * D + channel[None, :]
    if KEYS:
        tl.store(grad_k + at, (acc_k * factor).to(grad_k.dtype.element_ty), mask=ok_k)
    if VALUES:
        tl.store(grad_v + at, acc_v.to(grad_v.dtype.element_ty), mask=ok_k)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout_p: float, seed: int,
    with_map: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """q (B,H,N,D), k, v (B,H,M,D) -> out (B,H,N,D) in q's dtype, map (B,N,M) or (0,), lse (B,H,N)."""
    from vidops.kernels.attention_head_mean import head_mean

    batch, heads, n, d = q.shape
    out = q.new_empty(batch, heads, n, d, dtype=_common.stored(q.dtype))
    lse = q.new_empty(batch, heads, n, dtype=_common.accumulator(q.dtype))
    width = _common.padded(d)
    a, b, warps, stages = forward_tile(width, q, dropout_p > 0)
    tiles = cdiv(n, a)
    launch(
        _video_attention_fwd_kernel, batch * heads * tiles, q, k, v, out, lse,
        *q.stride(), *k.stride(), *v.stride(), scale, 1.0 / (1.0 - dropout_p),
        _common.dropout_threshold(dropout_p), seed, n, bound(k.shape[2]), tiles,
        DROPOUT=dropout_p > 0, H=heads, D=d, WIDTH=width, A=a, B=b, DOT=_common.operand(q.dtype),
        SPLIT=_common.split(q.dtype, width), ACC=_common.TL_DTYPE[lse.dtype], num_warps=warps, num_stages=stages,
    )  # fmt: skip
    out = out.to(q.dtype)
    if not with_map:
        return out, lse.new_empty(0), lse
    return out, head_mean(q, k, lse, scale, dropout_p, seed, False)[0], lse


def gradients(
    grad_out: torch.Tensor | None, grad_map: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor | None, out: torch.Tensor | None, lse: torch.Tensor, scale: float, dropout_p: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Gradients of q, k and v (None without a value product) from those of the output and the head-mean map.

    Either incoming gradient may be None; `grad_out`, `v` and `out` come together.
    """
    batch, heads, n, d = q.shape
    m = k.shape[2]
    stored = _common.stored(q.dtype)
    grad_q, grad_k = q.new_empty(q.shape, dtype=stored), q.new_empty(k.shape, dtype=stored)
    with_out, with_map = grad_out is not None, grad_map is not None
    grad_v = q.new_empty(k.shape, dtype=stored) if with_out else None
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    # Absent tensors are stood in for by present ones, which the kernels then never read.
    g, values, result = (t if t is not None else q for t in (grad_out, v, out))
    maps = grad_map if grad_map is not None else lse
    width = _common.padded(d)
    shared = (*g.stride(), *maps.stride()[:3], *q.stride(), *k.stride(), *values.stride())
    scalars = (scale, 1.0 / heads, 1.0 / (1.0 - dropout_p), _common.dropout_threshold(dropout_p), seed)
    constants = {
        "OUT": with_out, "MAP": with_map, "DROPOUT": dropout_p > 0, "H": heads, "D": d, "WIDTH": width,
        "DOT": _common.operand(q.dtype), "SPLIT": _common.split(q.dtype, width), "ACC": _common.TL_DTYPE[lse.dtype],
    }  # fmt: skip
    lse = lse.contiguous()
    a, b, warps, stages = backward_queries_tile(width, q)
    launch(
        _video_attention_bwd_dq_kernel, batch * heads * cdiv(n, a),
        g, maps, q, k, values, result, lse, delta, grad_q,
        *shared, *result.stride(), *scalars, n, bound(m), cdiv(n, a),
        A=a, B=b, num_warps=warps, num_stages=stages, **constants,
    )  # fmt: skip
    a, b, warps, stages = backward_keys_tile(width, q)
    # Two accumulators of wide float64 rows do not fit the registers, nor do two of 128 float32 rows whose operands
    # come in two parts: one launch each.
    wide = q.dtype == torch.float64 and width > 256
    apart = with_out and (wide or (_common.split(q.dtype, width) and warp_groups(q)))
    parts = [(True, False), (False, True)] if apart else [(True, with_out)]
    for keys_part, values_part in parts:
        launch(
            _video_attention_bwd_dkv_kernel, batch * heads * cdiv(m, b),
            g, maps, q, k, values, lse, delta, grad_k, grad_v if grad_v is not None else grad_k,
            *shared, *scalars, bound(n), m, cdiv(m, b),
            KEYS=keys_part, VALUES=values_part, A=a, B=b, num_warps=warps, num_stages=stages, **constants,
        )  # fmt: skip
    return grad_q.to(q.dtype), grad_k.to(q.dtype), grad_v.to(q.dtype) if grad_v is not None else None


def backward(
    grad_out: torch.Tensor, grad_map: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, scale: float, dropout_p: float, seed: int, with_map: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """grad_out (B,H,N,D), grad_map (B,N,M) (read only `with_map`) -> grad_q, grad_k, grad_v in q's dtype."""
    grad_q, grad_k, grad_v = gradients(
        grad_out, grad_map if with_map else None, q, k, v, out, lse, scale, dropout_p, seed
    )
    assert grad_v is not None
    return grad_q, grad_k, grad_v
