"""Scores against reference masks, and the reader of mask files.

A mask file is an `.npz` with `labels` (N, H, W) integers, 0 for background, `frames` (N,) the frame numbers in
the video, and optionally `names` of the objects 1, 2, ... and `complete` (N,) bool: whether all objects of the
frame are marked. Frames that are not complete count for the objects marked in them, and for nothing else.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vidops._npz import read_npz
from vidops._options import UsageError
from vidops.evaluation import fg_ari, upsample_nearest


class MaskError(UsageError):
    """A mask file that cannot be used; the text is one line that starts with its path."""


@dataclass(frozen=True)
class ReferenceMasks:
    labels: npt.NDArray[np.int64]  # (N, H, W)
    frames: npt.NDArray[np.int64]  # (N,)
    names: tuple[str, ...]  # of the objects 1..n
    complete: npt.NDArray[np.bool_]  # (N,)


def read_masks(path: str | os.PathLike[str]) -> ReferenceMasks:
    """Read and check a mask file; MaskError when it is not one."""
    path = os.fspath(path)
    try:
        held = read_npz(path, ("labels", "frames", "names", "complete"))
    except ValueError as error:
        raise MaskError(str(error)) from error
    if "labels" not in held or "frames" not in held:
        raise MaskError(f"{path}: expected arrays named labels and frames")
    labels, frames = held["labels"], held["frames"]
    if labels.ndim != 3 or 0 in labels.shape or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise MaskError(f"{path}: labels: expected non-negative integers (N, H, W), got {labels.dtype} {labels.shape}")
    if frames.shape != labels.shape[:1] or frames.dtype.kind not in "iu":
        raise MaskError(f"{path}: frames: expected {len(labels)} integers, got {frames.dtype} {frames.shape}")
    count = int(labels.max())
    names = np.atleast_1d(held.get("names", np.array([f"object {i}" for i in range(1, count + 1)])))
    complete = held.get("complete", np.ones(len(labels), dtype=bool))
    if len(names) < count or complete.shape != frames.shape or complete.dtype.kind not in "biu":
        raise MaskError(f"{path}: names or complete do not fit {count} objects in {len(labels)} frames")
    texts = tuple(map(str, names))
    return ReferenceMasks(labels.astype(np.int64), frames.astype(np.int64), texts, complete.astype(bool))


def _tube(truth: npt.NDArray[np.bool_], found: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """IoU per frame that shows the object, their mean, and IoU of the whole tube, false alarms elsewhere included."""
    shown = truth.any((1, 2))
    both = (truth & found).sum((1, 2))
    either = (truth | found).sum((1, 2))
    per_frame = both[shown] / either[shown]
    return {
        "iou_mean": float(per_frame.mean()),
        "iou_tube": float(both.sum() / either.sum()),
        "iou_frames": [round(float(x), 4) for x in per_frame],
    }


def score(labels: npt.NDArray[np.int64], indices: npt.NDArray[np.int64], masks: ReferenceMasks) -> dict[str, Any]:
    """Score labels (T, h, w) of the video's frames `indices` (T,) at the resolution of the masks.

    For each object: the one cluster whose mean IoU over the frames that show the object is best, and the union
    of the clusters that lie for more than half inside it. ARI over all pixels and FG-ARI over the pixels of
    objects, on complete frames.

    MaskError when no frame is in both.
    """
    where = {int(frame): n for n, frame in enumerate(masks.frames)}
    common = [(t, where[int(i)]) for t, i in enumerate(indices) if int(i) in where]
    if not common:
        raise MaskError("the masks hold none of the frames that were segmented")
    ours, theirs = (np.asarray(side) for side in zip(*common, strict=True))
    truth = masks.labels[theirs]
    found = upsample_nearest(labels[ours], truth.shape[1:])
    complete = masks.complete[theirs]
    objects: dict[str, Any] = {}
    for number, name in enumerate(masks.names, start=1):
        mask = truth == number
        # A frame that marks other objects only says nothing about this one.
        usable = complete | mask.any((1, 2))
        mask, there = mask[usable], found[usable]
        if not mask.any():
            continue
        touching = np.unique(there[mask])
        tubes = {int(c): _tube(mask, there == c) for c in touching}
        best = max(tubes, key=lambda c: tubes[c]["iou_mean"])
        inside = [int(c) for c in touching if 2 * (mask & (there == c)).sum() > (there == c).sum()]
        entry = {"frames": int(mask.any((1, 2)).sum()), "cluster": best, **tubes[best]}
        entry["union_of_clusters"] = inside
        if inside:
            entry["union_iou_mean"] = _tube(mask, np.isin(there, inside))["iou_mean"]
        objects[name] = entry
    result: dict[str, Any] = {"frames": len(common), "mask_size": list(truth.shape[1:]), "objects": objects}
    whole, segments = truth[complete], found[complete]
    if len(whole):
        # With every label raised by one no pixel counts as background: the index over all pixels.
        result["ari"] = fg_ari(whole + 1, segments)
        if (whole > 0).any():
            result["fg_ari"] = fg_ari(whole, segments)
    return result
