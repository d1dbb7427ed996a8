"""Interleaved comparison in one process: medians of one-thread CPU time, error beside time."""

import statistics
import sys
import time

import torch
from workload import LIMITS, error, groups, window

import vidops


def main(rounds: int) -> int:
    torch.set_num_threads(1)
    w = window()
    density = float(vidops.unpack_adjacency(w.adjacency).double().mean())
    print(f"n {w.p.shape[0]}, M {w.p.shape[1]}, {len(w.q)} heads; density {density:.3f}, {len(w.centroids)} clusters")
    failures = 0
    print(f"{'group':26} {'variant':16} {'CPU ms':>9} {'eager/x':>8} {'error':>9}")
    for group, variants in groups(w).items():
        want = variants["eager"]()
        errors = {name: error(call(), want) for name, call in variants.items()}  # warms up and compiles too
        spent: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, call in variants.items():
                start = time.process_time()
                call()
                spent[name].append(time.process_time() - start)
        base = statistics.median(spent["eager"])
        for name, times in spent.items():
            ok = errors[name] <= LIMITS.get(group, 0.0)
            failures += not ok
            middle = statistics.median(times)
            shown = f"{middle * 1e3:9.2f} {base / middle:8.2f}" if ok else f"{'FAILED':>18}"
            print(f"{group:26} {name:16} {shown} {errors[name]:9.1e}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 7))
