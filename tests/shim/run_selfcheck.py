"""Run the shim's own kernel once; a process of its own, so that the address sanitizer may end it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from shim_build import Shim

if __name__ == "__main__":
    ones = np.full((16, 64), 0x3F80, dtype=np.uint16)
    print(Shim(Path(sys.argv[1])).selfcheck(ones, np.ascontiguousarray(ones.reshape(64, 16)), 1)[0, 0])
