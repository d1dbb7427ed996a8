"""A square changes its colour on its way: train a small video transformer to tell which colour came first, then prune.

    python examples/sta_pruning.py [--steps 150] [--backend reference]

No weights are needed. Nothing is trained for the pruning: the same weights are tested with ever more tokens dropped.
"""

from __future__ import annotations

import argparse
import time

import torch

import vidops
from vidops.models.sta import VideoViT, VideoViTConfig, gflops, tokens_after

CONFIG = VideoViTConfig(img_size=32, patch=8, classes=4, dim=48, depth=6, heads=4, hidden=96, init_scale=1.0)
COLOURS = torch.tensor([[2.0, -0.5, -0.5], [-0.5, 2.0, -0.5], [-0.5, -0.5, 2.0]])
ORDERS = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 0]])  # classes: the first colour and the second
SIDE, BATCH = 10, 16


def clips(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Videos (count, 3, 16, 32, 32) of a square that moves over a still texture, and their classes (count,)."""
    label = torch.randint(len(ORDERS), (count,), generator=generator)
    ground = 0.4 * torch.randn(count, 3, 1, CONFIG.img_size, CONFIG.img_size, generator=generator)
    video = ground.repeat(1, 1, CONFIG.frames, 1, 1)
    room = CONFIG.img_size - SIDE
    for i in range(count):
        ends = torch.randint(0, room + 1, (2, 2), generator=generator)
        for t in range(CONFIG.frames):
            top, left = torch.lerp(ends[0].float(), ends[1].float(), t / (CONFIG.frames - 1)).round().int().tolist()
            colour = COLOURS[ORDERS[label[i], 2 * t // CONFIG.frames]]
            video[i, :, t, top : top + SIDE, left : left + SIDE] = colour[:, None, None]
    return video, label


def train(model: VideoViT, steps: int, backend: str | None) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 1))
    losses = []
    model.train()
    for _ in range(steps):
        video, label = clips(BATCH, generator)
        loss = torch.nn.functional.cross_entropy(model(video, backend=backend), label)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return (losses[0], sum(losses[-10:]) / 10) if losses else (0.0, 0.0)


@torch.no_grad()
def accuracy(model: VideoViT, r: int, video: torch.Tensor, label: torch.Tensor, backend: str | None) -> float:
    model.r = r
    return float((model(video, backend=backend).argmax(1) == label).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--backend", choices=vidops.BACKENDS)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = VideoViT(CONFIG)
    start = time.perf_counter()
    first, last = train(model, options.steps, options.backend)
    print(f"loss {first:.3f} -> {last:.3f} in {time.perf_counter() - start:.0f} s")
    video, label = clips(256, torch.Generator().manual_seed(1))
    for r in (0, 2, 4, 6, 8):
        left = tokens_after(CONFIG, r)[-1]
        found = accuracy(model, r, video, label, options.backend)
        print(f"r {r:2}: {left:3} of {CONFIG.tokens} tokens, {gflops(CONFIG, r):.3f} GFLOPs, accuracy {found:.3f}")


if __name__ == "__main__":
    main()
