"""The command line of ``vidops classify``: options, order of work, messages and exit codes."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vidops
from vidops import assets
from vidops._commands import failed, guarded
from vidops._options import Parser, UsageError, device_of, number, whole
from vidops._output import OutputFolder
from vidops._progress import Stages
from vidops.classify import pictures
from vidops.classify.labels import read_labels
from vidops.models import sta
from vidops.models.ssl_uvos import NORMALISATIONS
from vidops.segment.command import DEMO
from vidops.video import Video, read_video, write_video

FILES = ["tokens.mp4", "tokens.png", "report.json"]
PREFIX = "sta_"
TOP = 5
RANDOM = "random weights (no --checkpoint): the classes mean nothing, the tokens are those that such a model keeps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to `parser`; `run` takes what it parses."""
    parser.add_argument("video", nargs="?", metavar="VIDEO", help="any video FFmpeg reads")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for " + ", ".join(FILES))
    parser.add_argument("--demo", action="store_true", help="fetch the two-people clip and take that")
    parser.add_argument("--model", metavar="NAME", help=f"one of {', '.join(PREFIX + name for name in sta.CONFIGS)} "
                        "(default sta_vit_base, or what the config.json beside --checkpoint says)")
    parser.add_argument("--checkpoint", metavar="FILE", help="fine-tuned VideoMAE weights in the authors' or in "
                        "Hugging Face's layout, or a folder of the latter (default: random weights)")
    parser.add_argument("--classes", type=whole(1, 1_000_000), help="of the checkpoint (default 400)")
    parser.add_argument("--labels", metavar="FILE", help="names of the classes: a line each, or JSON")
    parser.add_argument("--r", type=whole(0, 100_000), default=48,
                        help="tokens that a group loses in each of three calls (default 48; 0 prunes nothing)")
    parser.add_argument("--start", type=number, default=0.0, metavar="S", help="seconds (default 0)")
    parser.add_argument("--end", type=number, metavar="S",
                        help="seconds (default: to the end); the model's frames are spread evenly in between")
    parser.add_argument("--repeats", type=whole(1, 1000), default=3,
                        help="timed forwards of each kind, taken in turns (default 3)")
    parser.add_argument("--seed", type=whole(0, 2**31 - 1), default=0, help="of random weights (default 0)")
    parser.add_argument("--backend", choices=vidops.BACKENDS, help="backend of every op (default: best one ready)")
    parser.add_argument("--device", metavar="DEV", help="torch device (default: cuda if there is a card, else cpu)")
    parser.add_argument("--allow-damaged", action="store_true", help="use what decodes of a damaged video")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def _config(args: argparse.Namespace) -> sta.VideoViTConfig | None:
    """What the options say of the model; None where the checkpoint's folder says it."""
    folder = args.checkpoint is not None and Path(args.checkpoint).is_dir()
    if args.model is None and folder:
        if args.classes is not None:
            raise UsageError("--classes: config.json says it")
        return None
    name = (args.model or "sta_vit_base").removeprefix(PREFIX)
    if name not in sta.CONFIGS:
        known = ", ".join(PREFIX + known for known in sta.CONFIGS)
        raise UsageError(f"--model: expected one of {known}, got {args.model!r}")
    config = sta.CONFIGS[name]
    return config if args.classes is None else replace(config, classes=args.classes)


def _model(args: argparse.Namespace) -> sta.VideoViT:
    config = _config(args)
    if args.checkpoint is not None:
        return sta.VideoViT.from_pretrained(args.checkpoint, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = sta.VideoViT(config or "vit_base")
    return model.eval()


def _clip(video: Video, config: sta.VideoViTConfig) -> torch.Tensor:
    """(1, 3, T, H, W): the centre of the frames, normalised; a short video stands still at its last frame."""
    return sta.views(
        torch.from_numpy(video.frames), frames=config.frames, stride=1, clips=1, crops=1, size=config.img_size
    )


def _pixels(clip: torch.Tensor) -> pictures.Frames:
    """What the model saw, as frames (T, H, W, 3)."""
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in NORMALISATIONS["train"])
    return (255 * (clip[0].cpu() * std + mean)).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def dropped_by(trace: sta.Trace, grid: tuple[int, int, int]) -> pictures.Dropped:
    """Of every token of the clip the call that drops it, 0 where it is kept to the end (t, h, w)."""
    dropped = np.zeros(grid, np.int64)
    for call, stage in reversed(list(enumerate(trace.stages, start=1))):
        dropped[~stage.mask(grid)[0].cpu().numpy()] = call
    return dropped


def _seconds(model: sta.VideoViT, r: int, forward: Callable[[], Any], device: torch.device) -> float:
    model.r = r
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    forward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _top(logits: torch.Tensor, names: list[str] | None) -> list[dict[str, Any]]:
    share = logits[0].float().softmax(-1).cpu()
    values, numbers = share.topk(min(TOP, len(share)))
    return [
        {"class": number, "name": names[number] if names else None, "probability": round(value, 6)}
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True)
    ]


@torch.inference_mode()
def _classify(args: argparse.Namespace, stages: Stages) -> dict[str, Any]:
    if args.demo == (args.video is not None):
        raise UsageError("expected either a VIDEO or --demo")
    if args.end is not None and args.end <= args.start:
        raise UsageError(f"--end {args.end:g} is not after --start {args.start:g}")
    device = device_of(args.device)
    path = str(assets.fetch(DEMO)) if args.demo else args.video
    with OutputFolder(args.output) as out:
        with stages.stage("weights"):
            model = _model(args)
        config = model.config
        try:
            left = sta.tokens_after(config, args.r)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        names = None if args.labels is None else read_labels(args.labels, config.classes)
        with stages.stage("decode") as advance:
            video = read_video(
                path, max_frames=config.frames, start=args.start, end=args.end, allow_damaged=args.allow_damaged,
                progress=advance,
            )  # fmt: skip
        model = model.to(device)
        clip = _clip(video, config).to(device)
        with stages.stage("classify", 2 * args.repeats) as advance:
            model.r = 0
            whole_logits = model(clip, backend=args.backend)
            model.r = args.r
            trace = model.trace(clip, backend=args.backend)
            spent: dict[int, list[float]] = {0: [], args.r: []}
            for turn in range(args.repeats):
                for r, seconds in spent.items():
                    seconds.append(_seconds(model, r, lambda: model(clip, backend=args.backend), device))
                advance(2 * turn + 2)
        pixels = _pixels(clip)
        with stages.stage("write"):
            overlaid = pictures.overlays(pixels, dropped_by(trace, config.grid))
            title = f"r = {args.r}: {left[-1] if args.r else config.tokens} of {config.tokens} tokens to the end"
            # Played at the speed of the source.
            step = float(np.median(np.diff(video.times))) if len(video.times) > 1 else 1.0
            rate = min(max(1 / max(step, 1e-3), 1.0), 60.0)
            encoder = write_video(out.file("tokens.mp4"), np.concatenate([pixels, overlaid], 2), rate)
            pictures.write_sheet(out.file("tokens.png"), pixels, overlaid, title)
        # The largest groups that a call may have.
        probe = trace.tokens.new_empty(1, config.tokens, 1)
        pruning = vidops.explain("sta_prune", probe, probe, config.grid[0] // 4, 1, backend=args.backend)
        source = {"codec": video.codec, "size": list(video.source_size), "damage": list(video.damage)}
        report = {
            "vidops": vidops.__version__,
            "video": {"path": path, **source},
            "frames": video.indices.tolist(),
            "model": args.model or ("config.json" if args.checkpoint else "sta_vit_base"),
            "weights": args.checkpoint or RANDOM,
            "load_report": str(model.load_report) if model.load_report else None,
            "r": args.r,
            "tokens": {"start": config.tokens, "after_calls": list(left) if args.r else []},
            "gflops": {"whole": round(sta.gflops(config, 0), 2), "pruned": round(sta.gflops(config, args.r), 2)},
            "seconds_whole": round(statistics.median(spent[0]), 4),
            "seconds_pruned": round(statistics.median(spent[args.r]), 4),
            "top_whole": _top(whole_logits, names),
            "top_pruned": _top(trace.logits, names),
            "backends": {pruning.op: pruning.backend},
            "device": str(device),
            "threads": torch.get_num_threads(),
            "seconds": {name: round(seconds, 3) for name, seconds in stages.seconds.items()},
            "encoder": encoder,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        out.file("report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        out.commit(FILES)
    return report


def _summary(report: dict[str, Any], folder: str) -> str:
    whole_s, pruned_s = report["seconds_whole"], report["seconds_pruned"]
    whole_g, pruned_g = report["gflops"]["whole"], report["gflops"]["pruned"]
    tokens = [report["tokens"]["start"], *report["tokens"]["after_calls"]]
    lines = [
        f"weights   {report['weights']}",
        f"tokens    {' -> '.join(map(str, tokens))}",
        f"forward   r 0: {1e3 * whole_s:.1f} ms   r {report['r']}: {1e3 * pruned_s:.1f} ms   "
        f"{whole_s / pruned_s:.2f} times as fast (multiply-adds {whole_g:.1f} -> {pruned_g:.1f} G: "
        f"{whole_g / pruned_g:.2f})",
        *(f"backend   {op}: {backend}" for op, backend in report["backends"].items()),
    ]
    title = f"{'r 0':<42}r {report['r']}"
    lines.append(f"top {len(report['top_whole'])}     {title}")
    for a, b in zip(report["top_whole"], report["top_pruned"], strict=True):
        shown = [f"{100 * e['probability']:5.1f} %  {(e['name'] or 'class ' + str(e['class']))[:30]}" for e in (a, b)]
        lines.append(f"          {shown[0]:<42}{shown[1]}")
    lines += [f"warning   {text}" for text in report["video"]["damage"]]
    lines.append(f"picture   {Path(folder) / 'tokens.png'}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Do what `args` say: 0, or 2 after one line on stderr when the input or the options cannot be used."""
    advice = "a smaller --model needs less"
    report = guarded("classify", args.output, advice, lambda: _classify(args, Stages(quiet=args.quiet)))
    if isinstance(report, int):
        return report
    if not args.quiet:
        print(_summary(report, args.output))
    return 0


def main(argv: list[str] | None = None) -> int:
    """``vidops classify ARGV``."""
    parser = Parser(prog="vidops classify", description="Classify a video with and without token pruning.")
    add_arguments(parser)
    try:
        args = parser.parse_args(argv)
    except UsageError as error:
        return failed("classify", str(error))
    return run(args)
