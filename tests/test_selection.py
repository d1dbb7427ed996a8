"""Environment variables of the selection policy, each in a process of its own (they are read at import)."""

import os
import subprocess
import sys

CALL = "import torch, vidops; vidops.greedy_absorb(torch.ones(1, 1, dtype=torch.int64))"


def _run(code, **environment):
    cleared = {k: v for k, v in os.environ.items() if not k.startswith(("VIDOPS_", "TRITON_INTERPRET"))}
    return subprocess.run([sys.executable, "-c", code], env={**cleared, **environment}, capture_output=True, text=True)


def test_missing_extension_is_an_error_with_reasons():
    done = _run(CALL, VIDOPS_NO_EXT="1")
    assert done.returncode != 0
    assert "BackendError" in done.stderr and "VIDOPS_NO_EXT" in done.stderr and 'backend="reference"' in done.stderr


def test_fallback_warns_and_names_every_refusal():
    done = _run(CALL, VIDOPS_NO_EXT="1", VIDOPS_FALLBACK="warn")
    assert done.returncode == 0
    assert "RuntimeWarning" in done.stderr and "VIDOPS_NO_EXT" in done.stderr


def test_fallback_allow_is_quiet():
    done = _run(CALL, VIDOPS_NO_EXT="1", VIDOPS_FALLBACK="allow")
    assert done.returncode == 0 and done.stderr == ""


def test_backend_variables():
    code = CALL + "; print(vidops.explain('greedy_absorb', torch.ones(1, 1, dtype=torch.int64)).backend)"
    assert _run(code, VIDOPS_BACKEND="reference").stdout.strip() == "reference"
    assert _run(code, VIDOPS_BACKEND="reference", VIDOPS_BACKEND_GREEDY_ABSORB="cpu").stdout.strip() == "cpu"


def test_unknown_values_are_named():
    for name in ("VIDOPS_BACKEND", "VIDOPS_FALLBACK"):
        done = _run(CALL, **{name: "fastest"})
        assert done.returncode != 0 and name in done.stderr and "fastest" in done.stderr


def test_report_never_fails_and_names_reasons():
    done = _run("import vidops.__main__ as m; raise SystemExit(m.main([]))", VIDOPS_NO_EXT="1")
    assert done.returncode == 0 and "VIDOPS_NO_EXT" in done.stdout and "greedy_absorb" in done.stdout
