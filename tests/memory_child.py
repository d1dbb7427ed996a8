"""Run by `test_memory.py` in a process of its own: the peak resident memory of one clustering call, as JSON.

What is there before the call (interpreter, torch, inputs, thread pools, warmed-up code) is subtracted, and the
kernel's mark of the largest resident size is set back to it.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from peers import eager_window

import vidops


def status(name: str) -> int:
    """A size of this process in bytes: ``"VmRSS"`` is in memory now, ``"VmHWM"`` was at most since the last reset."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found.group(1)) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def video(
    frames: int, key_frames: int, heads: int, tokens: int, channels: int, objects: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (T, H, HW, D) and k (Tk, H, HW, D) of a video whose tokens look like one of `objects` things."""
    g = torch.Generator().manual_seed(0)
    look = 1.6 * torch.randn(objects, heads, channels, generator=g)
    of = torch.randint(objects, (frames, tokens), generator=g)
    q = (look[of] + 0.3 * torch.randn(frames, tokens, heads, channels, generator=g)).transpose(1, 2).contiguous()
    return q, q[:: max(1, frames // key_frames)][:key_frames].clone()


def eager(q: torch.Tensor, k: torch.Tensor, window: int) -> None:
    """The public algorithm up to the leaders of each window; what follows needs less."""
    heads, channels = q.shape[1], q.shape[3]
    keys = k.transpose(0, 1).reshape(heads, -1, channels)
    for start in range(0, len(q), window):
        rows = q[start : start + window].transpose(0, 1).reshape(heads, -1, channels)
        eager_window(rows, keys, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("form", choices=("vidops", "eager"))
    for name in ("frames", "key_frames", "tokens", "window", "objects", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def cluster(q: torch.Tensor, k: torch.Tensor) -> None:
        if options.form == "eager":
            eager(q, k, options.window)
        else:
            vidops.hierarchical_cluster(q, k, 1.0, options.window)

    cluster(*video(2, 1, 8, 40, 48, 3))
    q, k = video(options.frames, options.key_frames, 8, options.tokens, 48, options.objects)
    before = status("VmRSS")
    reset_peak()
    cluster(q, k)
    found = {"peak": status("VmHWM") - before}
    if options.form == "vidops":
        # The details keep every level, so they are asked for after the measurement.
        _, details = vidops.hierarchical_cluster(q, k, 1.0, options.window, return_details=True)
        found |= {"leaders": details.level_sizes[0], "clusters": details.level_sizes[-1]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
