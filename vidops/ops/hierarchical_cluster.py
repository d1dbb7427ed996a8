"""`vidops.hierarchical_cluster`: the composition of the clustering ops (sheet 2.5 and 2.7)."""

from __future__ import annotations

from collections.abc import Callable
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

    Peak memory beyond the inputs, with n = window * HW rows, M = Tk * HW' keys, L leaders of all windows together
    and b bytes per value (4, or 8 for float64): ``max(copies * n + L, 2 * L) * M * b`` and smaller terms, all in
    `peak_bytes`. `copies` is 2 on the CPU (the map, and its logarithm or its neighbour mean) and 3 on a GPU, where
    the filter keeps bfloat16 operands. The eager form holds two per-head maps of a window, ``2 * H * n * M * b``.
    One host read per window (the number of its clusters) and one per round.

    Args:
        q: queries (T, H, HW, D), float16, bfloat16, float32 or float64, finite; T, HW >= 1.
        k: keys of the key frames (Tk, H, HW', D), dtype and device of `q`, finite.
        tau: threshold in nats, finite.
        window: frames per window of the first hierarchy, >= 1.
        scale: factor on the logits (default ``D ** -0.5``).
        precision: of the adjacency, see `symmetric_kl_adjacency`.
        max_rounds: bound on the number of rounds after the first hierarchy.
        backend: forced on every op of the composition; default: each op's first that can run.
        return_details: also return `Details`, which keep every level's list of vectors in memory.

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
        if not _finite(value):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    if k.shape[1] != heads or k.shape[3] != channels:
        raise ValueError(f"k: expected shape (key frames, {heads}, tokens, {channels}), got {tuple(k.shape)}")
    factor = _checks.scale(scale, channels)
    keys = k.transpose(0, 1).reshape(heads, -1, channels)
    lse_of: dict[int, torch.Tensor] = {}

    def queries(start: int) -> torch.Tensor:
        return q[start : start + window].transpose(0, 1).reshape(heads, -1, channels)

    def rows(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        p, log_p, lse_of[start] = attention_head_mean(
            queries(start), keys, scale=factor, return_log=True, return_lse=True, backend=backend
        )
        return p, log_p

    _checks.integer("window", window, 1)
    starts = range(0, frames, window)
    centroids, details = _centroids(rows, starts, tau, precision, max_rounds, backend, return_details)
    labels = [
        assign_clusters(queries(start), keys, centroids, scale=factor, lse=lse_of[start], backend=backend)
        for start in starts
    ]
    clusters = Clusters(torch.cat(labels).view(frames, tokens), centroids)
    return (clusters, details) if return_details else clusters


def peak_bytes(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    window: int = 3,
    *,
    backend: str = "cpu",
    precision: str = "filtered",
    leaders: int | None = None,
    clusters: int | None = None,
    itemsize: int = 4,
    threads: int | None = None,
) -> int:
    """Upper bound of the memory that `hierarchical_cluster` takes beyond its inputs, in bytes.

    Args:
        q_shape, k_shape: (T, H, HW, D) and (Tk, H, HW', D).
        window, precision: as in the call.
        backend: ``"cpu"``, ``"triton"`` or ``"cuda"``.
        leaders: clusters of the first hierarchy, all windows together; they depend on the video. Default: as many
            as one window has rows.
        clusters: in the result. Default: as many as leaders.
        itemsize: bytes of a value of the map: 4, or 8 for float64 inputs.
        threads: of the native CPU form; default: ``torch.get_num_threads()``.

    >>> from vidops.ops.hierarchical_cluster import peak_bytes
    >>> long_video = (99, 8, 2400, 48), (9, 8, 2400, 48)  # 99 frames of 320 x 480, patches of 8 pixels
    >>> [round(peak_bytes(*long_video, backend=name, clusters=1000, threads=2) / 1e9, 1)
    ...  for name in ("cpu", "triton", "cuda")]
    [2.1, 2.5, 2.6]
    """
    _checks.choice("backend", backend, ("cpu", "triton", "cuda"))
    _checks.choice("precision", precision, ("filtered", "exact"))
    frames, heads, tokens, channels = q_shape
    rows, keys = min(window, frames) * tokens, k_shape[0] * k_shape[2]
    leaders = rows if leaders is None else leaders
    clusters = leaders if clusters is None else clusters
    row, bits = keys * itemsize, rows * -(-rows // 64) * 8
    # All the time: the keys in the order of the heads, log-sum-exps, owners and labels.
    always = heads * keys * channels * itemsize + frames * tokens * (heads * itemsize + 2 * 8)
    # While maps are made, for a window or in the assignment: the queries, and what a kernel widens or packs of both.
    packed = {"cpu": rows + 2 * keys, "triton": 0, "cuda": rows + keys + 2 * 128}[backend] * -(-channels // 16) * 16
    making = heads * (rows * channels + packed) * itemsize
    # Scratch of the steps, per row: of a distance, of the greedy step, of the assignment's centroids.
    if backend == "cpu":
        # Two packed operands of a block of rows, of 64 MB each at most; per thread one column block of sums and tiles
        # of a few megabytes.
        threads = threads or torch.get_num_threads()
        tiles = threads * (64 * rows * itemsize + (4 << 20))
        distance, greedy = (
            2 * min(64 << 20, 2 * count * (keys + 64) * itemsize) + tiles for count in (rows, leaders)
        )
        assign = 2 * (clusters + 64) * row + tiles
    elif backend == "triton":
        # bfloat16 operands of the filter, and the pairs that it leaves open, as many bits as the result.
        distance, greedy, assign = rows * (row + 63 * itemsize) + bits, 0, rows * clusters * itemsize
    else:
        # The same, with twice the digits for exact distances; sums of 64 slices of rows. The greedy step packs as well.
        # The assignment works through 128 MB of map rows at a time, or all of a window, and their scores.
        sums = 132 * row
        distance = rows * (row + 63 * itemsize) * (2 if precision == "exact" else 1) + bits + sums
        greedy = leaders * (row + 63 * itemsize) + sums
        assign = clusters * row + min(160 << 20, 4 * rows * (keys + 127) * itemsize) + sums
    return always + max(
        (2 * rows + leaders) * row + max(making, distance + bits),
        2 * leaders * row + greedy,
        2 * clusters * row + making + assign,
    )


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
    if not _finite(p) or bool(p.amin() < 0):
        raise ValueError("p: expected finite, non-negative values")
    frames, tokens, columns = p.shape
    _checks.integer("window", window, 1)

    def rows(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _checks.map_and_log("p", p[start : start + window].reshape(-1, columns), None, rank=2)

    starts = range(0, frames, window)
    centroids, details = _centroids(rows, starts, tau, precision, max_rounds, backend, return_details)
    labels = []
    for start in starts:
        row, log_row = rows(start)
        labels.append(assign_rows(row, centroids, log_p=log_row, backend=backend))
    clusters = Clusters(torch.cat(labels).view(frames, tokens), centroids)
    return (clusters, details) if return_details else clusters


def _finite(value: torch.Tensor) -> bool:
    """Whether all values are finite, without a temporary of their number: the extremes carry NaN and infinity."""
    return bool(torch.stack(torch.aminmax(value)).isfinite().all())


def _centroids(
    rows: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    starts: range,
    tau: float,
    precision: str,
    max_rounds: int,
    backend: str | None,
    keep_levels: bool,
) -> tuple[torch.Tensor, Details]:
    """First hierarchy over the windows, then rounds on the list of the whole video.

    `rows(start)` makes a window's map and its logarithm. The function is handed over, not the maps: whoever else
    held one would keep it alive beside what is computed from it. Every large tensor is dropped at its last use.
    """
    _checks.number("tau", tau)
    _checks.choice("precision", precision, ("filtered", "exact"))
    _checks.integer("max_rounds", max_rounds, 1)
    owners, means = [], []
    for start in starts:
        p, log_p = rows(start)
        adjacency = symmetric_kl_adjacency(p, tau, log_p=log_p, precision=precision, backend=backend)
        del log_p
        mean = neighbour_mean(adjacency, p, backend=backend)
        del p, adjacency
        absorbed = greedy_absorb_kl(mean, tau, backend=backend)
        owners.append(absorbed.owner)
        means.append(segment_mean(mean, absorbed.label, int(absorbed.count), backend=backend))
        del mean
    x = torch.cat(means)
    means.clear()
    levels, sizes = [], []
    for _ in range(max_rounds):
        if keep_levels:
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
