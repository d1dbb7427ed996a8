"""Two squares cross a striped background: train the spatio-temporal block on the clip, then segment it.

    python examples/ssl_uvos_synthetic.py [--steps 80] [--tau 0.03] [--backend reference]

No weights are needed. The encoder is a small random one, which keeps colour and place but knows no objects,
and the threshold is chosen for this clip (at the paper's 1.0 one square stays with the background). So the
figures say that the whole path works, not how well the method does with DINO weights.
"""

from __future__ import annotations

import argparse
import time

import torch

from vidops.evaluation import fg_ari, mean_iou, upsample_nearest
from vidops.models.ssl_uvos import SSLUVOS, cosine_lr, parameter_groups, preprocess, with_losses

FRAMES, HEIGHT, WIDTH, SIDE = 12, 64, 96, 24


def moving_squares() -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (T, H, W, 3) uint8 and object ids (T, H, W), 0 for the background."""
    rows = torch.arange(HEIGHT)[:, None].expand(HEIGHT, WIDTH)
    background = torch.stack([60 + (rows // 8 % 2) * 8] * 3, dim=-1).to(torch.uint8)
    frames = background.repeat(FRAMES, 1, 1, 1)
    ids = torch.zeros(FRAMES, HEIGHT, WIDTH, dtype=torch.int64)
    for t in range(FRAMES):
        travelled = t * (WIDTH - SIDE) // (FRAMES - 1)
        squares = ((8, travelled, (230, 60, 40)), (32, WIDTH - SIDE - travelled, (40, 90, 230)))
        for number, (top, left, colour) in enumerate(squares, start=1):
            where = (t, slice(top, top + SIDE), slice(left, left + SIDE))
            frames[where] = torch.tensor(colour, dtype=torch.uint8)
            ids[where] = number
    return frames, ids


def train(model: SSLUVOS, video: torch.Tensor, steps: int, backend: str | None) -> list[float]:
    """A few steps of the paper's recipe on three-frame clips of the video; returns the losses."""
    base = 1e-3
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=base)
    model.train()
    history = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, total=steps, base=base, final=base / 10)
        start = int(torch.randint(0, len(video) - 4, ()))
        losses = model.training_step(video[None, start : start + 5 : 2], backend=backend)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(losses.total.item())
    model.eval()
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="training steps (default 80)")
    parser.add_argument("--tau", type=float, default=0.03, help="clustering threshold (default 0.03)")
    parser.add_argument("--backend", default=None, help="backend of every op (default: chosen per op)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    frames, ids = moving_squares()
    # Counts that fit 96 patches per frame; the paper's are for 1152.
    config = with_losses(
        "tiny", semantic_positives=4, semantic_negatives=40, motion_positives=3, motion_negatives=20
    )
    model = SSLUVOS(config)
    video = preprocess(frames, size=-1)

    started = time.perf_counter()
    history = train(model, video, arguments.steps, arguments.backend)
    if history:
        print(f"trained {len(history)} steps: loss {history[0]:.3f} -> {history[-1]:.3f}")
    found = model.segment(video, tau=arguments.tau, ratio=4, backend=arguments.backend)
    seconds = time.perf_counter() - started

    labels = upsample_nearest(found.labels.numpy(), (HEIGHT, WIDTH))
    print(f"{found.num_clusters} clusters in {seconds:.1f} s")
    print(f"FG-ARI {fg_ari(ids.numpy(), labels):.3f}, mIoU {mean_iou(ids.numpy(), labels):.3f}")
    symbols = ".#o+x*%@=-"
    for t in (0, FRAMES // 2, FRAMES - 1):
        print(f"frame {t}")
        for row in found.labels[t].tolist():
            print("  " + "".join(symbols[label % len(symbols)] for label in row))


if __name__ == "__main__":
    main()
