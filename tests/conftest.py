"""The test header names the matrix; a run can be required to have covered given backends."""

from __future__ import annotations

import os
from collections.abc import Iterator

import matrix
import pytest
import torch

_ran: dict[str, int] = {}


def pytest_report_header() -> str:
    where = ", ".join(f"{b} on {matrix.device_for(b)}" for b in matrix.BACKENDS)
    how = " (interpreted)" if matrix.INTERPRETED else " (host shim)" if matrix.SHIM else ""
    return f"vidops backends: {where}{how}"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        backend = dict(report.user_properties).get("backend")
        if backend is not None:
            _ran[str(backend)] = _ran.get(str(backend), 0) + 1


@pytest.fixture(autouse=True)
def _record_backend(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and "backend" in callspec.params:
        request.node.user_properties.append(("backend", callspec.params["backend"]))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A suite of skips is not green: every backend in VIDOPS_TEST_REQUIRE must have passed at least one test."""
    required = [b for b in os.environ.get("VIDOPS_TEST_REQUIRE", "").split(",") if b]
    missing = [b for b in required if not _ran.get(b)]
    if missing and exitstatus == pytest.ExitCode.OK:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"VIDOPS_TEST_REQUIRE: no test passed on {', '.join(missing)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that change torch's number of threads: restored afterwards."""
    saved = torch.get_num_threads()
    yield
    torch.set_num_threads(saved)
