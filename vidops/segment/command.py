"""The command line of ``vidops segment``: options, order of work, messages and exit codes."""

from __future__ import annotations

import argparse
import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vidops
from vidops import assets, features
from vidops._commands import failed, guarded
from vidops._options import Parser, UsageError, device_of, number, whole
from vidops._output import OutputFolder
from vidops._progress import Stages
from vidops.segment import descriptors, pictures, scoring
from vidops.video import Video, read_video, write_video

DEMO = "two_people"
DEMO_MASKS = Path(__file__).with_name("two_people_masks.npz")
FILES = ["overlay.mp4", "contact.png", "labels.npz", "report.json"]
# About as many tokens per frame as make the demo a matter of seconds on two cores; the aspect ratio is kept.
TOKENS = 1620
MAX_SIDE = 2048
CHECKPOINT_SIZE = (192, 384)


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 240x432, got {text!r}")
    height, width = map(int, parts)
    step = descriptors.SIZE_STEP
    if not all(step <= side <= MAX_SIDE and side % step == 0 for side in (height, width)):
        raise argparse.ArgumentTypeError(f"expected multiples of {step} from {step} to {MAX_SIDE}, got {text!r}")
    return height, width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to `parser`; `run` takes what it parses."""
    parser.add_argument("video", nargs="?", metavar="VIDEO", help="any video FFmpeg reads")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for " + ", ".join(FILES))
    parser.add_argument("--demo", action="store_true", help="fetch the two-people clip, segment it and score it")
    parser.add_argument("--frames", type=whole(1, 4096), default=24, help="frames sampled evenly (default 24)")
    parser.add_argument("--start", type=number, default=0.0, metavar="S", help="seconds (default 0)")
    parser.add_argument("--end", type=number, metavar="S", help="seconds (default: to the end)")
    parser.add_argument("--size", type=_size, metavar="HxW", help="size the network sees (default: by aspect ratio)")
    parser.add_argument("--tau", type=number, default=1.0, help="threshold of the clustering in nats (default 1)")
    parser.add_argument("--window", type=whole(1, 4096), default=3, help="frames clustered together (default 3)")
    parser.add_argument("--ratio", type=whole(1, 4096), help="every ratio-th frame is a key frame (default 8, 10 "
                        "with --checkpoint)")
    parser.add_argument("--motion", choices=("auto", "on", "off"), default="auto",
                        help="change against the clip's median, for static cameras (default auto)")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights of the ssl_uvos model, .pth or .safetensors")
    parser.add_argument("--model", default="vit_small_8", metavar="NAME", help="configuration of --checkpoint")
    parser.add_argument("--weights", metavar="FILE", help="MobileNetV2 weights (default: fetched once, then cached)")
    parser.add_argument("--backend", choices=vidops.BACKENDS, help="backend of every op (default: best one ready)")
    parser.add_argument("--device", metavar="DEV", help="torch device (default: cuda if there is a card, else cpu)")
    parser.add_argument("--masks", metavar="FILE", help="reference masks .npz to score against")
    parser.add_argument("--allow-damaged", action="store_true", help="use what decodes of a damaged video")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


@dataclass(frozen=True)
class _Tokens:
    """Queries and keys of a clip, and how they came about."""

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    grid: tuple[int, int]
    size: tuple[int, int]
    ratio: int
    method: dict[str, Any]


def default_size(height: int, width: int) -> tuple[int, int]:
    """A network size with about `TOKENS` tokens and the video's aspect ratio, in multiples of `SIZE_STEP`."""
    step = descriptors.SIZE_STEP
    factor = math.sqrt(TOKENS * descriptors.STRIDE**2 / (height * width))
    bounded = (min(max(round(side * factor / step), 2), MAX_SIDE // step // 2) for side in (height, width))
    rows, columns = (side * step for side in bounded)
    return rows, columns


def _imagenet_tokens(args: argparse.Namespace, video: Video, device: torch.device, stages: Stages) -> _Tokens:
    height, width = video.frames.shape[1:3]
    size = args.size or default_size(height, width)
    grid = (size[0] // descriptors.STRIDE, size[1] // descriptors.STRIDE)
    ratio = args.ratio or 8
    with stages.stage("weights"):
        path = args.weights or assets.fetch("mobilenet_v2")
        net = features.MobileNetV2.from_file(path).to(device)
    frames = torch.from_numpy(video.frames)
    with stages.stage("features", len(frames)) as advance:
        maps = features.extract(net, frames, size, descriptors.LAYERS, progress=advance)
    settings = descriptors.DescriptorSettings()
    with stages.stage("descriptors", len(frames)) as advance:
        found = descriptors.build(
            maps, grid, ratio=ratio, motion=args.motion, settings=settings, progress=advance
        )
    used = found.change is not None
    cues = "appearance, change against the median, carried place" if used else "appearance, place"
    method = {
        "features": "MobileNetV2, ImageNet weights, frozen; no spatio-temporal block, nothing is trained",
        "weights": str(path),
        "descriptor": f"Gaussian kernel over: {cues}",
        "motion_cue": used,
        "temporal_variation": round(found.variation, 4),
        "settings": asdict(settings),
    }
    return _Tokens(found.q, found.k, 1.0, grid, size, ratio, method)


def _checkpoint_tokens(args: argparse.Namespace, video: Video, device: torch.device, stages: Stages) -> _Tokens:
    # The model pulls in the whole of vidops.models, which a run without a checkpoint does not need.
    from vidops.models import ssl_uvos

    if args.model not in ssl_uvos.CONFIGS:
        raise UsageError(f"--model: expected one of {', '.join(ssl_uvos.CONFIGS)}, got {args.model!r}")
    size = args.size or CHECKPOINT_SIZE
    ratio = args.ratio or 10
    with stages.stage("weights"):
        model = ssl_uvos.SSLUVOS.from_pretrained(args.checkpoint, args.model).to(device)
    patch = model.config.patch
    images = ssl_uvos.preprocess(torch.from_numpy(video.frames), size=size, patch=patch)
    with stages.stage("features", len(images)) as advance:
        q, k = model.queries_keys(images, ratio=ratio, progress=advance, backend=args.backend)
    method = {
        "features": f"ssl_uvos {args.model} from a checkpoint: encoder keys and spatio-temporal block",
        "weights": args.checkpoint,
        "descriptor": "queries and keys of the spatio-temporal block",
        "load_report": str(model.load_report),
    }
    scale = float(q.shape[-1]) ** -0.5
    return _Tokens(q, k, scale, (size[0] // patch, size[1] // patch), size, ratio, method)


def _backends(args: argparse.Namespace, tokens: _Tokens) -> dict[str, str | None]:
    """The backend of each op of the clustering for these very tensors."""
    plan = vidops.explain("hierarchical_cluster", tokens.q, tokens.k, args.tau, args.window, backend=args.backend)
    return {part.op: part.backend for part in plan.parts}


def _sources(args: argparse.Namespace) -> tuple[str, str | None]:
    """The video and the masks that the options name."""
    if args.demo == (args.video is not None):
        raise UsageError("expected either a VIDEO or --demo")
    if args.end is not None and args.end <= args.start:
        raise UsageError(f"--end {args.end:g} is not after --start {args.start:g}")
    if args.demo:
        return str(assets.fetch(DEMO)), args.masks or str(DEMO_MASKS)
    return args.video, args.masks


def _segment(args: argparse.Namespace, stages: Stages) -> dict[str, Any]:
    path, mask_path = _sources(args)
    device = device_of(args.device)
    with OutputFolder(args.output) as out:
        masks = None if mask_path is None else scoring.read_masks(mask_path)
        with stages.stage("decode") as advance:
            video = read_video(
                path,
                max_frames=args.frames,
                start=args.start,
                end=args.end,
                allow_damaged=args.allow_damaged,
                progress=advance,
            )
        make = _checkpoint_tokens if args.checkpoint else _imagenet_tokens
        tokens = make(args, video, device, stages)
        with stages.stage("cluster"):
            backends = _backends(args, tokens)
            clusters, details = vidops.hierarchical_cluster(
                tokens.q,
                tokens.k,
                args.tau,
                args.window,
                scale=tokens.scale,
                backend=args.backend,
                return_details=True,
            )
            labels = clusters.labels.view(-1, *tokens.grid).cpu().numpy()
        count = len(clusters.centroids)
        scores = None
        if masks is not None:
            with stages.stage("score"):
                scores = scoring.score(labels, video.indices, masks)
        with stages.stage("write"):
            encoder = _write(out, video, labels, count, tokens, args)
        report = {
            "vidops": vidops.__version__,
            "video": {
                "path": path,
                "codec": video.codec,
                "container": video.container,
                "size": list(video.source_size),
                "rate": video.rate,
                "decoded_frames": video.decoded,
                "damage": list(video.damage),
            },
            "frames": video.indices.tolist(),
            "size": list(tokens.size),
            "grid": list(tokens.grid),
            "options": {"tau": args.tau, "window": args.window, "ratio": tokens.ratio, "motion": args.motion},
            "method": tokens.method,
            "clusters": count,
            "levels": details.level_sizes,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "backends": backends,
            "seconds": {name: round(spent, 3) for name, spent in stages.seconds.items()},
            "scores": scores,
            "encoder": encoder,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        out.file("report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        out.commit(FILES)
    return report


def _write(
    out: OutputFolder, video: Video, labels: np.ndarray, count: int, tokens: _Tokens, args: argparse.Namespace
) -> str:
    """Overlay video, contact sheet and labels into `out`; returns the video encoder's name."""
    overlaid = pictures.overlays(video.frames, labels)
    steps = np.diff(video.times)
    # Played at the speed of the source: as many frames a second as were sampled from one.
    rate = min(1 / float(np.median(steps)), 60.0) if len(steps) and np.median(steps) > 0 else 1.0
    encoder = write_video(out.file("overlay.mp4"), overlaid, rate)
    pictures.write_contact_sheet(out.file("contact.png"), video.frames, overlaid, video.times)
    config = {"tau": args.tau, "window": args.window, "ratio": tokens.ratio, "size": list(tokens.size)}
    np.savez_compressed(
        out.file("labels.npz"),
        labels=labels.astype(np.uint16 if count <= 2**16 else np.int32),
        frames=video.indices,
        times=video.times,
        clusters=np.int64(count),
        config=np.array(json.dumps(config)),
    )
    return encoder


def _summary(report: dict[str, Any], folder: str) -> str:
    height, width = report["grid"]
    spent = "  ".join(f"{name} {seconds:.1f}" for name, seconds in report["seconds"].items())
    ran: dict[str, list[str]] = {}
    for op, backend in report["backends"].items():
        ran.setdefault(str(backend), []).append(op)
    lines = [
        f"{len(report['frames'])} of {report['video']['decoded_frames']} frames, {height}x{width} tokens each, "
        f"{report['clusters']} clusters",
        f"features  {report['method']['features']}",
        f"rows      {report['method']['descriptor']}",
        *(f"backend   {backend}: {', '.join(ops)}" for backend, ops in ran.items()),
        f"seconds   {spent}",
    ]
    lines += [f"warning   {text}" for text in report["video"]["damage"]]
    if report["scores"]:
        for name, entry in report["scores"]["objects"].items():
            lines.append(
                f"score     {name}: IoU {entry['iou_mean']:.3f} over {entry['frames']} frames "
                f"(cluster {entry['cluster']}; tube IoU {entry['iou_tube']:.3f})"
            )
        indices = [f"{name} {report['scores'][key]:.3f}" for key, name in (("ari", "ARI"), ("fg_ari", "FG-ARI"))
                   if key in report["scores"]]
        if indices:
            lines.append(f"score     {'  '.join(indices)}")
    lines.append(f"picture   {Path(folder) / 'contact.png'}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Do what `args` say: 0, or 2 after one line on stderr when the input or the options cannot be used."""
    advice = "a smaller --size or fewer --frames need less"
    report = guarded("segment", args.output, advice, lambda: _segment(args, Stages(quiet=args.quiet)))
    if isinstance(report, int):
        return report
    if not args.quiet:
        print(_summary(report, args.output))
    return 0


def main(argv: list[str] | None = None) -> int:
    """``vidops segment ARGV``."""
    parser = Parser(prog="vidops segment", description="Segment the objects of a video over space and time.")
    add_arguments(parser)
    try:
        args = parser.parse_args(argv)
    except UsageError as error:
        return failed("segment", str(error))
    return run(args)
