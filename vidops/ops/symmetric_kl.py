"""Hub of `vidops.symmetric_kl`."""

from __future__ import annotations

from typing import Any

import torch

from vidops import _native
from vidops._registry import Backward, Impl, Op, resolve
from vidops.ops import _backends, _checks
from vidops.reference.symmetric_kl import symmetric_kl as reference


def symmetric_kl(
    p: torch.Tensor,
    q: torch.Tensor | None = None,
    *,
    log_p: torch.Tensor | None = None,
    log_q: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Pairwise symmetrised Kullback-Leibler divergence between the rows of two maps, in nats.

    ``D[i, j] = sum_c (p[i, c] - q[j, c]) * (log p[i, c] - log q[j, c])`` without the factor 1/2 (Eq. E2 of Ding
    et al., ECCV 2024, arXiv 2311.17893). Rows need not sum to one. Natural logarithm, no epsilon; an exact zero
    whose logarithm is not given counts with the logarithm of the smallest normal number.

    Args:
        p: map (..., n, M), float16, bfloat16, float32 or float64 (halves are widened); zero or one leading axis.
        q: map (..., m, M) of the same dtype and device; default `p` itself, and then D is exactly symmetric.
        log_p, log_q: their logarithms, when already known (`attention_head_mean` returns them).
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        D (..., n, m), float64 for float64 maps, else float32. D of a row with itself is zero up to rounding and
        may be slightly negative. Differentiable, once, in p, q and the logarithms given.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape, no column.
        BackendError: no backend, or not the one asked for, can run the call.

    NaN in a row makes every distance of that row NaN. Rounding is relative to the largest row: the native forms
    take the column means out first, so rows thousands of times smaller than others lose digits.

    Backends: reference, cpu, triton, cuda; the backward is two matrix products per input, by PyTorch on all.

    >>> import torch, vidops
    >>> p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    >>> [round(x, 4) for x in vidops.symmetric_kl(p)[0].tolist()]
    [0.0, 0.8789]
    """
    p, log_p = _checks.map_and_log("p", p, log_p, rank=(2, 3))
    same = q is None
    if same:
        if log_q is not None:
            raise ValueError("log_q: given without q")
        q, log_q = p, log_p
    else:
        q, log_q = _checks.map_and_log("q", q, log_q, rank=(p.dim(), p.dim()))
        _checks.same("q", q, "p", p)
        _checks.shape("q", q, (*p.shape[:-2], q.shape[-2], p.shape[-1]), "(..., m, columns of p)")
    name = resolve(OP, backend, p, log_p, q, log_q)
    lead = p.shape[:-2]
    p, log_p = _checks.one_batch(p, 3), _checks.one_batch(log_p, 3)
    q, log_q = (p, log_p) if same else (_checks.one_batch(q, 3), _checks.one_batch(log_q, 3))
    return _checks.like_lead(OP.call(p, log_p, q, log_q, same, name), lead)


def _fake(p: Any, log_p: Any, q: Any, log_q: Any, same: bool, backend: str) -> Any:
    return p.new_empty(p.shape[0], p.shape[1], q.shape[1])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    p, log_p, q, log_q, ctx.same, ctx.backend = inputs
    ctx.save_for_backward(p, log_p, q, log_q)


def _gradient(ctx: Any, grad: torch.Tensor) -> Any:
    grads = torch.ops.vidops.symmetric_kl_backward(grad, *ctx.saved_tensors, ctx.same, ctx.backend)
    return *grads, None, None


def _backward(
    grad: torch.Tensor, p: torch.Tensor, log_p: torch.Tensor, q: torch.Tensor, log_q: torch.Tensor, same: bool
) -> tuple[torch.Tensor, ...]:
    # D is bilinear in (p, log p) and (q, log q), so each gradient is a row sum times one factor minus a product.
    if same:
        grad = (grad + grad.transpose(-2, -1)) / 2
    rows, columns = grad.sum(-1)[..., None], grad.sum(-2)[..., None]
    grad_t = grad.transpose(-2, -1)
    return (
        rows * log_p - grad @ log_q,
        rows * p - grad @ q,
        columns * log_q - grad_t @ log_p,
        columns * q - grad_t @ p,
    )


def _fake_backward(grad: Any, p: Any, log_p: Any, q: Any, log_q: Any, same: bool, backend: str) -> Any:
    return tuple(t.new_empty(t.shape) for t in (p, log_p, q, log_q))


def _cpu_forward(
    p: torch.Tensor, log_p: torch.Tensor, q: torch.Tensor, log_q: torch.Tensor, same: bool
) -> torch.Tensor:
    distance = _fake(p, log_p, q, log_q, same, "")
    views = [_native.view(t) for t in (p, log_p, q, log_q, distance)]
    _native.C.symmetric_kl_forward_cpu(*views, same, _native.threads())
    return distance


def _cuda_forward(
    p: torch.Tensor, log_p: torch.Tensor, q: torch.Tensor, log_q: torch.Tensor, same: bool
) -> torch.Tensor:
    distance = _fake(p, log_p, q, log_q, same, "")
    rows = p.shape[1] + (0 if same else q.shape[1])
    words = _native.C.symmetric_kl_workspace_cuda(rows, p.shape[2])
    workspace = p.new_empty(words, dtype=torch.int64)
    views = [_native.view(t) for t in (p, log_p, q, log_q, distance, workspace)]
    _native.C.symmetric_kl_forward_cuda(*views, same, *_native.stream(p))
    return distance


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import symmetric_kl as kernel

    return kernel.forward(*args)


OP = Op(
    "symmetric_kl",
    schema="(Tensor p, Tensor log_p, Tensor q, Tensor log_q, bool same, str backend) -> Tensor",
    fake=_fake,
    backward=Backward(
        schema="(Tensor grad, Tensor p, Tensor log_p, Tensor q, Tensor log_q, bool same, str backend)"
        " -> (Tensor grad_p, Tensor grad_log_p, Tensor grad_q, Tensor grad_log_q)",
        fake=_fake_backward,
        setup_context=_setup_context,
        gradient=_gradient,
    ),
    impls=(
        Impl("reference", reference, _backward, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, _backward, _backends.cpu_refuses),
        Impl("triton", _triton_forward, _backward, _backends.triton_refuses),
        Impl("cuda", _cuda_forward, _backward, _backends.cuda_refuses),
    ),
)
