"""Two squares cross a striped background: train two-stage slots on the clip, then look for the squares.

    python examples/smtc_discovery.py [--steps 150] [--backend reference]

No weights are needed. The encoder is a small random one, which keeps colour and knows no objects. So the figures say
that the whole path works (two views, teacher, three losses, discovery), not how well the method does with DINO weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace

import torch

from vidops.models.recipe import cosine_lr, encoder_lr, parameter_groups
from vidops.models.smtc import CONFIGS, DISCOVERY_ITERS, SMTC, update_teacher

FRAMES, HEIGHT, WIDTH, SIDE = 12, 64, 64, 24


def moving_squares() -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (T, 3, H, W) around 0 and the squares' masks (2, T, H, W)."""
    rows = torch.arange(HEIGHT)[:, None].expand(HEIGHT, WIDTH)
    frames = (-0.5 + 0.1 * (rows // 8 % 2)).expand(FRAMES, 3, -1, -1).clone()
    masks = torch.zeros(2, FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    for t in range(FRAMES):
        travelled = t * (WIDTH - SIDE) // (FRAMES - 1)
        squares = ((4, travelled, (1.5, -0.5, -0.8)), (36, WIDTH - SIDE - travelled, (-0.8, -0.4, 1.5)))
        for number, (top, left, colour) in enumerate(squares):
            frames[t, :, top : top + SIDE, left : left + SIDE] = torch.tensor(colour)[:, None, None]
            masks[number, t, top : top + SIDE, left : left + SIDE] = True
    return frames, masks


def view(clip: torch.Tensor) -> torch.Tensor:
    """One draw of brightness and contrast per clip, in the place of the recipe's augmentation."""
    return clip * (0.8 + 0.4 * torch.rand(())) + 0.2 * torch.randn(3, 1, 1)


def train(model: SMTC, video: torch.Tensor, steps: int, backend: str | None) -> list[float]:
    base = 1e-3
    teacher = copy.deepcopy(model).requires_grad_(False)
    groups = parameter_groups(model, encoder="encoder.")
    optimizer = torch.optim.AdamW(groups, lr=base)
    model.train()
    history = []
    for step in range(steps):
        lr = cosine_lr(step, total=steps, base=base, final=base / 10)
        for group in optimizer.param_groups:
            group["lr"] = encoder_lr(step, lr, start=steps // 3) if group["name"].startswith("encoder") else lr
        start = int(torch.randint(0, len(video) - 3, ()))
        clip = video[None, start : start + 4]
        losses = model.training_step(view(clip), teacher, view(clip), backend=backend)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        update_teacher(teacher, model, momentum=0.99)
        history.append(losses.total.item())
    model.eval()
    return history


def best_iou(model: SMTC, video: torch.Tensor, masks: torch.Tensor, backend: str | None) -> list[float]:
    """For each square, the mean over frames of the IoU of the proposal that fits it best."""
    found = model.discover(video, iters=DISCOVERY_ITERS, backend=backend).proposals((HEIGHT, WIDTH))
    both = (found[None] & masks[:, None]).sum((-2, -1))
    either = (found[None] | masks[:, None]).sum((-2, -1))
    return (both / either.clamp_min(1)).amax(1).mean(1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps (default 150)")
    parser.add_argument("--backend", default=None, help="backend of every op (default: chosen per op)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    video, masks = moving_squares()
    model = SMTC(replace(CONFIGS["tiny"], grid=(8, 8)))
    started = time.perf_counter()
    before = best_iou(model.eval(), video, masks, arguments.backend)
    print("IoU of the two squares before training: {:.3f}, {:.3f}".format(*before))
    history = train(model, video, arguments.steps, arguments.backend)
    if history:
        print(f"trained {len(history)} steps: loss {history[0]:.3f} -> {history[-1]:.3f}")
    found = best_iou(model, video, masks, arguments.backend)
    print("IoU of the two squares after training: {:.3f}, {:.3f}".format(*found))
    print(f"{time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
