"""What `gpu_check` reads from its steps, and the files that it writes."""

from __future__ import annotations

import ast
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BACKENDS = ("triton", "cuda")
# Steps that the card record names when they passed, besides those that decide whether a backend is entered.
FURTHER = {"triton": ("validate", "memcheck", "bench"), "cuda": ("validate", "memcheck", "racecheck", "bench")}


def importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def find_card() -> dict[str, Any] | None:
    """The current device, asked for in a process of its own so that no context is held here; None without one."""
    code = (
        "import json, torch\n"
        "if torch.cuda.is_available():\n"
        "    p = torch.cuda.get_device_properties(0)\n"
        "    print(json.dumps({'device': p.name, 'capability': f'{p.major}.{p.minor}', 'memory': p.total_memory,\n"
        "        'multiprocessors': p.multi_processor_count, 'l2': p.L2_cache_size}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else None


def _imports(path: Path) -> set[str]:
    """Top-level modules that a test file needs to be imported at all."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def left_out(tests: Path) -> dict[str, str]:
    """Test files (below `tests`) that this machine cannot import -> what they need."""
    own = {p.stem for folder in (tests, HERE) for p in folder.rglob("*.py")} | {"vidops"}
    found = {}
    for path in sorted(tests.rglob("test_*.py")):
        absent = sorted(m for m in _imports(path) - own if not importable(m))
        if absent:
            found[path.relative_to(tests).as_posix()] = ", ".join(absent)
    return found


def counted(report: Path, required: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Counts of a JUnit report; a reason when no test passed on one of the `required` backends."""
    if not report.is_file():
        return {}, "the tests left no report"
    passed = failed = 0
    skipped: dict[str, int] = {}
    passed_on, failed_on = dict.fromkeys(required, 0), dict.fromkeys(required, 0)
    failures = []
    for case in xml.parse(report).iter("testcase"):
        on = set(re.split(r"[\[\]-]", case.get("name", ""))[1:]) & set(required)
        reason = case.find("skipped")
        if reason is not None:
            text = reason.get("message", "")
            skipped[text] = skipped.get(text, 0) + 1
        elif case.find("failure") is not None or case.find("error") is not None:
            failed += 1
            failures.append(f"{case.get('classname')}::{case.get('name')}")
            for backend in on:
                failed_on[backend] += 1
        else:
            passed += 1
            for backend in on:
                passed_on[backend] += 1
    details: dict[str, Any] = {"passed": passed, "failed": failed, "skipped": skipped, "failures": failures[:50]}
    if required:
        details |= {"passed_on": passed_on, "failed_on": failed_on}
    silent = [backend for backend, number in passed_on.items() if not number]
    return details, f"no test passed on {', '.join(silent)}" if silent else ""


def with_left_out(found: tuple[dict[str, Any], str], files: dict[str, str]) -> tuple[dict[str, Any], str]:
    details, why = found
    return (details | {"left_out": files} if files else details), why


def sanitizer_summary(log: Path) -> tuple[dict[str, Any], str]:
    """The tool's own last word: without one it did not watch the program, whatever the exit code says."""
    found = re.findall(r"^=+ (.*SUMMARY: .*)$", log.read_text(errors="replace"), re.M)
    return ({"summary": found[-1]}, "") if found else ({}, "the sanitizer left no summary")


def bench_rows(path: Path) -> tuple[dict[str, Any], str]:
    if not path.is_file():
        return {}, "the benches left no rows"
    return json.loads(path.read_text()), ""


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """Standard output of a program, None when it is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.stdout.rstrip() if done.returncode == 0 else None


def commit_of(root: Path) -> tuple[str, bool | None]:
    """(commit, whether files differ from it). VIDOPS_COMMIT outranks a history: a copy may carry an old one."""
    given = os.environ.get("VIDOPS_COMMIT")
    found = None if given else _output("git", "rev-parse", "--short=12", "HEAD", cwd=root)
    if found is None:
        return (given or "unknown")[:12], None
    changed = (_output("git", "status", "--porcelain", "--untracked-files=all", cwd=root) or "").splitlines()
    ours = ("bench/results/", "vidops/_card_record.json")
    return found, any(not entry[3:].startswith(ours) for entry in changed)


def sources(root: Path) -> dict[str, str | None]:
    """Hashes of the kernels, computed by the library in a process of its own: the build has just replaced it."""
    code = (
        "import json; from vidops import _report as r; from vidops._registry import OPS\n"
        "print(json.dumps({b: [r.kernel_source(b), sorted(n for n, op in OPS.items() if b in op.rows)]"
        " for b in r.CARD_BACKENDS}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


def versions() -> dict[str, str | None]:
    import numpy
    import torch
    import triton

    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "driver": driver.splitlines()[0] if driver else None,
        "nvcc": (_output("nvcc", "--version") or "").splitlines()[-1] or None if shutil.which("nvcc") else None,
    }


def portable(text: str, root: Path) -> str:
    """Without the folders of the machine that ran it: results are committed."""
    for folder, short in ((str(root), "."), (sys.executable, "python"), (sys.prefix, "<python>")):
        text = text.replace(folder, short)
    return text


def collect(root: Path, card: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything about one run. An earlier result of the same sources keeps the steps that did not run again."""
    import torch

    commit, changed = commit_of(root)
    steps = [s | {name: portable(s[name], root) for name in ("command", "tail")} for s in steps]
    found = {
        "machine": card | {"cpus": os.cpu_count(), "platform": platform.platform()},
        "versions": versions(),
        "flags": {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
            "environment": {k: v for k, v in os.environ.items() if k.startswith(("VIDOPS_", "NVIDIA_TF32"))},
        },
        "commit": commit,
        "changed": changed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sources": sources(root),
        "steps": steps,
    }
    earlier = result_path(root, found)
    if earlier.is_file():
        old = json.loads(earlier.read_text())
        if old["sources"] == found["sources"]:
            again = {step["name"] for step in steps}
            found["steps"] = [step for step in old["steps"] if step["name"] not in again] + steps
    return found


def result_path(root: Path, summary: dict[str, Any]) -> Path:
    device = re.sub(r"[^a-z0-9]+", "_", summary["machine"]["device"].lower()).strip("_")
    return root / "bench" / "results" / f"gpu_{device}_{summary['commit']}.json"


def record(summary: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The card record after this run.

    A backend is entered when its smoke step passed and the contract suite, run to its end, passed tests on it and
    failed none.
    """
    steps = {step["name"]: step for step in summary["steps"]}
    passed = [name for name, step in steps.items() if step["status"] == "passed"]
    after = dict(before)
    for backend, (source, ops) in summary["sources"].items():
        contract = steps.get(f"contract-{backend}", {"status": "", "details": {}})
        counts = contract["details"]
        tested = counts.get("passed_on", {}).get(backend) and not counts.get("failed_on", {}).get(backend)
        if f"smoke-{backend}" in passed and tested and contract["status"] in ("passed", "failed") and ops:
            after[backend] = {
                "device": summary["machine"]["device"],
                "date": summary["date"][:10],
                "commit": summary["commit"],
                "dirty": bool(summary["changed"]),
                "source": source,
                "ops": ops,
                "steps": ["smoke", "contract", *(name for name in FURTHER[backend] if name in passed)],
            }
    return after


def write(root: Path, summary: dict[str, Any]) -> list[Path]:
    """The JSON, the table beside it and the record; returns their paths."""
    path = result_path(root, summary)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1) + "\n")
    text = path.with_suffix(".txt")
    text.write_text(table(summary) + "\n")
    packaged = root / "vidops" / "_card_record.json"
    before = json.loads(packaged.read_text()) if packaged.is_file() else {}
    after = record(summary, before)
    if after != before:
        packaged.write_text(json.dumps(after, indent=1, sort_keys=True) + "\n")
    return [path, text, packaged]


def bench_line(row: dict[str, Any]) -> str:
    def number(name: str, form: str, width: int) -> str:
        return f"{row[name]:{form}}".rjust(width) if row.get(name) is not None else "-".rjust(width)

    peak = f"{row['peak_bytes'] / 1e6:.0f}" if row.get("peak_bytes") is not None else "-"
    head = f"{row.get('workload', ''):13} {row['group']:25} {row['variant']:16}"
    tail = f"{number('error', '.1e', 9)} {peak:>9}"
    if "ms" not in row:
        return f"{head} {'FAILED':>10} {'':19} {'':10} {'':8} {tail}  {row.get('why', 'wrong')}"
    spread = f"{row['ms_p10']:.3f}..{row['ms_p90']:.3f}"
    times = f"{row['ms']:10.3f} {spread:>19} {number('graph_ms', '.3f', 10)} {number('eager_over_this', '.2f', 8)}"
    return f"{head} {times} {tail}  {row.get('note', '')}".rstrip()


BENCH_HEADER = (
    f"{'workload':13} {'group':25} {'variant':16} {'ms':>10} {'10..90 %':>19} {'graph ms':>10} {'eager/x':>8} "
    f"{'error':>9} {'peak MB':>9}"
)


def table(summary: dict[str, Any]) -> str:
    """A page: machine, steps, bench rows."""
    machine, v = summary["machine"], summary["versions"]
    state = {True: " with local changes", False: "", None: " (as given)"}[summary["changed"]]
    lines = [
        f"# {machine['device']} (sm_{machine['capability'].replace('.', '')}, {machine['memory'] / 2**30:.0f} GiB), "
        f"driver {v['driver']}, torch {v['torch']}, triton {v['triton']}, python {v['python']}",
        f"# commit {summary['commit']}{state}, {summary['date']}; TF32 only where a row says so",
        "",
    ]
    for step in summary["steps"]:
        details = step["details"]
        note = "; ".join(filter(None, [step["why"], details.get("summary")]))
        if "passed" in details:
            note = f"{details['passed']} passed, {details['failed']} failed, {sum(details['skipped'].values())} skipped"
            note += f"; {details['passed_on']}" if "passed_on" in details else ""
            note += f"; {step['why']}" if step["why"] else ""
        lines.append(f"{step['name']:13} {step['status']:10} {step['seconds']:7.1f} s  {note}".rstrip())
        for name, needs in details.get("left_out", {}).items():
            lines.append(f"{'':13} left out: tests/{name} (needs {needs})")
    bench = next((step["details"] for step in summary["steps"] if step["name"] == "bench"), {})
    if bench.get("rows"):
        ceilings = ", ".join(f"{name} {value:.0f}" for name, value in bench["ceilings"].items())
        lines += ["", f"this card: {ceilings}", BENCH_HEADER, *map(bench_line, bench["rows"])]
        for backend, why in bench["host_reads"].items():
            lines.append(f"window on {backend}: {'the host waits: ' + why if why else 'no host read'}")
        for row in bench["long_video"]:
            peak, formula = row["peak_bytes"] / 1e9, row["formula_bytes"] / 1e9
            lines.append(f"99 frames of 320x480 on {row['backend']}: {peak:.2f} GB, formula {formula:.2f} GB")
    return "\n".join(lines)
