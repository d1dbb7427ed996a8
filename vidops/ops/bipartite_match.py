"""Hub of `vidops.bipartite_match`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from vidops import _native
from vidops._registry import Impl, Op, resolve
from vidops.ops import _backends, _checks, _tokens
from vidops.reference.bipartite_match import bipartite_match as reference


class Matching(NamedTuple):
    """Even tokens and their best odd partners: `order` (B, ceil(N/2)) int64, the even tokens (as 0, 1, ... for the
    positions 0, 2, ...) ascending by (similarity, position); `similarity` (B, ceil(N/2)), cosines; `partner`
    (B, ceil(N/2)) int64, the odd token (0, 1, ... for the positions 1, 3, ...)."""

    order: torch.Tensor
    similarity: torch.Tensor
    partner: torch.Tensor


def bipartite_match(
    metric: torch.Tensor, *, class_token: bool = False, distill_token: bool = False, backend: str | None = None
) -> Matching:
    """The most similar odd token of every even token, and the even tokens sorted by that similarity.

    ``similarity_i = max_j cos(metric_2i, metric_2j+1)``: the bipartite soft matching of Bolya et al., ICLR 2023
    (arXiv 2210.09461), which `token_merge` merges by, and the first frame of `sta_prune` drops by.

    Args:
        metric: keys (B, N, d), float16, bfloat16, float32 or float64, not normalised; N, d >= 1.
        class_token: the first even token takes part as none: its similarity is -inf, so that it comes first.
        distill_token: the first odd token is nobody's partner.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        `Matching`. Similarities are float64 for float64 keys, else float32, -inf where there is no partner (which
        is then -1 for N = 1). Of equal partners the first is taken. A key of zeros has cosine 0 with every other;
        a similarity of NaN sorts last. Not differentiable: decisions are constants.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or an empty axis.
        BackendError: no backend, or not the one asked for, can run the call; or a gradient is needed.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> keys = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 2.0]]])
    >>> found = vidops.bipartite_match(keys)
    >>> found.order.tolist(), found.partner.tolist()
    ([[0, 1]], [[0, 1]])
    """
    _tokens.keys("metric", metric)
    _tokens.flag("class_token", class_token)
    _tokens.flag("distill_token", distill_token)
    name = resolve(OP, backend, metric)
    return Matching(*OP.call(metric, class_token, distill_token, name))


def _fake(metric: Any, class_token: bool, distill_token: bool, backend: str) -> Any:
    even = (metric.shape[0], (metric.shape[1] + 1) // 2)
    return (
        metric.new_empty(even, dtype=torch.int64),
        metric.new_empty(even, dtype=_checks.accumulation_dtype(metric.dtype)),
        metric.new_empty(even, dtype=torch.int64),
    )


def _cpu_forward(metric: torch.Tensor, class_token: bool, distill_token: bool) -> tuple[torch.Tensor, ...]:
    results = _fake(metric, class_token, distill_token, "")
    views = [_native.view(t) for t in (*_backends.upcast(metric), *results)]
    _native.C.bipartite_match_forward_cpu(*views, class_token, distill_token, _native.threads())
    return results


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import bipartite_match as kernel

    return kernel.forward(*args)


def _cuda_forward(metric: torch.Tensor, class_token: bool, distill_token: bool) -> tuple[torch.Tensor, ...]:
    results = _fake(metric, class_token, distill_token, "")
    workspace = results[0].new_empty(_native.C.bipartite_match_workspace_cuda(*metric.shape))
    views = [_native.view(t) for t in (metric, *results, workspace)]
    _native.C.bipartite_match_forward_cuda(*views, class_token, distill_token, *_native.stream(metric))
    return results


MAX_EVEN = 4096  # what a block of the CUDA kernel sorts in shared memory


def _large(tensors: Sequence[torch.Tensor]) -> str | None:
    tokens = tensors[0].shape[-2] if tensors[0].dim() == 3 else 0  # a probe of the device has no tokens
    return None if tokens <= 2 * MAX_EVEN else f"at most {2 * MAX_EVEN} tokens are sorted in a block, got {tokens}"


def _cuda_refuses(tensors: Sequence[torch.Tensor]) -> str | None:
    return _backends.cuda_refuses(tensors) or _large(tensors)


OP = Op(
    "bipartite_match",
    schema="(Tensor metric, bool class_token, bool distill_token, str backend)"
    " -> (Tensor order, Tensor similarity, Tensor partner)",
    fake=_fake,
    # Not float32 under autocast: the kernels read halves, and compute in float32.
    autocast_fp32=False,
    impls=(
        Impl("reference", reference, None, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, None, _backends.cpu_refuses),
        Impl("triton", _triton_forward, None, _backends.triton_refuses),
        Impl("cuda", _cuda_forward, None, _cuda_refuses),
    ),
)
