"""A small tracker of objects: slots are found in the first frame and carried through the others.

Initial slots and iterations of Locatello et al., NeurIPS 2020 (arXiv 2006.15055); corrector and predictor of Kipf et
al., ICLR 2022 (arXiv 2111.12594); features as targets after Seitzer et al., ICLR 2023 (arXiv 2209.14860).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import vidops

FREQUENCIES = (1, 2, 4, 6)


def place_waves(rows: int, columns: int) -> torch.Tensor:
    """Sines and cosines of the places of a grid (rows * columns, channels)."""
    axes = (torch.linspace(0, 1, rows), torch.linspace(0, 1, columns))
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
    angles = torch.cat([math.pi * k * place for k in FREQUENCIES], -1)
    return torch.cat([angles.sin(), angles.cos(), place], -1)


class Reconstruction(NamedTuple):
    values: torch.Tensor  # what the slots make of the frames, in the shape of the target
    masks: torch.Tensor  # share of each slot in each place (B, T, S, rows, columns)

    def labels(self) -> torch.Tensor:
        """Slot of every place (B, T, rows, columns) int64."""
        return self.masks.argmax(2)


class ImageEncoder(nn.Module):
    """Frames (B, 3, side, side) in 0..1 -> tokens (B, side * side, dim)."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(3, dim, 5, padding=2), nn.ReLU()]
        convolutions += [nn.Conv2d(dim, dim, 5, padding=2), nn.ReLU(), nn.Conv2d(dim, dim, 5, padding=2), nn.ReLU()]
        self.convolutions = nn.Sequential(*convolutions)
        self.norm = nn.LayerNorm(dim)
        self.place = TokenPlaces(side, dim)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        # Normalised before places are added: what the convolutions give at first is far smaller than those.
        return self.place(self.norm(self.convolutions(2 * frames - 1).flatten(2).mT))


class TokenPlaces(nn.Module):
    """Adds places to tokens, and mixes the channels of each."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("waves", place_waves(side, side), persistent=False)
        self.waves: torch.Tensor
        self.embed = nn.Linear(self.waves.shape[1], dim)
        self.mix = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.mix(tokens + self.embed(self.waves))


class ImageDecoder(nn.Module):
    """Slots (n, dim) -> colours and a logit of the mask (n, 4, side, side), from a broadcast grid of a quarter."""

    def __init__(self, side: int, dim: int, hidden: int = 32) -> None:
        super().__init__()
        self.side = side // 4
        self.register_buffer("places", place_waves(self.side, self.side)[:, -2:], persistent=False)
        self.places: torch.Tensor
        self.embed = nn.Linear(4, dim)
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(dim, hidden, 5, 2, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(hidden, hidden, 5, 2, 2, 1), nn.ReLU(), nn.Conv2d(hidden, 4, 3, padding=1),
        )  # fmt: skip

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        grid = self.embed(torch.cat([self.places, 1 - self.places], -1)).T.unflatten(1, (self.side, self.side))
        return self.layers(slots[:, :, None, None] + grid)


class SlotTracker(nn.Module):
    """Slots of every frame of a clip, and the frames that they make.

    Args:
        encoder: (n, ...) frames -> tokens (n, N, dim).
        decoder: slots (n, dim) -> (n, channels + 1, rows, columns), the last channel the mask's logit.
        slots, dim: number and width of slots.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, slots: int, dim: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.first = vidops.nn.SlotAttention(slots, dim, iters=3, hidden_dim=2 * dim)
        self.predictor = vidops.nn.SlotPredictor(dim)
        self.corrector = vidops.nn.SlotCorrector(dim, mlp_size=2 * dim)

    def forward(self, clips: torch.Tensor, noise: torch.Tensor, *, backend: str | None = None) -> Reconstruction:
        """clips (B, T, ...) and noise (B, S, dim) of the initial slots -> what the slots of each frame decode to."""
        batch, frames = clips.shape[:2]
        tokens = self.encoder(clips.flatten(0, 1)).unflatten(0, (batch, frames))
        slots = self.first(tokens[:, 0], noise=noise, backend=backend)
        found = [slots]
        for t in range(1, frames):
            slots, _ = self.corrector(self.predictor(slots), tokens[:, t], backend=backend)
            found.append(slots)
        drawn = self.decoder(torch.stack(found, 1).flatten(0, 2)).unflatten(0, (batch, frames, -1))
        masks = drawn[:, :, :, -1:].softmax(2)
        return Reconstruction((masks * drawn[:, :, :, :-1]).sum(2), masks.squeeze(3))


class FeatureTracker(nn.Module):
    """Slots of every frame of a clip of features (B, T, rows * columns, channels).

    A place is rebuilt from the slots in the shares in which they attend to it, and knows nothing of where it is: what
    looks alike belongs together. (A decoder that knows places divides a scene this simple into regions of the picture.)
    """

    def __init__(self, grid: tuple[int, int], channels: int, slots: int, dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.encoder = nn.Sequential(nn.Linear(channels, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.start = nn.Parameter(torch.randn(1, 1, dim))
        self.first = vidops.nn.SlotCorrector(dim, mlp_size=2 * dim, iters=3)
        self.predictor = vidops.nn.SlotPredictor(dim)
        self.corrector = vidops.nn.SlotCorrector(dim, mlp_size=2 * dim)
        self.decoder = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, channels))

    def forward(self, clips: torch.Tensor, noise: torch.Tensor, *, backend: str | None = None) -> Reconstruction:
        """As `SlotTracker.forward`; values are (B, T, channels, rows, columns)."""
        tokens = self.encoder(clips)
        slots, shares = self.first(self.start + noise, tokens[:, 0], backend=backend)
        found, masks = [slots], [shares]
        for t in range(1, clips.shape[1]):
            slots, shares = self.corrector(self.predictor(slots), tokens[:, t], backend=backend)
            found.append(slots)
            masks.append(shares)
        drawn, shares = self.decoder(torch.stack(found, 1)), torch.stack(masks, 1)
        values = torch.einsum("btsn,btsc->btcn", shares, drawn)
        return Reconstruction(values.unflatten(3, self.grid), shares.unflatten(3, self.grid))


def reconstruction_loss(found: Reconstruction, target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(found.values, target)
