"""One golden file, and one comparison made with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vidops._npz import read_npz
from vidops.ops._backends import TRITON_INTERPRETED

# Values computed in float64 and stored in float32: half a unit in the last place of the largest entry.
STORED_FLOAT32 = 1e-7


class Check(NamedTuple):
    """`error` must not exceed `limit`; NaN fails."""

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


class GoldenError(ValueError):
    """A golden file that cannot be read; the text names the file."""


@dataclass(frozen=True)
class Case:
    """Arrays of one golden file."""

    path: Path
    arrays: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: Path) -> Case:
        try:
            return cls(path, read_npz(path))
        except ValueError as error:
            raise GoldenError(str(error)) from error

    def cfg(self, name: str, default: Any) -> Any:
        """A 0-d option, or `default` where the file has none."""
        found = self.arrays.get(f"cfg.{name}")
        return default if found is None else found.item()

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(np.array(self.arrays[name], order="C")).to(dtype)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """max |got - expected| / max |expected|, infinite for another shape.

    Gradients that are mathematically zero are rounding noise on both sides: those are compared absolutely.
    """
    if got.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    expected = expected.to(device="cpu", dtype=torch.float64)
    error = (got.detach().to(device="cpu", dtype=torch.float64) - expected).abs().max().item()
    largest = expected.abs().max().item()
    return error / largest if largest > 1e-9 else error


def mismatches(got: np.ndarray, expected: np.ndarray) -> float:
    """Number of entries that differ; infinite for another shape."""
    return float("inf") if got.shape != expected.shape else float((got != expected).sum())


def device_of(backend: str) -> torch.device:
    """Where a backend's tensors live."""
    on_card = backend == "cuda" or (backend == "triton" and not TRITON_INTERPRETED)
    return torch.device("cuda" if on_card else "cpu")


def dtypes(backend: str, *, cuda_doubles: bool = False) -> tuple[torch.dtype, ...]:
    """What a backend computes in: most CUDA kernels refuse float64."""
    return (torch.float32,) if backend == "cuda" and not cuda_doubles else (torch.float64, torch.float32)


def tag_of(dtype: torch.dtype) -> str:
    return "float64" if dtype == torch.float64 else "float32"


def state_of(case: Case, dtype: torch.dtype, prefix: str = "state.") -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): case.tensor(name, dtype) for name in case.arrays if name.startswith(prefix)
    }


def nonempty(checks: list[Check]) -> list[Check]:
    """A case none of whose arrays was understood must not pass."""
    return checks or [Check("arrays to compare", float("inf"), 0.0)]


def gradient_checks(
    case: Case, scalar: torch.Tensor, wanted: Mapping[str, torch.Tensor], limit: float, tag: str
) -> list[Check]:
    wanted = {key: tensor for key, tensor in wanted.items() if key in case.arrays}
    if not wanted:
        return []
    found = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True)
    checks = []
    for (key, tensor), gradient in zip(wanted.items(), found, strict=True):
        gradient = torch.zeros_like(tensor) if gradient is None else gradient
        stored = case.arrays[key].dtype == np.float32 and tag == "float64"
        error = relative_error(gradient, case.tensor(key, torch.float64))
        checks.append(Check(f"{key} {tag}", error, max(limit, STORED_FLOAT32) if stored else limit))
    return checks
