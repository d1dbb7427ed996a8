"""What is ready on this machine, and what is not and why. Never raises, initialises no CUDA context of its own."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

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


# Written by `bench/gpu_check.py` after a run on a card: backend -> what ran, where, when, and from which sources.
CARD_RECORD = Path(__file__).with_name("_card_record.json")
CARD_BACKENDS = ("triton", "cuda")


def kernel_source(backend: str) -> str | None:
    """Hash of the sources behind ``"triton"`` or ``"cuda"`` on this machine, None when they cannot be told.

    For cuda it is the figure inside the extension, which covers its CPU half as well: a change there makes a record
    stale although the kernels are the same, never the other way round.
    """
    if backend == "cuda":
        if _native.C is not None:
            return _native.C.source_hash
        root = Path(__file__).resolve().parent.parent
        return _native.source_hash(root) if (root / "csrc" / "bindings.cpp").is_file() else None
    found = importlib.util.find_spec("vidops.kernels")
    if found is None or not found.submodule_search_locations:
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(found.submodule_search_locations[0]).glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def card_state(record: Path = CARD_RECORD) -> dict[str, str]:
    """Backend -> whether its kernels, as they are now, have run on a card; for the GPU backends."""
    entries: dict[str, Any] = {}
    if record.is_file():
        try:
            entries = json.loads(record.read_text())
        except ValueError as error:
            return dict.fromkeys(CARD_BACKENDS, f"unknown: {record.name} cannot be read ({error})")
    return {backend: _card_state(backend, entries.get(backend)) for backend in CARD_BACKENDS}


def _card_state(backend: str, entry: dict[str, Any] | None) -> str:
    with_op = [name for name, op in OPS.items() if backend in op.rows]
    if not with_op:
        return "no kernels"
    built = ""
    if backend == "cuda" and _native.C is not None:
        architectures = ", ".join(_native.C.cuda_architectures)
        built = f"compiled for {architectures}, " if architectures else "not compiled here, "
    if entry is None:
        return f"{built}never run on a card"
    commit = f"commit {entry['commit']}{' with local changes' if entry['dirty'] else ''}"
    if entry["source"] != kernel_source(backend):
        return f"{built}changed, and not run on a card since {commit} ({entry['device']}, {entry['date']})"
    missing = sorted(set(with_op) - set(entry["ops"]))
    rest = f"; never run on a card: {', '.join(missing)}" if missing else ""
    return f"{built}passed {', '.join(entry['steps'])} on {entry['device']}, {entry['date']}, {commit}{rest}"


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
    lines += ["", *(f"{backend} kernels: {state}" for backend, state in card_state().items())]
    return "\n".join(lines)
