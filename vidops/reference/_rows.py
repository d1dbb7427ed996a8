"""What references that add up rows by index share."""

from __future__ import annotations

import torch


def add_rows(total: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``total[index[k]] += rows[k]`` in place: in the order of k or, on a card, in another fixed one."""
    # On a card index_add_ adds by atomics, where index_put_ sorts; on the CPU it is index_put_ whose threads race.
    if total.is_cuda:
        return total.index_put_((index,), rows, accumulate=True)
    return total.index_add_(0, index, rows)
