"""Pruned VideoMAE ViTs on a card: clips per second of every r, float16, beside the paper's and the ideal ratios.

``python bench/gpu_sta_models.py [--model vit_large] [--batch 32] [--rounds 7] [--json FILE]``: random weights, forwards
that take turns, medians of the faster of calls and graph replays; what the three calls of pruning take of a forward is
measured on tensors of the same shapes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Variant, measure

import vidops
from vidops.models.sta import CONFIGS, VideoViT, VideoViTConfig, gflops, tokens_after

# Of ViT-L: r -> clips per second over those without pruning (figure 5, batch 32, one V100).
PAPER = {0: 1.0, 16: 1.28, 32: 1.54, 48: 1.95, 64: 2.41, 80: 3.2, 96: 4.3}


def prune_all(config: VideoViTConfig, r: int, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The three calls of a forward on (x, keys) of each, one after the other."""
    groups = config.grid[0]
    return [
        vidops.sta_prune(x, keys, groups >> call, r, call == 1).x
        for call, (x, keys) in enumerate(zip(tensors[::2], tensors[1::2], strict=True))
    ]


def call_inputs(config: VideoViTConfig, batch: int, r: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    entering = (config.tokens, *tokens_after(config, r)[:-1])
    widths = config.dim, config.dim // config.heads
    return tuple(like.new_empty(batch, tokens, width).normal_() for tokens in entering for width in widths)


def rows(name: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    config, device = CONFIGS[name], torch.device("cuda")
    model = VideoViT(config).eval().to(device, torch.float16)
    size = config.img_size
    video = torch.randn(batch, 3, config.frames, size, size, device=device, dtype=torch.float16)

    def forward(r: int, clips: torch.Tensor) -> torch.Tensor:
        model.r = r
        return model(clips)

    variants = [Variant(str(r), lambda clips, r=r: forward(r, clips)) for r in PAPER]
    times = measure(variants, [(video,)], device, rounds, 60.0)
    found = []
    for r, paper in PAPER.items():
        ms = times[str(r)].best
        row: dict[str, Any] = {"model": name, "batch": batch, "r": r, "ms": ms, "clips_per_s": 1e3 * batch / ms}
        row |= {"times": times[str(r)].summary(), "ideal": gflops(config, 0) / gflops(config, r)}
        row |= {"ratio": times["0"].best / ms, "paper": paper if name == "vit_large" else None, "calls_share": 0.0}
        if r:
            inputs = call_inputs(config, batch, r, video)
            variant = Variant("calls", lambda *tensors, r=r: prune_all(config, r, tensors))
            row["calls_ms"] = measure([variant], [inputs], device, rounds, 10.0)["calls"].best
            row["calls_share"] = row["calls_ms"] / ms
        found.append(row)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="vit_large", choices=sorted(n for n in CONFIGS if n.startswith("vit")))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write all rows")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_sta_models: torch finds no CUDA device", file=sys.stderr)
        return 2
    with torch.inference_mode():
        found = rows(options.model, options.batch, options.rounds)
    columns = ("ms", 9), ("clips/s", 9), ("r0/x", 7), ("ideal", 7), ("paper", 7), ("3 calls", 9)
    print(f"{'model':10} {'batch':>5} {'r':>3}", *(f"{name:>{width}}" for name, width in columns))
    for row in found:
        paper = "-" if row["paper"] is None else f"{row['paper']:.2f}"
        print(
            f"{row['model']:10} {row['batch']:5} {row['r']:3} {row['ms']:9.3f} {row['clips_per_s']:9.1f} "
            f"{row['ratio']:7.2f} {row['ideal']:7.2f} {paper:>7} {100 * row['calls_share']:7.2f} %"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
