"""The C++ CPU cores alone, under the address and undefined-behaviour sanitizers, at every ISA level."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++17", "-O1", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_cpu_cores_under_sanitizers(tmp_path: Path) -> None:
    sources = [*sorted((CSRC / "cpu").glob("*.cpp")), *sorted(HERE.glob("*.cpp"))]

    def compile_one(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        command = ["g++", *FLAGS, "-I", str(CSRC / "include"), "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = tmp_path / "cpu_tests"
    command = ["g++", *FLAGS, *map(str, objects), "-o", str(program)]
    link = subprocess.run(command, check=False, capture_output=True, text=True)
    assert link.returncode == 0, link.stderr
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run([str(program)], check=False, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 failures" in run.stdout
