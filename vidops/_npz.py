"""Reading archives of arrays that somebody else wrote."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Collection

import numpy as np

# What NumPy and zipfile let through for files that are no archives, cut short or damaged inside.
_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(path: str | os.PathLike[str], names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or those of `names` that it has; ValueError for a file or array (pickled ones
    too) that cannot be read."""
    try:
        # NumPy leaves a file that it opened itself open when it cannot read it.
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, no archive")
            with archive:
                return {name: archive[name] for name in archive.files if names is None or name in names}
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{os.fspath(path)}: not a readable .npz file without pickles ({reason})") from error
