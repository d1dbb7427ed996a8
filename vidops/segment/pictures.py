"""Pictures of a segmentation: overlay frames and the contact sheet."""

from __future__ import annotations

import colorsys
import os

import numpy as np
import numpy.typing as npt

from vidops.evaluation import MissingDependencyError, upsample_nearest

Frames = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

# Clusters above this share of the clip are scenery: tinted lightly, so that small clusters stand out.
SCENERY = 0.08
_GOLDEN = 0.618_033_988_75


def palette(labels: Labels) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Colours (K, 3) in 0..255 and opacities (K, 1) for labels 0..K-1, strong for small clusters.

    Hues go by size, smallest cluster first but specks last, a golden-ratio turn apart, so that the objects
    of a clip take the most distinct ones.
    """
    count = int(labels.max()) + 1
    share = np.bincount(labels.reshape(-1), minlength=count) / labels.size
    scenery = share > SCENERY
    order = np.lexsort((-share, scenery))
    colours = np.zeros((count, 3), np.float32)
    for rank, cluster in enumerate(order):
        hue = (0.02 + rank * _GOLDEN) % 1.0
        muted = bool(scenery[cluster])
        colours[cluster] = colorsys.hsv_to_rgb(hue, 0.55 if muted else 0.95, 0.75 if muted else 1.0)
    opacity = np.where(scenery, 0.30, 0.60).astype(np.float32)[:, None]
    return colours * 255, opacity


def overlays(frames: Frames, labels: Labels) -> Frames:
    """Frames (T, H, W, 3) tinted by labels (T, h, w), with outlines; nearest-neighbour, as the scores use them."""
    colours, opacity = palette(labels)
    height, width = frames.shape[1:3]
    out = np.empty_like(frames)
    for t, frame in enumerate(frames):
        # One frame at a time: the float copy of a clip would be large.
        shown = upsample_nearest(labels[t : t + 1], (height, width))[0]
        alpha = opacity[shown]
        mixed = frame * (1 - alpha) + colours[shown] * alpha
        edge = np.zeros(shown.shape, bool)
        edge[:, 1:] |= shown[:, 1:] != shown[:, :-1]
        edge[1:] |= shown[1:] != shown[:-1]
        mixed[edge] = 255 * 0.85
        out[t] = mixed.round().astype(np.uint8)
    return out


def image_module():
    """Pillow's Image and ImageDraw."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingDependencyError("pictures need Pillow: pip install 'vidops[demo]'") from error
    return Image, ImageDraw


def write_contact_sheet(
    path: str | os.PathLike[str],
    frames: Frames,
    overlaid: Frames,
    times: npt.NDArray[np.float64],
    *,
    cells: int = 12,
    columns: int = 4,
    cell_width: int = 300,
) -> None:
    """A PNG of up to `cells` evenly chosen frames, each above its overlay, with its time.

    Reduced to 256 colours, which keeps a sheet of photographs at a fifth of the size.
    """
    Image, ImageDraw = image_module()
    count = min(cells, len(frames))
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    columns = min(columns, count)
    rows = -(-count // columns)
    height = max(1, round(cell_width * frames.shape[1] / frames.shape[2]))
    gap = 4
    sheet = Image.new("RGB", (columns * (cell_width + gap) - gap, rows * (2 * height + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, t in enumerate(chosen):
        x, y = i % columns * (cell_width + gap), i // columns * (2 * height + gap)
        for j, pixels in enumerate((frames[t], overlaid[t])):
            cell = Image.fromarray(pixels).resize((cell_width, height), Image.Resampling.BOX)
            sheet.paste(cell, (x, y + j * height))
        text = f"{times[t]:.2f} s"
        draw.rectangle((x, y, x + 7 * len(text) + 2, y + 13), fill="black")
        draw.text((x + 3, y + 1), text, fill="white")
    sheet = sheet.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    sheet.save(path, format="PNG", optimize=True)
