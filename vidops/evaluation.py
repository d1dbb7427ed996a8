"""Scores of video segmentations: DAVIS J and F with both ways of matching, FG-ARI and mIoU.

Conventions are those of the DAVIS 2017 unsupervised evaluation (Caelles et al., arXiv 1905.00737); the
per-frame matching is that of the public code of Ding et al., ECCV 2024 (arXiv 2311.17893), an upper bound of
the official one that hides identity switches. Everything here is NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Masks = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]

VOID = 255
BOUNDARY = 0.008
# Boundary points dilated, and proposals multiplied, together: bounds the memory of large frames.
_CHUNK = 1 << 14
_PROPOSALS = 32


class MissingDependencyError(ImportError):
    """An optional package is needed for this function; the text names the extra that installs it."""


def assignment(score: Scores) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The Hungarian assignment that maximises `score` (K, n): rows ascending, and their columns."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingDependencyError(
            "matching proposals to objects needs SciPy: pip install 'vidops[eval]'"
        ) from error
    rows, columns = linear_sum_assignment(score, maximize=True)
    return rows, columns


def _array(name: str, value: object, kinds: str, meaning: str) -> npt.NDArray:
    """`value` is an array whose dtype is of one of NumPy's `kinds`."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array, got {type(value).__name__}")
    if value.dtype.kind not in kinds:
        raise TypeError(f"{name}: expected {meaning}, got dtype {value.dtype}")
    return value


def _frames(name: str, value: object) -> npt.NDArray:
    """`value` holds integers (T, H, W), none of the axes empty."""
    found = _array(name, value, "iu", "integers (T, H, W)")
    if found.ndim != 3 or 0 in found.shape:
        raise ValueError(f"{name}: expected shape (T, H, W) with no empty axis, got {found.shape}")
    return found


def upsample_nearest(labels: npt.NDArray, size: tuple[int, int], frames: int | None = None) -> npt.NDArray:
    """Label maps (T, h, w) brought to `size` by nearest neighbour, source index ``floor(i * in / out)``.

    With `frames` larger than T the last map is repeated: the authors' loader drops the last frame of a video
    and their evaluator fills it so.
    """
    _array("labels", labels, "biuf", "numbers")
    if labels.ndim != 3 or 0 in labels.shape:
        raise ValueError(f"labels: expected shape (T, h, w) with no empty axis, got {labels.shape}")
    frames = len(labels) if frames is None else frames
    if min(*size, frames) < 1:
        raise ValueError(f"size, frames: expected at least 1, got {size}, {frames}")
    time = np.minimum(np.arange(frames), len(labels) - 1)
    rows, columns = (np.arange(out) * have // out for out, have in zip(size, labels.shape[1:], strict=True))
    return labels[np.ix_(time, rows, columns)]


def one_hot(labels: npt.NDArray, count: int | None = None) -> Masks:
    """Labels (T, H, W) in 0..K-1 -> proposals (K, T, H, W)."""
    _frames("labels", labels)
    count = int(labels.max()) + 1 if count is None else count
    return labels[None] == np.arange(count).reshape(-1, 1, 1, 1)


def objects_of(annotation: npt.NDArray) -> tuple[Masks, Masks]:
    """Annotation (T, H, W), 0 background, 255 void -> masks (n, T, H, W) and void (T, H, W).

    Objects are those of the first frame: what appears later is not scored.
    """
    _frames("annotation", annotation)
    ids = [i for i in np.unique(annotation[0]) if i not in (0, VOID)]
    masks = np.stack([annotation == i for i in ids]) if ids else np.zeros((0, *annotation.shape), bool)
    return masks, annotation == VOID


def boundary_map(masks: Masks) -> Masks:
    """Boundary of masks (..., H, W): pixels that differ from their right, lower or lower-right neighbour.

    The frame's edge repeats the last row and column, so a mask has no boundary along it.
    """
    padded = np.pad(masks, [(0, 0)] * (masks.ndim - 2) + [(0, 1), (0, 1)], mode="edge")
    right, lower, corner = padded[..., :-1, 1:], padded[..., 1:, :-1], padded[..., 1:, 1:]
    return (masks != right) | (masks != lower) | (masks != corner)


def disk(radius: int) -> npt.NDArray[np.intp]:
    """Offsets (row, column) of a disk, ``row**2 + column**2 <= radius**2``."""
    axis = np.arange(-radius, radius + 1)
    row, column = np.meshgrid(axis, axis, indexing="ij")
    return np.argwhere(row**2 + column**2 <= radius**2) - radius


def dilate(masks: Masks, radius: int) -> Masks:
    """Masks (..., H, W) dilated by a disk.

    Boundaries are sparse, so every pixel stamps the disk instead of every pixel looking for one.
    """
    height, width = masks.shape[-2:]
    flat = masks.reshape(-1, height, width)
    padded = np.zeros((len(flat), height + 2 * radius, width + 2 * radius), dtype=bool)
    strides = np.array([padded.shape[1] * padded.shape[2], padded.shape[2], 1])
    stamps = disk(radius) @ strides[1:]
    points = (np.argwhere(flat) + [0, radius, radius]) @ strides
    for start in range(0, len(points), _CHUNK):
        padded.reshape(-1)[points[start : start + _CHUNK, None] + stamps] = True
    return padded[:, radius : radius + height, radius : radius + width].reshape(masks.shape)


def boundary_radius(height: int, width: int, tolerance: float = BOUNDARY) -> int:
    """Radius in pixels: `tolerance` itself from 1 on, else that share of the image diagonal, rounded up."""
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: expected a finite number >= 0, got {tolerance}")
    return int(tolerance) if tolerance >= 1 else math.ceil(tolerance * math.hypot(height, width))


@dataclass(frozen=True)
class PairScores:
    """J and F (K, n, T) of every proposal with every object in every frame."""

    j: Scores
    f: Scores


def _checked(proposals: Masks, objects: Masks, void: Masks | None) -> None:
    for name, value in (("proposals", proposals), ("objects", objects)):
        _array(name, value, "b", "bool (count, T, H, W)")
        if value.ndim != 4:
            raise ValueError(f"{name}: expected shape (count, T, H, W), got {value.shape}")
    if proposals.shape[1:] != objects.shape[1:]:
        raise ValueError(
            f"proposals: expected frames and size {objects.shape[1:]} of objects, got {proposals.shape[1:]}"
        )
    if 0 in objects.shape[1:]:
        raise ValueError(f"objects: expected at least one frame and pixel, got {objects.shape}")
    if void is not None and _array("void", void, "b", "bool (T, H, W)").shape != objects.shape[1:]:
        raise ValueError(f"void: expected shape {objects.shape[1:]} of objects, got {void.shape}")


def _flat(masks: Masks) -> Masks:
    """(K, H, W) -> (K, H*W), for no masks as well."""
    return masks.reshape(len(masks), math.prod(masks.shape[1:]))


def _counts(left: Masks, right: Masks) -> Scores:
    """Common pixels (K, n) of masks (K, P) and (n, P); exact in float32 products of up to 2**24 pixels."""
    narrow = np.float32 if left.shape[1] < 2**24 else np.float64
    wide = right.T.astype(narrow)
    parts = [left[i : i + _PROPOSALS].astype(narrow) @ wide for i in range(0, len(left), _PROPOSALS)]
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros((0, len(right)))


def pair_scores(
    proposals: Masks, objects: Masks, void: Masks | None = None, *, tolerance: float = BOUNDARY
) -> PairScores:
    """J (region similarity) and F (boundary accuracy) of all pairs.

    Args:
        proposals: (K, T, H, W) bool. objects: (n, T, H, W) bool.
        void: (T, H, W) bool, pixels that count for nobody.
        tolerance: of a boundary match, see `boundary_radius`.
    """
    _checked(proposals, objects, void)
    count, (number, frames, height, width) = len(proposals), objects.shape
    radius = boundary_radius(height, width, tolerance)
    j = np.zeros((count, number, frames))
    f = np.zeros((count, number, frames))
    for t in range(frames):
        ours, theirs = proposals[:, t], objects[:, t]
        if void is not None:
            ours, theirs = ours & ~void[t], theirs & ~void[t]
        j[:, :, t] = _region(_flat(ours), _flat(theirs))
        f[:, :, t] = _boundary(ours, theirs, radius)
    return PairScores(j, f)


def _region(ours: Masks, theirs: Masks) -> Scores:
    common = _counts(ours, theirs)
    union = ours.sum(1)[:, None] + theirs.sum(1)[None, :] - common
    return np.where(union == 0, 1.0, common / np.maximum(union, 1))


def _boundary(ours: Masks, theirs: Masks, radius: int) -> Scores:
    our_edges, their_edges = boundary_map(ours), boundary_map(theirs)
    our_length = our_edges.sum((1, 2))[:, None]
    their_length = their_edges.sum((1, 2))[None, :]

    matched_ours = _counts(_flat(our_edges), _flat(dilate(their_edges, radius)))
    matched_theirs = _counts(_flat(dilate(our_edges, radius)), _flat(their_edges))
    # No boundary on one side only: perfect precision of saying nothing, or perfect recall of nothing.
    precision = np.where(our_length == 0, 1.0, matched_ours / np.maximum(our_length, 1))
    recall = np.where(their_length == 0, 1.0, matched_theirs / np.maximum(their_length, 1))
    precision = np.where((their_length == 0) & (our_length > 0), 0.0, precision)
    recall = np.where((our_length == 0) & (their_length > 0), 0.0, recall)
    total = precision + recall
    return np.where(total == 0, 0.0, 2 * precision * recall / np.where(total == 0, 1.0, total))


@dataclass(frozen=True)
class Matching:
    """J and F (n, T) of matched pairs; `rows` are proposals and `columns` objects, both (n,) or (T, n)."""

    j: Scores
    f: Scores
    rows: npt.NDArray[np.intp]
    columns: npt.NDArray[np.intp]

    @property
    def j_mean(self) -> float:
        return float(self.j.mean())

    @property
    def f_mean(self) -> float:
        return float(self.f.mean())

    @property
    def jf_mean(self) -> float:
        return (self.j_mean + self.f_mean) / 2


def _enough(scores: PairScores) -> None:
    count, number = scores.j.shape[:2]
    if number == 0:
        raise ValueError("objects: expected at least one object to match")
    if count < number:
        raise ValueError(f"proposals: {count} for {number} objects; `evaluate_video` adds empty ones")


def match_per_sequence(scores: PairScores) -> Matching:
    """The official matching: one assignment per video on ``(mean_t J + mean_t F) / 2``.

    ValueError for fewer proposals than objects.
    """
    _enough(scores)
    rows, columns = assignment((scores.j.mean(2) + scores.f.mean(2)) / 2)
    return Matching(scores.j[rows, columns], scores.f[rows, columns], rows, columns)


def match_per_frame(scores: PairScores) -> Matching:
    """The authors' matching: one assignment per frame on ``J + F``.

    Rows of the result are ordered by proposal index in each frame, as in the authors' code, so that only
    means over all objects have a meaning. ValueError for fewer proposals than objects.
    """
    _enough(scores)
    j, f, rows, columns = [], [], [], []
    for t in range(scores.j.shape[2]):
        row, column = assignment(scores.j[:, :, t] + scores.f[:, :, t])
        j.append(scores.j[row, column, t])
        f.append(scores.f[row, column, t])
        rows.append(row)
        columns.append(column)
    return Matching(np.stack(j, 1), np.stack(f, 1), np.stack(rows), np.stack(columns))


@dataclass(frozen=True)
class VideoScores:
    """Both matchings of one video, and the scores of all pairs."""

    pairs: PairScores
    per_sequence: Matching
    per_frame: Matching


def evaluate_video(
    proposals: Masks, objects: Masks, void: Masks | None = None, *, tolerance: float = BOUNDARY
) -> VideoScores:
    """Score proposals (K, T, H, W) against objects (n, T, H, W) under both protocols.

    Missing proposals are filled up with empty masks to the number of objects, as the official evaluator does.
    The official protocol admits 20 proposals per video and the authors' copy 300; no limit is set here, so
    say how many there were when quoting a figure.
    """
    _checked(proposals, objects, void)
    if len(proposals) < len(objects):
        empty = np.zeros((len(objects) - len(proposals), *objects.shape[1:]), dtype=bool)
        proposals = np.concatenate([proposals, empty])
    pairs = pair_scores(proposals, objects, void, tolerance=tolerance)
    return VideoScores(pairs, match_per_sequence(pairs), match_per_frame(pairs))


def _contingency(truth: npt.NDArray, labels: npt.NDArray, void: Masks | None) -> npt.NDArray[np.int64]:
    """Common pixels (ids of truth, labels) over the whole video, ids in ascending order."""
    if _frames("labels", labels).shape != truth.shape:
        raise ValueError(f"labels: expected shape {truth.shape} of truth, got {labels.shape}")
    truth, labels = truth.reshape(-1), labels.reshape(-1)
    if void is not None:
        truth, labels = truth[~void.reshape(-1)], labels[~void.reshape(-1)]
    ids, true = np.unique(truth, return_inverse=True)
    clusters, found = np.unique(labels, return_inverse=True)
    table = np.bincount(true * len(clusters) + found, minlength=len(ids) * len(clusters))
    return table.reshape(len(ids), len(clusters))


def fg_ari(truth: npt.NDArray, labels: npt.NDArray) -> float:
    """Adjusted Rand index over a video's foreground: truth, labels (T, H, W) integer, 0 background of truth.

    1 when the foreground is one object in one cluster; ValueError without any foreground.
    """
    foreground = _frames("truth", truth) > 0
    if not foreground.any():
        raise ValueError("truth: no foreground pixel, so that the index is undefined")
    table = _contingency(truth, labels, ~foreground).astype(np.float64)

    def pairs(counts: Scores) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, of_truth, of_labels = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    total = pairs(table.sum(keepdims=True))
    expected = of_truth * of_labels / total if total else 0.0
    highest = (of_truth + of_labels) / 2
    return 1.0 if highest == expected else (together - expected) / (highest - expected)


def mean_iou(truth: npt.NDArray, labels: npt.NDArray) -> float:
    """Mean over the objects of a video of the IoU with the cluster that the Hungarian assignment gives them.

    truth, labels (T, H, W) integer, 0 is the background of `truth` and no object. An object left without a
    cluster counts 0.
    """
    ids = np.unique(_frames("truth", truth))
    table = _contingency(truth, labels, None).astype(np.float64)
    union = table.sum(1, keepdims=True) + table.sum(0, keepdims=True) - table
    iou = (table / union)[ids > 0]
    if not len(iou):
        raise ValueError("truth: no object")
    rows, columns = assignment(iou)
    return float(iou[rows, columns].sum() / len(iou))
