"""Whole forwards of pruned VideoMAE ViTs against the unpruned one: how near the time comes to the multiply-adds saved.

``python bench/sta_models.py [--models vit_small,...] [--batch 1] [--rounds 3] [--plot FILE.png]``: interleaved medians
of one-thread CPU time for every r, random weights; the share of the forward that the calls of pruning take is measured
on tensors of the same shapes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from ratios import compare

import vidops
from vidops.models.sta import CALLS, CONFIGS, VideoViT, gflops, tokens_after

DROPS = (0, 16, 32, 48, 64, 80, 96)
Curve = list[tuple[int, float, float]]  # r, multiply-adds and time of r = 0 over those of r


def pruning_calls(name: str, batch: int, r: int) -> list[object]:
    """The three calls of a forward, on tensors of their shapes."""
    config = CONFIGS[name]
    tokens, calls = config.tokens, []
    for call, left in enumerate(tokens_after(config, r)):
        x, keys = torch.randn(batch, tokens, config.dim), torch.randn(batch, tokens, config.dim // config.heads)
        groups = config.grid[0] >> call
        calls.append(lambda x=x, keys=keys, groups=groups, call=call: vidops.sta_prune(x, keys, groups, r, call == 1))
        tokens = left
    assert len(calls) == CALLS
    return calls


def measure(name: str, batch: int, rounds: int) -> Curve:
    config = CONFIGS[name]
    model = VideoViT(config).eval()
    video = torch.randn(batch, 3, config.frames, config.img_size, config.img_size)

    def forward(r: int) -> torch.Tensor:
        model.r = r
        return model(video)

    times = compare({str(r): lambda r=r: forward(r) for r in DROPS}, rounds)
    curve: Curve = []
    for r in DROPS:
        ideal, got = gflops(config, 0) / gflops(config, r), times["0"] / times[str(r)]
        share = 0.0
        if r:
            parts = compare({str(i): call for i, call in enumerate(pruning_calls(name, batch, r))}, rounds)
            share = sum(parts.values()) / times[str(r)]
        print(
            f"{name:10} {batch:5} {r:3} {times[str(r)] * 1e3:10.1f} {got:8.3f} {ideal:8.3f} {got / ideal:10.3f} "
            f"{100 * share:8.2f} %",
            flush=True,
        )
        curve.append((r, ideal, got))
    return curve


def plot(path: Path, curves: dict[str, Curve], title: str) -> None:
    """Speed-up against the ratio of multiply-adds; on the diagonal all that is saved is gained."""
    from PIL import Image, ImageDraw

    size, margin = 420, 48
    most = max(max(ideal, got) for curve in curves.values() for _, ideal, got in curve) * 1.05
    picture = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(picture)

    def place(x: float, y: float) -> tuple[float, float]:
        room = size - 2 * margin
        return margin + room * (x - 1) / (most - 1), size - margin - room * (y - 1) / (most - 1)

    for tick in range(1, int(most) + 1):
        draw.line((*place(tick, 1), *place(tick, most)), fill=(225, 225, 225))
        draw.line((*place(1, tick), *place(most, tick)), fill=(225, 225, 225))
        draw.text((place(tick, 1)[0] - 3, size - margin + 6), str(tick), fill="black")
        draw.text((margin - 16, place(1, tick)[1] - 6), str(tick), fill="black")
    draw.line((*place(1, 1), *place(most, most)), fill=(150, 150, 150))
    draw.text((margin, 10), title, fill="black")
    draw.text((size // 2 - 70, size - 22), "multiply-adds saved, times", fill="black")
    draw.text((6, margin - 18), "speed-up", fill="black")
    for number, (name, curve) in enumerate(curves.items()):
        colour = ((30, 90, 200), (200, 80, 40), (40, 150, 70))[number % 3]
        points = [place(ideal, got) for _, ideal, got in curve]
        draw.line(points, fill=colour, width=2)
        for (r, _, _), (x, y) in zip(curve, points, strict=True):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            if number == 0 and r:
                draw.text((x - 6, y - 18), str(r), fill=colour)
        draw.text((margin + 10, margin + 4 + 14 * number), name, fill=colour)
    picture.save(path, format="PNG", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="vit_small,vit_base")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("CPU ms", 10), ("r0/x", 8), ("ideal", 8), ("of ideal", 10), ("3 calls", 10)
    print(f"{'model':10} {'batch':>5} {'r':>3}", *(f"{name:>{width}}" for name, width in columns))
    with torch.inference_mode():
        curves = {name: measure(name, options.batch, options.rounds) for name in options.models.split(",")}
    if options.plot:
        plot(options.plot, curves, f"VideoMAE ViT, batch {options.batch}, one CPU thread, float32; labels: r")


if __name__ == "__main__":
    main()
