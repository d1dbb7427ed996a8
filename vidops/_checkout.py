"""Make a source checkout importable: `kernels/` and `models/` lie beside the package there, not inside it.

Installed copies (wheel or editable) already carry `vidops.kernels` and `vidops.models` and never take the branch.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path


class _SiblingFinder:
    """Serves the mapped packages on first import, so that importing vidops itself loads neither."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        folder = self.folders.get(name)
        if folder is None:
            return None
        init = folder / "__init__.py"
        return importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(folder)])


def map_sibling_packages(package: str, here: Path) -> None:
    folders = {}
    for name in ("kernels", "models"):
        folder = here.parent / name
        if (folder / "__init__.py").is_file() and importlib.util.find_spec(f"{package}.{name}") is None:
            folders[f"{package}.{name}"] = folder
    if folders:
        sys.meta_path.append(_SiblingFinder(folders))  # type: ignore[arg-type]
