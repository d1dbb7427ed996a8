"""What every hub's table needs to say about its backends: common refusals, nothing op-specific."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch

from vidops import _native

TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_TRITON_FOUND = importlib.util.find_spec("triton") is not None


def reference_refuses(tensors: Sequence[torch.Tensor]) -> str | None:
    return None


cpu_refuses = _native.cpu_refusal
cuda_refuses = _native.cuda_refusal
cuda_refuses_in_any_dtype = _native.cuda_refusal_of_any_dtype


def triton_refuses(tensors: Sequence[torch.Tensor]) -> str | None:
    if not _TRITON_FOUND:
        return "triton is not installed (pip install triton)"
    if TRITON_INTERPRETED:
        return None
    for t in tensors:
        if t.device.type != "cuda":
            return f"needs CUDA tensors, got {t.device} (TRITON_INTERPRET=1 runs kernels interpreted on the CPU)"
    return None


def upcast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The native CPU cores compute in float32 or float64; halves are widened on the way in."""
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)
