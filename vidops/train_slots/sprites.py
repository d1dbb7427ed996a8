"""Clips of coloured shapes that move, bounce and cover one another, with their masks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Clips(NamedTuple):
    """`frames` (B, T, 3, side, side) float32 in 0..1; `ids` (B, T, side, side) int64, 0 the background."""

    frames: torch.Tensor
    ids: torch.Tensor


def draw(count: int, frames: int, side: int, generator: torch.Generator, *, objects: int = 3) -> Clips:
    """`count` clips of discs, squares and diamonds over a dark background, from `generator` alone.

    Colours of a clip's shapes are a third of the colour circle apart, so that they can be told apart.
    """

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    start, velocity = uniform(count, objects, 2) * side, (uniform(count, objects, 2) * 2 - 1) * 0.12 * side
    radius = side * (0.15 + 0.07 * uniform(count, objects))[..., None, None]
    shape = torch.randint(3, (count, objects), generator=generator)[..., None, None]
    turn = uniform(count, 1, 1) + torch.arange(objects)[:, None] / objects + torch.tensor([0, 1 / 3, 2 / 3])
    colour = 0.5 + 0.5 * torch.cos(2 * math.pi * turn)
    background = 0.1 * uniform(count, 3)
    rows, columns = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    images, ids = [], []
    for t in range(frames):
        # Reflected at the borders: a triangle wave of twice the side.
        place = side - ((start + velocity * t) % (2 * side) - side).abs()
        down = (rows - place[..., 0, None, None]).abs()
        across = (columns - place[..., 1, None, None]).abs()
        disc, square = down**2 + across**2 < 1.2 * radius**2, torch.maximum(down, across) < radius
        diamond = down + across < 1.35 * radius
        covered = torch.where(shape == 0, disc, torch.where(shape == 1, square, diamond))
        image = background[:, :, None, None].repeat(1, 1, side, side)
        owner = torch.zeros(count, side, side, dtype=torch.int64)
        for number in range(objects):
            mask = covered[:, number]
            image = torch.where(mask[:, None], colour[:, number, :, None, None], image)
            owner = torch.where(mask, number + 1, owner)
        images.append(image)
        ids.append(owner)
    return Clips(torch.stack(images, 1), torch.stack(ids, 1))
