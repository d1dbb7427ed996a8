"""`vidops.nearest_fill`: a composition of `nearest_kept` and `gather_tokens`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vidops._registry import COMPOSITIONS
from vidops.ops import _checks, _tokens
from vidops.ops.gather_tokens import gather_tokens
from vidops.ops.nearest_kept import nearest_kept


class Filled(NamedTuple):
    """`dense` (..., h w, D), and `source` (..., h w) int64: which kept token each place holds a copy of."""

    dense: torch.Tensor
    source: torch.Tensor


def nearest_fill(
    x: torch.Tensor, keep: torch.Tensor, grid: tuple[int, int], *, backend: str | None = None
) -> Filled:
    """The whole grid again from its kept tokens: every place gets a copy of the nearest one.

    ``dense_n = x_j``, j the kept token nearest to place n (Ding et al., ICCV 2023, arXiv 2308.04549, section 3.3: the
    regular windows of a pruned VideoSwin). Kept tokens stay where they are.

    Args:
        x: kept tokens (..., K, D), float16, bfloat16, float32 or float64; K >= 1.
        keep: their raster indices (..., K) int64, leading axes and device of `x`; see `nearest_kept`.
        grid: (h, w).
        backend: forced on both ops; default: the first that can run.

    Returns:
        `Filled`; differentiable in `x` (a token's gradient is the sum over its copies).

    Raises: as `nearest_kept` and `gather_tokens`.

    >>> import torch, vidops
    >>> x = torch.tensor([[10.0], [20.0]])
    >>> vidops.nearest_fill(x, torch.tensor([0, 5]), (2, 3)).dense.view(2, 3).tolist()
    [[10.0, 10.0, 20.0], [10.0, 20.0, 20.0]]
    """
    _checks.tensor("x", x, rank=(2, 8))
    meaning = "(leading axes of x, tokens of x)"
    _checks.shape("keep", _tokens.indices("keep", keep, x, x.shape[:-2], meaning), tuple(x.shape[:-1]), meaning)
    source = nearest_kept(keep, grid, backend=backend)
    return Filled(gather_tokens(x, source, backend=backend), source)


COMPOSITIONS[nearest_fill] = ("nearest_kept", "gather_tokens")
