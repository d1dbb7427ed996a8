"""Which way does the square move? Train object tokens and the state-change head over a frozen encoder.

    python examples/object_adapter_motion.py [--steps 500] [--backend reference]

No weights are needed. The encoder is a small random one with sines for positions, which keeps colour and place, and
the teacher of the object embeddings, which the paper takes from CLIP, is left out. So the figure says that the whole
path learns, not how well the method does with DINO or CLIP weights.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

from vidops.models.object_adapter import CONFIGS, LossSettings, ObjectAdapter
from vidops.models.recipe import cosine_lr
from vidops.models.vit import DinoEncoder

DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))
FRAMES, SIDE, SQUARE, SPEED = 4, 32, 8, 4


def batch(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (B, T, 3, H, W) of a resting and of a moving square in any colours, and the direction of the second."""

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    label = draw(0, len(DIRECTIONS), size)
    colours = torch.rand(size, 2, 3, generator=generator) * 2 - 1
    reach = SPEED * (FRAMES - 1)
    rest = draw(0, SIDE - SQUARE + 1, size, 2)
    start = draw(reach, SIDE - SQUARE - reach + 1, size, 2)
    clips = torch.zeros(size, FRAMES, 3, SIDE, SIDE)
    for b in range(size):
        for t in range(FRAMES):
            moved = start[b] + SPEED * t * torch.tensor(DIRECTIONS[int(label[b])])
            for (top, left), colour in ((rest[b].tolist(), colours[b, 0]), (moved.tolist(), colours[b, 1])):
                clips[b, t, :, top : top + SQUARE, left : left + SQUARE] = colour[:, None, None]
    return clips, label


@torch.no_grad()
def see_places(encoder: torch.nn.Module) -> None:
    """Give a fresh encoder what a trained one has: features that tell colours and places apart."""
    assert isinstance(encoder, DinoEncoder)
    torch.nn.init.normal_(encoder.patch_embed.proj.weight, std=0.2)
    places = torch.arange(encoder.grid)
    count = encoder.pos_embed.shape[2] // 4
    angle = places[:, None] * (math.pi / 2 / encoder.grid) * 2 ** (3 * torch.arange(count) / count)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = wave[:, None].expand(-1, encoder.grid, -1), wave.expand(encoder.grid, -1, -1)
    encoder.pos_embed[0, 1:] = 0.3 * torch.cat([rows, columns], dim=2).flatten(0, 1)


def train(model: ObjectAdapter, steps: int, generator: torch.Generator, backend: str | None) -> None:
    base = 2e-3
    optimizer = torch.optim.AdamW(model.parameter_groups(), lr=base)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, total=steps, base=base, final=base / 10)
        clips, label = batch(32, generator)
        teacher = F.normalize(torch.ones(*clips.shape[:2], model.config.embed_dim), dim=-1)
        losses = model.training_step(clips, label, teacher, backend=backend)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4}: cross-entropy {losses.classification.item():.3f}")
    model.eval()


@torch.no_grad()
def accuracy(model: ObjectAdapter, generator: torch.Generator, backend: str | None) -> float:
    clips, label = batch(256, generator)
    found = model(clips, need_state=False, backend=backend).logit.argmax(1)
    return float((found == label).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps (default 500)")
    parser.add_argument("--backend", default=None, help="backend of every op (default: chosen per op)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = replace(CONFIGS["tiny"], patch=4, frames=FRAMES, slots=4, classes=len(DIRECTIONS))
    model = ObjectAdapter(replace(config, losses=LossSettings(distillation=0.0)))
    see_places(model.encoder)
    started = time.perf_counter()
    train(model, arguments.steps, torch.Generator().manual_seed(1), arguments.backend)
    found = accuracy(model, torch.Generator().manual_seed(2), arguments.backend)
    print(f"held-out accuracy {found:.3f} (chance {1 / len(DIRECTIONS):.2f}), {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
