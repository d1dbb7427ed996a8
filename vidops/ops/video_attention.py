"""Hub of `vidops.video_attention`."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F

from vidops import _native
from vidops._registry import Backward, Impl, Op, _forced, resolve
from vidops.ops import _backends, _checks
from vidops.reference.video_attention import video_attention as reference
from vidops.reference.video_attention import video_attention_backward as reference_backward


@overload
def video_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    need: Literal["none"] = "none",
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def video_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    need: Literal["map", "keys"],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def video_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    need: str = "none",
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over all tokens of a clip, with the head-averaged map or keys beside it.

    ``out_h = drop(softmax(scale * q_h k_h^T)) v_h`` and ``map = mean_h drop(softmax(...))`` (sheet 2.2 of Ding et
    al., ECCV 2024, arXiv 2311.17893): the same dropped, rescaled weights feed both. The dropout mask is a
    function of `seed` and the element's index (Philox-4x32-10), equal on every backend and regenerated in the
    backward, never stored.

    Args:
        q: queries (B, H, N, D), float16, bfloat16, float32 or float64.
        k, v: keys and values (B, H, M, D), dtype and device of `q`; M >= 1.
        scale: factor on the logits (default ``D ** -0.5``).
        dropout_p: probability in [0, 1) of dropping a weight.
        seed: key of the dropout mask, 0 <= seed < 2^63; required when ``dropout_p > 0``.
        need: ``"none"``, ``"map"`` (head-mean map) or ``"keys"`` (head-mean keys, the metric of token merging).
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: PyTorch's
            scaled_dot_product_attention when neither a map nor dropout is wanted (it is the best kernel for
            that), else the first backend that can run.

    Returns:
        out (B, H, N, D) in the dtype of `q`; with ``need="map"`` also the map (B, N, M), float64 for float64
        inputs, else float32; with ``need="keys"`` also the keys averaged over heads (B, M, D). All are
        differentiable, once, the gradients of output and map entering one backward. Under autocast the inputs
        are cast to the autocast dtype, as for scaled_dot_product_attention.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape, dropout_p, seed or need.
        BackendError: no backend, or not the one asked for, can run the call.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> q = torch.randn(1, 2, 6, 8)
    >>> out, weights = vidops.video_attention(q, q, q, need="map")
    >>> out.shape, weights.shape
    (torch.Size([1, 2, 6, 8]), torch.Size([1, 6, 6]))
    """
    q, k, v = _autocast(q, k, v)
    _checks.attention_pair(q, k, rank=(4, 4))
    _checks.tensor("v", v, rank=4)
    _checks.same("v", v, "k", k)
    _checks.shape("v", v, tuple(k.shape), "of k")
    factor = _checks.scale(scale, q.shape[-1])
    dropout_p = _checks.number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    _checks.choice("need", need, ("none", "map", "keys"))
    if dropout_p > 0 and seed is None:
        raise ValueError("seed: required when dropout_p > 0 (draw it from a torch.Generator)")
    seed = 0 if seed is None else _checks.integer("seed", seed, 0)
    with_map = need == "map"
    forced = backend or _forced.get(OP.name) or _forced.get("*")
    if not with_map and dropout_p == 0 and forced is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=factor)
    else:
        name = resolve(OP, backend, q, k, v)
        out, weights, _ = OP.call(q, k, v, factor, dropout_p, seed, with_map, name)
        if with_map:
            return out, weights
    return (out, k.mean(dim=1)) if need == "keys" else out


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """The rule of scaled_dot_product_attention: float tensors but float64 take the autocast dtype."""
    found = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else ""
    if found not in ("cpu", "cuda") or not torch.is_autocast_enabled(found):
        return tensors
    dtype = torch.get_autocast_dtype(found)
    halves = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in halves else t for t in tensors)


def _fake(
    q: Any, k: Any, v: Any, scale: float, dropout_p: float, seed: int, with_map: bool, backend: str
) -> tuple[Any, Any, Any]:
    acc = _checks.accumulation_dtype(q.dtype)
    batch, heads, n, _ = q.shape
    map_shape = (batch, n, k.shape[2]) if with_map else (0,)
    return (
        q.new_empty(q.shape),
        q.new_empty(map_shape, dtype=acc),
        q.new_empty(batch, heads, n, dtype=acc),
    )


def _fake_backward(grad_out: Any, grad_map: Any, q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any, Any]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, ctx.scale, ctx.dropout_p, ctx.seed, ctx.with_map, ctx.backend = inputs
    out, _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _gradient(ctx: Any, grad_out: Any, grad_map: Any, grad_lse: Any) -> Any:
    grads = torch.ops.vidops.video_attention_backward(
        grad_out, grad_map, *ctx.saved_tensors, ctx.scale, ctx.dropout_p, ctx.seed, ctx.with_map, ctx.backend
    )
    return *grads, None, None, None, None, None


def _reference_backward(
    grad_out: torch.Tensor,
    grad_map: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    dropout_p: float,
    seed: int,
    with_map: bool,
) -> tuple[torch.Tensor, ...]:
    return reference_backward(grad_out, grad_map if with_map else None, q, k, v, scale, dropout_p, seed)


def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout_p: float, seed: int, with_map: bool
) -> tuple[torch.Tensor, ...]:
    wide_q, wide_k, wide_v = _backends.upcast(q, k, v)
    out = _fake(wide_q, wide_k, wide_v, scale, dropout_p, seed, with_map, "")
    views = [_native.view(t) for t in (wide_q, wide_k, wide_v, *out)]
    _native.C.video_attention_forward_cpu(*views, scale, dropout_p, seed, _native.threads())
    return out[0].to(q.dtype), out[1], out[2]


def _cpu_backward(
    grad_out: torch.Tensor,
    grad_map: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    dropout_p: float,
    seed: int,
    with_map: bool,
) -> tuple[torch.Tensor, ...]:
    wide_grad, wide_q, wide_k, wide_v, wide_out = _backends.upcast(grad_out, q, k, v, out)
    grads = [torch.empty(t.shape, dtype=t.dtype) for t in (wide_q, wide_k, wide_v)]
    grad_map = grad_map if with_map else lse.new_empty(0)
    tensors = (wide_grad, grad_map, wide_q, wide_k, wide_v, wide_out, lse, *grads)
    views = [_native.view(t) for t in tensors]
    _native.C.video_attention_backward_cpu(*views, scale, dropout_p, seed, _native.threads())
    return tuple(g.to(q.dtype) for g in grads)


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import video_attention as kernel

    return kernel.forward(*args)


def _triton_backward(*args: Any) -> Any:
    from vidops.kernels import video_attention as kernel

    return kernel.backward(*args)


def _cuda_workspace(q: torch.Tensor, k: torch.Tensor, backward: bool) -> torch.Tensor:
    split = q.dtype == torch.float32
    words = _native.C.video_attention_workspace_cuda(*q.shape, k.shape[2], split, backward)
    return q.new_empty(words, dtype=torch.int64)


def _cuda_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout_p: float, seed: int, with_map: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = _fake(q, k, v, scale, dropout_p, seed, with_map, "")
    views = [_native.view(t) for t in (q, k, v, *out, _cuda_workspace(q, k, False))]
    _native.C.video_attention_forward_cuda(*views, scale, dropout_p, seed, *_native.stream(q))
    return out


def _cuda_backward(
    grad_out: torch.Tensor,
    grad_map: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    dropout_p: float,
    seed: int,
    with_map: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    grad_map = grad_map if with_map else lse.new_empty(0)
    tensors = (grad_out, grad_map, q, k, v, out, lse.contiguous(), *grads, _cuda_workspace(q, k, True))
    views = [_native.view(t) for t in tensors]
    _native.C.video_attention_backward_cuda(*views, scale, dropout_p, seed, *_native.stream(q))
    return grads


OP = Op(
    "video_attention",
    schema="(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, int seed, bool with_map, str backend)"
    " -> (Tensor out, Tensor map, Tensor lse)",
    fake=_fake,
    # The hub applies the autocast rule of scaled_dot_product_attention itself.
    autocast_fp32=False,
    backward=Backward(
        schema="(Tensor grad_out, Tensor grad_map, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
        " float dropout_p, int seed, bool with_map, str backend)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
        fake=_fake_backward,
        setup_context=_setup_context,
        gradient=_gradient,
    ),
    impls=(
        Impl("reference", reference, _reference_backward, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, _cpu_backward, _backends.cpu_refuses),
        Impl("triton", _triton_forward, _triton_backward, _backends.triton_refuses),
        Impl("cuda", _cuda_forward, _cuda_backward, _backends.cuda_refuses),
    ),
)
