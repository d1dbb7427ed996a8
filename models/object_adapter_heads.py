"""What `vidops.models.object_adapter` puts around its slots: the adapter before them, the interactions after them."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from vidops.models.vit import Attention, Block, Mlp

EPS = 1e-5


class Adapter3d(nn.Sequential):
    """Residual bottleneck of convolutions over space and time, sheet 3.1: (B, C, T, H, W) -> the same."""

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        hidden = hidden or dim // 4
        super().__init__(
            nn.Conv3d(dim, hidden, 1),
            nn.ReLU(),
            nn.Conv3d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv3d(hidden, dim, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x + super().forward(x)


def two_layers(dim: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out))


def frame_pairs(frames: int) -> torch.Tensor:
    """All pairs (R, 2) of an earlier and a later frame: neighbours first, then by growing distance."""
    return torch.tensor([(t, t + gap) for gap in range(1, frames) for t in range(frames - gap)]).view(-1, 2)


def _checked_slots(slots: torch.Tensor) -> None:
    if slots.dim() != 4 or 0 in slots.shape:
        raise ValueError(f"slots: expected shape (B, T, S, C), got {tuple(slots.shape)}")


class StateChange(NamedTuple):
    """R pairs of frames in the order of `frame_pairs`."""

    objects: torch.Tensor  # slots after the exchange within their frame (B, T, S, C)
    winner: torch.Tensor  # the pair that gave each maximum (B, S, O) int64
    video: torch.Tensor  # feature of the video (B, O)
    logit: torch.Tensor  # (B, classes)
    state: torch.Tensor | None  # embeddings of the changes for the loss (B, R, S, O)


class ObjectStateChange(nn.Module):
    """Objects of a frame attend to each other; each object's change between any two frames is pooled, sheet 3.3."""

    def __init__(
        self,
        dim: int,
        embed_dim: int,
        classes: int,
        *,
        heads: int = 8,
        hidden: int | None = None,
        eps: float = EPS,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: expected 0 <= p < 1, got {drop_path}")
        self.st_transformer = Block(dim, heads, hidden=hidden or 4 * dim, qkv_bias=False, eps=eps, drop_path=drop_path)
        self.mlp_token = two_layers(2 * dim, 2 * dim, embed_dim)
        self.mlp_state = two_layers(embed_dim, embed_dim, embed_dim)
        self.cls_layer = nn.Linear(embed_dim, classes)

    def check_frames(self, frames: int) -> None:
        """ValueError for a number of frames that has no pair."""
        if frames < 2:
            raise ValueError(f"frames: a state change needs at least 2, got {frames}")

    def _split(self, objects: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What an object (B, T, S, C) gives the hidden layer as the earlier and as the later one of a pair."""
        expand = cast(nn.Linear, self.mlp_token[0])
        # W1 [y; y'] = Wa y + Wb y': a product for each frame, where the concatenation takes one for each pair.
        of_earlier, of_later = expand.weight.chunk(2, dim=1)
        return F.linear(objects, of_earlier, expand.bias), F.linear(objects, of_later)

    def changes(self, objects: torch.Tensor) -> torch.Tensor:
        """Objects (B, T, S, C) -> their change in every pair of frames (B, R, S, O)."""
        first, last = frame_pairs(objects.shape[1]).to(objects.device).T
        earlier, later = self._split(objects)
        return self.mlp_token[2](F.relu(earlier[:, first] + later[:, last]))

    def strongest(self, objects: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maximum of `changes` over the pairs (B, S, O) and the first pair that has it, one gap of frames at a time.

        Holds the changes of T - 1 pairs at a time instead of those of all T (T - 1) / 2.
        """
        earlier, later = self._split(objects)
        frames = objects.shape[1]
        best, winner, done = None, None, 0
        for gap in range(1, frames):
            changes = self.mlp_token[2](F.relu(earlier[:, :-gap] + later[:, gap:]))
            value, pair = changes.max(dim=1)
            pair = pair + done
            done += frames - gap
            if best is None or winner is None:
                best, winner = value, pair
            else:
                # As `max` has it: the first of equals, and NaN over everything.
                better = (value > best) | (value.isnan() & ~best.isnan())
                best, winner = value.where(better, best), pair.where(better, winner)
        assert best is not None and winner is not None
        return best, winner

    def forward(self, slots: torch.Tensor, *, need_state: bool = True, backend: str | None = None) -> StateChange:
        """slots (B, T, S, C), T >= 2. Without `need_state` nothing is held for every pair at once."""
        _checked_slots(slots)
        batch, frames = slots.shape[:2]
        self.check_frames(frames)
        objects, _ = self.st_transformer(slots.flatten(0, 1), backend=backend)
        objects = objects.unflatten(0, (batch, frames))
        if need_state:
            changes = self.changes(objects)
            # Of equal maxima `max` takes the first, and its gradient goes there alone; `amax` would divide it.
            strongest, winner = changes.max(dim=1)
            state = self.mlp_state(changes)
        else:
            strongest, winner = self.strongest(objects)
            state = None
        video = strongest.mean(1)
        return StateChange(objects, winner, video, self.cls_layer(video), state)


class SpaceTimeBlock(nn.Module):
    """Attention of each object over time, then of the objects of a frame and the video token, then an MLP."""

    def __init__(self, dim: int, heads: int, *, hidden: int | None = None, eps: float = EPS) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qkv_bias=False)
        self.time_norm1 = nn.LayerNorm(dim, eps=eps)
        self.time_attn = Attention(dim, heads, qkv_bias=False)
        self.time_fc = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden or 4 * dim)

    def forward(
        self, token: torch.Tensor, objects: torch.Tensor, *, backend: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """token (B, 1, C), objects (B, T, S, C) -> the same."""
        batch, frames, slots = objects.shape[:3]
        tracks = objects.transpose(1, 2).flatten(0, 1)
        update, _ = self.time_attn(self.time_norm1(tracks), backend=backend)
        objects = objects + self.time_fc(update).unflatten(0, (batch, slots)).transpose(1, 2)

        rows = torch.cat([token[:, None].expand(-1, frames, -1, -1), objects], dim=2)
        update, _ = self.attn(self.norm1(rows.flatten(0, 1)), backend=backend)
        update = update.unflatten(0, (batch, frames))
        token = token + update[:, :, 0].mean(1, keepdim=True)
        objects = objects + update[:, :, 1:]
        return token + self.mlp(self.norm2(token)), objects + self.mlp(self.norm2(objects))


class SpaceTime(NamedTuple):
    video: torch.Tensor  # feature of the video (B, O)
    logit: torch.Tensor  # (B, classes)


class SpaceTimeAttention(nn.Module):
    """The other interaction: a video token and all objects through divided space-time blocks, sheet 3.4."""

    def __init__(
        self,
        dim: int,
        embed_dim: int,
        classes: int,
        *,
        frames: int,
        slots: int,
        heads: int = 8,
        depth: int = 3,
        hidden: int | None = None,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        self.st_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.time_embed = nn.Parameter(torch.zeros(1, frames, dim))
        # Row 0 belongs to the video token.
        self.slots_embed = nn.Parameter(torch.zeros(1, slots + 1, dim))
        for parameter in (self.st_token, self.time_embed, self.slots_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.st_transformer = nn.ModuleList(SpaceTimeBlock(dim, heads, hidden=hidden, eps=eps) for _ in range(depth))
        self.mlp_token = two_layers(dim, 2 * dim, embed_dim)
        self.cls_layer = nn.Linear(dim, classes)

    def check_frames(self, frames: int) -> None:
        """ValueError for another number of frames than there are time embeddings."""
        if frames != self.time_embed.shape[1]:
            raise ValueError(f"frames: expected {self.time_embed.shape[1]}, got {frames}")

    def forward(self, slots: torch.Tensor, *, backend: str | None = None) -> SpaceTime:
        """slots (B, T, S, C), T and S those of the embeddings."""
        _checked_slots(slots)
        self.check_frames(slots.shape[1])
        if slots.shape[2] != self.slots_embed.shape[1] - 1:
            raise ValueError(f"slots: expected {self.slots_embed.shape[1] - 1} a frame, got {slots.shape[2]}")
        token = (self.st_token + self.slots_embed[:, :1]).expand(len(slots), -1, -1)
        objects = slots + self.slots_embed[:, None, 1:] + self.time_embed[:, :, None]
        for block in self.st_transformer:
            token, objects = block(token, objects, backend=backend)
        video = token[:, 0]
        return SpaceTime(self.mlp_token(video), self.cls_layer(video))
