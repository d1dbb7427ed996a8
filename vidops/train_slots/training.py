"""The training loop: reconstruction, Adam with warm-up and a cosine, FG-ARI as it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vidops.train_slots.data import Labels, Task
from vidops.train_slots.model import reconstruction_loss

WARM_UP, CLIP_NORM = 100, 1.0


@dataclass
class Point:
    """What an evaluation found: the mean loss of the steps since the last one, and FG-ARI."""

    step: int
    loss: float
    fg_ari: float


@dataclass
class Result:
    model: nn.Module
    points: list[Point]
    losses: list[float]
    labels: Labels  # of the test clips, after the last step
    values: torch.Tensor  # their reconstruction
    seconds: float = 0.0


def learning_rate(most: float, step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARM_UP)
    return most * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    task: Task,
    *,
    steps: int,
    seed: int = 0,
    every: int = 100,
    backend: str | None = None,
    device: torch.device | None = None,
    report: Callable[[Point], None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Result:
    """A model trained from scratch; everything random is drawn on the CPU, from `seed`."""
    device = device or torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.model()
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=task.learning_rate)
    test_noise = torch.randn(len(task.test), task.slots, task.dim, generator=torch.Generator().manual_seed(seed + 1))
    points: list[Point] = []
    losses: list[float] = []
    started = time.perf_counter()

    @torch.no_grad()
    def evaluate(step: int) -> tuple[Labels, torch.Tensor]:
        found = model(task.test.to(device), test_noise.to(device), backend=backend)
        labels = found.labels().cpu().numpy()
        target = task.target(task.test).to(device)
        recent = losses[-every:] or [float(reconstruction_loss(found, target))]
        points.append(Point(step, float(np.mean(recent)), task.score(labels)))
        if report is not None:
            report(points[-1])
        return labels, found.values.cpu()

    last = evaluate(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(task.learning_rate, step, steps)
        clips = task.batch(generator)
        noise = torch.randn(len(clips), task.slots, task.dim, generator=generator)
        found = model(clips.to(device), noise.to(device), backend=backend)
        loss = reconstruction_loss(found, task.target(clips).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        losses.append(loss.item())
        if advance is not None:
            advance(step + 1)
        if (step + 1) % every == 0 or step + 1 == steps:
            last = evaluate(step + 1)
    return Result(model, points, losses, *last, seconds=time.perf_counter() - started)
