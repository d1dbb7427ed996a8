"""One frame of label propagation at the paper's two grids against the public algorithm in eager PyTorch, materialised.

``python bench/propagation.py [rounds] [--long]``: interleaved medians of one-thread CPU time, error beside time.
``--long`` adds the finer grid, where the eager form holds 3.4 GB of affinities.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

import vidops

CHANNELS, FRAMES, LABELS, TEMPERATURE = 384, 21, 5, 0.2
LIMIT = 2e-5
APART = 1e-5  # of affinities whose order no rounding changes


@dataclass(frozen=True)
class Workload:
    name: str
    grid: tuple[int, int]
    radius: float
    top_k: int


SHORT = Workload("30 x 53, radius 7, k 7", (30, 53), 7.0, 7)
LONG = Workload("60 x 106, radius 35, k 28", (60, 106), 35.0, 28)


@dataclass(frozen=True)
class Frame:
    query: torch.Tensor
    context: torch.Tensor
    labels: torch.Tensor


def frame(w: Workload) -> Frame:
    """Features of a scene that drifts: smooth over the grid, moved by a position every few frames, noise on top."""
    g = torch.Generator().manual_seed(0)
    height, width = w.grid
    coarse = torch.randn(1, CHANNELS, height // 6 + 2, (width + FRAMES) // 6 + 2, generator=g)
    scene = torch.nn.functional.interpolate(coarse, size=(height, width + FRAMES), mode="bilinear")[0]
    clip = torch.stack([scene[:, :, f // 3 : f // 3 + width] for f in range(FRAMES + 1)])
    clip = clip + 0.5 * torch.randn(clip.shape, generator=g)
    rows = torch.nn.functional.normalize(clip.flatten(2).transpose(1, 2), dim=-1).contiguous()
    labels = torch.randn(FRAMES, height * width, LABELS, generator=g).mul(3).softmax(-1)
    return Frame(rows[FRAMES], rows[:FRAMES], labels)


def eager(f: Frame, w: Workload, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels, and the best affinities of every query: all affinities, the mask added, top-k, softmax."""
    tokens = len(f.query)
    affinity = (f.query @ f.context.flatten(0, 1).T).view(tokens, FRAMES, tokens)
    place = torch.arange(tokens, device=f.query.device)
    y, x = place // w.grid[1], place % w.grid[1]
    distance = ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2).float().sqrt()
    affinity[:, 1:] += torch.where(distance < w.radius, 0.0, -1e10)[:, None]
    value, index = affinity.view(tokens, -1).topk(w.top_k + extra, dim=1)
    weight = (value[:, : w.top_k] / TEMPERATURE).softmax(1)
    labels = f.labels.flatten(0, 1)[index[:, : w.top_k]]
    return (weight[..., None] * labels).sum(1), value


def native(f: Frame, w: Workload) -> torch.Tensor:
    return vidops.label_propagation(
        f.query, f.context, f.labels, w.grid, top_k=w.top_k, radius=w.radius, temperature=TEMPERATURE
    )


def variants(f: Frame, w: Workload) -> dict[str, Callable[[], torch.Tensor]]:
    return {"eager": lambda: eager(f, w)[0], "cpu": lambda: native(f, w)}


def clear(f: Frame, w: Workload) -> torch.Tensor:
    """Queries whose k-th affinity is apart from the next: the others may take either."""
    value = eager(f, w, extra=1)[1]
    return value[:, -2] - value[:, -1] > APART


def error(got: torch.Tensor, want: torch.Tensor, rows: torch.Tensor) -> float:
    return float((got - want)[rows].abs().max() / want.abs().max())


def main(arguments: list[str]) -> int:
    from ratios import compare

    torch.set_num_threads(1)
    long = "--long" in arguments
    rounds = next((int(a) for a in arguments if a.isdigit()), 7)
    failures = 0
    print(f"{'label propagation':26} {'variant':8} {'CPU ms':>10} {'eager/x':>8} {'error':>9} {'queries compared':>17}")
    for w in (SHORT, LONG) if long else (SHORT,):
        f = frame(w)
        calls, rows = variants(f, w), clear(f, w)
        want = calls["eager"]()
        errors = {name: error(call(), want, rows) for name, call in calls.items()}
        times = compare(calls, rounds if w is SHORT else 1)
        for name in calls:
            failures += not errors[name] <= LIMIT
            shown = f"{times[name] * 1e3:10.4g} {times['eager'] / times[name]:8.2f} {errors[name]:9.1e}"
            print(f"{w.name:26} {name:8} {shown} {int(rows.sum()):>8} of {len(rows)}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
