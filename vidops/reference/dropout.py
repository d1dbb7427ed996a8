"""Counter-based dropout: the mask is a function of (seed, element index), so no backend needs to store it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_MASK32 = 0xFFFFFFFF


def philox_first_word(index: torch.Tensor, seed: int) -> torch.Tensor:
    """First output word of Philox-4x32-10 (Salmon et al., SC 2011) for 64-bit counters `index` (int64).

    Counter words (index low, index high, 0, 0), key words (seed low, seed high); result in [0, 2^32) as int64.
    """
    c0, c1 = index & _MASK32, (index >> 32) & _MASK32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # int64 products wrap modulo 2^64, and the bit pattern of the unsigned product is what is wanted.
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((right >> 32) & _MASK32) ^ c1 ^ k0,
            right & _MASK32,
            ((left >> 32) & _MASK32) ^ c3 ^ k1,
            left & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0


def dropout_factor(
    shape: Sequence[int], p: float, seed: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """0 where an element of `shape` is dropped, 1/(1-p) where it is kept; elements are counted row-major."""
    count = math.prod(shape)
    index = torch.arange(count, dtype=torch.int64, device=device)
    keep = philox_first_word(index, seed) >= int(p * 2**32)
    return (keep.to(dtype) / (1.0 - p)).view(*shape)
