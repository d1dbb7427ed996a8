"""Interleaved timing of several variants on one device: events or graph replays, rotated inputs, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = tuple[torch.Tensor, ...]
Call = Callable[..., Any]

# Longer calls gain nothing from a graph, and a captured one keeps its memory.
GRAPH_BELOW_MS = 100.0
# Replays between two events: the first waits for the host, the others do not.
REPLAYS = 10


@dataclass(frozen=True)
class Variant:
    """One way to compute a group's result from its inputs."""

    name: str
    call: Call
    tf32: bool = False
    # Not where it reads results on the host in between, or builds an autograd graph.
    capturable: bool = True


Verdict = tuple[float, bool]


@dataclass(frozen=True)
class Group:
    """One step: inputs, variants (the eager peer first), and the judge (result, tf32) -> (error, right)."""

    name: str
    inputs: Inputs
    variants: list[Variant]
    judge: Callable[[Any, bool], Verdict]


@dataclass
class Timing:
    """Milliseconds per call as a user makes it, and per replay of a captured graph (without launch costs)."""

    milliseconds: list[float] = field(default_factory=list)
    replayed: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def best(self) -> float:
        """Median of the faster of the two ways: eager code gets the same choice as ours."""
        return min(statistics.median(times) for times in (self.milliseconds, self.replayed) if times)

    def summary(self) -> dict[str, Any]:
        row: dict[str, Any] = {"calls": len(self.milliseconds)}
        for name, times in (("ms", self.milliseconds), ("graph_ms", self.replayed)):
            if times:
                ordered = sorted(times)
                low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
                row |= {name: statistics.median(ordered), f"{name}_p10": low, f"{name}_p90": high}
        return row | ({"note": self.note} if self.note else {})


@contextmanager
def matmul_precision(tf32: bool) -> Iterator[None]:
    """float32 products of torch in TF32, or not, inside the block."""
    saved = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = saved


def rotated(inputs: Inputs, cache_bytes: int) -> list[Inputs]:
    """Copies of `inputs`, at least three, that together exceed the cache; one when a single set does."""
    size = sum(t.numel() * t.element_size() for t in inputs)
    if size > cache_bytes:
        return [inputs]
    count = max(3, min(32, cache_bytes // max(size, 1) + 1))
    return [inputs, *(tuple(t.clone() for t in inputs) for _ in range(count - 1))]


def cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call allocates at most beyond what is there, results included; None on the CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _once(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _replays(variant: Variant, sets: list[Inputs]) -> Callable[[], Any]:
    """A call that replays captured graphs, one per input set, `REPLAYS` times or once per set if those are more."""
    graphs = []
    for inputs in sets:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            variant.call(*inputs)
        graphs.append(graph)

    def replay() -> None:
        for number in range(max(REPLAYS, len(graphs))):
            graphs[number % len(graphs)].replay()

    return replay


@dataclass
class _Prepared:
    variant: Variant
    calls: list[Callable[[], Any]]
    replay: Callable[[], Any] | None
    timing: Timing


def _prepare(variant: Variant, sets: list[Inputs], device: torch.device) -> _Prepared:
    calls: list[Callable[[], Any]] = [lambda inputs=inputs: variant.call(*inputs) for inputs in sets]
    found = _Prepared(variant, calls, None, Timing())
    with matmul_precision(variant.tf32):
        for _ in range(2):
            calls[0]()
        if device.type != "cuda" or not variant.capturable or _once(calls[0], device) > GRAPH_BELOW_MS:
            return found
        try:
            found.replay = _replays(variant, sets)
        except RuntimeError as error:
            found.timing.note = f"not capturable: {str(error).splitlines()[0][:120]}"
    return found


def measure(
    variants: list[Variant], sets: list[Inputs], device: torch.device, rounds: int, budget_s: float
) -> dict[str, Timing]:
    """Variants take turns, every round over all input sets, until `rounds` are done or the time is up.

    At least three rounds are made whatever they cost: fewer have no spread.
    """
    prepared = [_prepare(variant, sets, device) for variant in variants]
    started = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - started > budget_s:
            break
        for one in prepared:
            with matmul_precision(one.variant.tf32):
                one.timing.milliseconds += [_once(call, device) for call in one.calls]
            if one.replay is not None:
                one.timing.replayed.append(_once(one.replay, device) / max(REPLAYS, len(sets)))
    return {one.variant.name: one.timing for one in prepared}


def ceilings(device: torch.device) -> dict[str, float]:
    """What this very card reaches: copy in GB/s (read and written) and square products in TFLOP/s."""
    found = {}
    n = 256 << 20
    found["copy_GB_per_s"] = 2 * 4 * n / _copy_ms(n, device) / 1e6
    n = 8192
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True)):
        found[f"{name}_TFLOP_per_s"] = 2 * n**3 / _product_ms(n, dtype, tf32, device) / 1e9
    return found


def _copy_ms(count: int, device: torch.device) -> float:
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    return _median(lambda: target.copy_(source), device)


def _product_ms(n: int, dtype: torch.dtype, tf32: bool, device: torch.device) -> float:
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    with matmul_precision(tf32):
        return _median(lambda: a @ b, device)


def _median(call: Callable[[], Any], device: torch.device) -> float:
    for _ in range(3):
        call()
    return statistics.median(_once(call, device) for _ in range(7))
