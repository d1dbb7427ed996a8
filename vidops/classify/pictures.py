"""Which tokens were kept: the frames, those patches that were dropped darkened by when they were."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from vidops.segment.pictures import image_module

Frames = npt.NDArray[np.uint8]
Dropped = npt.NDArray[np.int64]  # 0 where a token is kept to the end, else the call that drops it, 1, 2, 3

# What a dropped patch is mixed with, by call, and how much of the picture stays.
COLOURS = np.array([[0, 0, 0], [20, 24, 40], [30, 70, 120], [190, 120, 40]], np.float32)
STAYS = np.array([1.0, 0.12, 0.25, 0.35], np.float32)
NAMES = ("kept", "dropped first", "second", "third")


def overlays(frames: Frames, dropped: Dropped) -> Frames:
    """Frames (T, H, W, 3) under `dropped` (t, h, w), whose patches are H/h x W/w pixels of T/t frames."""
    steps = [whole // parts for whole, parts in zip(frames.shape[:3], dropped.shape, strict=True)]
    shown = dropped
    for axis, step in enumerate(steps):
        shown = shown.repeat(step, axis)
    stays = STAYS[shown][..., None]
    mixed = frames * stays + COLOURS[shown] * (1 - stays)
    # A line of the grid between a token that is kept and one that is not.
    edge = np.zeros(shown.shape, bool)
    kept = shown == 0
    edge[:, 1:] |= kept[:, 1:] != kept[:, :-1]
    edge[:, :, 1:] |= kept[:, :, 1:] != kept[:, :, :-1]
    mixed[edge] = 0.5 * mixed[edge] + 0.5 * 235
    return mixed.round().astype(np.uint8)


def write_sheet(
    path: str | os.PathLike[str], frames: Frames, overlaid: Frames, title: str, *, columns: int = 8
) -> None:
    """A PNG of every frame above its overlay, with a legend."""
    Image, ImageDraw = image_module()
    count, height, width = frames.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    gap, head = 4, 34
    sheet = Image.new("RGB", (columns * (width + gap) - gap, head + rows * (2 * height + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), title, fill="black")
    x = 4
    for name, colour in zip(NAMES, COLOURS.astype(int), strict=True):
        fill = "white" if name == "kept" else tuple(int(c) for c in colour)
        draw.rectangle((x, 19, x + 10, 29), fill=fill, outline="black")
        draw.text((x + 15, 18), name, fill="black")
        x += 30 + 7 * len(name)
    for t in range(count):
        place = (t % columns * (width + gap), head + t // columns * (2 * height + gap))
        sheet.paste(Image.fromarray(frames[t]), place)
        sheet.paste(Image.fromarray(overlaid[t]), (place[0], place[1] + height))
    sheet = sheet.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    sheet.save(path, format="PNG", optimize=True)
