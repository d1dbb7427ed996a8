"""`vidops.hierarchical_cluster`: the composition of the clustering ops (sheet 2.5 and 2.7)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, overload

import torch

from vidops._registry import COMPOSITIONS
from vidops.ops import _checks
from vidops.ops.assign_clusters import assign_clusters
from vidops.ops.assign_rows import assign_rows
from vidops.ops.attention_head_mean import attention_head_mean
from vidops.ops.greedy_absorb_kl import greedy_absorb_kl
from vidops.ops.neighbour_mean import neighbour_mean
from vidops.ops.segment_mean import segment_mean
from vidops.ops.symmetric_kl_adjacency import symmetric_kl_adjacency


class Clusters(NamedTuple):
    """`labels` (T, HW) int64 in [0, K) and `centroids` (K, M): each cluster's mean attention row."""

    labels: torch.Tensor
    centroids: torch.Tensor


class Details(NamedTuple):
    """What happened on the way: see `hierarchical_cluster`."""

    first_owner: torch.Tensor  # (T * HW,) int64: leader of every row, an index within its window
    levels: list[torch.Tensor]  # the list of vectors entering each round on the whole video
    level_sizes: list[int]  # their lengths, then the final count


@overload
def hierarchical_cluster(
    q: torch.Tensor,
    k: torch.Tensor,
    tau: float = 1.0,
    window: int = 3,
    *,
    scale: float | None = None,
    precision: str = "filtered",
    max_rounds: int = 10_000,
    backend: str | None = None,
    return_details: Literal[False] = False,
) -> Clusters: ...
@overload
def hierarchical_cluster(
    q: torch.Tensor,
    k: torch.Tensor,
    tau: float = 1.0,
    window: int = 3,
    *,
    scale: float | None = None,
    precision: str = "filtered",
    max_rounds: int = 10_000,
    backend: str | None = None,
    return_details: Literal[True],
) -> tuple[Clusters, Details]: ...
def hierarchical_cluster(
    q: torch.Tensor,
    k: torch.Tensor,
    tau: float = 1.0,
    window: int = 3,
    *,
    scale: float | None = None,
    precision: str = "filtered",
    max_rounds: int = 10_000,
    backend: str | None = None,
    return_details: bool = False,
) -> Clusters | tuple[Clusters, Details]:
    """Cluster all tokens of a video by their head-averaged attention rows.

    Windows of up to `window` frames are clustered first (adjacency at `tau`, neighbour mean, greedy absorption);
    the leaders' means of the whole video are then absorbed round by round until their number stays; every token
    takes the nearest of the final centroids (sheet 2.5, memory-efficient variant of 2.7; Ding et al., ECCV 2024,
    arXiv 2311.17893). The attention rows of one window exist at a time, and are rebuilt for the assignment.

    Peak memory beyond the inputs, with n = window * HW rows and M = Tk * HW keys of b bytes (4, or 8 for float64):
    at most ``3 * n * M * b`` (map, logarithm and one product), plus ``n^2 / 8`` for the bit rows and the kernels'
    bounded workspaces. One host read per window (the number of its clusters) and one per round.

    Args:
        q: queries (T, H, HW, D), float16, bfloat16, float32 or float64, finite; T, HW >= 1.
        k: keys of the key frames (Tk, H, HW', D), dtype and device of `q`, finite.
        tau: threshold in nats, finite.
        window: frames per window of the first hierarchy, >= 1.
        scale: factor on the logits (default ``D ** -0.5``).
        precision: of the adjacency, see `symmetric_kl_adjacency`.
        max_rounds: bound on the number of rounds after the first hierarchy.
        backend: forced on every op of the composition; default: each op's first that can run.
        return_details: also return `Details`.

    Returns:
        `Clusters(labels (T, HW), centroids (K, M))`. Not differentiable.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank or shape, empty or non-finite input.
        BackendError: no backend, or not the one asked for, can run an op; or a gradient is needed.

    >>> import torch, vidops
    >>> frames = torch.eye(2).repeat(2, 1, 1)[:, None] * 9
    >>> vidops.hierarchical_cluster(frames, frames, scale=1.0).labels.tolist()
    [[0, 1], [0, 1]]
    """
    _checks.tensor("q", q, rank=4)
    _checks.tensor("k", k, rank=4)
    _checks.same("k", k, "q", q)
    frames, heads, tokens, channels = q.shape
    for name, value in (("q", q), ("k", k)):
        if value.numel() == 0:
            raise ValueError(f"{name}: expected at least one frame, head, token and channel, got {tuple(value.shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    if k.shape[1] != heads or k.shape[3] != channels:
        raise ValueError(f"k: expected shape (key frames, {heads}, tokens, {channels}), got {tuple(k.shape)}")
    factor = _checks.scale(scale, channels)
    keys = k.transpose(0, 1).reshape(heads, -1, channels)
    lse_of: list[torch.Tensor] = []

    def queries(start: int) -> torch.Tensor:
        return q[start : start + window].transpose(0, 1).reshape(heads, -1, channels)

    def maps() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, frames, window):
            p, log_p, lse = attention_head_mean(
                queries(start), keys, scale=factor, return_log=True, return_lse=True, backend=backend
            )
            lse_of.append(lse)
            yield p, log_p
            del p, log_p

    _checks.integer("window", window, 1)
    centroids, details = _centroids(maps(), tau, precision, max_rounds, backend)
    labels = [
        assign_clusters(queries(start), keys, centroids, scale=factor, lse=lse, backend=backend)
        for start, lse in zip(range(0, frames, window), lse_of, strict=True)
    ]
    clusters = Clusters(torch.cat(labels).view(frames, tokens), centroids)
    return (clusters, details) if return_details else clusters


@overload
def hierarchical_cluster_map(
    p: torch.Tensor,
    tau: float = 1.0,
    window: int = 3,
    *,
    precision: str = "filtered",
    max_rounds: int = 10_000,
    backend: str | None = None,
    return_details: Literal[False] = False,
) -> Clusters: ...
@overload
def hierarchical_cluster_map(
    p: torch.Tensor,
    tau: float = 1.0,
    window: int = 3,
    *,
    precision: str = "filtered",
    max_rounds: int = 10_000,
    backend: str | None = None,
    return_details: Literal[True],
) -> tuple[Clusters, Details]: ...
def hierarchical_cluster_map(
    p: torch.Tensor,
    tau: float = 1.0,
    window: int = 3,
    *,
    precision: str = "filtered",
    max_rounds: int = 10_000,
    backend: str | None = None,
    return_details: bool = False,
) -> Clusters | tuple[Clusters, Details]:
    """`hierarchical_cluster` on a given map (the whole variant of sheet 2.7, arXiv 2311.17893).

    Args:
        p: head-averaged attention rows (T, HW, M), float16, bfloat16, float32 or float64, finite, non-negative.
        tau, window, precision, max_rounds, backend, return_details: as in `hierarchical_cluster`.

    Returns, raises: as `hierarchical_cluster`.

    >>> import torch, vidops
    >>> p = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]])
    >>> vidops.hierarchical_cluster_map(p).labels.tolist()
    [[0, 1]]
    """
    _checks.tensor("p", p, rank=3)
    if p.numel() == 0:
        raise ValueError(f"p: expected at least one frame, token and column, got {tuple(p.shape)}")
    if not bool(p.isfinite().all()) or bool((p < 0).any()):
        raise ValueError("p: expected finite, non-negative values")
    frames, tokens, columns = p.shape
    _checks.integer("window", window, 1)

    def rows(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _checks.map_and_log("p", p[start : start + window].reshape(-1, columns), None, rank=2)

    starts = range(0, frames, window)
    centroids, details = _centroids((rows(s) for s in starts), tau, precision, max_rounds, backend)
    labels = []
    for start in starts:
        row, log_row = rows(start)
        labels.append(assign_rows(row, centroids, log_p=log_row, backend=backend))
    clusters = Clusters(torch.cat(labels).view(frames, tokens), centroids)
    return (clusters, details) if return_details else clusters


def _centroids(
    maps: Iterator[tuple[torch.Tensor, torch.Tensor]],
    tau: float,
    precision: str,
    max_rounds: int,
    backend: str | None,
) -> tuple[torch.Tensor, Details]:
    """First hierarchy over the windows' maps, then rounds on the list of the whole video."""
    _checks.number("tau", tau)
    _checks.choice("precision", precision, ("filtered", "exact"))
    _checks.integer("max_rounds", max_rounds, 1)
    owners, means = [], []
    for p, log_p in maps:
        adjacency = symmetric_kl_adjacency(p, tau, log_p=log_p, precision=precision, backend=backend)
        # The logarithm is as large as the map: it must not outlive the distance.
        del log_p
        mean = neighbour_mean(adjacency, p, backend=backend)
        del p
        absorbed = greedy_absorb_kl(mean, tau, backend=backend)
        owners.append(absorbed.owner)
        means.append(segment_mean(mean, absorbed.label, int(absorbed.count), backend=backend))
    x = torch.cat(means)
    levels, sizes = [], []
    for _ in range(max_rounds):
        levels.append(x)
        sizes.append(x.shape[0])
        absorbed = greedy_absorb_kl(x, tau, backend=backend)
        x = segment_mean(x, absorbed.label, int(absorbed.count), backend=backend)
        if x.shape[0] == sizes[-1]:
            break
    sizes.append(x.shape[0])
    return x, Details(torch.cat(owners), levels, sizes)


_ON_A_MAP = ("symmetric_kl_adjacency", "neighbour_mean", "greedy_absorb_kl", "segment_mean")
COMPOSITIONS[hierarchical_cluster] = ("attention_head_mean", *_ON_A_MAP, "assign_clusters")
COMPOSITIONS[hierarchical_cluster_map] = (*_ON_A_MAP, "assign_rows")
