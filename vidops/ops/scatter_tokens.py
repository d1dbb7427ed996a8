"""Hub of `vidops.scatter_tokens`."""

from __future__ import annotations

from typing import Any

import torch

from vidops._registry import Backward, Impl, Op, resolve
from vidops.ops import _backends, _checks, _tokens
from vidops.ops import gather_tokens as gathering
from vidops.reference.gather_tokens import gather_tokens as reference_gather
from vidops.reference.scatter_tokens import scatter_tokens as reference


def scatter_tokens(
    x: torch.Tensor, index: torch.Tensor, num_tokens: int, *, backend: str | None = None
) -> torch.Tensor:
    """Tokens added up by index: ``out[..., n, :]`` is the sum of the ``x[..., k, :]`` with ``index[..., k] == n``.

    The adjoint of `gather_tokens`, and what `token_merge` (Bolya et al., ICLR 2023, arXiv 2210.09461) averages by.
    Sums are taken in the order of k (by the reference, on a card, in another fixed one), in at least float32: the same
    bits on every run.

    Args:
        x: tokens (..., K, D), float16, bfloat16, float32 or float64.
        index: (..., K) int64 in [0, num_tokens), leading axes and device of `x`; values may repeat. Others are an
            error on CPU tensors, and not checked on CUDA tensors (that would be a host sync): such rows are left out
            there.
        num_tokens: N >= 0, the tokens of the result.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        (..., N, D), dtype of `x`, zeros where nothing was added; differentiable in `x`, once.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape, an index out of range.
        BackendError: no backend, or not the one asked for, can run the call.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> vidops.scatter_tokens(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 0, 1]), 3).squeeze(1).tolist()
    [2.0, 4.0, 0.0]
    """
    _checks.tensor("x", x, rank=(2, 8))
    lead = x.shape[:-2]
    _tokens.indices("index", index, x, lead, "(leading axes of x, tokens of x)")
    _checks.shape("index", index, tuple(x.shape[:-1]), "(leading axes of x, tokens of x)")
    num_tokens = _checks.integer("num_tokens", num_tokens, 0)
    name = resolve(OP, backend, x)
    rows, place = _checks.one_batch(x, 3), _checks.one_batch(index, 2)
    _tokens.check_range("index", place, num_tokens, name)
    return _checks.like_lead(OP.call(rows, place, num_tokens, name), lead)


def _fake(x: Any, index: Any, num_tokens: Any, backend: str) -> Any:
    return x.new_empty(x.shape[0], num_tokens, x.shape[2])


def _fake_backward(grad: Any, index: Any, backend: str) -> Any:
    return grad.new_empty(grad.shape[0], index.shape[1], grad.shape[2])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, index, _, ctx.backend = inputs
    ctx.save_for_backward(index)


def _gradient(ctx: Any, grad: Any) -> Any:
    (index,) = ctx.saved_tensors
    return torch.ops.vidops.scatter_tokens_backward(grad, index, ctx.backend), None, None, None


OP = Op(
    "scatter_tokens",
    schema="(Tensor x, Tensor index, SymInt num_tokens, str backend) -> Tensor",
    fake=_fake,
    # Sums are float32 whatever the tokens are.
    autocast_fp32=False,
    backward=Backward(
        schema="(Tensor grad, Tensor index, str backend) -> Tensor",
        fake=_fake_backward,
        setup_context=_setup_context,
        gradient=_gradient,
    ),
    impls=(
        Impl("reference", reference, reference_gather, _backends.reference_refuses),
        Impl("cpu", gathering.cpu_scatter, gathering.cpu_gather, _backends.cpu_refuses),
        Impl("triton", gathering.triton_scatter, gathering.triton_gather, _backends.triton_refuses),
        Impl("cuda", gathering.cuda_scatter, gathering.cuda_gather, _backends.cuda_refuses_in_any_dtype),
    ),
)
