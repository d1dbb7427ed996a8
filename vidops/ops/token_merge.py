"""`vidops.token_merge` and the attention that goes with it: compositions of `bipartite_match` and `scatter_tokens`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from vidops._registry import COMPOSITIONS
from vidops.ops import _checks, _tokens
from vidops.ops.bipartite_match import bipartite_match
from vidops.ops.scatter_tokens import scatter_tokens


class Merged(NamedTuple):
    """`x` (B, N - r, D); `size` (B, N - r, 1), how many tokens each stands for; `source` (B, N) int64, into which row
    of `x` each token went: ``gather_tokens(merged.x, merged.source)`` undoes the merge, up to what was averaged."""

    x: torch.Tensor
    size: torch.Tensor
    source: torch.Tensor


def token_merge(
    x: torch.Tensor,
    metric: torch.Tensor,
    r: int,
    size: torch.Tensor | None = None,
    *,
    class_token: bool = False,
    distill_token: bool = False,
    backend: str | None = None,
) -> Merged:
    """Merges the r even tokens that are most like an odd token into it, as a mean weighted by sizes.

    Token merging of Bolya et al., ICLR 2023 (arXiv 2210.09461, section 3). The result holds the even tokens that are
    left, most similar first (in the order of their positions with a class token), then the odd ones.

    Args:
        x: tokens (B, N, D), float16, bfloat16, float32 or float64.
        metric: keys (B, N, d) averaged over heads, not normalised, dtype and device of `x`; N, d >= 1.
        r: tokens to merge, >= 0; at most half of those that are not protected are, as in the paper.
        size: how many tokens each stands for (B, N, 1), dtype and device of `x`; default: one each.
        class_token: the first token is never merged and stays first.
        distill_token: nor is the second, which stays second; needs `class_token`.
        backend: forced on both ops; default: the first that can run.

    Returns:
        `Merged`; differentiable in `x` and `size`, the decisions are constants.

    Raises: as `bipartite_match` and `scatter_tokens`.

    >>> import torch, vidops
    >>> x, keys = torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    >>> merged = vidops.token_merge(x, keys, 1)
    >>> merged.x.flatten().tolist(), merged.size.flatten().tolist(), merged.source.tolist()
    ([5.0, 2.0], [1.0, 2.0], [[1, 1, 0]])
    """
    _tokens.keys("metric", metric)
    _checks.tensor("x", x, rank=3)
    _checks.same("metric", metric, "x", x)
    batch, tokens = x.shape[:2]
    _checks.shape("metric", metric, (batch, tokens, metric.shape[2]), "(batch of x, tokens of x, channels)")
    _checks.integer("r", r, 0)
    if size is not None:
        _checks.tensor("size", size, rank=3)
        _checks.same("size", size, "x", x)
        _checks.shape("size", size, (batch, tokens, 1), "(batch of x, tokens of x, 1)")
    _tokens.flag("class_token", class_token)
    if _tokens.flag("distill_token", distill_token) and not class_token:
        raise ValueError("distill_token: expected a class token before it")
    r = min(r, (tokens - class_token - distill_token) // 2)
    found = bipartite_match(metric.detach(), class_token=class_token, distill_token=distill_token, backend=backend)
    source = _source(found.order, found.partner, r, tokens, class_token, distill_token)
    if size is None:
        size = x.new_ones(batch, tokens, 1)
    total = scatter_tokens(size, source, tokens - r, backend=backend)
    return Merged(scatter_tokens(x * size, source, tokens - r, backend=backend) / total, total, source)


def _source(
    order: torch.Tensor, partner: torch.Tensor, r: int, tokens: int, class_token: bool, distill_token: bool
) -> torch.Tensor:
    """The row of the result that each token goes to."""
    even, odd = (tokens + 1) // 2, tokens // 2
    left, merged = order[:, : even - r].flip(1), order[:, even - r :]
    if class_token:
        left = left.sort(1).values
    row = torch.arange(even - r, device=order.device)
    row_of_odd = torch.arange(odd, device=order.device) + even - r
    if distill_token:
        # First the two special tokens, then the other even ones, then the other odd ones.
        row = torch.where(row > 0, row + 1, row)
        row_of_odd = torch.where(row_of_odd == even - r, 1, row_of_odd)
    source = order.new_empty(order.shape[0], tokens)
    source[:, 1::2] = row_of_odd
    evens = torch.empty_like(order).scatter_(1, left, row.expand_as(left))
    source[:, 0::2] = evens.scatter_(1, merged, row_of_odd[partner.gather(1, merged)])
    return source


COMPOSITIONS[token_merge] = ("bipartite_match", "scatter_tokens")


def proportional_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """Attention in which a merged token counts as often as tokens it stands for.

    ``softmax(scale q k^T + log size) v`` (Bolya et al., ICLR 2023, arXiv 2210.09461, Eq. 1), through PyTorch's
    scaled_dot_product_attention.

    Args:
        q, k, v: (B, H, N, D), floating.
        size: (B, N, 1), > 0, dtype of `q`.
        scale: factor on the logits (default ``D ** -0.5``).

    Returns:
        (B, H, N, D), differentiable in all of them.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape.

    >>> import torch, vidops
    >>> q = torch.zeros(1, 1, 2, 1)
    >>> v, size = torch.tensor([[[[0.0], [4.0]]]]), torch.tensor([[[1.0], [3.0]]])
    >>> vidops.proportional_attention(q, q, v, size).flatten()
    tensor([3.0000, 3.0000])
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(name, value, rank=4)
        _checks.same(name, value, "q", q)
        length = q.shape[2] if name == "q" else k.shape[2]
        width = value.shape[3] if name == "v" else q.shape[3]
        _checks.shape(name, value, (*q.shape[:2], length, width), "(batch, heads, tokens, channels)")
    _checks.tensor("size", size, rank=3)
    _checks.same("size", size, "q", q)
    _checks.shape("size", size, (k.shape[0], k.shape[2], 1), "(batch, keys, 1)")
    scale = _checks.scale(scale, q.shape[3])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=size.log().mT.unsqueeze(1), scale=scale)
