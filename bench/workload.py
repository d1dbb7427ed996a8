"""The clustering window that is benched: synthetic regions, and the public algorithm in eager PyTorch as the peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import vidops


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


def window(rows: int = 2592, keys: int = 1728, heads: int = 8, channels: int = 48, regions: int = 24) -> Window:
    """Tokens of a 2-D grid whose regions are Voronoi cells, so that clusters are neither sorted nor balanced."""
    g = torch.Generator().manual_seed(0)
    side = int(rows**0.5)
    place = torch.stack([torch.arange(rows) // side, torch.arange(rows) % side], -1) / side
    seeds = torch.rand(regions, 2, generator=g)
    cell = torch.cdist(place, seeds).argmin(1)
    look = torch.randn(regions, heads, channels, generator=g) * 1.6
    q = (look[cell] + 0.35 * torch.randn(rows, heads, channels, generator=g)).transpose(0, 1).contiguous()
    pick = torch.randperm(rows, generator=g)[:keys]
    k = (q[:, pick] + 0.35 * torch.randn(heads, len(pick), channels, generator=g)).contiguous()
    tau = 1.0
    p, log_p = vidops.attention_head_mean(q, k, return_log=True)
    adjacency = vidops.symmetric_kl_adjacency(p, tau, log_p=log_p)
    mean = vidops.neighbour_mean(adjacency, p)
    absorbed = vidops.greedy_absorb_kl(mean, tau)
    centroids = vidops.segment_mean(mean, absorbed.label, int(absorbed.count))
    return Window(q, k, tau, p, log_p, adjacency, mean, centroids)


def eager_map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1).mean(0)


def eager_distance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Two entropies and two products, as the public code of the paper forms it."""
    own = (p * p.log()).sum(-1)[:, None] + (q * q.log()).sum(-1)[None]
    return own - p @ q.log().T - (q @ p.log().T).T


def eager_greedy(x: torch.Tensor, near: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The public loop: one Python iteration and at least one host read per row."""
    free = torch.ones(len(x), dtype=torch.bool)
    owner = torch.zeros(len(x), dtype=torch.int64)
    means = []
    for i in range(len(x)):
        if not free[i]:
            continue
        members = near[i] & free
        owner[members] = i
        means.append(x[members].mean(0))
        free &= ~members
    return owner, torch.stack(means)


def eager_mean(p: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    total = near.float() @ p
    return total / total.sum(-1, keepdim=True)


def eager_window(q: torch.Tensor, k: torch.Tensor, tau: float) -> torch.Tensor:
    p = eager_map(q, k)
    mean = eager_mean(p, eager_distance(p, p) <= tau)
    return eager_greedy(mean, eager_distance(mean, mean) <= tau)[0]


def native_window(q: torch.Tensor, k: torch.Tensor, tau: float, precision: str) -> torch.Tensor:
    p, log_p = vidops.attention_head_mean(q, k, return_log=True)
    adjacency = vidops.symmetric_kl_adjacency(p, tau, log_p=log_p, precision=precision)
    mean = vidops.neighbour_mean(adjacency, p)
    absorbed = vidops.greedy_absorb_kl(mean, tau)
    vidops.segment_mean(mean, absorbed.label, int(absorbed.count))
    return absorbed.owner


Variants = dict[str, Callable[[], torch.Tensor]]


def groups(w: Window) -> dict[str, Variants]:
    """Group -> variant -> call. The first variant is the eager peer; results of a group are comparable."""
    near = vidops.unpack_adjacency(w.adjacency)
    compiled_map, compiled_distance = torch.compile(eager_map), torch.compile(eager_distance)
    return {
        "map": {
            "eager": lambda: eager_map(w.q, w.k),
            "eager+compile": lambda: compiled_map(w.q, w.k),
            "cpu": lambda: vidops.attention_head_mean(w.q, w.k),
        },
        "distance": {
            "eager": lambda: eager_distance(w.p, w.p) <= w.tau,
            "eager+compile": lambda: compiled_distance(w.p, w.p) <= w.tau,
            "cpu exact": lambda: vidops.symmetric_kl_adjacency(w.p, w.tau, log_p=w.log_p, precision="exact"),
            "cpu filtered": lambda: vidops.symmetric_kl_adjacency(w.p, w.tau, log_p=w.log_p),
        },
        "neighbour mean": {
            "eager": lambda: eager_mean(w.p, near),
            "cpu": lambda: vidops.neighbour_mean(w.adjacency, w.p),
        },
        "second distance + greedy": {
            "eager": lambda: eager_greedy(w.mean, eager_distance(w.mean, w.mean) <= w.tau)[0],
            "cpu": lambda: vidops.greedy_absorb_kl(w.mean, w.tau).owner,
        },
        "greedy walk": {
            "eager": lambda: eager_greedy(w.mean, near)[0],
            "cpu": lambda: vidops.greedy_absorb(w.adjacency).owner,
        },
        "window": {
            "eager": lambda: eager_window(w.q, w.k, w.tau),
            "cpu exact": lambda: native_window(w.q, w.k, w.tau, "exact"),
            "cpu filtered": lambda: native_window(w.q, w.k, w.tau, "filtered"),
        },
        "assign": {
            # The map is rebuilt on both sides: in the memory-efficient variant nobody keeps it.
            "eager": lambda: eager_distance(w.centroids, eager_map(w.q, w.k)).argmin(0),
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


LIMITS = {"map": 2e-5, "neighbour mean": 2e-5}
