"""Checkpoints from local files: read safely, checked completely, reported in full.

A file is data, never code: `.safetensors`, or `torch.load` with ``weights_only=True``. Whatever is wrong with
a file, the caller sees one `CheckpointError` that names the file and what was expected of it.
"""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# A guard against a wrong file or a decompression bomb, far above any checkpoint of the models here.
MAX_BYTES = 16 * 2**30

# Keys under which a training script keeps the parameters ("module" is DeepSpeed's). The teacher comes before the
# student because DINO evaluates and publishes its teacher.
WRAPPERS = ("model_state_dict", "state_dict", "model", "module", "teacher", "student")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text starts with its path and says what was expected."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        super().__init__(f"{os.fspath(path)}: {problem}")
        self.path = os.fspath(path)
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.problem)


@dataclass(frozen=True)
class FoundState:
    """Parameters as stored in a file; `layout` is the key that held them, or "state dict"."""

    state: dict[str, torch.Tensor]
    layout: str


@dataclass(frozen=True)
class LoadReport:
    """What a load did: `missing` kept their initial values, `unexpected` and `ignored` stayed in the file."""

    path: str
    layout: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not self.missing and not self.unexpected

    def __str__(self) -> str:
        text = f"{self.path} ({self.layout}): {len(self.loaded)} loaded"
        for title, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("ignored", self.ignored),
        ):
            if names:
                text += f", {len(names)} {title} ({shortened(names)})"
        return text


def shortened(names: Iterable[str], limit: int = 4) -> str:
    """The first names of a list that may be long, as they are shown in messages."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:120] for name in names[:limit]) + more


# What torch's and pickle's readers raise on damaged input, found by mutating real files; a programming error
# elsewhere must not be taken for a damaged file, so nothing broader is caught.
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    MemoryError,
    AssertionError,
    ImportError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)


def read_state_dict(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> FoundState:
    """Named tensors of a checkpoint file, on the CPU.

    Args:
        path: a `.safetensors` file, or one written by `torch.save` that holds a mapping of names to tensors,
            plainly or under one of `WRAPPERS`.
        max_bytes: refuse files that are larger, or that unpack to more.

    Raises:
        CheckpointError: no such file, too large, damaged, holding objects other than tensors and plain
            containers (nothing in the file is executed), no floating point tensors, or numbers that are not
            finite.
    """
    file = Path(path)
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "no such file"
        raise CheckpointError(path, f"{kind}; expected a local .safetensors or torch.save file")
    size = file.stat().st_size
    if size == 0:
        raise CheckpointError(path, "the file is empty; expected a .safetensors or torch.save file")
    if size > max_bytes:
        raise CheckpointError(path, f"{size} bytes; expected a checkpoint of at most {max_bytes}")
    raw = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file, max_bytes)
    mapping, layout = _unwrapped(path, raw)
    return FoundState(_checked_tensors(path, mapping), layout)


def _read_safetensors(file: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(file, "reading .safetensors needs: pip install safetensors") from error
    try:
        return load_file(file, device="cpu")
    except (SafetensorError, *_DAMAGE) as error:
        raise CheckpointError(file, f"not a readable safetensors file ({_cause(error)})") from error


def _read_torch(file: Path, max_bytes: int) -> Any:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > max_bytes:
                raise CheckpointError(file, f"unpacks to {unpacked} bytes; expected at most {max_bytes}")
        with warnings.catch_warnings():
            # Said of any file that is no pickle at all; the error that follows is what the caller needs.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # DINO's full checkpoint carries its command line: a plain attribute holder, harmless to rebuild.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        cause = _cause(error)
        if "GLOBAL" in cause:
            raise CheckpointError(
                file,
                "holds objects other than tensors and plain containers, which are refused because rebuilding "
                f"them could run code ({cause})",
            ) from error
        raise CheckpointError(file, f"not a readable torch.save file ({cause})") from error


def _cause(error: BaseException) -> str:
    """One line of an error's text; torch's advice on how to switch its protection off is no part of it."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if "GLOBAL" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {line[:160]}" if line else type(error).__name__


def _unwrapped(path: str | os.PathLike[str], raw: Any) -> tuple[Mapping[Any, Any], str]:
    if not isinstance(raw, Mapping):
        raise CheckpointError(path, f"holds a {type(raw).__name__}; expected names mapped to tensors")
    for key in WRAPPERS:
        if isinstance(raw.get(key), Mapping):
            return raw[key], key
    return raw, "state dict"


def _checked_tensors(path: str | os.PathLike[str], mapping: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    expected = "expected parameter names mapped to tensors"
    if not mapping:
        raise CheckpointError(path, f"holds no entries; {expected}")
    for name, value in mapping.items():
        if not isinstance(name, str):
            raise CheckpointError(path, f"has the key {name!r:.80}; {expected}")
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(path, f"{name[:120]} is a {type(value).__name__}; {expected}")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(path, f"{name[:120]} is not an ordinary dense tensor; {expected}")
    return dict(mapping)


def without_prefix(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """`state` with `prefix` taken off, if every name carries it (data-parallel training adds "module.")."""
    if all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def load_into(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    path: str | os.PathLike[str],
    layout: str = "state dict",
    strict: bool = True,
    required: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
) -> LoadReport:
    """Copy `state` into `module`, all of it or nothing.

    Args:
        module: the model; its parameters keep their dtype and device.
        state: tensors by the model's names.
        strict: refuse missing and unexpected names instead of reporting them.
        required: prefixes of names that may not be missing even without `strict`.
        path, layout, ignored: for the messages and the report.

    Raises:
        CheckpointError: missing or unexpected names where they are not allowed, another shape or a dtype that
            is not floating point, numbers that are not finite, another table of indices, or no name in common.
            `module` is unchanged.
    """
    own = module.state_dict()
    loaded = tuple(name for name in own if name in state)
    missing = tuple(name for name in own if name not in state)
    unexpected = tuple(name for name in state if name not in own)
    if not loaded:
        raise CheckpointError(
            path,
            f"no name fits the model (found {shortened(state)}); expected names such as {shortened(own, 3)}",
        )
    lacking = missing if strict else tuple(name for name in missing if name.startswith(required))
    if lacking:
        problem = f"{len(lacking)} of {len(own)} parameters are missing ({shortened(lacking)})"
        if required and not any(name.startswith(required) for name in lacking):
            problem += f"; the file ({layout}) has only part of the model, which strict=False accepts"
        raise CheckpointError(path, problem)
    if strict and unexpected:
        raise CheckpointError(
            path, f"{len(unexpected)} names do not belong to the model ({shortened(unexpected)})"
        )
    for name in loaded:
        value = state[name]
        if value.shape != own[name].shape:
            raise CheckpointError(
                path,
                f"{name} has shape {tuple(value.shape)}; expected {tuple(own[name].shape)} in this model",
            )
        if not own[name].is_floating_point():
            # A table of indices, which the model's sizes determine.
            if value.dtype != own[name].dtype or not torch.equal(value, own[name].cpu()):
                raise CheckpointError(path, f"{name} differs; expected the {own[name].dtype} table of this model")
            continue
        if not value.is_floating_point():
            raise CheckpointError(path, f"{name} is {value.dtype}; expected a floating point tensor")
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(path, f"{name} holds NaN or infinity; expected finite weights")
    module.load_state_dict({name: state[name] for name in loaded}, strict=False)
    return LoadReport(os.fspath(path), layout, loaded, missing, unexpected, ignored)
