"""The command line of ``vidops train-slots``: options, order of work, messages and exit codes."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from dataclasses import asdict
from typing import Any

import torch

import vidops
from vidops._commands import failed, guarded
from vidops._options import Parser, UsageError, device_of, whole
from vidops._output import OutputFolder
from vidops._progress import Stages
from vidops.train_slots import pictures
from vidops.train_slots.data import TASKS, Task
from vidops.train_slots.training import Point, Result, train

STEPS = {"sprites": 1500, "clip": 600}
COMPARED = ("reference", "cpu")
# Of the losses of two backends, relative; further runs drift apart, since training amplifies rounding.
TOLERANCE, COMPARED_STEPS = 1e-4, 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to `parser`; `run` takes what it parses."""
    parser.add_argument("-o", "--output", required=True, metavar="OUT",
                        help="folder for DATA_curve.png, DATA_masks.gif, DATA_weights.pt and report.json")
    parser.add_argument("--data", choices=("both", *TASKS), default="both",
                        help="moving sprites, descriptors of the two-people clip, or one after the other (default)")
    steps = ", ".join(f"{count} for {name}" for name, count in STEPS.items())
    parser.add_argument("--steps", type=whole(1, 1_000_000), help=f"training steps (default {steps})")
    parser.add_argument("--every", type=whole(1, 1_000_000), default=100, help="steps between scores (default 100)")
    parser.add_argument("--seed", type=whole(0, 2**31 - 1), default=0, help="of everything random (default 0)")
    parser.add_argument("--backend", choices=vidops.BACKENDS, help="backend of slot attention (default: best ready)")
    parser.add_argument("--compare", action="store_true",
                        help=f"first train {COMPARED_STEPS} steps on {' and '.join(COMPARED)}: their losses must agree")
    parser.add_argument("--device", metavar="DEV", help="torch device (default: cuda if there is a card, else cpu)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no scores")


class Disagreement(RuntimeError):
    """Two backends do not train alike; the text is one line."""


def compare(task: Task, *, seed: int, steps: int = COMPARED_STEPS) -> float:
    """The largest relative difference of the losses that training on the two backends of `COMPARED` has."""
    runs = [train(task, steps=steps, seed=seed, every=steps, backend=backend) for backend in COMPARED]
    differences = (abs(a - b) / abs(a) for a, b in zip(runs[0].losses, runs[1].losses, strict=True))
    return max(differences)


def _checked_comparison(task: Task, seed: int) -> float:
    found = compare(task, seed=seed)
    if not found <= TOLERANCE:
        raise Disagreement(f"losses on {' and '.join(COMPARED)} differ by {found:.1e}, more than {TOLERANCE:.0e}")
    return found


def _backend(task: Task, device: torch.device, wanted: str | None) -> str | None:
    """The backend that slot attention trains on for this task's tokens."""
    weight = torch.zeros(task.dim, task.dim, device=device, requires_grad=True)
    params = vidops.SlotParams(q_weight=weight, k_weight=weight, v_weight=weight)
    tokens = weight.detach()[None]
    return vidops.explain(vidops.slot_attention, tokens, tokens, params, iters=1, backend=wanted).backend


def _trained(args: argparse.Namespace, name: str, stages: Stages, device: torch.device, out: OutputFolder) -> Any:
    with stages.stage(f"{name} data"):
        task = TASKS[name]()
    backend = _backend(task, device, args.backend)
    difference = None
    if args.compare:
        with stages.stage(f"{name} compare"):
            difference = _checked_comparison(task, args.seed)
        if not args.quiet:
            print(f"{name:8} {' and '.join(COMPARED)}: losses of {COMPARED_STEPS} steps differ by {difference:.1e}")
    steps = args.steps or STEPS[name]

    def report(point: Point) -> None:
        if not args.quiet:
            print(f"{name:8} step {point.step:5}  loss {point.loss:.4f}  FG-ARI {point.fg_ari:.3f}", flush=True)

    with stages.stage(f"{name} train", steps) as advance:
        result = train(
            task, steps=steps, seed=args.seed, every=args.every, backend=args.backend, device=device, report=report,
            advance=advance,
        )  # fmt: skip
    if not all(math.isfinite(loss) for loss in result.losses):
        raise Disagreement(f"{name}: the loss is not finite")
    with stages.stage(f"{name} write"):
        _write(out, task, result, backend)
    return {
        "data": name,
        "steps": steps,
        "seed": args.seed,
        "learning_rate": task.learning_rate,
        "slots": task.slots,
        "backend": backend,
        "seconds": round(result.seconds, 1),
        "points": [asdict(point) for point in result.points],
        "compared": difference,
    }


def files_of(name: str) -> list[str]:
    return [f"{name}_{what}" for what in ("curve.png", "masks.gif", "weights.pt")]


def _write(out: OutputFolder, task: Task, result: Result, backend: str | None) -> None:
    curve, masks, weights = (out.file(name) for name in files_of(task.name))
    last = result.points[-1]
    title = f"{task.name}: FG-ARI {last.fg_ari:.2f} after {last.step} steps, {result.seconds:.0f} s, backend {backend}"
    pictures.write_curve(curve, result.points, title)
    pictures.write_masks(masks, task.pictures, result.labels)
    torch.save({name: t.cpu() for name, t in result.model.state_dict().items()}, weights)


def _train_all(args: argparse.Namespace, stages: Stages) -> dict[str, Any]:
    device = device_of(args.device)
    if args.compare and device.type != "cpu":
        raise UsageError(f"--compare: {COMPARED[1]} needs --device cpu")
    names = list(TASKS) if args.data == "both" else [args.data]
    with OutputFolder(args.output) as out:
        runs = [_trained(args, name, stages, device, out) for name in names]
        report = {
            "vidops": vidops.__version__,
            "runs": runs,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "seconds": {name: round(spent, 3) for name, spent in stages.seconds.items()},
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        out.file("report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        out.commit([*(file for name in names for file in files_of(name)), "report.json"])
    return report


def run(args: argparse.Namespace) -> int:
    """Do what `args` say: 0; 1 when backends disagree; 2 after one line on stderr when something cannot be used."""
    advice = "--data sprites needs less"
    try:
        report = guarded("train-slots", args.output, advice, lambda: _train_all(args, Stages(quiet=args.quiet)))
    except Disagreement as error:
        print(f"vidops train-slots: {error}", file=sys.stderr)
        return 1
    if isinstance(report, int):
        return report
    if not args.quiet:
        for found in report["runs"]:
            first, last = found["points"][0], found["points"][-1]
            print(
                f"{found['data']:8} FG-ARI {first['fg_ari']:.3f} -> {last['fg_ari']:.3f} in {found['seconds']:.0f} s, "
                f"backend {found['backend']}: {', '.join(files_of(found['data']))}"
            )
    return 0


def main(argv: list[str] | None = None) -> int:
    """``vidops train-slots ARGV``."""
    parser = Parser(prog="vidops train-slots", description="Train slot attention to find objects, from scratch.")
    add_arguments(parser)
    try:
        args = parser.parse_args(argv)
    except UsageError as error:
        return failed("train-slots", str(error))
    return run(args)
