"""Names of classes from a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vidops._options import UsageError

MAX_BYTES = 16 * 2**20


def read_labels(path: str | os.PathLike[str], count: int) -> list[str]:
    """`count` names: a line each, or JSON: a list, an object of numbers to names, or a config.json with `id2label`.

    UsageError, naming the file, when there are not `count`, or when it is none of these.
    """
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise UsageError(f"--labels {path}: larger than any list of classes")
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--labels {path}: {reason}") from error
    names = _parse(text, str(path))
    if len(names) != count:
        raise UsageError(f"--labels {path}: {len(names)} names for {count} classes")
    return names


def _parse(text: str, path: str) -> list[str]:
    if not text.lstrip().startswith(("{", "[")):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        found: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"--labels {path}: not JSON ({error})") from error
    if isinstance(found, dict):
        found = found.get("id2label", found)
    if isinstance(found, dict):
        try:
            # Either way round; names that are numbers themselves are taken for numbers of classes.
            number = {int(key): value for key, value in found.items()}
        except ValueError:
            number = {value: key for key, value in found.items() if isinstance(value, int)}
        found = [number.get(i) for i in range(len(number))]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UsageError(f"--labels {path}: expected names of the classes 0, 1, ... without gaps")
    return found
