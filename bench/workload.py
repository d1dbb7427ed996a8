"""The clustering window that is benched: synthetic regions, and the groups of calls that are compared on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import peers
import torch

import vidops
from vidops import _native


@dataclass(frozen=True)
class Window:
    """q (H, n, D), k (H, M, D), and the intermediate results that the single steps start from."""

    q: torch.Tensor
    k: torch.Tensor
    tau: float
    p: torch.Tensor
    log_p: torch.Tensor
    adjacency: torch.Tensor
    mean: torch.Tensor
    centroids: torch.Tensor


TAU = 1.0


def grid(rows: int) -> torch.Tensor:
    """Places (rows, 2) of the tokens of a square frame, in raster order."""
    side = int(rows**0.5)
    return torch.stack([torch.arange(rows) // side, torch.arange(rows) % side], -1) / side


def tokens(
    rows: int = 2592, keys: int = 1728, heads: int = 8, channels: int = 48, regions: int = 24
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k of a 2-D grid whose regions are Voronoi cells, so that clusters are neither sorted nor balanced."""
    g = torch.Generator().manual_seed(0)
    seeds = torch.rand(regions, 2, generator=g)
    cell = torch.cdist(grid(rows), seeds).argmin(1)
    look = torch.randn(regions, heads, channels, generator=g) * 1.6
    q = (look[cell] + 0.35 * torch.randn(rows, heads, channels, generator=g)).transpose(0, 1).contiguous()
    pick = torch.randperm(rows, generator=g)[:keys]
    k = (q[:, pick] + 0.35 * torch.randn(heads, len(pick), channels, generator=g)).contiguous()
    return q, k


def window(rows: int = 2592, keys: int = 1728, heads: int = 8, channels: int = 48, regions: int = 24) -> Window:
    q, k = tokens(rows, keys, heads, channels, regions)
    p, log_p = vidops.attention_head_mean(q, k, return_log=True)
    adjacency = vidops.symmetric_kl_adjacency(p, TAU, log_p=log_p)
    mean = vidops.neighbour_mean(adjacency, p)
    absorbed = vidops.greedy_absorb_kl(mean, TAU)
    centroids = vidops.segment_mean(mean, absorbed.label, int(absorbed.count))
    return Window(q, k, TAU, p, log_p, adjacency, mean, centroids)


def native_window(q: torch.Tensor, k: torch.Tensor, tau: float, precision: str) -> torch.Tensor:
    p, log_p = vidops.attention_head_mean(q, k, return_log=True)
    adjacency = vidops.symmetric_kl_adjacency(p, tau, log_p=log_p, precision=precision)
    mean = vidops.neighbour_mean(adjacency, p)
    return native_greedy(mean, tau)


def native_greedy(mean: torch.Tensor, tau: float) -> torch.Tensor:
    absorbed = vidops.greedy_absorb_kl(mean, tau)
    vidops.segment_mean(mean, absorbed.label, int(absorbed.count))
    return absorbed.owner


Variants = dict[str, peers.Peer]


def walk(distance: torch.Tensor, tau: float) -> Variants:
    """The greedy walk alone, no means: the op as called, and its kernel without the torch op around it."""
    near = distance <= tau
    adjacency = vidops.pack_adjacency(near)

    def kernel() -> Callable[[], torch.Tensor] | str:
        if _native.C is None:
            return _native.WHY_NOT
        owner, label = torch.empty(2, len(near), dtype=torch.int64)
        count = torch.empty((), dtype=torch.int64)
        views = [_native.view(t) for t in (adjacency, owner, label, count)]

        def call() -> torch.Tensor:
            _native.C.greedy_absorb_forward_cpu(*views, 1)
            return owner

        return call

    return {
        "eager": lambda: peers.public_walk(distance, tau),
        "lean loop": lambda: peers.lean_walk(near),
        "cpu": lambda: vidops.greedy_absorb(adjacency).owner,
        "cpu, kernel only": kernel(),
    }


def groups(w: Window) -> dict[str, Variants]:
    """Group -> variant -> call, or why there is none. The first is the eager peer; results of a group agree.

    `second distance + greedy` and the window include the means of the members on both sides, the walks on neither.
    """
    near = vidops.unpack_adjacency(w.adjacency)
    compiled_map, compiled_distance = torch.compile(peers.eager_map), torch.compile(peers.eager_distance)
    few = slice(None, None, len(w.p) // 256)
    p, log_p = w.p[few].contiguous(), w.log_p[few].contiguous()
    place = grid(7200)
    return {
        "map": {
            "eager": lambda: peers.eager_map(w.q, w.k),
            "eager+compile": lambda: compiled_map(w.q, w.k),
            "cpu": lambda: vidops.attention_head_mean(w.q, w.k),
        },
        "distance": {
            "eager": lambda: peers.eager_distance(w.p, w.p) <= w.tau,
            "eager+compile": lambda: compiled_distance(w.p, w.p) <= w.tau,
            "cpu exact": lambda: vidops.symmetric_kl_adjacency(w.p, w.tau, log_p=w.log_p, precision="exact"),
            "cpu filtered": lambda: vidops.symmetric_kl_adjacency(w.p, w.tau, log_p=w.log_p),
        },
        "distance, every 10th row": {
            "eager": lambda: peers.eager_distance(p, p),
            "scipy rel_entr": peers.scipy_distance(p),
            "sklearn pairwise": peers.sklearn_distance(p),
            "cpu": lambda: vidops.symmetric_kl(p, log_p=log_p),
        },
        "neighbour mean": {
            "eager": lambda: peers.eager_mean(w.p, near),
            "scipy sparse": peers.scipy_mean(w.p, near),
            "cpu": lambda: vidops.neighbour_mean(w.adjacency, w.p),
        },
        "second distance + greedy": {
            "eager": lambda: peers.eager_greedy(w.mean, peers.eager_distance(w.mean, w.mean), w.tau)[0],
            "cpu": lambda: native_greedy(w.mean, w.tau),
        },
        "greedy walk": walk(vidops.symmetric_kl(w.mean), w.tau),
        # The window of a 320 x 480 video has 7,200 rows; here neighbours are those within a fifth of the frame.
        "greedy walk, n 7200": walk(torch.cdist(place, place), 0.2),
        "window": {
            "eager": lambda: peers.eager_window(w.q, w.k, w.tau),
            "cpu exact": lambda: native_window(w.q, w.k, w.tau, "exact"),
            "cpu filtered": lambda: native_window(w.q, w.k, w.tau, "filtered"),
        },
        "assign": {
            # The map is rebuilt on both sides: in the memory-efficient variant nobody keeps it.
            "eager": lambda: peers.eager_distance(w.centroids, peers.eager_map(w.q, w.k)).argmin(0),
            "cpu": lambda: vidops.assign_clusters(w.q, w.k, w.centroids),
        },
    }


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error of values; share of differing entries of decisions (bit rows too) and labels."""
    if want.dtype == torch.bool and got.dtype == torch.int64:
        got = vidops.unpack_adjacency(got)
    if want.is_floating_point():
        return float((got - want).abs().max() / want.abs().max())
    return float((got != want).double().mean())


LIMITS = {"map": 2e-5, "distance, every 10th row": 2e-5, "neighbour mean": 2e-5}
