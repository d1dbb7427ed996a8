"""Hub of `vidops.attention_head_mean`."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from vidops import _native
from vidops._registry import Backward, Impl, Op, resolve
from vidops.ops import _backends, _checks
from vidops.reference.attention_head_mean import attention_head_mean as reference
from vidops.reference.attention_head_mean import attention_head_mean_backward as reference_backward


@overload
def attention_head_mean(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float | None = None,
    return_log: Literal[False] = False,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def attention_head_mean(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float | None = None,
    return_log: Literal[True],
    return_lse: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, ...]: ...
@overload
def attention_head_mean(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float | None = None,
    return_log: bool = False,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, ...]: ...
def attention_head_mean(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float | None = None,
    return_log: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Softmax attention map averaged over heads; the per-head maps are never materialised.

    ``P[n, m] = mean_h softmax_m(scale * q[h, n] . k[h, m])`` (Eq. E1 of Ding et al., ECCV 2024,
    arXiv 2311.17893). The logarithm is formed as ``logsumexp_h(s_h - lse_h) - log H`` and is finite for finite
    inputs even where P underflows to zero.

    Sparse key frames are a matter of which keys are passed: give the tokens of frames 0, r, 2r, ... as `k`.

    Args:
        q: queries (..., H, N, D), float16, bfloat16, float32 or float64; zero to two leading axes.
        k: keys (..., H, M, D), dtype, device and leading axes of `q`; M >= 1.
        scale: factor on the logits (default ``D ** -0.5``).
        return_log: also return log P.
        return_lse: also return the log-sum-exp of every head's row.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        P (..., N, M), then log P (..., N, M) if asked, then lse (..., H, N) if asked; float64 for float64
        inputs, else float32 (a probability map in half precision would lose its small entries). P and log P
        are differentiable with respect to q and k, once; lse is not. Under autocast the op runs in float32.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape, no key, head or channel.
        BackendError: no backend, or not the one asked for, can run the call.

    NaN or infinity in a query row makes that row of the map NaN; in a key, every row.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> q, k = torch.randn(8, 6, 16), torch.randn(8, 10, 16)
    >>> vidops.attention_head_mean(q, k).sum(-1).allclose(torch.ones(6))
    True
    """
    _checks.attention_pair(q, k, rank=(3, 5))
    factor = _checks.scale(scale, q.shape[-1])
    name = resolve(OP, backend, q, k)
    lead = q.shape[:-3]
    q, k = _checks.one_batch(q, 4), _checks.one_batch(k, 4)
    p, log_p, lse = OP.call(q, k, factor, 0.0, 0, return_log, name)
    result = [_checks.like_lead(p, lead)]
    if return_log:
        result.append(_checks.like_lead(log_p, lead))
    if return_lse:
        result.append(_checks.like_lead(lse, lead))
    return result[0] if len(result) == 1 else tuple(result)


def _fake(q: Any, k: Any, scale: float, dropout_p: float, seed: int, with_log: bool, backend: str) -> Any:
    acc = _checks.accumulation_dtype(q.dtype)
    batch, heads, n, _ = q.shape
    m = k.shape[2]
    log_shape = (batch, n, m) if with_log else (0,)
    return (
        q.new_empty(batch, n, m, dtype=acc),
        q.new_empty(log_shape, dtype=acc),
        q.new_empty(batch, heads, n, dtype=acc),
    )


def _fake_backward(
    grad_p: Any, q: Any, k: Any, lse: Any, scale: float, dropout_p: float, seed: int, backend: str
) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, ctx.scale, ctx.dropout_p, ctx.seed, ctx.with_log, ctx.backend = inputs
    p, _, lse = output
    ctx.mark_non_differentiable(lse)
    # P is needed only to turn a gradient of log P into one of P.
    ctx.save_for_backward(q, k, lse, p if ctx.with_log else None)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_p: Any, grad_log_p: Any, grad_lse: Any) -> Any:
    q, k, lse, p = ctx.saved_tensors
    grad = grad_p
    if ctx.with_log and grad_log_p is not None:
        from_log = grad_log_p / p.clamp_min(torch.finfo(p.dtype).tiny)
        grad = from_log if grad is None else grad + from_log
    if grad is None:
        return (None,) * 7
    grad_q, grad_k = torch.ops.vidops.attention_head_mean_backward(
        grad, q, k, lse, ctx.scale, ctx.dropout_p, ctx.seed, ctx.backend
    )
    return grad_q, grad_k, None, None, None, None, None


def _outputs(q: torch.Tensor, k: torch.Tensor, with_log: bool) -> tuple[torch.Tensor, ...]:
    return _fake(q, k, 0.0, 0.0, 0, with_log, "")


def _reference_backward(
    grad_p: torch.Tensor, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[torch.Tensor, ...]:
    return reference_backward(grad_p, q, k, scale, dropout_p, seed)


def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, scale: float, dropout_p: float, seed: int, with_log: bool
) -> tuple[torch.Tensor, ...]:
    q, k = _backends.upcast(q, k)
    out = _outputs(q, k, with_log)
    views = [_native.view(t) for t in (q, k, *out)]
    _native.C.attention_head_mean_forward_cpu(*views, scale, dropout_p, seed, _native.threads())
    return out


def _cpu_backward(
    grad_p: torch.Tensor, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[torch.Tensor, ...]:
    wide_q, wide_k = _backends.upcast(q, k)
    grads = torch.empty(wide_q.shape, dtype=wide_q.dtype), torch.empty(wide_k.shape, dtype=wide_k.dtype)
    views = [_native.view(t) for t in (grad_p, wide_q, wide_k, lse, *grads)]
    _native.C.attention_head_mean_backward_cpu(*views, scale, dropout_p, seed, _native.threads())
    return grads[0].to(q.dtype), grads[1].to(k.dtype)


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import attention_head_mean as kernel

    return kernel.forward(*args)


def _triton_backward(*args: Any) -> Any:
    from vidops.kernels import attention_head_mean as kernel

    return kernel.backward(*args)


def _cuda_workspace(q: torch.Tensor, k: torch.Tensor, backward: bool) -> torch.Tensor:
    split = q.dtype == torch.float32
    words = _native.C.attention_head_mean_workspace_cuda(*q.shape, k.shape[2], split, backward)
    return q.new_empty(words, dtype=torch.int64)


def _cuda_forward(
    q: torch.Tensor, k: torch.Tensor, scale: float, dropout_p: float, seed: int, with_log: bool
) -> tuple[torch.Tensor, ...]:
    out = _outputs(q, k, with_log)
    views = [_native.view(t) for t in (q, k, *out, _cuda_workspace(q, k, False))]
    _native.C.attention_head_mean_forward_cuda(*views, scale, dropout_p, seed, *_native.stream(q))
    return out


def _cuda_backward(
    grad_p: torch.Tensor, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, dropout_p: float, seed: int
) -> tuple[torch.Tensor, ...]:
    grads = q.new_empty(q.shape), k.new_empty(k.shape)
    views = [_native.view(t) for t in (grad_p, q, k, lse.contiguous(), *grads, _cuda_workspace(q, k, True))]
    _native.C.attention_head_mean_backward_cuda(*views, scale, dropout_p, seed, *_native.stream(q))
    return grads


OP = Op(
    "attention_head_mean",
    schema="(Tensor q, Tensor k, float scale, float dropout_p, int seed, bool with_log, str backend)"
    " -> (Tensor p, Tensor log_p, Tensor lse)",
    fake=_fake,
    backward=Backward(
        schema="(Tensor grad_p, Tensor q, Tensor k, Tensor lse, float scale, float dropout_p, int seed,"
        " str backend) -> (Tensor grad_q, Tensor grad_k)",
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
