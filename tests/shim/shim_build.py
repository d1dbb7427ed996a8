"""Builds the CUDA kernels for the host shim and calls them through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np

CSRC = Path(__file__).resolve().parents[2] / "csrc"
OPS = ("greedy_absorb", "segment_mean")
SEEDS = (0, 1, 2, 3, 4, 100, 101, 102, 103, 104)
GXX = shutil.which("g++")


def build(folder: Path, *flags: str, ops: tuple[str, ...] = OPS) -> Path:
    """Compile shim, harness and launchers into one shared library in `folder`."""
    library = folder / "libvidops_shim.so"
    command = [str(GXX), "-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-DVIDOPS_SHIM", f"-I{CSRC / 'include'}"]
    sources = [CSRC / "shim" / name for name in ("shim.cpp", "harness.cpp", "selfcheck.cpp")]
    launchers = [CSRC / "cuda" / f"{op}_launch.cu" for op in ops]
    subprocess.run(
        [*command, *flags, *map(str, sources), "-x", "c++", *map(str, launchers), "-o", str(library)], check=True
    )
    return library


class ShimError(RuntimeError):
    """A launcher or the shim refused or reported a fault."""


class Shim:
    """One built library."""

    def __init__(self, library: Path) -> None:
        self._lib = ctypes.CDLL(str(library))

    def _call(self, name: str, seed: int, *arguments: np.ndarray | int) -> None:
        error = ctypes.create_string_buffer(1024)
        values = [
            ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in arguments
        ]
        if getattr(self._lib, name)(ctypes.c_uint(seed), *values, error, ctypes.c_size_t(len(error))):
            raise ShimError(error.value.decode())

    def _workspace(self, name: str, *sizes: int) -> np.ndarray:
        function = getattr(self._lib, name)
        function.restype = ctypes.c_int64
        return np.full(function(*map(ctypes.c_int64, sizes)), -1, dtype=np.int64)

    def greedy_absorb(self, adjacency: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
        rows, words = adjacency.shape
        owner, label, count = np.full(rows, -9), np.full(rows, -9), np.full(1, -9)
        scratch = self._workspace("shim_greedy_absorb_workspace", rows)
        stride = adjacency.strides[0] // 8
        self._call(
            "shim_greedy_absorb", seed, adjacency, rows, words, stride, owner, label, count, scratch, scratch.size
        )
        return owner, label, int(count[0])

    def segment_mean(self, x: np.ndarray, label: np.ndarray, segments: int, seed: int) -> np.ndarray:
        rows, cols = x.shape
        mean = np.full((segments, cols), np.nan, dtype=np.float32)
        scratch = self._workspace("shim_segment_mean_workspace", rows, segments)
        stride = x.strides[0] // 4
        self._call(
            "shim_segment_mean", seed, x, rows, cols, stride, label, segments, mean, scratch, scratch.size
        )
        return mean

    def selfcheck(self, a: np.ndarray, b: np.ndarray, seed: int) -> np.ndarray:
        """a (16, 16s) and b (16s, 16) as bfloat16 bits -> a @ b[:, :8]."""
        c = np.full((16, 8), np.nan, dtype=np.float32)
        self._call("shim_selfcheck", seed, a, b, c, a.shape[1] // 16)
        return c

    def divergent(self, seed: int) -> None:
        self._call("shim_divergent", seed, np.zeros(64, dtype=np.int32))
