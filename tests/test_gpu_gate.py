"""The gate's own behaviour, without a card: what it says when a step fails, hangs, or cannot run."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu_attention
import gpu_check
import gpu_propagation
import gpu_prune
import gpu_record
import gpu_slots
import gpu_smoke
import gpu_timing
import gpu_window
import propagation
import pytest
import slots
import sta
import torch
from gpu_check import FAILED, NOT_RUN, PASSED, TIMED_OUT, Outcome, Step

from vidops import _report
from vidops._registry import OPS, Impl

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
CPU = torch.device("cpu")
PUBLIC = set(OPS)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="no kernel of Triton is involved")


def _python(name: str, code: str, seconds: int = 60, **options) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds, **options)


def _outcomes(tmp_path, *steps, budget=120.0):
    return gpu_check.run_all(list(steps), tmp_path, budget, say=lambda text: None)


# --- steps ---------------------------------------------------------------------------------------------------------


def test_a_failed_step_does_not_stop_the_others(tmp_path):
    found = _outcomes(
        tmp_path, _python("build", ""), _python("first", "print('what went wrong'); raise SystemExit(7)"),
        _python("second", "import os; print(os.environ['WANTED'])", environment={"WANTED": "a value"}),
    )  # fmt: skip
    assert [(o.name, o.status) for o in found] == [("build", PASSED), ("first", FAILED), ("second", PASSED)]
    assert found[1].why == "exit code 7" and "what went wrong" in found[1].tail
    assert "a value" in found[2].tail and found[2].command.startswith("WANTED=a value ")
    assert gpu_check.exit_code(found) == 1


def test_nothing_runs_after_a_failed_build(tmp_path):
    found = _outcomes(tmp_path, _python("build", "raise SystemExit(1)"), _python("tests", ""))
    assert (found[1].status, found[1].why) == (NOT_RUN, "the build failed")
    assert gpu_check.exit_code(found) == 1


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path):
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('x'); time.sleep(0.05)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    started = time.monotonic()
    (found,) = _outcomes(tmp_path, _python("slow", code, seconds=3, inspect=lambda: ({"rows": [1]}, "")))
    assert found.details == {"rows": [1]}  # what it had by then is kept
    assert (found.status, found.why) == (TIMED_OUT, "stopped after 3 s")
    assert time.monotonic() - started < 30 and gpu_check.exit_code([found]) == 1
    before = beat.stat().st_size
    time.sleep(0.5)
    assert before == beat.stat().st_size > 0


def test_the_time_for_all_steps_is_kept(tmp_path):
    found = _outcomes(
        tmp_path, _python("first", "import time; time.sleep(600)"), _python("second", ""), budget=2.0
    )  # fmt: skip
    assert [o.status for o in found] == [TIMED_OUT, NOT_RUN]
    assert found[1].why == "the time for all steps was used up"


def test_a_missing_tool_is_not_a_pass(tmp_path):
    step = Step("memcheck", ["no-such-sanitizer", "x"], 60, needs=("no-such-sanitizer",))
    (found,) = _outcomes(tmp_path, step)
    assert (found.status, found.why) == (NOT_RUN, "no-such-sanitizer not found")
    assert gpu_check.exit_code([found]) == 3


def test_a_tool_that_refuses_the_device_is_not_a_pass(tmp_path):
    code = "print('Error: Device not supported'); raise SystemExit(1)"
    (found,) = _outcomes(tmp_path, _python("memcheck", code, needs=("sh",)))
    assert (found.status, found.why) == (NOT_RUN, "sh: Device not supported")


def test_what_a_step_left_behind_can_fail_it(tmp_path):
    (found,) = _outcomes(tmp_path, _python("tests", "", inspect=lambda: ({"passed": 0}, "no test passed on cuda")))
    assert (found.status, found.why, found.details) == (FAILED, "no test passed on cuda", {"passed": 0})


def test_exit_codes():
    def outcome(status, **details):
        return Outcome("x", status, "", 0.0, "", details=details)

    assert gpu_check.exit_code([outcome(PASSED), outcome(PASSED)]) == 0
    assert gpu_check.exit_code([outcome(PASSED, left_out={"test_segment.py": "av"})]) == 3
    assert gpu_check.exit_code([outcome(NOT_RUN), outcome(PASSED)]) == 3
    assert gpu_check.exit_code([outcome(NOT_RUN), outcome(FAILED)]) == 1
    assert gpu_check.exit_code([]) == 3


def test_steps_can_be_chosen(tmp_path):
    steps = gpu_check.plan(tmp_path, quick=False, long=False)
    names = [step.name for step in steps]
    assert names[0] == "build" and len(set(names)) == len(names) and set(gpu_check.QUICK) < set(names)
    assert [s.name for s in gpu_check.chosen(steps, "bench,build", False)] == ["build", "bench"]
    assert [s.name for s in gpu_check.chosen(steps, None, True)] == [n for n in names if n in gpu_check.QUICK]
    with pytest.raises(ValueError, match="unknown step tests"):
        gpu_check.chosen(steps, "build,tests", False)
    for step in steps:
        scripts = [part for part in step.command if part.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts), step.command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize("script", ["gpu_check.py", "gpu_smoke.py", "gpu_window.py"])
def test_without_a_card(script):
    done = subprocess.run([sys.executable, f"bench/{script}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "finds no CUDA device" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    """With injected steps in place of those that need a card."""
    (tmp_path / "vidops").mkdir()
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_record, "find_card", lambda: _summary()["machine"])
    monkeypatch.setattr(gpu_record, "sources", lambda root: _summary()["sources"])
    monkeypatch.setattr(gpu_check, "missing", list)
    monkeypatch.setenv("VIDOPS_COMMIT", "feedfacecafe")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    code = f"import os; assert os.environ['PYTHONPATH'].startswith({str(tmp_path)!r}); "
    code += "assert 'TRITON_INTERPRET' not in os.environ"
    steps = [
        _python("build", code), _python("smoke-triton", ""), _python("smoke-cuda", "raise SystemExit(1)"),
        *(_python(f"contract-{b}", "", inspect=lambda b=b: (_contract(b), "")) for b in gpu_record.BACKENDS),
    ]  # fmt: skip
    monkeypatch.setattr(gpu_check, "plan", lambda work, quick, long: steps)
    stale = tmp_path / "build" / "gpu_check" / "bench.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    assert gpu_check.main(["--copy-to", str(tmp_path / "out")]) == 1
    assert not stale.exists()
    out = capsys.readouterr().out
    assert "smoke-cuda: failed (exit code 1)" in out and "3 passed, 0 failed, 0 skipped" in out
    stem = "gpu_nvidia_x9000_pcie_feedfacecafe"
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert copied == {f"{stem}.json", f"{stem}.txt", "_card_record.json"} | {f"{s.name}.log" for s in steps}
    assert set(json.loads((tmp_path / "vidops" / "_card_record.json").read_text())) == {"triton"}
    assert gpu_check.main(["--steps", "smoke-cuda,nonsense"]) == 2
    monkeypatch.setattr(gpu_check, "missing", lambda: ["program nvcc"])
    assert gpu_check.main([]) == 2 and "missing: program nvcc" in capsys.readouterr().err


def test_programs_are_found_in_the_toolkit(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "some-cuda-tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert gpu_check.find_program("some-cuda-tool") is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.find_program("some-cuda-tool") == str(tool)
    monkeypatch.setattr(gpu_check, "MODULES", ("torch", "no_such_module"))
    monkeypatch.setattr(gpu_check, "PROGRAMS", ("some-cuda-tool", "no-such-program"))
    assert gpu_check.missing() == ["Python module no_such_module", "program no-such-program"]


# --- what is read from the steps -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def junit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("junit")
    (folder / "test_sample.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('backend,n', [('reference', 1), ('triton', 1), ('triton', 2), ('cuda', 1)])\n"
        "def test_it(backend, n):\n"
        "    if backend == 'cuda': pytest.skip('op: no cuda row yet')\n"
        "    assert n < 2\n"
    )
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(folder)]
    subprocess.run(command, cwd=folder, capture_output=True)
    return report


def test_counts_by_backend(junit):
    details, why = gpu_record.counted(junit, ("triton", "cuda"))
    assert (details["passed"], details["failed"]) == (2, 1)
    assert details["skipped"] == {"op: no cuda row yet": 1}
    assert details["passed_on"] == {"triton": 1, "cuda": 0} and details["failed_on"] == {"triton": 1, "cuda": 0}
    assert why == "no test passed on cuda" and details["failures"][0].endswith("test_it[triton-2]")
    assert gpu_record.counted(junit, ("triton",))[1] == ""
    assert gpu_record.counted(junit.with_name("absent.xml"), ())[1] == "the tests left no report"


def test_the_sanitizer_must_have_spoken(tmp_path):
    log = tmp_path / "log"
    log.write_text("26 right, 0 wrong\n========= ERROR SUMMARY: 0 errors\n")
    assert gpu_record.sanitizer_summary(log) == ({"summary": "ERROR SUMMARY: 0 errors"}, "")
    log.write_text("26 right, 0 wrong\n")
    assert gpu_record.sanitizer_summary(log) == ({}, "the sanitizer left no summary")


def test_files_that_need_an_absent_package_are_named(tmp_path):
    (tmp_path / "sub").mkdir()
    needs = "import json\nimport no_such_package.part\nfrom also_absent import x\n"
    (tmp_path / "sub" / "test_needs.py").write_text(needs)
    fine = "import helper\nimport torch\nfrom workload import error\nfrom . import y\n"
    (tmp_path / "test_fine.py").write_text(fine)
    (tmp_path / "helper.py").write_text("")
    found = gpu_record.left_out(tmp_path)
    assert found == {"sub/test_needs.py": "also_absent, no_such_package"}
    assert gpu_record.with_left_out(({"passed": 1}, ""), found) == ({"passed": 1, "left_out": found}, "")
    assert gpu_record.with_left_out(({"passed": 1}, ""), {}) == ({"passed": 1}, "")


# --- what is written -----------------------------------------------------------------------------------------------


def _step(name, status=PASSED, why="", **details):
    return {
        "name": name, "status": status, "why": why, "seconds": 1.0, "command": name, "tail": "", "details": details,
    }  # fmt: skip


def _summary(*steps, source="0123"):
    return {
        "machine": {"device": "NVIDIA X9000 PCIe", "capability": "9.0", "memory": 80 << 30},
        "versions": {"driver": "1.2", "torch": "2.11", "triton": "3.6", "python": "3.12"},
        "commit": "abcdef012345",
        "changed": False,
        "date": "2030-01-02T03:04:05+00:00",
        "sources": {"triton": [source, ["segment_mean"]], "cuda": [source, ["segment_mean", "greedy_absorb"]]},
        "steps": list(steps),
    }


def _contract(backend, failed=0):
    return {
        "passed": 3, "failed": failed, "skipped": {}, "failures": [],
        "passed_on": {backend: 2}, "failed_on": {backend: failed},
    }  # fmt: skip


def _contracts():
    return [_step(f"contract-{backend}", **_contract(backend)) for backend in gpu_record.BACKENDS]


def test_record_names_the_backends_that_passed():
    smoke = _step("smoke-triton"), _step("smoke-cuda")
    found = gpu_record.record(_summary(*smoke, *_contracts(), _step("memcheck")), {})
    assert set(found) == {"triton", "cuda"}
    assert found["cuda"]["steps"] == ["smoke", "contract", "memcheck"]
    assert found["cuda"]["ops"] == ["segment_mean", "greedy_absorb"] and found["cuda"]["date"] == "2030-01-02"

    broken = _step("contract-cuda", FAILED, "exit code 1", **_contract("cuda", failed=1))
    found = gpu_record.record(_summary(*smoke, _contracts()[0], broken), {})
    assert set(found) == {"triton"}
    old = {"cuda": {"commit": "earlier"}}
    stopped = _step("contract-cuda", TIMED_OUT, **_contract("cuda"))
    half = _step("smoke-triton", FAILED), _contracts()[0], stopped, _step("smoke-cuda")
    assert gpu_record.record(_summary(*half), old) == old
    assert gpu_record.record(_summary(*smoke), {}) == {}


def test_the_table_of_benches_needs_no_vidops(tmp_path):
    """The gate builds in place and imports nothing of it."""
    row = {"group": "map", "variant": "cuda", "workload": "fast", "ms": 1.0, "ms_p10": 1.0, "ms_p90": 1.0, "error": 0.0}
    details = {"rows": [row], "ceilings": {"copy": 1.0}, "host_reads": {}, "long_video": []}
    summary = _summary(_step("bench", **details))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    code = f"import sys, json; sys.path.insert(0, {str(BENCH)!r}); import gpu_record; "
    code += "print(gpu_record.table(json.load(open('summary.json')))); assert 'vidops' not in sys.modules"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "fast          map" in done.stdout, done.stderr


def test_results_name_no_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_record, "sources", lambda root: _summary()["sources"])
    step = _step("bench") | {"command": f"{sys.executable} {tmp_path}/bench/x.py", "tail": f"{sys.prefix}/lib: warning"}
    (found,) = gpu_record.collect(tmp_path, _summary()["machine"], [step])["steps"]
    assert found["command"] == "python ./bench/x.py" and found["tail"] == "<python>/lib: warning"


def test_files_and_merging(tmp_path, monkeypatch):
    (tmp_path / "vidops").mkdir()
    monkeypatch.setattr(gpu_record, "sources", lambda root: _summary()["sources"])
    monkeypatch.setenv("VIDOPS_COMMIT", "0a1b2c3d4e5f67")
    card = _summary()["machine"]
    failed = [_step(f"contract-{b}", FAILED, "exit code 1") for b in gpu_record.BACKENDS]
    first = [_step("build"), _step("smoke-cuda"), _step("smoke-triton"), *failed]
    files = gpu_record.write(tmp_path, gpu_record.collect(tmp_path, card, first))
    assert [f.name for f in files] == [
        "gpu_nvidia_x9000_pcie_0a1b2c3d4e5f.json", "gpu_nvidia_x9000_pcie_0a1b2c3d4e5f.txt", "_card_record.json",
    ]  # fmt: skip
    assert not files[2].exists()
    again = gpu_record.collect(tmp_path, card, [*_contracts(), _step("memcheck", NOT_RUN, "no tool")])
    gpu_record.write(tmp_path, again)
    kept = json.loads(files[0].read_text())
    assert [(s["name"], s["status"]) for s in kept["steps"]] == [
        ("build", PASSED), ("smoke-cuda", PASSED), ("smoke-triton", PASSED),
        ("contract-triton", PASSED), ("contract-cuda", PASSED), ("memcheck", NOT_RUN),
    ]  # fmt: skip
    assert kept["flags"]["environment"]["VIDOPS_COMMIT"] and "torch" in kept["versions"]
    text = files[1].read_text()
    assert "3 passed, 0 failed" in text and "no tool" in text and "as given" in text
    assert json.loads(files[2].read_text())["cuda"]["commit"] == "0a1b2c3d4e5f"
    # Results of other sources are not mixed in.
    monkeypatch.setattr(gpu_record, "sources", lambda root: _summary(source="4567")["sources"])
    assert [s["name"] for s in gpu_record.collect(tmp_path, card, [_step("build")])["steps"]] == ["build"]


def test_table_shows_the_benches():
    row = {
        "workload": "fast", "group": "map", "variant": "cuda", "tf32": False, "error": 1e-6, "ok": True, "calls": 9,
        "peak_bytes": 123_000_000, "ms": 0.5, "ms_p10": 0.4, "ms_p90": 0.6, "eager_over_this": 7.25,
    }  # fmt: skip
    bench = {
        "rows": [row, {"group": "map", "variant": "triton", "error": None, "ok": False, "why": "no"}],
        "ceilings": {"copy_GB_per_s": 3000.0}, "host_reads": {"triton": "", "cuda": "a copy"},
        "long_video": [{"backend": "cuda", "peak_bytes": 2.5e9, "formula_bytes": 2.6e9, "ok": True}],
    }  # fmt: skip
    text = gpu_record.table(_summary(_step("memcheck", summary="ERROR SUMMARY: 0 errors"), _step("bench", **bench)))
    for wanted in (
        "sm_90, 80 GiB", "0 errors", "copy_GB_per_s 3000", "0.400..0.600", "7.25", "123", "FAILED",
        "window on triton: no host read", "window on cuda: the host waits: a copy", "2.50 GB, formula 2.60 GB",
    ):  # fmt: skip
        assert wanted in text


def test_commit_and_local_changes(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "x")
    commit, changed = gpu_record.commit_of(tmp_path)
    assert len(commit) == 12 and changed is False
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "gpu.json").write_text("{}")
    assert gpu_record.commit_of(tmp_path) == (commit, False)
    (tmp_path / "file").write_text("b")
    assert gpu_record.commit_of(tmp_path) == (commit, True)


# --- what the library says -----------------------------------------------------------------------------------------


def test_card_state(tmp_path):
    record = tmp_path / "record.json"
    assert _report.card_state(record)["triton"] == "never run on a card"
    entry = {
        "device": "NVIDIA X", "date": "2030-01-02", "commit": "abc", "dirty": False, "steps": ["smoke", "contract"],
        "source": _report.kernel_source("triton"), "ops": [op for op in OPS if op != "segment_mean"],
    }  # fmt: skip
    record.write_text(json.dumps({"triton": entry}))
    state = _report.card_state(record)
    assert state["triton"] == (
        "passed smoke, contract on NVIDIA X, 2030-01-02, commit abc; never run on a card: segment_mean"
    )
    assert state["cuda"].endswith("never run on a card")
    record.write_text(json.dumps({"triton": entry | {"source": "other", "dirty": True}}))
    assert _report.card_state(record)["triton"] == (
        "changed, and not run on a card since commit abc with local changes (NVIDIA X, 2030-01-02)"
    )
    record.write_text("{")
    assert "cannot be read" in _report.card_state(record)["cuda"]


def test_kernel_sources_follow_the_files(monkeypatch, tmp_path):
    before = _report.kernel_source("triton")
    assert before == _report.kernel_source("triton") and len(before) == 16
    for path in (ROOT / "kernels").glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})()
    monkeypatch.setattr(_report.importlib.util, "find_spec", lambda name: spec)
    assert _report.kernel_source("triton") == before
    (tmp_path / "segment_mean.py").write_text("changed")
    assert _report.kernel_source("triton") != before
    from vidops import _native

    assert _report.kernel_source("cuda") == _native.source_hash(ROOT)


def test_report_and_readme_say_what_ran():
    lines = _report.report().splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["triton", "cuda"]
    readme = (ROOT / "README.md").read_text()
    assert ("Nothing has run on a card yet" in readme) != _report.CARD_RECORD.is_file()
    columns, *rows = re.findall(r"^\| (op \|.*|[a-z_, ()]+ \| yes \|.*)\|$", readme, re.M)
    backends = [cell.strip() for cell in columns.split("|")][1:]
    table = {}
    for row in rows:
        names, *cells = (cell.strip() for cell in row.split("|"))
        has = {backend for backend, cell in zip(backends, cells, strict=True) if cell != "none"}
        table |= {name.strip(): has for name in re.sub(r"\(.*\)", "", names).split(",")}
    assert table == {name: set(OPS[name].rows) for name in PUBLIC}


# --- smoke and benches, rehearsed on the CPU -----------------------------------------------------------------------


def test_smoke_covers_every_op():
    assert set(gpu_smoke.cases(torch.float32)) == PUBLIC
    rows = list(gpu_smoke.run(["cpu"], CPU))
    assert {row[0] for row in rows} == PUBLIC and {row[3] for row in rows} == {"ok"}
    owners = gpu_smoke.cases(torch.float32)["greedy_absorb_kl"]("reference", CPU, torch.float64)
    assert int(owners[2]) == 3  # three groups of rows: neither all apart nor all together


@pytest.mark.parametrize("op,spoil", [
    ("segment_mean", lambda out: out * (1 + 1e-4)),
    ("neighbour_mean", lambda out: torch.where(out == out.max(), torch.nan, out)),
    ("assign_rows", lambda out: out.roll(1)),
    ("symmetric_kl_adjacency", lambda out: out ^ 4),
])  # fmt: skip
def test_smoke_catches_wrong_results(monkeypatch, op, spoil):
    row = OPS[op].rows["cpu"]
    spoiled = Impl("cpu", lambda *args: spoil(row.forward(*args)), row.backward, row.refuses)
    monkeypatch.setitem(OPS[op].rows, "cpu", spoiled)
    outcome, error, limit = gpu_smoke.check(op, "cpu", CPU, torch.float32)
    assert outcome == "wrong" and error > limit


def test_smoke_fails_on_a_refusal(monkeypatch, capsys):
    row = OPS["segment_mean"].rows["cpu"]
    refusing = Impl("cpu", row.forward, row.backward, lambda tensors: "not today")
    monkeypatch.setitem(OPS["segment_mean"].rows, "cpu", refusing)
    assert gpu_smoke.main(["--device", "cpu", "--backends", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "refused: not today" in out and out.splitlines()[-1].endswith(" right, 1 wrong")
    assert not torch.are_deterministic_algorithms_enabled()


def test_smoke_poisons_memory():
    with gpu_smoke.poisoned_memory():
        assert torch.empty(1000).isnan().all()


@pytest.fixture(scope="module")
def window_groups():
    torch.set_num_threads(1)
    d = gpu_window.data(200, 150, CPU)
    found = gpu_window.groups(d, ["cpu"], compiled=False) + gpu_attention.groups(40, CPU, ["cpu"], compiled=False)
    small = (slots.Workload("gated", 2, 33, 24, 5, 16), slots.Workload("residual", 2, 17, 16, 3, 8, False, True))
    found += gpu_slots.groups(CPU, ["cpu"], False, small)
    found += gpu_propagation.groups(propagation.Workload("", (4, 7), 2.5, 5), CPU, ["cpu"], compiled=False)
    found += gpu_prune.groups(CPU, ["cpu"], False, (sta.Workload("pruning", 2, 4, 21, 16, 8, 6, True),))
    return {group.name: group for group in found}


def test_bench_rows(window_groups):
    for name, group in window_groups.items():
        rows = gpu_window.bench(group, CPU, rounds=3, budget_s=0.0)
        assert [row["variant"] for row in rows][0] == "eager" and rows[-1]["variant"].startswith("cpu"), name
        for row in rows:
            assert row["ok"] and row["ms"] > 0 and row["calls"] == 3, row
            assert name in gpu_record.bench_line(row) and "FAILED" not in gpu_record.bench_line(row)


@pytest.mark.parametrize("name,spoil", [
    ("map", lambda out: out * 1.001),
    ("map", lambda out: torch.where(out == out.max(), torch.nan, out)),
    ("distance", lambda out: out ^ 2),
    ("neighbour mean", lambda out: out + 1e-3),
    ("second distance + greedy", lambda out: out.roll(1)),
    ("greedy walk", lambda out: out.roll(1)),
    ("assign", lambda out: out.roll(1)),
    ("window", lambda out: out.roll(1)),
    ("attention fp32", lambda outs: (outs[0], outs[1] * 1.001)),
    ("gated, forward bf16", lambda outs: [outs[0] + 0.1]),
    ("residual, fwd+bwd fp32", lambda outs: [*outs[:-1], outs[-1] * 1.001]),
    ("propagation fp32", lambda out: out.roll(1, 0)),
    ("pruning fp32", lambda outs: (outs[0].roll(1, 1), outs[1])),
    ("pruning fp16", lambda outs: (outs[0], outs[1].roll(1, 2))),
    ("propagation bf16", lambda out: out * 1.001),
    ("attention fwd+bwd bf16", lambda outs: (outs[0] * torch.nan, *outs[1:])),
])  # fmt: skip
def test_wrong_variants_get_no_time(window_groups, name, spoil):
    group = window_groups[name]
    right = group.variants[-1]
    wrong = gpu_timing.Variant("cpu wrong", lambda *inputs: spoil(right.call(*inputs)))
    raising = gpu_timing.Variant("cpu raising", lambda *inputs: torch.ones(2) @ torch.ones(3))
    planted = gpu_timing.Group(group.name, group.inputs, [group.variants[0], wrong, raising], group.judge)
    rows = gpu_window.bench(planted, CPU, rounds=3, budget_s=0.0)
    assert [row["ok"] for row in rows] == [True, False, False]
    assert all("ms" not in row and "FAILED" in gpu_record.bench_line(row) for row in rows[1:])
    assert "size" in rows[2]["why"] or "shape" in rows[2]["why"]


def test_inputs_rotate_when_they_fit_the_cache():
    inputs = (torch.arange(1024.0), torch.zeros(3))
    sets = gpu_timing.rotated(inputs, 4 * 1024 * 5)
    assert len(sets) == 5 and len({s[0].data_ptr() for s in sets}) == 5
    assert all(torch.equal(s[0], inputs[0]) for s in sets)
    assert len(gpu_timing.rotated(inputs, 4 * 1027 + 1)) == 3
    assert gpu_timing.rotated(inputs, 1000) == [inputs]


def test_timing_takes_turns_and_keeps_the_spread():
    order = []
    variants = [gpu_timing.Variant(n, lambda x, n=n: order.append(n)) for n in ("a", "b")]
    found = gpu_timing.measure(variants, [(torch.ones(1),)] * 2, CPU, rounds=4, budget_s=60)
    assert order[4:] == ["a", "a", "b", "b"] * 4  # after two warm-up calls each
    row = found["a"].summary()
    assert row["calls"] == 8 and row["ms_p10"] <= row["ms"] <= row["ms_p90"] and "graph_ms" not in row
    timing = gpu_timing.Timing([5.0, 7.0, 6.0], [2.0, 3.0, 4.0])
    assert timing.best == 3.0 and timing.summary()["graph_ms"] == 3.0


def test_tf32_is_asked_for_and_restored():
    before = torch.backends.cuda.matmul.allow_tf32
    seen = []
    probe = gpu_timing.Variant("x", lambda x: seen.append(torch.backends.cuda.matmul.allow_tf32), tf32=True)
    gpu_timing.measure([probe], [(torch.ones(1),)], CPU, rounds=1, budget_s=1)
    assert seen and all(seen) and torch.backends.cuda.matmul.allow_tf32 == before is False
