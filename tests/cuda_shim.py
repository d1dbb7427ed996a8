"""Runs the CUDA kernels of the library on CPU tensors, through the hubs, without a card.

The real `.cu` files, launchers and bindings are compiled against the host shim (`csrc/shim`) into a module that has
the extension's CUDA entry points. `install` puts it in the place of the extension's CUDA half for this process, so
that backend "cuda" accepts CPU tensors; it is a way to test kernels, never a way to run them for a result.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from vidops import _native

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
GXX = shutil.which("g++")
LOCK_STEP, SHUFFLED, SKEWED = (0,), (1, 2, 3, 4), (100, 101, 102, 103, 104)
SEEDS = (*LOCK_STEP, *SHUFFLED, *SKEWED)  # odd ones copy asynchronously at once, even ones as late as allowed


def build(*flags: str, kernels: bool = True) -> Path:
    """The module's file, compiled with `flags` on top of the usual ones; kept until a source changes.

    Without `kernels` it holds the shim's own test kernels only, and builds faster.
    """
    import pybind11

    sources = [CSRC / "shim" / "shim.cpp", CSRC / "shim" / "module.cpp"]
    if kernels:
        sources += [CSRC / "bindings_cuda.cpp", *sorted((CSRC / "cuda").glob("*_launch.cu"))]
    else:
        flags = (*flags, "-DVIDOPS_SHIM_SELFCHECK_ONLY")
    key = hashlib.sha256("\0".join((*flags, sysconfig.get_config_var("EXT_SUFFIX"))).encode())
    for path in sorted(p for p in CSRC.rglob("*") if p.is_file() and "cpu" not in p.relative_to(CSRC).parts[:1]):
        key.update(path.read_bytes())
    name = f"vidops_shim_{key.hexdigest()[:16]}"
    folder = ROOT / "build" / name
    module = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.is_file():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    includes = [CSRC / "include", CSRC / "cuda", pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [str(GXX), "-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden"]
    command += ["-DVIDOPS_SHIM", f"-DVIDOPS_SHIM_MODULE={name}", *(f"-I{path}" for path in includes), *flags]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.{os.getpid()}.o"
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    # Two processes may build at once: the finished file appears in one step.
    unfinished = folder / f"{os.getpid()}.so"
    subprocess.run([str(GXX), "-shared", *flags, *objects, "-o", str(unfinished)], check=True)
    unfinished.replace(module)
    for path in objects:
        Path(path).unlink()
    return module


def load(path: Path) -> ModuleType:
    """Import a built module; builds with different flags live side by side."""
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _device_refusal(tensors: Iterable[torch.Tensor]) -> str | None:
    return next((f"the host shim takes CPU tensors, got {t.device}" for t in tensors if t.device.type != "cpu"), None)


@contextmanager
def installed(module: ModuleType) -> Iterator[ModuleType]:
    """Within the block, backend "cuda" of every op that has one runs on the shim."""
    saved = _native.C, _native.stream, _native.cuda_device_refusal
    combined = {name: getattr(_native.C, name) for name in dir(_native.C) if not name.startswith("__")}
    combined.update({name: getattr(module, name) for name in dir(module) if name.endswith("_cuda")})
    _native.C = SimpleNamespace(**{**combined, "cuda_architectures": ("host shim",)})
    _native.stream = lambda t: (0, 0)
    _native.cuda_device_refusal = _device_refusal
    try:
        yield module
    finally:
        _native.C, _native.stream, _native.cuda_device_refusal = saved


def install() -> Any:
    """For a whole process: build, load and install, for good."""
    holder = installed(load(build()))
    holder.__enter__()
    return holder
