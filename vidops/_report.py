"""What is ready on this machine, and what is not and why. Never raises, initialises no CUDA context of its own."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from vidops import _native
from vidops._registry import BACKENDS, OPS
from vidops.ops import _backends


def backends() -> dict[str, dict[str, str]]:
    """op -> backend -> ``"ready"`` or the reason why not, for tensors on this machine's best device.

    >>> import vidops
    >>> vidops.backends()["greedy_absorb"]["reference"]
    'ready'
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table: dict[str, dict[str, str]] = {}
    for name, op in sorted(OPS.items()):
        row = table[name] = {}
        for backend in BACKENDS:
            where = "cpu" if backend == "cpu" else device
            reason = op.refusal(backend, (torch.empty(1, device=where),), needs_grad=False)
            ready = "ready (interpreted)" if backend == "triton" and _backends.TRITON_INTERPRETED else "ready"
            row[backend] = reason or ready
    return table


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The text of ``python -m vidops``."""
    import vidops

    lines = [
        f"vidops {vidops.__version__}   torch {torch.__version__}   triton {_version('triton')}   "
        f"python {platform.python_version()}",
    ]
    if _native.C is None:
        lines.append(f"extension: {_native.WHY_NOT}")
    else:
        c = _native.C
        cuda = ", ".join(c.cuda_architectures) or "none"
        lines.append(f"extension: {c.__file__}")
        lines.append(f"  compiler {c.compiler}, CPU level {c.cpu_isa()} of {', '.join(c.cpu_isas())}, CUDA {cuda}")
    lines.append(f"device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}")
    table = backends()
    width = max(map(len, table))
    reasons: dict[str, str] = {}
    lines.append("")
    lines.append(" " * width + "  " + "  ".join(f"{b:>10}" for b in BACKENDS))
    for name, row in table.items():
        cells = []
        for backend in BACKENDS:
            ready = row[backend].startswith("ready")
            if not ready:
                reasons[row[backend]] = reasons.get(row[backend], chr(ord("a") + len(reasons)))
            cells.append(f"{row[backend].removeprefix('ready ') if ready else '(' + reasons[row[backend]] + ')':>10}")
        lines.append(f"{name:<{width}}  " + "  ".join(cells))
    lines += ["", *(f"({mark}) {reason}" for reason, mark in reasons.items())]
    return "\n".join(lines)
