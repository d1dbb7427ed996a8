"""Queries and keys for the clustering when no trained spatio-temporal block is given.

The paper's clustering needs attention rows that agree within an object and differ between objects. Its trained
block learns such rows; here they are built from frozen ImageNet features by three cues that need no training:

* appearance: principal components of a middle layer of the network;
* change: distance of early features to their median over time, which finds what moves before a static camera;
* place: position, and for what moves, position carried through time by a random walk of local attention, so
  that one object keeps one address while it crosses the picture (in the manner of Jabri et al., "Space-Time
  Correspondence as a Contrastive Random Walk", NeurIPS 2020, used here without learning).

The cues are joined in one vector f per token, and the logit of query i and key j is -|f_i - f_j|^2 / 2 up to a
constant per query, so that an attention row is a Gaussian kernel over the tokens of the key frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

EARLY_LAYER = 3  # stride 4: sharp enough for outlines
WALK_LAYER = 6  # stride 8
APPEARANCE_LAYER = 13  # stride 16: parts of things
LAYERS = (EARLY_LAYER, WALK_LAYER, APPEARANCE_LAYER)
STRIDE = 8
# Network sizes are multiples of the coarsest stride used, so that the grids of all layers nest.
SIZE_STEP = 16


@dataclass(frozen=True)
class DescriptorSettings:
    """Weights of the cues, in units in which a squared distance of `tau` separates two clusters."""

    appearance: float = 1.0
    change: float = 5.0
    moving_place: float = 4.0
    static_place: float = 2.0
    components: int = 12
    # Change counts from `change_low` times the median of the clip and is full `change_ramp` above it.
    change_low: float = 6.5
    change_ramp: float = 1.0
    # Above this ratio of temporal to spatial variation the camera moves and the median shows no background.
    static_camera: float = 0.25
    min_frames: int = 5
    walk_radius: int = 4
    walk_place: float = 3.0
    walk_change: float = 0.25
    walk_appearance: float = 1.0


@dataclass(frozen=True)
class Descriptors:
    """`q` (T, 1, HW, D) and `k` (Tk, 1, HW, D) for `scale=1`; `change` (T, HW) in [0, 1] or None if not used."""

    q: torch.Tensor
    k: torch.Tensor
    change: torch.Tensor | None
    variation: float  # temporal over spatial variation of the early features


def _rms(x: torch.Tensor) -> torch.Tensor:
    # A clip of one flat colour has no variation at all; its descriptors are zero then, not NaN.
    return x.pow(2).sum(-1).mean().sqrt().clamp_min(1e-6)


def principal_components(maps: torch.Tensor, count: int, grid: tuple[int, int]) -> torch.Tensor:
    """Leading components of standardised maps (T, C, h, w) over the whole clip -> (T, HW, count) on `grid`.

    Scaled to a mean squared length of one. Deterministic: eigenvectors of the C x C covariance.
    """
    frames, channels, height, width = maps.shape
    rows = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    rows = rows - rows.mean(0)
    rows = rows / rows.std(0, correction=0).clamp_min(1e-5)
    vectors = torch.linalg.eigh(rows.T @ rows / len(rows)).eigenvectors
    found = rows @ vectors.flip(1)[:, :count]
    found = found.view(frames, height, width, -1).permute(0, 3, 1, 2)
    found = F.interpolate(found, size=grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    return found / _rms(found)


def temporal_change(maps: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, float]:
    """Distance of unit features (T, C, h, w) to their median over time, (T, HW) on `grid`, and its share.

    The distance is in units of its own median over the clip. The second value is that median over the mean
    spatial distance of the same features: small before a static camera.
    """
    unit = F.normalize(maps, dim=1)
    still = unit.median(0, keepdim=True).values
    distance = (unit - still).norm(dim=1, keepdim=True)
    spatial = float((unit - unit.mean((2, 3), keepdim=True)).norm(dim=1).mean().clamp_min(1e-6))
    typical = float(distance.median())
    distance = F.interpolate(distance, size=grid, mode="area").flatten(1)
    # Rendered clips have exact stills, hence a median of zero.
    return distance / max(typical, 0.01 * spatial), typical / spatial


def positions(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Centred (row, column) of every token (HW, 2), the longer side spanning -1 to 1."""
    height, width = grid
    rows = (torch.arange(height, device=device) - (height - 1) / 2) * 2 / max(height, width)
    columns = (torch.arange(width, device=device) - (width - 1) / 2) * 2 / max(height, width)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def _neighbours(x: torch.Tensor, grid: tuple[int, int], radius: int) -> torch.Tensor:
    """(HW, C) -> (HW, C, (2r+1)^2): the rows around every token, zero outside the frame."""
    side = 2 * radius + 1
    image = x.T.reshape(1, -1, *grid)
    return F.unfold(image, side, padding=radius).view(x.shape[1], side * side, -1).permute(2, 0, 1)


def carried_positions(
    walk: torch.Tensor,
    change: torch.Tensor,
    grid: tuple[int, int],
    settings: DescriptorSettings,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Where a random walker from each token ends in the middle frame of the clip: (T, HW, 2), in expectation.

    A step goes to the adjacent frame, to tokens within `walk_radius`, with a softmax over closeness in place,
    change and appearance. The expectation is carried outwards from the middle frame, one product per frame.

    Args:
        walk: appearance (T, HW, C).
        change: (T, HW) in [0, 1].
        grid: (h, w).
        progress: called with the number of frames done.
    """
    frames = len(walk)
    radius = settings.walk_radius
    carried: list[torch.Tensor] = [torch.empty(0)] * frames
    middle = frames // 2
    carried[middle] = positions(grid, walk.device)
    inside = _neighbours(torch.ones_like(walk[0, :, :1]), grid, radius)[:, 0] > 0
    offsets = torch.arange(-radius, radius + 1, device=walk.device, dtype=walk.dtype)
    squared = (offsets[:, None] ** 2 + offsets**2).flatten()
    near = (-squared / (2 * settings.walk_place**2)).expand_as(inside).masked_fill(~inside, float("-inf"))

    def step(here: int, there: int) -> torch.Tensor:
        moved = (_neighbours(change[there, :, None], grid, radius)[:, 0] - change[here, :, None]) ** 2
        look = (_neighbours(walk[there], grid, radius) - walk[here, :, :, None]).pow(2).sum(1)
        logits = near - moved / (2 * settings.walk_change**2) - look / (2 * settings.walk_appearance**2)
        weights = logits.softmax(-1)
        return torch.einsum("nj,ncj->nc", weights, _neighbours(carried[there], grid, radius))

    order = [(t, t - 1) for t in range(middle + 1, frames)] + [(t, t + 1) for t in range(middle - 1, -1, -1)]
    for done, (here, there) in enumerate(order):
        carried[here] = step(here, there)
        if progress is not None:
            progress(done + 2)
    return torch.stack(carried)


def gaussian_queries_keys(f: torch.Tensor, ratio: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (T, HW, C) -> q (T, 1, HW, C + 1), k (Tk, 1, HW, C + 1) with q.k = -|f_q - f_k|^2/2 + |f_q|^2/2.

    The last term is constant in a softmax row. Key frames are 0, ratio, ... as in the paper (sheet 2.3), and at
    least one.
    """
    if ratio < 1:
        raise ValueError(f"ratio: expected at least 1, got {ratio}")
    keys = f[::ratio][: max(1, len(f) // ratio)]
    q = torch.cat([f, torch.ones_like(f[..., :1])], dim=-1)
    k = torch.cat([keys, keys.pow(2).sum(-1, keepdim=True) / -2], dim=-1)
    return q[:, None], k[:, None]


@torch.no_grad()
def build(
    maps: list[torch.Tensor],
    grid: tuple[int, int],
    *,
    ratio: int,
    motion: str = "auto",
    settings: DescriptorSettings | None = None,
    progress: Callable[[int], None] | None = None,
) -> Descriptors:
    """Queries and keys of a clip from the outputs of `LAYERS`.

    Args:
        maps: for each of `LAYERS` (T, C, h, w).
        grid: tokens (h, w) per frame.
        ratio: of the key frames.
        motion: "on" or "off" for the change cue; "auto" uses it before a static camera, given enough frames.
        settings: weights, default `DescriptorSettings()`.
        progress: called with the number of frames done.
    """
    if motion not in ("auto", "on", "off"):
        raise ValueError(f"motion: expected auto, on or off, got {motion!r}")
    s = settings or DescriptorSettings()
    early, walk_maps, late = maps
    frames = len(early)
    look = principal_components(late, s.components, grid)
    place = positions(grid, early.device).expand(frames, -1, -1)
    distance, variation = temporal_change(early, grid)
    if motion == "off" or (motion == "auto" and (frames < s.min_frames or variation > s.static_camera)):
        f = torch.cat([s.appearance * look, s.static_place * place], dim=-1)
        q, k = gaussian_queries_keys(f, ratio)
        return Descriptors(q, k, None, variation)
    change = ((distance - s.change_low) / s.change_ramp).clamp(0, 1)
    walk = principal_components(walk_maps, s.components, grid)
    carried = carried_positions(walk, change, grid, s, progress)
    moving = change[..., None]
    # What moves is told apart by its carried place, what rests by appearance and place.
    parts = [
        s.appearance * look * (1 - moving),
        s.static_place * place * (1 - moving),
        s.moving_place * carried * moving,
        s.change * moving,
    ]
    q, k = gaussian_queries_keys(torch.cat(parts, dim=-1), ratio)
    return Descriptors(q, k, change, variation)
