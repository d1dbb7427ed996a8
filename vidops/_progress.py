"""Time per stage, and a progress bar where a person can see it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_WIDTH = 24


class Stages:
    """Collects seconds per named stage; draws on `stream` when it is a terminal and `quiet` is off."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.shown = not quiet and self.stream.isatty()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Time the body; it receives a function to call with the number of steps done."""
        start = time.perf_counter()
        drawn = 0.0

        def advance(done: int) -> None:
            nonlocal drawn
            now = time.perf_counter()
            # Drawing is slow on some terminals; ten times a second is smooth enough.
            if self.shown and (now - drawn > 0.1 or done == total):
                drawn = now
                if total:
                    filled = min(_WIDTH, _WIDTH * done // total)
                    bar = f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {done}/{total}"
                else:
                    bar = str(done) if done else ""
                self._line(f"{name:<10} {bar} {now - start:6.1f} s")

        advance(0)
        try:
            yield advance
        finally:
            spent = self.seconds[name] = time.perf_counter() - start
            if self.shown:
                self._line(f"{name:<10} {spent:.1f} s")
                self.stream.write("\n")
                self.stream.flush()

    def _line(self, text: str) -> None:
        self.stream.write(f"\r\x1b[2K{text}")
        self.stream.flush()
