"""The host shim itself: its wrappers are right, and planted faults are found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cuda_shim
import pytest
import torch
from cuda_shim import GXX, ROOT, SEEDS, build, load
from torch.utils.dlpack import to_dlpack

pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is not installed")


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randint(-8, 9, shape, generator=generator).bfloat16() for shape in ((16, 64), (64, 16)))
    return a, b, a.float() @ b[:, :8].float()  # small integers: exact in any order


def selfcheck(module: ModuleType, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = torch.full((16, 8), float("nan"))
    module.selfcheck(to_dlpack(a), to_dlpack(b), to_dlpack(c))
    return c


def test_tensor_core_wrappers(seeded: ModuleType) -> None:
    a, b, expected = operands()
    assert torch.equal(selfcheck(seeded, a, b), expected)


def group_product(module: ModuleType) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-8, 9, (64, 192), generator=generator).half() for _ in range(2))
    c = torch.full((64, 64), float("nan"))
    module.groups(to_dlpack(a), to_dlpack(b), to_dlpack(c))
    return c, a.float() @ b.float().T


def test_warpgroup_product(seeded: ModuleType) -> None:
    found, expected = group_product(seeded)
    assert torch.equal(found, expected)


def test_missing_arrival_of_a_warpgroup_is_reported() -> None:
    broken = load(build("-DVIDOPS_FAULT_MISSING_ARRIVE", kernels=False))
    with pytest.raises(broken.Fault, match="before it arrived"):
        group_product(broken)


def test_missing_wait_for_a_warpgroup_is_caught() -> None:
    broken = load(build("-DVIDOPS_FAULT_MISSING_GROUP_WAIT", kernels=False))
    for seed in (0, 2, 4, 100, 102):  # even seeds multiply as late as allowed
        broken.set_seed(seed)
        found, expected = group_product(broken)
        assert not torch.equal(found, expected)


def test_product_without_a_wait_is_reported() -> None:
    broken = load(build("-DVIDOPS_FAULT_MISSING_LAST_GROUP_WAIT", kernels=False))
    with pytest.raises(broken.Fault, match="never waited for"):
        group_product(broken)


def test_divergent_barrier_is_reported(seeded: ModuleType) -> None:
    with pytest.raises(seeded.Fault, match="barrier after some threads have left"):
        seeded.divergent(to_dlpack(torch.zeros(64, dtype=torch.int32)))


def test_too_small_workspace_is_refused(shim: ModuleType) -> None:
    rows, count = torch.zeros(130, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    tensors = (torch.zeros(130, 3, dtype=torch.int64), rows, rows.clone(), count, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(shim.ArgumentError, match="workspace must hold"):
        shim.greedy_absorb_forward_cuda(*map(to_dlpack, tensors), 0, 0)


def rotated(module: ModuleType) -> torch.Tensor:
    out = torch.zeros(128, dtype=torch.int32)
    module.rotate(to_dlpack(out), 5)
    return out


ROTATED = (torch.arange(128, dtype=torch.int32) + 5 * 33) % 128 + 5


def test_barriers(seeded: ModuleType) -> None:
    assert torch.equal(rotated(seeded), ROTATED)


def test_missing_barrier_is_caught() -> None:
    broken = load(build("-DVIDOPS_FAULT_MISSING_BARRIER", kernels=False))
    caught = []
    for seed in SEEDS:
        broken.set_seed(seed)
        caught += [seed] * (not torch.equal(rotated(broken), ROTATED))
    assert set(caught) & set(cuda_shim.SKEWED)


def passed_on(module: ModuleType, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What two clusters of `blocks` have handed around, and what that should be."""
    out, rounds = torch.zeros(2, blocks, 64, dtype=torch.int32), 4
    module.cluster(to_dlpack(out), blocks, rounds)
    rank, me = torch.arange(blocks)[:, None], torch.arange(64)
    expected = (rank + rounds) % blocks * 64 + (me + 33 * rounds) % 64 + rounds
    return out, expected.int().expand_as(out)


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_clusters(seeded: ModuleType, blocks: int) -> None:
    assert torch.equal(*passed_on(seeded, blocks))


def test_cluster_has_to_divide_the_grid(shim: ModuleType) -> None:
    with pytest.raises(shim.Fault, match="do not divide the grid"):
        shim.cluster(to_dlpack(torch.zeros(3, 64, dtype=torch.int32)), 2, 1)


@pytest.mark.parametrize("fault", ["MISSING_CLUSTER_BARRIER", "EARLY_EXIT"])
def test_fault_in_a_cluster_is_caught(fault: str) -> None:
    """Memory of another block written again too early, or read after that block has left."""
    broken = load(build(f"-DVIDOPS_FAULT_{fault}", kernels=False))
    caught = []
    for seed in SEEDS:
        broken.set_seed(seed)
        caught += [seed] * (not torch.equal(*passed_on(broken, 4)))
    assert set(caught) & set(cuda_shim.SKEWED)


def test_block_outside_the_cluster_is_reported() -> None:
    broken = load(build("-DVIDOPS_FAULT_NO_SUCH_BLOCK", kernels=False))
    with pytest.raises(broken.Fault, match="no block of this rank"):
        passed_on(broken, 4)


def test_missing_copy_wait_is_caught() -> None:
    broken = load(build("-DVIDOPS_FAULT_MISSING_WAIT", kernels=False))
    a, b, expected = operands()
    for seed in (0, 2, 4):  # even seeds copy as late as allowed
        broken.set_seed(seed)
        assert not torch.equal(selfcheck(broken, a, b), expected)


def under_asan(*arguments: str) -> subprocess.CompletedProcess[str]:
    runtime = subprocess.run([str(GXX), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "VIDOPS_TEST_REQUIRE"},
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    script = Path(__file__).with_name("run_under_asan.py")
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip


ASAN = ("-fsanitize=address", "--param", "asan-stack=0")  # fibers switch stacks under the sanitizer's feet


def test_out_of_bounds_read_is_caught() -> None:
    result = under_asan("selfcheck", str(build(*ASAN, "-DVIDOPS_FAULT_OUT_OF_BOUNDS", kernels=False)))
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


def test_kernels_stay_in_bounds() -> None:
    module = build(*ASAN)
    assert float(under_asan("selfcheck", str(module)).stdout) == 64.0
    kernels = sorted(str(p) for p in Path(__file__).parent.glob("test_*_cuda.py"))
    result = under_asan("tests", str(module), *kernels, "-k", "seed0 or seed101")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout
