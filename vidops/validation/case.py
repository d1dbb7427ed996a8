"""One golden file, and one comparison made with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


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
            with np.load(path, allow_pickle=False) as archive:
                return cls(path, {name: archive[name] for name in archive.files})
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise GoldenError(f"{path}: not a readable .npz without pickles ({error})") from error

    def cfg(self, name: str, default: Any) -> Any:
        """A 0-d option, or `default` where the file has none."""
        found = self.arrays.get(f"cfg.{name}")
        return default if found is None else found.item()

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(np.array(self.arrays[name], order="C")).to(dtype)
