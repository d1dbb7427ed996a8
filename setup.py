"""Builds the extension with CMake, without torch, and maps kernels/ and models/ into the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def source_hash() -> str:
    """The figure `vidops._native` compares with, computed by the same code but without importing torch."""
    text = (ROOT / "vidops" / "_native.py").read_text()
    start = text.index("def source_hash")
    scope: dict = {}
    exec("import hashlib\nfrom pathlib import Path\n" + text[start : text.index("\n\n\n", start)], scope)
    return scope["source_hash"](ROOT)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder per Python version, kept between builds; every path into pip's temporary environment is
        # passed anew, because CMake would otherwise remember those of a deleted one.
        version = f"py{sys.version_info[0]}{sys.version_info[1]}"
        build = Path(os.environ.get("VIDOPS_BUILD_DIR", ROOT / "build" / version))
        build.mkdir(parents=True, exist_ok=True)
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise RuntimeError("building vidops needs cmake and ninja (pip install cmake ninja)")
        definitions = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": build,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
            "PYTHON_EXECUTABLE": sys.executable,
            "PYBIND11_FINDPYTHON": "ON",
            "VIDOPS_CUDA": os.environ.get("VIDOPS_CUDA", "AUTO"),
            "VIDOPS_SOURCE_HASH": source_hash(),
        }
        if "VIDOPS_CUDA_ARCHS" in os.environ:
            definitions["VIDOPS_CUDA_ARCHS"] = os.environ["VIDOPS_CUDA_ARCHS"]
        flags = [f"-D{name}={value}" for name, value in definitions.items()]
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *flags], check=True)
        subprocess.run([cmake, "--build", build], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)


extensions = [] if os.environ.get("VIDOPS_NO_EXT") == "1" else [Extension("vidops._C", sources=[])]

setup(
    # Every package by name: find_packages would ship kernels/ and models/ as top-level packages.
    packages=[
        "vidops",
        "vidops.classify",
        "vidops.nn",
        "vidops.ops",
        "vidops.patching",
        "vidops.reference",
        "vidops.segment",
        "vidops.train_slots",
        "vidops.validation",
        "vidops.kernels",
        "vidops.models",
    ],
    package_dir={"vidops": "vidops", "vidops.kernels": "kernels", "vidops.models": "models"},
    package_data={"vidops": ["py.typed", "_card_record.json"], "vidops.segment": ["two_people_masks.npz"]},
    ext_modules=extensions,
    cmdclass={"build_ext": CMakeBuild},
)
