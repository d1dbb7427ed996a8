"""The curve of a training run, and what its slots see."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vidops.segment.pictures import image_module
from vidops.train_slots.data import Labels
from vidops.train_slots.training import Point

Frames = npt.NDArray[np.uint8]
# A colour per slot, far apart in hue and lightness.
COLOURS = np.array(
    [
        [40, 44, 52], [230, 80, 60], [70, 150, 240], [90, 200, 110], [245, 190, 60], [180, 110, 220], [90, 210, 220],
        [250, 250, 250],
    ],
    np.uint8,
)  # fmt: skip
SCALE_TO = 128  # pixels of a panel's shorter side
WIDTH, HEIGHT, MARGIN = 640, 320, 44


def write_curve(path: str | os.PathLike[str], points: Sequence[Point], title: str) -> None:
    """A PNG of FG-ARI (left axis, 0 to 1) and of the loss (right axis, from 0) against steps."""
    Image, ImageDraw = image_module()
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    left, right, top, bottom = MARGIN, WIDTH - MARGIN - 20, MARGIN, HEIGHT - MARGIN
    most_steps, most_loss = max(1, points[-1].step), max(p.loss for p in points) or 1.0

    def place(step: float, share: float) -> tuple[float, float]:
        return left + (right - left) * step / most_steps, bottom - (bottom - top) * min(max(share, 0.0), 1.0)

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = place(0, share)[1]
        draw.line((left, y, right, y), fill=(225, 225, 225))
        draw.text((8, y - 6), f"{share:.2f}", fill=(30, 90, 200))
        draw.text((right + 6, y - 6), f"{share * most_loss:.3g}", fill=(200, 80, 40))
        x = place(share * most_steps, 0)[0]
        draw.text((x - 10, bottom + 8), f"{share * most_steps:.0f}", fill="black")
    draw.text((left, 10), title, fill="black")
    draw.text((8, top - 18), "FG-ARI", fill=(30, 90, 200))
    draw.text((right - 8, top - 18), "loss", fill=(200, 80, 40))
    draw.text((right - 30, bottom + 22), "steps", fill="black")
    for colour, shares in (
        ((200, 80, 40), [p.loss / most_loss for p in points]),
        ((30, 90, 200), [p.fg_ari for p in points]),
    ):
        line = [place(p.step, share) for p, share in zip(points, shares, strict=True)]
        draw.line(line, fill=colour, width=2)
        for x, y in line:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    picture.save(path, format="PNG", optimize=True)


def _panel(frame: Frames, height: int, width: int) -> Frames:
    """Nearest neighbour, so that a pixel of a small picture stays one."""
    rows = np.arange(height) * frame.shape[0] // height
    columns = np.arange(width) * frame.shape[1] // width
    return frame[np.ix_(rows, columns)]


def write_masks(
    path: str | os.PathLike[str], pictures: Frames, labels: Labels, *, milliseconds: int = 250
) -> None:
    """A GIF of clips (n, T, H, W, 3), one beside the other, above the colours of their slots (n, T, rows, columns)."""
    Image, _ = image_module()
    height, width = pictures.shape[2:4]
    factor = SCALE_TO / min(height, width)
    height, width = round(height * factor), round(width * factor)
    sheets = []
    for t in range(pictures.shape[1]):
        columns = []
        for clip, found in zip(pictures, labels, strict=False):
            slots = COLOURS[found[t] % len(COLOURS)]
            columns.append(np.concatenate([_panel(clip[t], height, width), _panel(slots, height, width)]))
        sheets.append(Image.fromarray(np.concatenate(columns, 1)))
    sheets[0].save(
        path, format="GIF", save_all=True, append_images=sheets[1:], duration=milliseconds, loop=0, optimize=True
    )
