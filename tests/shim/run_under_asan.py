"""Runs pytest, or the shim's own kernel, in a process of its own under the address sanitizer.

``run_under_asan.py selfcheck MODULE`` or ``run_under_asan.py tests MODULE PYTEST_ARGUMENTS...``
"""

from __future__ import annotations

import sys
from pathlib import Path

import cuda_shim
import pytest
import torch
from torch.utils.dlpack import to_dlpack

if __name__ == "__main__":
    what, path = sys.argv[1], Path(sys.argv[2])
    if what == "selfcheck":
        ones, c = torch.ones(16, 64, dtype=torch.bfloat16), torch.zeros(16, 8)
        cuda_shim.load(path).selfcheck(to_dlpack(ones), to_dlpack(ones.reshape(64, 16)), to_dlpack(c))
        print(float(c[0, 0]))
    else:
        cuda_shim.build = lambda *flags: path
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[3:]]))
