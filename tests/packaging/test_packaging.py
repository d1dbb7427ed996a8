"""What is shipped, and that it works away from the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(*command, cwd, **environment):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta as b; print(b.build_sdist({str(out)!r}))"
    _run(sys.executable, "-c", code, cwd=ROOT)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(sdist, tmp_path_factory):
    """The package installed from a wheel that was built from the unpacked sdist."""
    work = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        # Python before 3.11.4 has no filters.
        archive.extractall(work, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = (p for p in work.iterdir() if p.is_dir())
    _run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", work, source,
        cwd=work, VIDOPS_CUDA="OFF", VIDOPS_BUILD_DIR=str(work / "build"),
    )  # fmt: skip
    (wheel,) = work.glob("*.whl")
    target = work / "site"
    _run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=work)
    return wheel, target


def test_wheel_has_one_top_level_name(installed):
    names = zipfile.ZipFile(installed[0]).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"vidops"}
    for wanted in ("vidops/kernels/symmetric_kl.py", "vidops/models/ssl_uvos.py", "vidops/py.typed"):
        assert wanted in names
    assert any(name.startswith("vidops/_C.") for name in names)


def test_installed_copy_runs_elsewhere(installed):
    code = (
        "import torch, vidops, vidops.kernels, vidops.models.ssl_uvos as m, sys; "
        "assert 'triton' not in sys.modules; "
        "print(vidops.attention_head_mean(torch.ones(1, 2, 3), torch.ones(1, 4, 3), backend='cpu').sum().item()); "
        "print(vidops.__file__)"
    )
    # -P keeps the working folder off the path: the checkout must not be what is found.
    out = _run(sys.executable, "-P", "-c", code, cwd=ROOT, PYTHONPATH=str(installed[1])).split()
    assert float(out[0]) == pytest.approx(2.0)
    assert out[1].startswith(str(installed[1]))


def test_sdist_carries_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for wanted in ("CMakeLists.txt", "csrc/bindings.cpp", "csrc/cpu/kernels.inl", "csrc/cuda/device.cuh", "setup.py"):
        assert wanted in names


def test_import_is_light(tmp_path):
    """At most 6 % of what torch itself takes, which a busy machine slows as much: 0.1 s of 1.7."""
    code = (
        "import sys, time; clock = time.perf_counter; start = clock(); import torch; middle = clock(); import vidops; "
        "end = clock(); assert not torch.cuda.is_initialized(); "
        "assert not {'triton', 'cupy', 'scipy', 'av', 'vidops.kernels', 'vidops.models'} & set(sys.modules); "
        "print((end - middle) / (middle - start))"
    )
    # As after pip, which compiles what it installs: the first run writes the bytecode, whatever the caller's setting.
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    _run(sys.executable, "-c", code, cwd="/", **bytecode)
    assert min(float(_run(sys.executable, "-c", code, cwd="/", **bytecode)) for _ in range(4)) <= 0.06
