"""Hub of `vidops.gather_tokens`."""

from __future__ import annotations

from typing import Any

import torch

from vidops import _native
from vidops._registry import Backward, Impl, Op, resolve
from vidops.ops import _backends, _checks, _tokens
from vidops.reference.gather_tokens import gather_tokens as reference
from vidops.reference.gather_tokens import scatter_tokens as reference_scatter


def gather_tokens(x: torch.Tensor, index: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """The tokens of the given indices, in their order: ``out[..., k, :] = x[..., index[..., k], :]``.

    The last step of token pruning (Ding et al., ICCV 2023, arXiv 2308.04549). Its gradient, `scatter_tokens`, adds the
    rows of a token that was taken several times in the order of k, the same bits on every run.

    Args:
        x: tokens (..., N, D), float16, bfloat16, float32 or float64.
        index: (..., K) int64 in [0, N), leading axes and device of `x`; values may repeat. Others are an error on CPU
            tensors, and not checked on CUDA tensors (that would be a host sync): they give rows of zeros there.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        (..., K, D), dtype of `x`; differentiable in `x`, once.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape, an index out of range.
        BackendError: no backend, or not the one asked for, can run the call.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> vidops.gather_tokens(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0])).squeeze(1).tolist()
    [3.0, 1.0]
    """
    _checks.tensor("x", x, rank=(2, 8))
    lead = x.shape[:-2]
    _tokens.indices("index", index, x, lead, "(leading axes of x, taken)")
    name = resolve(OP, backend, x)
    rows, taken = _checks.one_batch(x, 3), _checks.one_batch(index, 2)
    _tokens.check_range("index", taken, rows.shape[1], name)
    return _checks.like_lead(OP.call(rows, taken, name), lead)


def _fake(x: Any, index: Any, backend: str) -> Any:
    return x.new_empty(x.shape[0], index.shape[1], x.shape[2])


def _fake_backward(grad: Any, index: Any, tokens: Any, backend: str) -> Any:
    return grad.new_empty(grad.shape[0], tokens, grad.shape[2])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, index, ctx.backend = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(index)


def _gradient(ctx: Any, grad: Any) -> Any:
    (index,) = ctx.saved_tensors
    return torch.ops.vidops.gather_tokens_backward(grad, index, ctx.tokens, ctx.backend), None, None


# Each way of the pair is one function per backend, forward of one op and backward of the other.
def cpu_gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    out = _fake(x, index, "")
    _native.C.gather_tokens_forward_cpu(*(_native.view(t) for t in (x, index, out)), _native.threads())
    return out


def cpu_scatter(x: torch.Tensor, index: torch.Tensor, tokens: int) -> torch.Tensor:
    (wide,) = _backends.upcast(x)
    out = _fake_backward(wide, index, tokens, "")
    _native.C.scatter_tokens_forward_cpu(*(_native.view(t) for t in (wide, index, out)), _native.threads())
    return out.to(x.dtype)


def triton_gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    from vidops.kernels import gather_tokens as kernel

    return kernel.gather(x, index)


def triton_scatter(x: torch.Tensor, index: torch.Tensor, tokens: int) -> torch.Tensor:
    from vidops.kernels import gather_tokens as kernel

    return kernel.scatter(x, index, tokens)


def cuda_gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    out = _fake(x, index, "")
    _native.C.gather_tokens_forward_cuda(*(_native.view(t) for t in (x, index, out)), *_native.stream(x))
    return out


def cuda_scatter(x: torch.Tensor, index: torch.Tensor, tokens: int) -> torch.Tensor:
    out = _fake_backward(x, index, tokens, "")
    workspace = index.new_empty(_native.C.scatter_tokens_workspace_cuda(*index.shape, tokens))
    views = [_native.view(t) for t in (x, index, out, workspace)]
    _native.C.scatter_tokens_forward_cuda(*views, *_native.stream(x))
    return out


OP = Op(
    "gather_tokens",
    schema="(Tensor x, Tensor index, str backend) -> Tensor",
    fake=_fake,
    # Moves tokens, whatever their dtype.
    autocast_fp32=False,
    backward=Backward(
        schema="(Tensor grad, Tensor index, SymInt tokens, str backend) -> Tensor",
        fake=_fake_backward,
        setup_context=_setup_context,
        gradient=_gradient,
    ),
    impls=(
        Impl("reference", reference, reference_scatter, _backends.reference_refuses),
        Impl("cpu", cpu_gather, cpu_scatter, _backends.cpu_refuses),
        Impl("triton", triton_gather, triton_scatter, _backends.triton_refuses),
        Impl("cuda", cuda_gather, cuda_scatter, _backends.cuda_refuses_in_any_dtype),
    ),
)
