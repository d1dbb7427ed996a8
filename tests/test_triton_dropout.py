"""The dropout mask of the Triton kernels is Philox-4x32-10 to the bit, also for counters beyond 32 bits.

Run as a script under TRITON_INTERPRET=1, this file prints the mask of every (first counter, key, threshold)
of the JSON list argv[1], one string of 0 and 1 per line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

COUNT = 256
REPOSITORY = Path(__file__).resolve().parents[1]


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox-4x32-10 (Salmon et al., SC 2011): counters (n, 4), key (2,), uint64 < 2^32 -> words (n, 4)."""
    low = np.uint64(0xFFFFFFFF)
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k = [np.uint64(key[0]), np.uint64(key[1])]
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (right >> np.uint64(32)) ^ c[1] ^ k[0],
            right & low,
            (left >> np.uint64(32)) ^ c[3] ^ k[1],
            left & low,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, 1)


def first_words(base: int, seed: int) -> np.ndarray:
    counter = np.zeros((COUNT, 4), dtype=np.uint64)
    elements = [base + i for i in range(COUNT)]
    counter[:, 0] = [e & 0xFFFFFFFF for e in elements]
    counter[:, 1] = [e >> 32 for e in elements]
    return philox(counter, np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], dtype=np.uint64))[:, 0]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_yardstick_has_the_published_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    got = philox(np.array([counter], dtype=np.uint64), np.array(key, dtype=np.uint64))
    assert tuple(int(w) for w in got[0]) == words


BASES = (0, 2**32 - 100, 2**40 + 5)
SEEDS = (0, 1, 0x123456789ABCDEF, -5)
# The word of one element itself is the sharpest threshold: the element is kept there, and dropped one above.
REQUESTS = [
    (base, seed, int(first_words(base, seed)[17]) + above)
    for base in BASES
    for seed in SEEDS
    for above in (0, 1)
]


@pytest.fixture(scope="module")
def masks() -> list[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, json.dumps(REQUESTS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("request_", range(len(REQUESTS)), ids=[str(r) for r in REQUESTS])
def test_mask_is_philox(request_: int, masks: list[str]) -> None:
    base, seed, threshold = REQUESTS[request_]
    assert masks[request_] == "".join("01"[int(word) >= threshold] for word in first_words(base, seed))


@triton.jit
def _mask_kernel(
    out, base: tl.int64, seed: tl.int64, threshold: tl.uint32, keep: tl.constexpr, SIZE: tl.constexpr
):
    at = tl.arange(0, SIZE)
    tl.store(out + at, keep(at.to(tl.int64) + base, seed, threshold).to(tl.int32))


def _print_masks(requests: list[tuple[int, int, int]]) -> None:
    from vidops.kernels._common import dropout_keep

    for base, seed, threshold in requests:
        out = torch.zeros(COUNT, dtype=torch.int32)
        _mask_kernel[(1,)](out, base, seed, threshold, keep=dropout_keep, SIZE=COUNT)
        print("".join(str(bit) for bit in out.tolist()))


if __name__ == "__main__":
    _print_masks(json.loads(sys.argv[1]))
