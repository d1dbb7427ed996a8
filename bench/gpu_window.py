"""Our ops on a card: ``python bench/gpu_window.py [--quick] [--long] [--json FILE]``.

Every step of the clustering window and the window itself, at the sizes of a 320 x 480 video, attention with its map,
slot attention and token pruning at published sizes, in one process with their peers: the public algorithms in eager
PyTorch (float32, and with TF32 products), compiled, Triton and CUDA. Errors are against float64 on the same card; a
variant that is wrong gets FAILED and no time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_attention
import gpu_propagation
import gpu_prune
import gpu_slots
import torch
from gpu_record import BENCH_HEADER, bench_line
from gpu_timing import Group, Variant, Verdict, cache_bytes, ceilings, matmul_precision, measure, peak_memory, rotated
from peers import eager_distance, eager_map, eager_mean, public_walk

import vidops
from vidops._registry import OPS
from vidops.ops.hierarchical_cluster import peak_bytes

# Rows of a window of three frames, keys of the video's key frames.
WORKLOADS = {"fast": (3456, 8064), "default": (7200, 14400), "default-long": (7200, 21600)}
HEADS, CHANNELS, TAU = 8, 48, 1.0

# A pair whose float64 distance is this close to the threshold may be decided either way; so may a row with two
# centroids this close. TF32 has ten bits: it is a peer, measured by its own precision.
BAND = {False: 1e-4, True: 2e-2}
VALUES = {False: 2e-5, True: 2e-2}

@dataclass(frozen=True)
class Data:
    """Inputs of every step in float32, and what float64 makes of them."""

    q: torch.Tensor
    k: torch.Tensor
    p: torch.Tensor
    log_p: torch.Tensor
    adjacency: torch.Tensor
    mean: torch.Tensor
    label: torch.Tensor
    centroids: torch.Tensor


def inputs(rows: int, keys: int, device: torch.device, regions: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """q (H, n, D), k (H, M, D): tokens of a grid whose regions are Voronoi cells, keys drawn from them with noise."""
    g = torch.Generator().manual_seed(0)
    side = int(rows**0.5)
    place = torch.stack([torch.arange(rows) // side, torch.arange(rows) % side], -1) / side
    cell = torch.cdist(place, torch.rand(regions, 2, generator=g)).argmin(1)
    look = 1.6 * torch.randn(regions, HEADS, CHANNELS, generator=g)
    q = (look[cell] + 0.35 * torch.randn(rows, HEADS, CHANNELS, generator=g)).transpose(0, 1).contiguous()
    pick = torch.randint(rows, (keys,), generator=g)
    k = (q[:, pick] + 0.35 * torch.randn(HEADS, keys, CHANNELS, generator=g)).contiguous()
    return q.to(device), k.to(device)


def exact_map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The head-mean map in float64, one head at a time."""
    total = torch.zeros(q.shape[1], k.shape[1], dtype=torch.float64, device=q.device)
    for head, other in zip(q.double(), k.double(), strict=True):
        total += (head @ other.T * q.shape[-1] ** -0.5).softmax(-1)
    return total / len(q)


def exact_distance(p: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
    p = p.double()
    return eager_distance(p, p if x is None else x.double())


def walk(near: torch.Tensor) -> vidops.Absorption:
    """Greedy absorption of a boolean matrix, on the host."""
    return vidops.greedy_absorb(vidops.pack_adjacency(near.cpu()))


def data(rows: int, keys: int, device: torch.device) -> Data:
    q, k = inputs(rows, keys, device)
    p64 = exact_map(q, k)
    near = exact_distance(p64) <= TAU
    mean64 = eager_mean64(p64, near)
    absorbed = walk(exact_distance(mean64) <= TAU)
    label = absorbed.label.to(device)
    centroids = eager_segment_mean(mean64, label, int(absorbed.count))
    p = p64.float()
    return Data(
        q, k, p, p64.log().float(), vidops.pack_adjacency(near), mean64.float(), label, centroids.float()
    )  # fmt: skip


def eager_mean64(p: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    total = near.double() @ p.double()
    return total / total.sum(-1, keepdim=True)


def values_judge(want: torch.Tensor) -> Callable[[torch.Tensor, bool], Verdict]:
    largest = want.abs().max()

    def judge(got: torch.Tensor, tf32: bool) -> Verdict:
        error = float((got.double() - want).abs().max() / largest)
        return error, error <= VALUES[tf32]

    return judge


def pairs_judge(distance: torch.Tensor) -> Callable[[torch.Tensor, bool], Verdict]:
    """Error: share of pairs decided otherwise than in float64. Right: none of them outside the band."""
    expected, gap = distance <= TAU, (distance - TAU).abs()

    def judge(got: torch.Tensor, tf32: bool) -> Verdict:
        relation = vidops.unpack_adjacency(got) if got.dtype == torch.int64 else got
        other = relation != expected
        other.fill_diagonal_(False)
        return float(other.double().mean()), not bool((other & (gap > BAND[tf32])).any())

    return judge


def labels_judge(want: torch.Tensor, open_rows: Callable[[bool], torch.Tensor]) -> Callable[..., Verdict]:
    """Error: share of labels that differ. Right: no more than the rows which the precision leaves open."""

    def judge(got: torch.Tensor, tf32: bool) -> Verdict:
        error = float((got != want).double().mean())
        return error, error <= float(open_rows(tf32).double().mean())

    return judge


def _rows_near_threshold(distance: torch.Tensor) -> Callable[[bool], torch.Tensor]:
    gap = (distance - TAU).abs()
    gap.fill_diagonal_(float("inf"))
    return lambda tf32: (gap <= BAND[tf32]).any(1)


def eager_segment_mean(x: torch.Tensor, label: torch.Tensor, count: int) -> torch.Tensor:
    """Sizes by a sum of ones: `bincount` would wait for the host."""
    total = x.new_zeros(count, x.shape[1]).index_add_(0, label, x)
    return total / x.new_zeros(count).index_add_(0, label, torch.ones_like(x[:, 0]))[:, None]


def eager_owners(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The public window up to its owners."""
    p = eager_map(q, k)
    mean = eager_mean(p, eager_distance(p, p) <= TAU)
    del p
    return public_walk(eager_distance(mean, mean), TAU)


def vidops_window(backend: str, precision: str) -> Callable[..., torch.Tensor]:
    """The window up to its owners. No host read: the number of clusters is needed only for the means after it."""

    def call(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        p, log_p = vidops.attention_head_mean(q, k, return_log=True, backend=backend)
        adjacency = vidops.symmetric_kl_adjacency(p, TAU, log_p=log_p, precision=precision, backend=backend)
        del log_p
        mean = vidops.neighbour_mean(adjacency, p, backend=backend)
        del p
        return vidops.greedy_absorb_kl(mean, TAU, backend=backend).owner

    return call


def groups(d: Data, backends: list[str], compiled: bool) -> list[Group]:
    """Steps of the window, cheap ones first; an op that a backend lacks has no variant there."""

    def peers(call: Callable[..., Any], capturable: bool = True, products: bool = True) -> list[Variant]:
        found = [Variant("eager", call, capturable=capturable)]
        if products:
            found.append(Variant("eager tf32", call, tf32=True, capturable=capturable))
        if compiled and capturable:
            # One graph per workload: dynamic shapes would be the second workload's, not the peer's best.
            found.append(Variant("compile", torch.compile(call, dynamic=False)))
        return found

    def own(op: str, make: Callable[[str], dict[str, Callable[..., Any]]]) -> list[Variant]:
        return [
            Variant(f"{backend}{' ' if kind else ''}{kind}", call)
            for backend in backends
            if backend in OPS[op].rows
            for kind, call in make(backend).items()
        ]

    near = vidops.unpack_adjacency(d.adjacency)
    count = len(d.centroids)
    mean_distance = exact_distance(d.mean)
    distance = exact_distance(d.p)
    cost = exact_distance(d.centroids, exact_map(d.q, d.k))
    two = cost.topk(2, 0, largest=False).values if count > 1 else None
    owner = walk(mean_distance <= TAU).owner.to(d.q.device)
    walked = walk(near).owner.to(d.q.device)
    open_mean = _rows_near_threshold(mean_distance)
    precisions = ("exact", "filtered")

    def assign_open(tf32: bool) -> torch.Tensor:
        if two is None:
            return torch.zeros(d.q.shape[1], dtype=torch.bool)
        return two[1] - two[0] <= BAND[tf32]

    window_own = [
        Variant(f"{backend} {precision}", vidops_window(backend, precision))
        for backend in with_ops(backends, WINDOW_OPS)
        for precision in precisions
    ]
    return [
        Group(
            "segment mean", (d.mean, d.label),
            peers(lambda x, label: eager_segment_mean(x, label, count), products=False)
            + own("segment_mean", lambda b: {"": lambda x, y: vidops.segment_mean(x, y, count, backend=b)}),
            values_judge(eager_segment_mean(d.mean.double(), d.label, count)),
        ),
        Group(
            "greedy walk", (d.adjacency, 2 * TAU * (~near).float()),
            [Variant("eager", lambda bits, far: public_walk(far, TAU), capturable=False)]
            + own("greedy_absorb", lambda b: {"": lambda bits, far: vidops.greedy_absorb(bits, backend=b).owner}),
            labels_judge(walked, lambda tf32: torch.zeros(1)),
        ),
        Group(
            "map", (d.q, d.k),
            peers(eager_map)
            + own("attention_head_mean", lambda b: {"": lambda q, k: vidops.attention_head_mean(q, k, backend=b)}),
            values_judge(exact_map(d.q, d.k)),
        ),
        Group(
            "distance", (d.p, d.log_p),
            peers(lambda p, log_p: eager_distance(p, p) <= TAU)
            + own("symmetric_kl_adjacency", lambda b: {
                f: lambda p, log_p, f=f: vidops.symmetric_kl_adjacency(p, TAU, log_p=log_p, precision=f, backend=b)
                for f in precisions
            }),
            pairs_judge(distance),
        ),
        Group(
            "neighbour mean", (d.adjacency, near, d.p),
            peers(lambda bits, near, p: eager_mean(p, near))
            + own("neighbour_mean", lambda b: {"": lambda bits, near, p: vidops.neighbour_mean(bits, p, backend=b)}),
            values_judge(eager_mean64(d.p, near)),
        ),
        Group(
            "second distance + greedy", (d.mean,),
            peers(lambda x: public_walk(eager_distance(x, x), TAU), capturable=False)
            + own("greedy_absorb_kl", lambda b: {"": lambda x: vidops.greedy_absorb_kl(x, TAU, backend=b).owner}),
            labels_judge(owner, open_mean),
        ),
        Group(
            "assign", (d.q, d.k, d.centroids),
            # The map is rebuilt on both sides: in the memory-efficient variant nobody keeps it.
            peers(lambda q, k, x: eager_distance(x, eager_map(q, k)).argmin(0))
            + own("assign_clusters", lambda b: {"": lambda q, k, x: vidops.assign_clusters(q, k, x, backend=b)}),
            labels_judge(cost.argmin(0), assign_open),
        ),
        Group(
            "window", (d.q, d.k),
            peers(eager_owners, capturable=False) + window_own,
            labels_judge(owner, open_mean),
        ),
    ]  # fmt: skip


def bench(group: Group, device: torch.device, rounds: int, budget_s: float) -> list[dict[str, Any]]:
    """Rows of one group: judged first, timed if right, peak memory of every variant."""
    rows, right = [], []
    for variant in group.variants:
        row: dict[str, Any] = {"group": group.name, "variant": variant.name, "tf32": variant.tf32}
        try:
            with matmul_precision(variant.tf32):
                row["error"], row["ok"] = group.judge(variant.call(*group.inputs), variant.tf32)
                row["peak_bytes"] = peak_memory(lambda v=variant: v.call(*group.inputs), device)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            row |= {"error": None, "ok": False, "why": str(error).splitlines()[0][:200]}
        if row["ok"]:
            right.append(variant)
        rows.append(row)
    sets = rotated(group.inputs, cache_bytes(device))
    timings = measure(right, sets, device, rounds, budget_s)
    eager = timings.get(group.variants[0].name)
    for row in rows:
        if row["variant"] in timings:
            row |= timings[row["variant"]].summary() | {"input_sets": len(sets)}
            if eager is not None:
                row["eager_over_this"] = eager.best / timings[row["variant"]].best
    return rows


def host_reads(backend: str, d: Data) -> str:
    """Empty when a window runs on `backend` without the host waiting for the device, else what went wrong.

    Torch's own checks see its synchronising calls; a capture fails on any, those of native code as well.
    """
    call = vidops_window(backend, "filtered")
    call(d.q, d.k)  # compiles and allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(d.q, d.k)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call(d.q, d.k)
    except RuntimeError as error:
        return f"not capturable: {str(error).splitlines()[0]}"
    return ""


def long_video(backend: str, device: torch.device) -> dict[str, Any]:
    """Peak memory of the whole clustering of 99 frames of 320 x 480, every eleventh a key frame."""
    shape, key_shape = (99, HEADS, 2400, CHANNELS), (9, HEADS, 2400, CHANNELS)
    look = 1.6 * torch.randn(24, HEADS, 1, CHANNELS, device=device)
    of = torch.randint(24, (shape[0], shape[2]), device=device)
    q = look[of, :, 0].transpose(1, 2) + 0.35 * torch.randn(shape, device=device)
    k = q[::11].clone()
    leaders = []

    def call() -> None:
        _, details = vidops.hierarchical_cluster(q, k, TAU, 3, backend=backend, return_details=True)
        leaders.append(details.level_sizes[0])

    peak = peak_memory(call, device) or 0
    formula = peak_bytes(shape, key_shape, backend=backend, leaders=leaders[0])
    ok = peak <= formula and peak + (q.numel() + k.numel()) * 4 <= 6e9
    return {"backend": backend, "leaders": leaders[0], "peak_bytes": peak, "formula_bytes": formula, "ok": ok}


WINDOW_OPS = ("attention_head_mean", "symmetric_kl_adjacency", "neighbour_mean", "greedy_absorb_kl")
CLUSTER_OPS = (*WINDOW_OPS, "segment_mean", "assign_clusters")


def with_ops(backends: list[str], ops: tuple[str, ...]) -> list[str]:
    return [backend for backend in backends if all(backend in OPS[op].rows for op in ops)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smallest workload, few rounds")
    parser.add_argument("--long", action="store_true", help="also the workload with 21600 keys")
    parser.add_argument("--backends", default="triton,cuda")
    parser.add_argument("--json", type=Path, help="where to write all rows")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_window: torch finds no CUDA device", file=sys.stderr)
        return 2
    device, backends = torch.device("cuda"), options.backends.split(",")
    names = ["fast"] if options.quick else ["fast", "default"] + ["default-long"] * options.long
    found: dict[str, Any] = {"rows": [], "host_reads": {}, "long_video": [], "ceilings": ceilings(device)}
    print(BENCH_HEADER)

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))

    def run(name: str) -> None:
        torch.compiler.reset()  # every workload compiles anew, within the limit on recompilations
        d = data(*WORKLOADS[name], device)
        steps = groups(d, backends, compiled=True)
        steps += gpu_attention.groups(WORKLOADS[name][0], device, backends, compiled=True)
        if name in gpu_propagation.WORKLOADS:
            steps += gpu_propagation.groups(gpu_propagation.WORKLOADS[name], device, backends, compiled=True)
        run_groups(name, steps)
        if name == names[0]:
            found["host_reads"] = {b: host_reads(b, d) for b in with_ops(backends, WINDOW_OPS)}

    def run_groups(name: str, steps: Iterable[Group]) -> None:
        for group in steps:
            rows = bench(group, device, rounds=7 if options.quick else 15, budget_s=4 if options.quick else 8)
            for row in rows:
                row["workload"] = name
                print(bench_line(row), flush=True)
            found["rows"] += rows
            save()  # a run that is stopped keeps what it has

    for name in names:
        run(name)
        torch.cuda.empty_cache()
    chosen = gpu_slots.WORKLOADS[:1] if options.quick else gpu_slots.WORKLOADS
    run_groups("slots", gpu_slots.groups(device, backends, compiled=True, workloads=chosen))
    pruned = gpu_prune.WORKLOADS[:2] if options.quick else gpu_prune.WORKLOADS
    run_groups("pruning", gpu_prune.groups(device, backends, compiled=True, workloads=pruned))
    if not options.quick:
        found["long_video"] = [long_video(b, device) for b in with_ops(backends, CLUSTER_OPS)]
    save()
    for backend, why in found["host_reads"].items():
        print(f"window on {backend}: {'the host waits: ' + why if why else 'no host read'}")
    for row in found["long_video"]:
        print(f"99 frames on {row['backend']}: {row['peak_bytes'] / 1e9:.2f} GB, formula "
              f"{row['formula_bytes'] / 1e9:.2f} GB: {'ok' if row['ok'] else 'FAILED'}")  # fmt: skip
    own = [row for row in found["rows"] if row["variant"].split()[0] in backends]
    failed = [row for row in own if not row["ok"]] + [row for row in found["long_video"] if not row["ok"]]
    failed += [why for why in found["host_reads"].values() if why]
    print(f"{len(own)} rows of vidops, {len(failed)} failed")
    return 1 if failed or not own else 0


if __name__ == "__main__":
    sys.exit(main())
