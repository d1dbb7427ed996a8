"""Output folders that hold whole files or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


class OutputError(OSError):
    """The output folder cannot be used; the text is one line."""


class OutputFolder:
    """Files are written into a hidden folder inside `path` and renamed into place together by `commit`.

    Used as a context manager: leaving it without `commit` removes what was written, and the folder itself when
    it was made here. Being inside `path`, the hidden folder is on the same file system, so renames are atomic,
    and a folder that cannot be written is found out before any work is done.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._made: list[Path] = []
        self._scratch: Path | None = None

    def __enter__(self) -> OutputFolder:
        try:
            missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._made = missing
            self._scratch = Path(tempfile.mkdtemp(prefix=".vidops-", dir=self.path))
        except OSError as error:
            raise OutputError(f"output folder {self.path} cannot be written ({error.strerror})") from error
        return self

    def file(self, name: str) -> Path:
        """Where to write the file that `commit` will put at ``path/name``."""
        if self._scratch is None:
            raise RuntimeError("the output folder is not open")
        return self._scratch / name

    def commit(self, names: list[str]) -> None:
        """Put the named files into place, replacing older ones, in this order."""
        for name in names:
            try:
                os.replace(self.file(name), self.path / name)
            except OSError as error:
                raise OutputError(f"{self.path / name} cannot be written ({error.strerror})") from error
        self._made = []

    def __exit__(self, *_: object) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                # Someone else put something into it meanwhile; it is theirs now.
                break
