"""Multi-view evaluation of video classifiers: clips spread over a video, crops spread over a frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vidops.models.ssl_uvos import preprocess


def clip_indices(total: int, *, frames: int, stride: int, clips: int) -> torch.Tensor:
    """Frames (clips, frames) int64 of a video of `total` frames: clips of every `stride`-th frame, the first at the
    start, the last at the end, one alone in the middle. A video that is too short stands still at its last frame.
    """
    for name, value in (("total", total), ("frames", frames), ("stride", stride), ("clips", clips)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value}")
    starts = _spread(max(total - (frames - 1) * stride - 1, 0), clips)
    return (torch.tensor(starts)[:, None] + stride * torch.arange(frames)).clamp(max=total - 1)


def _spread(room: int, count: int) -> list[int]:
    """`count` starts from 0 to `room`, ends included; the middle for one alone."""
    return [room // 2] if count == 1 else [round(i * room / (count - 1)) for i in range(count)]


def views(
    video: torch.Tensor,
    *,
    frames: int = 16,
    stride: int = 4,
    clips: int = 5,
    crops: int = 3,
    size: int = 224,
) -> torch.Tensor:
    """Views of a video as video transformers are evaluated: clips x crops, normalised with ImageNet's statistics.

    The defaults are those of VideoMAE on Kinetics-400 (Ding et al., ICCV 2023, arXiv 2308.04549, section 4): five clips
    of 16 frames, every fourth one, and three square crops along the longer side of frames whose short side is `size`.

    Args:
        video: (T, H, W, 3) uint8, as decoded.
        frames, stride, clips: see `clip_indices`; a VideoSwin takes 32 frames, every second one, four clips.
        crops: crops of every clip, from one end of the longer side to the other; one alone is in the middle.
        size: side of the crops in pixels.

    Returns:
        (clips * crops, 3, frames, size, size) float32, the crops of one clip next to each other.

    >>> import torch
    >>> from vidops.models.views import views
    >>> views(torch.zeros(20, 12, 16, 3, dtype=torch.uint8), frames=4, clips=2, crops=3, size=8).shape
    torch.Size([6, 3, 4, 8, 8])
    """
    if video.dim() != 4 or video.shape[-1] != 3 or video.dtype != torch.uint8 or 0 in video.shape:
        raise ValueError(f"video: expected uint8 (T, H, W, 3), got {video.dtype} {tuple(video.shape)}")
    for name, value in (("crops", crops), ("size", size)):
        if value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value}")
    indices = clip_indices(len(video), frames=frames, stride=stride, clips=clips)
    used, place = indices.unique(return_inverse=True)
    short = min(video.shape[1:3])
    height, width = (size if side == short else round(side * size / short) for side in video.shape[1:3])
    images = preprocess(video[used.to(video.device)], size=(height, width), patch=1, normalisation="train")
    tops, lefts = _spread(height - size, crops), _spread(width - size, crops)
    found = [
        images[place[clip].to(images.device), :, top : top + size, left : left + size]
        for clip in range(clips)
        for top, left in zip(tops, lefts, strict=True)
    ]
    return torch.stack(found).transpose(1, 2)


@torch.no_grad()
def classify_views(
    model: Callable[..., torch.Tensor], views: torch.Tensor, *, batch: int = 8, **options: Any
) -> torch.Tensor:
    """Class probabilities (classes,) of one video: the mean over its views (V, 3, T, H, W) of each one's softmax.

    Args:
        model: gives logits (V, classes); `options` go to it.
        batch: views per call.
    """
    if views.dim() != 5 or len(views) == 0:
        raise ValueError(f"views: expected shape (V, 3, T, H, W) with at least one view, got {tuple(views.shape)}")
    if batch < 1:
        raise ValueError(f"batch: expected at least one view per call, got {batch}")
    logits = torch.cat([model(part, **options) for part in views.split(batch)])
    return logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32).mean(0)
