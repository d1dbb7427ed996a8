"""The compiled extension: found or not, why not, and how tensors are handed to it.

Tensors cross as DLPack capsules, which describe themselves, so the native side verifies rather than trusts and
never sees torch's ABI: one binary serves every supported torch.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage] - documented, not exported


def source_hash(root: Path) -> str:
    """SHA-256 over everything the extension is built from; `setup.py` stores the same figure in the binary."""
    digest = hashlib.sha256()
    files = [root / "CMakeLists.txt"]
    for pattern in ("include/vidops/*.h", "cpu/*", "cuda/*", "bindings*"):
        files += sorted(p for p in (root / "csrc").glob(pattern) if p.is_file())
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def _load() -> tuple[Any, str]:
    if os.environ.get("VIDOPS_NO_EXT") == "1":
        return None, "the extension is switched off by VIDOPS_NO_EXT=1"
    try:
        _C = importlib.import_module("vidops._C")
    except ImportError as error:
        return None, f"the extension vidops._C is not built or does not load ({error}); run: pip install ."
    root = Path(__file__).resolve().parent.parent
    if (root / "csrc" / "bindings.cpp").is_file() and _C.source_hash != source_hash(root):
        return None, "the extension was built from other sources than this checkout; rebuild: pip install -e ."
    return _C, ""


# The extension, or None and why: no type checker knows its functions, and the refusals guard their use.
C, WHY_NOT = _load()


def cpu_refusal(tensors: Any) -> str | None:
    """Shared first checks of every native CPU implementation."""
    if C is None:
        return WHY_NOT
    for t in tensors:
        if t.device.type != "cpu":
            return f"needs CPU tensors, got {t.device}"
    return None


def cuda_refusal(tensors: Any) -> str | None:
    """Shared checks of native CUDA implementations that have no float64."""
    reason = cuda_refusal_of_any_dtype(tensors)
    if reason is not None:
        return reason
    for t in tensors:
        if t.dtype == torch.float64:
            return "float64 is not implemented in CUDA (triton runs it)"
    return None


def cuda_refusal_of_any_dtype(tensors: Any) -> str | None:
    """Shared first checks of every native CUDA implementation."""
    if C is None:
        return WHY_NOT
    if not C.cuda_architectures:
        return "the extension was built without CUDA (VIDOPS_CUDA=ON, and nvcc)"
    return cuda_device_refusal(tensors)


def cuda_device_refusal(tensors: Any) -> str | None:
    """What the tensors' device says against a launch."""
    for t in tensors:
        if t.device.type != "cuda":
            return f"needs CUDA tensors, got {t.device}"
    capability = torch.cuda.get_device_capability(tensors[0].device)
    if capability < (8, 0):
        return f"built for sm_80 and newer, this device is sm_{capability[0]}{capability[1]}"
    return None


def view(t: torch.Tensor) -> Any:
    """A capsule for `t`, whose last axis is made contiguous first if it is not (a copy; other strides stay)."""
    if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
        t = t.clone(memory_format=torch.contiguous_format)  # Tensor.contiguous leaves an empty tensor's strides
    return to_dlpack(t)


def threads() -> int:
    return torch.get_num_threads()


def stream(t: torch.Tensor) -> tuple[int, int]:
    """(device index, stream handle) for a launch on the current stream of `t`'s device."""
    index = t.device.index
    return index, torch.cuda.current_stream(index).cuda_stream
