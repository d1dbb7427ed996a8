"""``make gpu-check``: everything that needs a card, in one command, without a network.

Builds the extension in place with the running interpreter, runs the suite on the card, compute-sanitizer, and the
benches; writes ``bench/results/gpu_<device>_<commit>.json`` and ``.txt``, and what passed into
``vidops/_card_record.json``, from which ``python -m vidops`` tells what has run on a card.

Exit code: 0 everything passed; 1 a step failed; 2 no card, or something the build needs is missing; 3 nothing
failed, and something did not run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gpu_record

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"

# What the build and the suite cannot do without: modules of this interpreter, and programs.
MODULES = ("torch", "triton", "numpy", "scipy", "pytest", "hypothesis", "setuptools", "pybind11")
PROGRAMS = ("cmake", "ninja", "nvcc", "g++")
SANITIZER = "compute-sanitizer"
TAIL = 4000


@dataclass(frozen=True)
class Step:
    """One command. `needs` are programs without which it is not run; `inspect` reads its traces afterwards and
    returns details and, when they show a failure that the exit code does not, why."""

    name: str
    command: list[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    inspect: Callable[[], tuple[dict[str, Any], str]] | None = None


@dataclass
class Outcome:
    """What became of a step; `why` is empty when it passed."""

    name: str
    status: str
    why: str
    seconds: float
    command: str
    tail: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def find_program(name: str) -> str | None:
    """On PATH, beside this interpreter, or in the CUDA toolkit."""
    toolkit = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ] + ["/usr/local/cuda"]
    folders = [Path(sys.executable).parent, *(Path(t) / "bin" for t in toolkit)]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which(name, path=path)


def missing() -> list[str]:
    """Names of absent modules and programs that nothing works without."""
    return [f"Python module {m}" for m in MODULES if not gpu_record.importable(m)] + [
        f"program {p}" for p in PROGRAMS if find_program(p) is None
    ]


def environment() -> dict[str, str]:
    """Of every step: the checkout is imported, not another copy that may be installed; the tools beside this
    interpreter come first, for programs that steps start themselves; and Triton compiles."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found["PATH"] = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), os.environ.get("PATH")]))
    return found


def run(step: Step, log: Path, seconds: float) -> Outcome:
    """Run one step in a process group of its own, which is ended as a whole when its time is up."""
    shown = " ".join([*(f"{k}={v}" for k, v in step.environment.items()), *step.command])
    absent = [name for name in step.needs if find_program(name) is None]
    if absent:
        return Outcome(step.name, NOT_RUN, f"{', '.join(absent)} not found", 0.0, shown)
    if seconds < 1:
        return Outcome(step.name, NOT_RUN, "the time for all steps was used up", 0.0, shown)
    command = [find_program(step.command[0]) or step.command[0], *step.command[1:]]
    started = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment() | step.environment, stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Also after a normal end: a worker that outlived its parent would hold the card.
            end_group(process)
    tail = log.read_text(errors="replace")[-TAIL:]
    outcome = Outcome(step.name, PASSED, "", round(time.monotonic() - started, 1), shown, tail)
    if code is None:
        outcome.status, outcome.why = TIMED_OUT, f"stopped after {seconds:.0f} s"
    elif "Device not supported" in tail and step.needs:
        outcome.status, outcome.why = NOT_RUN, f"{step.needs[0]}: Device not supported"
    elif code:
        outcome.status, outcome.why = FAILED, f"exit code {code}"
    if step.inspect is not None and outcome.status != NOT_RUN:
        outcome.details, why = step.inspect()
        if why and outcome.status == PASSED:
            outcome.status, outcome.why = FAILED, why
    return outcome


def end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it has ended already
    process.wait()


def log_of(work: Path, step: str) -> Path:
    return work / f"{step}.log"


def run_all(steps: list[Step], logs: Path, budget: float, say: Callable[[str], None] = print) -> list[Outcome]:
    """Every step in order, whatever became of the others; only a failed build leaves nothing to run."""
    deadline = time.monotonic() + budget
    outcomes: list[Outcome] = []
    built = True
    for step in steps:
        if not built:
            outcome = Outcome(step.name, NOT_RUN, "the build failed", 0.0, " ".join(step.command))
        else:
            say(f"{step.name} ...")
            outcome = run(step, log_of(logs, step.name), min(step.seconds, deadline - time.monotonic()))
        built = built and (step.name != "build" or outcome.status == PASSED)
        outcomes.append(outcome)
        say(f"{step.name}: {outcome.status}{f' ({outcome.why})' if outcome.why else ''}, {outcome.seconds} s")
        if outcome.status in (FAILED, TIMED_OUT):
            say(outcome.tail)
    return outcomes


def exit_code(outcomes: list[Outcome]) -> int:
    if any(o.status in (FAILED, TIMED_OUT) for o in outcomes):
        return 1
    incomplete = any(o.status == NOT_RUN or o.details.get("left_out") for o in outcomes)
    return 3 if incomplete or not outcomes else 0


def plan(work: Path, quick: bool, long: bool) -> list[Step]:
    """All steps, in order. `work` receives what they leave behind."""
    python = sys.executable
    smoke = [python, "bench/gpu_smoke.py"]
    workers = ["-n", str(min(16, os.cpu_count() or 1))] if gpu_record.importable("xdist") else []
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "-m", "not slow and not network"]
    left_out = gpu_record.left_out(ROOT / "tests")
    ignored = [f"--ignore=tests/{name}" for name in sorted({"ops", *left_out})]
    suite, bench = work / "suite.xml", work / "bench.json"
    few = {"OMP_NUM_THREADS": "2"}  # several workers share the processor
    # Without the caching allocator every tensor is an allocation of its own, whose bounds memcheck knows.
    plain = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def contract(backend: str) -> Step:
        report = work / f"contract-{backend}.xml"
        return Step(
            f"contract-{backend}", [*pytest, "tests/ops", f"--junitxml={report}"], 480,
            few | {"VIDOPS_TEST_DEVICE": "cuda", "VIDOPS_TEST_BACKENDS": f"reference,{backend}"},
            inspect=lambda: gpu_record.counted(report, (backend,)),
        )  # fmt: skip

    def sanitizer(tool: str, *options: str) -> Step:
        command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", *smoke, *options]
        log = log_of(work, tool)
        return Step(tool, command, 300, plain, (SANITIZER,), lambda: gpu_record.sanitizer_summary(log))

    return [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 400, {"VIDOPS_CUDA": "ON"}),
        Step("report", [python, "-m", "vidops"], 60),
        *(Step(f"smoke-{b}", [*smoke, "--backends", b], 180) for b in gpu_record.BACKENDS),
        # One step each: Triton compiles for minutes, and neither should wait for the other's time to run out.
        *(contract(b) for b in reversed(gpu_record.BACKENDS)),
        Step("validate", [python, "-m", "vidops", "validate", "tests/golden"], 240),
        sanitizer("memcheck"),
        # Where Triton lays a value out in several threads, all of them store it: hazards of its compiler's making.
        sanitizer("racecheck", "--backends", "cuda"),
        Step(
            "bench",
            [python, "bench/gpu_window.py", "--json", str(bench), *["--quick"] * quick, *["--long"] * long], 480,
            inspect=lambda: gpu_record.bench_rows(bench),
        ),
        Step(
            "suite", [*pytest, "tests", *ignored, f"--junitxml={suite}"], 480, few,
            inspect=lambda: gpu_record.with_left_out(gpu_record.counted(suite, ()), left_out),
        ),
    ]  # fmt: skip


QUICK = ("build", "report", "smoke-triton", "smoke-cuda", "contract-cuda", "memcheck", "bench")


def chosen(steps: list[Step], names: str | None, quick: bool) -> list[Step]:
    known = [step.name for step in steps]
    wanted = names.split(",") if names else list(QUICK) if quick else known
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"unknown step {', '.join(unknown)}; expected {', '.join(known)}")
    return [step for step in steps if step.name in wanted]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The gate for a machine with a card.")
    parser.add_argument("--quick", action="store_true", help=f"about 5 minutes: {', '.join(QUICK)}")
    parser.add_argument("--long", action="store_true", help="benches with the largest workload as well")
    parser.add_argument("--steps", help="only these, comma-separated; merged into an earlier result of this commit")
    parser.add_argument("--budget", type=float, help="seconds for all steps (default 1200, 300 with --quick)")
    parser.add_argument("--copy-to", type=Path, help="also copy the results, the record and all logs here")
    options = parser.parse_args(argv)

    card = gpu_record.find_card()
    if card is None and gpu_record.importable("torch"):
        print("gpu-check: torch finds no CUDA device: this gate runs on a machine with a card", file=sys.stderr)
        return 2
    if absent := missing():
        print(f"gpu-check: missing: {', '.join(absent)} (interpreter {sys.executable})", file=sys.stderr)
        return 2

    work = ROOT / "build" / "gpu_check"
    shutil.rmtree(work, ignore_errors=True)  # nothing an earlier run left may pass for this one's
    work.mkdir(parents=True)
    try:
        steps = chosen(plan(work, options.quick, options.long), options.steps, options.quick)
    except ValueError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    budget = options.budget or (300.0 if options.quick else 1200.0)
    outcomes = run_all(steps, work, budget)
    summary = gpu_record.collect(ROOT, card, [asdict(o) for o in outcomes])
    files = gpu_record.write(ROOT, summary)
    if options.copy_to:
        options.copy_to.mkdir(parents=True, exist_ok=True)
        for path in (*files, *(log_of(work, o.name) for o in outcomes)):
            if path.is_file():
                shutil.copy2(path, options.copy_to)
    print(gpu_record.table(summary))
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
