"""Argument checks shared by the hubs. Same errors for every backend, raised before a backend is chosen."""

from __future__ import annotations

import math
from typing import Any, cast

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Maps, distances and log-sum-exps are at least float32 whatever the inputs are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensor(name: str, value: Any, *, rank: int | tuple[int, int], floating: bool = True) -> torch.Tensor:
    """`value` is a dense tensor of an accepted dtype and rank (or rank range, inclusive)."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if floating and value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    low, high = (rank, rank) if isinstance(rank, int) else rank
    if not low <= value.dim() <= high:
        expected = f"{low}" if low == high else f"{low} to {high}"
        raise ValueError(f"{name}: expected {expected} dimensions, got shape {tuple(value.shape)}")
    return value


def same(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """`value` shares dtype and device with `other`."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected dtype {other.dtype} like {other_name}, got {value.dtype}")
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} like {other_name}, got {value.device}")


def shape(name: str, value: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if value.shape != expected:
        raise ValueError(f"{name}: expected shape {meaning} = {tuple(expected)}, got {tuple(value.shape)}")


def number(name: str, value: Any, *, positive: bool = False) -> float:
    """A finite Python number (bool is not one)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # Comparisons, because traced code has no math.isfinite of a number that it keeps symbolic.
    if not -math.inf < value < math.inf or (positive and value <= 0):
        raise ValueError(f"{name}: expected a finite {'positive ' if positive else ''}number, got {value}")
    return float(value)


def integer(name: str, value: Any, minimum: int) -> int:
    """A Python integer, or the symbol that stands for one in traced code (bool is neither)."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value}")
    return cast(int, value)


def choice(name: str, value: Any, options: tuple[str, ...]) -> str:
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def attention_pair(q: Any, k: Any, *, rank: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """q (..., H, N, D) and k (..., H, M, D): same dtype, device and all axes but the token axis; M, H, D >= 1."""
    tensor("q", q, rank=rank)
    tensor("k", k, rank=rank)
    same("k", k, "q", q)
    q_shape, k_shape = q.shape, k.shape
    if len(k_shape) != len(q_shape) or k_shape[-1] != q_shape[-1] or k_shape[:-2] != q_shape[:-2]:
        raise ValueError(
            f"k: expected shape (..., heads, keys, channels) matching q {tuple(q_shape)} in all axes but the "
            f"token axis, got {tuple(k_shape)}"
        )
    if q_shape[-3] == 0 or q_shape[-1] == 0:
        missing = "head" if q_shape[-3] == 0 else "channel"
        raise ValueError(f"q: expected at least one {missing}, got shape {tuple(q_shape)}")
    if k_shape[-2] == 0:
        raise ValueError(f"k: expected at least one key (a softmax over none is undefined), got {tuple(k_shape)}")
    return q, k


def scale(value: Any, channels: int) -> float:
    return channels**-0.5 if value is None else number("scale", value)


def one_batch(value: torch.Tensor, rank: int) -> torch.Tensor:
    """`value` with all axes before its last ``rank - 1`` as one; itself, at no cost, when it has `rank` axes."""
    if value.dim() == rank:
        return value
    kept = value.shape[1 - rank :]
    return value.reshape(math.prod(value.shape[: 1 - rank]), *kept)  # -1 would be ambiguous for empty tensors


def like_lead(value: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    """`value` (batch, ...) with the leading axes `lead` in place of the one of `one_batch`."""
    return value if len(lead) == 1 else value.view(*lead, *value.shape[1:])


def map_and_log(
    name: str, p: Any, log_p: Any, *, rank: int | tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A map (..., n, M) in accumulation dtype and its logarithm (taken here when not given).

    An exact zero has the logarithm of the smallest normal number, so that no distance becomes 0 * inf.
    """
    tensor(name, p, rank=rank)
    if p.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one column, got shape {tuple(p.shape)}")
    # A cast to the same dtype would still cost a dispatch.
    if p.dtype not in (torch.float32, torch.float64):
        p = p.float()
    if log_p is None:
        positive = p.clamp_min(torch.finfo(p.dtype).tiny)
        # In place where autograd does not need the clamped values: maps are the largest tensors there are.
        return p, positive.log() if positive.requires_grad else positive.log_()
    tensor(f"log_{name}", log_p, rank=rank)
    if log_p.dtype not in (torch.float32, torch.float64):
        log_p = log_p.float()
    same(f"log_{name}", log_p, name, p)
    shape(f"log_{name}", log_p, tuple(p.shape), f"of {name}")
    return p, log_p
