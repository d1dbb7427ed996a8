"""What there is to learn from: sprites without end, or the descriptors of one real clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vidops import assets, features
from vidops.evaluation import fg_ari
from vidops.segment import descriptors, scoring
from vidops.segment.command import DEMO, DEMO_MASKS
from vidops.train_slots import sprites
from vidops.train_slots.model import FeatureTracker, ImageDecoder, ImageEncoder, SlotTracker
from vidops.video import Video, read_video

SIDE, SPRITES, TRAIN_FRAMES, TEST_FRAMES, TEST_CLIPS = 16, 3, 2, 4, 32
TEST_SEED = 20_000
# Size at which MobileNetV2 sees the real clip, frames sampled of it, and how far apart descriptors put what moves.
CLIP_SIZE, CLIP_FRAMES, MOVING_PLACE = (240, 432), 24, 24.0

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """Batches to train on, one set of clips to score on, and a model for them."""

    name: str
    model: Callable[[], SlotTracker | FeatureTracker]
    learning_rate: float
    slots: int
    dim: int
    batch: Callable[[torch.Generator], torch.Tensor]  # clips (B, T, ...), which are also what is rebuilt
    target: Callable[[torch.Tensor], torch.Tensor]  # clips -> target (B, T, channels, rows, columns)
    test: torch.Tensor
    score: Callable[[Labels], float]  # FG-ARI of labels (B, T, rows, columns) of `test`
    pictures: npt.NDArray[np.uint8]  # of the first clips of `test` (clips, T, H, W, 3)


def sprite_task(*, batch: int = 16) -> Task:
    slots, dim = SPRITES + 1, 32
    test = sprites.draw(TEST_CLIPS, TEST_FRAMES, SIDE, torch.Generator().manual_seed(TEST_SEED), objects=SPRITES)
    truth = test.ids.numpy()

    def score(labels: Labels) -> float:
        return float(np.mean([fg_ari(ids, found) for ids, found in zip(truth, labels, strict=True)]))

    pictures = (255 * test.frames[:4]).round().to(torch.uint8).movedim(2, -1).numpy()
    return Task(
        name="sprites",
        model=lambda: SlotTracker(ImageEncoder(SIDE, dim), ImageDecoder(SIDE, dim), slots, dim),
        learning_rate=6e-4,
        slots=slots,
        dim=dim,
        batch=lambda g: sprites.draw(batch, TRAIN_FRAMES, SIDE, g, objects=SPRITES).frames,
        target=lambda clips: clips,
        test=test.frames,
        score=score,
        pictures=pictures,
    )


def clip_task() -> Task:
    """`CLIP_FRAMES` frames of the two-people clip as the descriptors that `vidops segment` clusters, from frozen
    ImageNet weights; what moves is told apart by its place more than there."""
    video = read_video(str(assets.fetch(DEMO)), max_frames=CLIP_FRAMES)
    net = features.MobileNetV2.from_file(assets.fetch("mobilenet_v2"))
    maps = features.extract(net, torch.from_numpy(video.frames), CLIP_SIZE, descriptors.LAYERS)
    grid = (CLIP_SIZE[0] // descriptors.STRIDE, CLIP_SIZE[1] // descriptors.STRIDE)
    found = descriptors.build(
        maps, grid, ratio=CLIP_FRAMES, settings=descriptors.DescriptorSettings(moving_place=MOVING_PLACE)
    )
    tokens = found.q[:, 0, :, :-1]  # its last channel is the constant that a kernel of distances needs
    return feature_task(video, tokens, grid, scoring.read_masks(DEMO_MASKS))


def feature_task(
    video: Video,
    tokens: torch.Tensor,
    grid: tuple[int, int],
    masks: scoring.ReferenceMasks,
    *,
    batch: int = 2,
    frames: int = 4,
    slots: int = 8,
) -> Task:
    """Windows of `frames` frames of a clip's tokens (T, rows * columns, channels), which are also what is rebuilt.

    The windows are longer than those of sprites: slots are scored over the whole clip, and drift where they were
    trained on two frames.
    """
    dim, channels = 48, tokens.shape[2]
    clip = tokens - tokens.mean((0, 1))
    clip = clip / clip.std().clamp_min(1e-6)

    def windows(generator: torch.Generator) -> torch.Tensor:
        first = torch.randint(len(clip) - frames + 1, (batch,), generator=generator)
        return torch.stack([clip[t : t + frames] for t in first.tolist()])

    return Task(
        name="clip",
        model=lambda: FeatureTracker(grid, channels, slots, dim),
        learning_rate=1e-3,
        slots=slots,
        dim=dim,
        batch=windows,
        target=lambda clips: clips.mT.unflatten(3, grid),
        test=clip[None],
        score=lambda labels: float(scoring.score(labels[0], video.indices, masks)["fg_ari"]),
        pictures=video.frames[None],
    )


TASKS: dict[str, Callable[[], Task]] = {"sprites": sprite_task, "clip": clip_task}
