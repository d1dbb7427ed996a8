"""Object-centric learning in videos: semantics and instances by two stages of masked slot attention.

Qian, Ding, Liu, Lin, "Semantics Meets Temporal Correspondence: Self-supervised Object-centric Learning in Videos",
ICCV 2023, arXiv 2308.09951. Key features of a DINO ViT are fused with their correlation to the previous frame. A
first stage of slot attention splits a frame into semantics, a second one each semantic into instances. Training
makes both consistent over time with a teacher.

>>> import torch
>>> from vidops.models.smtc import SMTC
>>> with torch.device("meta"):
...     model = SMTC("vit_small_16")
>>> sum(p.numel() for p in model.parameters())
23109120
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from vidops.checkpoints import LoadReport
from vidops.models.smtc_losses import (
    LossSettings,
    consistency_loss,
    instance_cosine,
    instance_loss,
    separation_loss,
    valid_instances,
)
from vidops.models.vit import DinoEncoder, load_with_encoder
from vidops.nn import TwoStageSlotAttention

# `vidops.models.ssl_uvos.preprocess` makes the input: the authors test with these and its "test" statistics, and
# train with its "train" statistics.
TEST_SIZE = (480, 800)
TRAIN_SIZE = (256, 256)
# Iterations of the authors' multi-object discovery; they train with three.
DISCOVERY_ITERS = 5


@dataclass(frozen=True)
class SMTCConfig:
    """Sizes and numbers of the model; the defaults are those of the released weights."""

    dim: int = 384
    depth: int = 12
    encoder_heads: int = 6
    patch: int = 16
    img_size: int = 224
    hidden: int = 1536
    drop_path: float = 0.1
    grid: tuple[int, int] = (16, 16)
    num_slots: int = 16
    num_instances: int = 4
    slot_hidden: int = 384
    iters: int = 3
    threshold: float = 0.3
    soft_mask: bool = False
    reparameterised: bool = False
    frames: int = 4
    losses: LossSettings = field(default_factory=LossSettings)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], *, encoder_heads: int, **changes: Any) -> SMTCConfig:
        """The configuration of a full state dict.

        Head count and number of instances leave no trace in it, and of the grid only the area does: name them where
        they are not the default, or the grid not square.
        """
        try:
            dim, _, patch, _ = state["encoder.patch_embed.proj.weight"].shape
            stored = state["encoder.pos_embed"].shape[1] - 1
            hidden = state["encoder.blocks.0.mlp.fc1.weight"].shape[0]
            side = math.isqrt(state["transport_proj.weight"].shape[1])
            num_slots = state["slot_attention.slots_mu"].shape[1]
            slot_hidden = state["slot_attention.mlp.0.weight"].shape[0]
        except KeyError as error:
            raise ValueError(f"state: not a full smtc state dict, {error.args[0]} is missing") from error
        found: dict[str, Any] = {
            "dim": dim,
            "depth": len({name.split(".")[2] for name in state if name.startswith("encoder.blocks.")}),
            "encoder_heads": encoder_heads,
            "patch": patch,
            "img_size": math.isqrt(stored) * patch,
            "hidden": hidden,
            "grid": (side, side),
            "num_slots": num_slots,
            "slot_hidden": slot_hidden,
        }
        return cls(**found | changes)


CONFIGS = {
    "vit_small_16": SMTCConfig(),
    # For examples and tests: runs in milliseconds, same structure.
    "tiny": SMTCConfig(
        dim=24,
        depth=2,
        encoder_heads=3,
        patch=8,
        img_size=24,
        hidden=96,
        grid=(3, 3),
        num_slots=4,
        num_instances=3,
        slot_hidden=24,
    ),
}


def resolve_config(config: str | SMTCConfig) -> SMTCConfig:
    if isinstance(config, SMTCConfig):
        return config
    if config not in CONFIGS:
        raise ValueError(f"config: expected an SMTCConfig or one of {', '.join(map(repr, CONFIGS))}, got {config!r}")
    return CONFIGS[config]


def resized_keys(keys: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Keys (B, T, C, h, w) on the grid whose positions the projection of E1 knows: (B, T, C, rows, columns)."""
    if tuple(keys.shape[-2:]) == grid:
        return keys
    resized = F.interpolate(keys.flatten(0, 1), size=grid, mode="bilinear", align_corners=False)
    return resized.unflatten(0, keys.shape[:2])


def projected_correlation(
    keys: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """Projection (B, T, D, h*w) of the correlation with the previous frame, the second term of E1."""
    previous = resized_keys(keys, grid).flatten(3).roll(1, dims=1)
    current = keys.flatten(3)
    weight = weight.squeeze(-1)
    out, positions = weight.shape
    channels, tokens = current.shape[2:]
    # Of the two orders of the products, the one with fewer multiply-adds; the first never holds the correlation.
    if out * channels * (positions + tokens) < positions * tokens * (out + channels):
        projected = (weight @ previous.mT) @ current
    else:
        projected = weight @ (previous.mT @ current)
    return projected + bias[:, None]


def transport_fusion(
    keys: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """Keys fused with a projection of their correlation to the frame before, E1: (B, T, h*w, C).

    Args:
        keys: (B, T, C, h, w). The frame before the first is the last.
        weight: W_c (C, rows * columns, 1), whose input channels are positions of the previous frame.
        bias: (C,).
        grid: (rows, columns), to which keys of the previous frame are resized.
    """
    if keys.dim() != 5 or 0 in keys.shape:
        raise ValueError(f"keys: expected shape (B, T, C, h, w), got {tuple(keys.shape)}")
    expected = (keys.shape[2], grid[0] * grid[1], 1)
    if tuple(weight.shape) != expected:
        raise ValueError(f"weight: expected shape {expected}, got {tuple(weight.shape)}")
    return (keys.flatten(3) + projected_correlation(keys, weight, bias, grid)).mT


class TrainingOutput(NamedTuple):
    """What the training forward returns, sheet 2.6; N patches per frame."""

    dots: torch.Tensor  # semantic dots (B, T, S, N)
    frame: torch.Tensor  # keys before fusion (B, T, N, C)
    semantic: torch.Tensor  # semantic slots (B, T, S, C)
    instance: torch.Tensor  # instance slots (B, T, S, P, C)
    objects: torch.Tensor  # unit vectors of the instances, for matching (B, T, S, P, C)


class Prediction(NamedTuple):
    """What inference returns, sheet 2.6; `grid` is (h, w)."""

    semantic_mask: torch.Tensor  # (B, T, S, h*w), sums to one over S
    score: torch.Tensor  # cosine of an instance with its semantic (B, T, S, P)
    instance_mask: torch.Tensor  # (B, T, S, P, h*w), sums to the semantic mask over P
    grid: tuple[int, int]


class Discovery(NamedTuple):
    """Instances of every frame of a video; those of different frames are not linked."""

    score: torch.Tensor  # (T, S, P)
    mask: torch.Tensor  # (T, S, P, h, w)

    def proposals(self, size: tuple[int, int], *, min_score: float = 0.5, threshold: float = 0.3) -> torch.Tensor:
        """Masks (K, T, height, width) bool as the authors score them, sheet 5.

        Of every frame, the instances with a score of at least `min_score`, semantic by semantic; upsampled to `size`
        by nearest neighbour, stretched to 0..1 over the frame and cut at `threshold`. Frames with fewer than K are
        filled up with empty masks.
        """
        rows, columns = (
            torch.arange(out, device=self.mask.device) * have // out
            for out, have in zip(size, self.mask.shape[-2:], strict=True)
        )
        chosen = self.score >= min_score
        counts = chosen.flatten(1).sum(1).tolist()
        found = self.mask.new_zeros((max(counts), len(counts), *size), dtype=torch.bool)
        for t, count in enumerate(counts):
            masks = self.mask[t][chosen[t]][:, rows[:, None], columns]
            low, high = masks.amin((-2, -1), keepdim=True), masks.amax((-2, -1), keepdim=True)
            # 0 / 0 of a constant mask is NaN, which no threshold is below.
            found[:count, t] = (masks - low) / (high - low) > threshold
        return found


class Losses(NamedTuple):
    total: torch.Tensor
    consistency: torch.Tensor
    separation: torch.Tensor
    instance: torch.Tensor


class SMTC(nn.Module):
    """The model of Qian et al.: DINO encoder, fusion with temporal correspondence, two stages of slot attention.

    Args:
        config: a name in `CONFIGS` or an `SMTCConfig`.

    The encoder of a model made here has random weights; `from_pretrained` loads them.
    """

    load_report: LoadReport | None = None

    def __init__(self, config: str | SMTCConfig = "vit_small_16") -> None:
        super().__init__()
        c = self.config = resolve_config(config)
        self.encoder = DinoEncoder(
            dim=c.dim,
            depth=c.depth,
            heads=c.encoder_heads,
            patch=c.patch,
            img_size=c.img_size,
            hidden=c.hidden,
            drop_path=c.drop_path,
        )
        self.transport_proj = nn.Conv1d(c.grid[0] * c.grid[1], c.dim, kernel_size=1)
        self.mlp_slot = nn.Sequential(nn.Linear(c.dim, 2 * c.dim), nn.ReLU(), nn.Linear(2 * c.dim, c.dim))
        self.slot_attention = TwoStageSlotAttention(
            c.num_slots,
            c.num_instances,
            c.dim,
            c.iters,
            hidden_dim=c.slot_hidden,
            threshold=c.threshold,
            soft_mask=c.soft_mask,
            reparameterised=c.reparameterised,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: str | SMTCConfig = "vit_small_16",
        *,
        strict: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> SMTC:
        """A model with the weights of a local checkpoint, in eval mode; see `load_checkpoint`."""
        model = cls(config).to(dtype)
        model.load_checkpoint(path, strict=strict)
        return model.eval()

    def load_checkpoint(self, path: str | Path, *, strict: bool = True) -> LoadReport:
        """Load the authors' checkpoint, or DINO weights for the encoder alone, from a local file.

        Layouts, `strict`, the report and errors are those of `SSLUVOS.load_checkpoint`: without `strict` everything
        but the encoder may be missing.
        """
        self.load_report = load_with_encoder(self, path, strict=strict)
        return self.load_report

    def _slots(
        self,
        clip: torch.Tensor,
        instance_init: torch.Tensor | None,
        iters: int | None,
        backend: str | None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[int, int]]:
        """Keys (B, T, N, C), what `TwoStageSlotAttention` returns with (B, T) in front, and the grid of tokens."""
        if clip.dim() != 5 or clip.shape[2] != 3 or 0 in clip.shape:
            raise ValueError(f"clip: expected shape (B, T, 3, H, W), got {tuple(clip.shape)}")
        size = clip.shape[:2]
        images = clip.flatten(0, 1)
        grid = self.encoder.grid_of(images)
        keys = self.encoder.keys(images, backend=backend).unflatten(0, size)
        weight, bias = self.transport_proj.weight, cast(torch.Tensor, self.transport_proj.bias)
        fused = transport_fusion(keys.mT.unflatten(-1, grid), weight, bias, self.config.grid)
        results = self.slot_attention(fused.flatten(0, 1), instance_init, iters=iters, backend=backend)
        return keys, tuple(t.unflatten(0, size) for t in results), grid

    def forward(
        self, clip: torch.Tensor, *, instance_init: torch.Tensor | None = None, backend: str | None = None
    ) -> TrainingOutput:
        """Training forward, sheet 2.6.

        Args:
            clip: normalised frames (B, T, 3, H, W).
            instance_init: initial instances (B*T, S, P, C), default drawn from torch's generator.
            backend: backend of every vidops op, default chosen per op.
        """
        keys, (semantic, dots, instance, _), _ = self._slots(clip, instance_init, None, backend)
        objects = F.normalize(self.mlp_slot(instance), dim=-1, eps=1e-12)
        return TrainingOutput(dots, keys, semantic, instance, objects)

    @torch.no_grad()
    def predict(
        self,
        clip: torch.Tensor,
        *,
        instance_init: torch.Tensor | None = None,
        iters: int | None = None,
        backend: str | None = None,
    ) -> Prediction:
        """Masks and scores of a clip (B, T, 3, H, W), sheet 2.6; `iters` replaces the configuration's."""
        _, slots, grid = self._slots(clip, instance_init, iters, backend)
        semantic, dots, instance, instance_dots = slots
        semantic_mask = dots.softmax(-2)
        instance_mask = instance_dots.softmax(-2) * semantic_mask[..., None, :]
        return Prediction(semantic_mask, instance_cosine(semantic, instance), instance_mask, grid)

    @torch.no_grad()
    def discover(
        self,
        video: torch.Tensor,
        *,
        instance_init: torch.Tensor | None = None,
        iters: int | None = None,
        backend: str | None = None,
    ) -> Discovery:
        """Instances of a whole video, chunk by chunk, sheet 5.

        Args:
            video: normalised frames (T, 3, H, W); may lie on another device than the model.
            instance_init: initial instances (chunks, frames, S, P, C), default drawn from torch's generator.
            iters: iterations of slot attention, default the configuration's; the authors use `DISCOVERY_ITERS`.

        A last chunk with fewer frames than the configuration says is filled up with the video's last ones, whose
        second results are dropped.
        """
        if video.dim() != 4 or 0 in video.shape:
            raise ValueError(f"video: expected shape (T, 3, H, W), got {tuple(video.shape)}")
        length = self.config.frames
        weight = self.transport_proj.weight
        scores, masks = [], []
        for number, start in enumerate(range(0, len(video), length)):
            chunk = video[start : start + length]
            kept = len(chunk)
            if kept < length:
                chunk = torch.cat([chunk, video[-(length - kept) :]])
            found = self.predict(
                chunk[None].to(device=weight.device, dtype=weight.dtype),
                instance_init=None if instance_init is None else instance_init[number][: len(chunk)],
                iters=iters,
                backend=backend,
            )
            scores.append(found.score[0, :kept])
            masks.append(found.instance_mask[0, :kept].unflatten(-1, found.grid))
        return Discovery(torch.cat(scores), torch.cat(masks))

    def losses(self, student: TrainingOutput, teacher: TrainingOutput) -> Losses:
        """Eqs. E4 to E6 and their sum; the teacher's tensors take part as constants."""
        settings = self.config.losses
        valid, teacher_valid = (valid_instances(o.dots, o.semantic, o.instance, settings) for o in (student, teacher))
        consistency = consistency_loss(student.dots, teacher.dots, teacher.frame, settings)
        separation = separation_loss(student.dots)
        instance = instance_loss(student.objects, teacher.objects, valid, teacher_valid, settings)
        return Losses(consistency + separation + instance, consistency, separation, instance)

    def training_step(
        self, clip: torch.Tensor, teacher: SMTC, teacher_clip: torch.Tensor, *, backend: str | None = None
    ) -> Losses:
        """Forward of both and losses of one batch of clips; call `.total.backward()` on the result.

        The clips are two augmentations of the same frames. `update_teacher` follows the optimizer's step.
        """
        with torch.no_grad():
            target = teacher(teacher_clip, backend=backend)
        return self.losses(self(clip, backend=backend), target)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, *, momentum: float = 0.999, encoder: bool = False) -> None:
    """Move the teacher's parameters towards the student's: ``momentum * teacher + (1 - momentum) * student``.

    Those of the encoder stay as they are, unless `encoder` (the first release).
    """
    for (name, old), new in zip(teacher.named_parameters(), student.parameters(), strict=True):
        if encoder or "encoder" not in name:
            old.lerp_(new, 1 - momentum)
