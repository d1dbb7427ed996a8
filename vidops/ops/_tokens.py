"""Checks that the hubs of token pruning share."""

from __future__ import annotations

from typing import Any

import torch

from vidops.ops import _checks


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def indices(name: str, value: Any, like: torch.Tensor, lead: tuple[int, ...], meaning: str) -> torch.Tensor:
    """`value` is an int64 tensor (*lead, K) on the device of `like`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    if value.dim() != len(lead) + 1 or value.shape[:-1] != lead:
        raise ValueError(f"{name}: expected shape {meaning}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")
    return value


def check_range(name: str, value: torch.Tensor, bound: int, backend: str) -> None:
    """Values in [0, bound), where looking is no host sync, there is something to see (a fake tensor has no values), and
    the backend does not look itself."""
    seen = type(value) is torch.Tensor and value.device.type == "cpu" and not torch.compiler.is_compiling()
    if not seen or backend == "cpu" or not value.numel():
        return
    low, high = torch.aminmax(value)
    if low < 0 or high >= bound:
        raise ValueError(f"{name}: expected values in [0, {bound}), got {int(low)} to {int(high)}")


def keys(name: str, value: Any) -> torch.Tensor:
    """Keys (B, N, d) with at least one token and channel."""
    _checks.tensor(name, value, rank=3)
    if value.shape[1] == 0 or value.shape[2] == 0:
        raise ValueError(f"{name}: expected at least one token and channel, got shape {tuple(value.shape)}")
    return value
