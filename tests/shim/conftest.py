"""The shim module: tests of this folder drive the kernels through the hubs on it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import cuda_shim
import pytest


@pytest.fixture(scope="module")
def shim() -> Iterator[ModuleType]:
    """The built module, standing in for the extension's CUDA half while the tests of one file run."""
    if cuda_shim.GXX is None:
        pytest.skip("g++ is not installed")
    with cuda_shim.installed(cuda_shim.load(cuda_shim.build())) as module:
        yield module


@pytest.fixture(params=cuda_shim.SEEDS, ids=lambda seed: f"seed{seed}")
def seeded(shim: ModuleType, request: pytest.FixtureRequest) -> ModuleType:
    """The module under each schedule of the shim in turn."""
    shim.set_seed(request.param)
    return shim
