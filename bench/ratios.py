"""Interleaved comparison in one process: medians of one-thread CPU time, error beside time; then peak memory.

A call shorter than 5 ms is timed over as many repetitions as fill them: the clock, and the caches that the previous
variant left behind, would otherwise be what is measured. The garbage collector rests meanwhile, as in `timeit`: one of
its full passes, which go over all modules that torch loads, outweighs a thousand short calls.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import overhead
import torch
from peers import eager_window
from workload import LIMITS, TAU, error, groups, native_window, tokens, window

import vidops

SAMPLE = 5e-3


def seconds(call: Callable[[], object], repeat: int = 1) -> float:
    start = time.process_time()
    for _ in range(repeat):
        call()
    return (time.process_time() - start) / repeat


def repetitions(call: Callable[[], object]) -> int:
    if min(seconds(call) for _ in range(2)) > SAMPLE:  # the very first call may import or collect garbage
        return 1
    return max(1, round(SAMPLE / max(seconds(call, 50), 1e-7)))


def compare(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    spent: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    try:
        repeat = {name: repetitions(call) for name, call in calls.items()}
        for _ in range(rounds):
            for name, call in calls.items():
                spent[name].append(seconds(call, repeat[name]))
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in spent.items()}


def steps(rounds: int) -> int:
    w = window()
    density = float(vidops.unpack_adjacency(w.adjacency).double().mean())
    print(f"n {w.p.shape[0]}, M {w.p.shape[1]}, {len(w.q)} heads; density {density:.3f}, {len(w.centroids)} clusters")
    failures = 0
    print(f"{'group':26} {'variant':18} {'CPU ms':>10} {'eager/x':>8} {'error':>9}")
    for group, variants in groups(w).items():
        calls = {name: call for name, call in variants.items() if not isinstance(call, str)}
        want = calls["eager"]()
        errors = {name: error(call(), want) for name, call in calls.items()}  # warms up and compiles too
        times = compare(calls, rounds)
        for name, call in variants.items():
            if isinstance(call, str):
                print(f"{group:26} {name:18} skipped: {call}")
                continue
            ok = errors[name] <= LIMITS.get(group, 0.0)
            failures += not ok
            shown = f"{times[name] * 1e3:10.4g} {times['eager'] / times[name]:8.2f}" if ok else f"{'FAILED':>19}"
            print(f"{group:26} {name:18} {shown} {errors[name]:9.1e}", flush=True)
    return failures


def host_overhead(rounds: int) -> None:
    print(f"\n{'call of a tiny input, us':26} {'vidops':>8} {'bare op, same work':>19} {'more':>6} {'empty op':>9}")
    with torch.inference_mode():
        for name, calls in overhead.calls().items():
            times = compare(calls._asdict(), max(rounds, 15))
            ours, same_work, empty = (times[kind] * 1e6 for kind in calls._fields)
            print(f"{name:26} {ours:8.2f} {same_work:19.2f} {ours - same_work:6.2f} {empty:9.2f}", flush=True)


def peak_mib() -> float:
    """Of this process since it started its program; `ru_maxrss` would include the parent it was forked from."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def window_memory(side: str) -> None:
    """In a process of its own: what one run of the window adds to the peak that its inputs already made."""
    q, k = tokens()
    before = peak_mib()
    if side == "eager":
        eager_window(q, k, TAU)
    else:
        native_window(q, k, TAU, side)
    print(f"{before:10.0f} {peak_mib():10.0f} {peak_mib() - before:10.0f}")


def memory() -> None:
    if not Path("/proc/self/status").exists():
        print("\npeak memory: skipped, it is read from /proc")
        return
    print(f"\n{'window, peak MiB':26} {'inputs':>10} {'peak':>10} {'added':>10}")
    for side in ("eager", "exact", "filtered"):
        command = [sys.executable, __file__, "memory", side]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{side if side == 'eager' else 'cpu ' + side:26} {done.stdout.rstrip()}", flush=True)


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    if arguments[:1] == ["memory"]:
        window_memory(arguments[1])
        return 0
    rounds = int(arguments[0]) if arguments else 7
    failures = steps(rounds)
    host_overhead(rounds)
    memory()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
