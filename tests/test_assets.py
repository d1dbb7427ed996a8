"""Assets are taken by hash or not at all."""

import dataclasses
import hashlib
import zipfile

import pytest

from vidops import assets
from vidops.assets import AssetError


def _asset(data=b"payload", member="pkg/data/file.bin"):
    return assets.Asset(
        name="toy",
        requirement="toy==1",
        wheel="toy-1-py3-none-any.whl",
        wheel_sha256="0" * 64,
        member=member,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        licence="none",
        what="a test",
    )


def _wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_one_member_is_unpacked(tmp_path):
    wheel = _wheel(tmp_path / "w.whl", {"pkg/data/file.bin": b"payload", "../../evil": b"x"})
    target = tmp_path / "out" / "member"
    target.parent.mkdir()
    assets.unpack_member(_asset(), wheel, target)
    assert target.read_bytes() == b"payload"
    assert {p.name for p in tmp_path.iterdir()} == {"w.whl", "out"}


@pytest.mark.parametrize(
    "members", [{"pkg/data/file.bin": b"PAYLOAD"}, {"pkg/data/file.bin": b"payload and more"}, {"other": b"payload"}]
)
def test_wrong_member_is_refused(tmp_path, members):
    with pytest.raises(AssetError, match="toy"):
        assets.unpack_member(_asset(), _wheel(tmp_path / "w.whl", members), tmp_path / "member")


def test_not_a_wheel(tmp_path):
    (tmp_path / "w.whl").write_bytes(b"not a zip")
    with pytest.raises(AssetError, match="toy"):
        assets.unpack_member(_asset(), tmp_path / "w.whl", tmp_path / "member")


def test_unknown_name_lists_the_known():
    with pytest.raises(AssetError, match="two_people"):
        assets.fetch("two people")


def test_folder_is_checked_by_hash(tmp_path, monkeypatch):
    asset = _asset()
    monkeypatch.setitem(assets.ASSETS, "toy", asset)
    monkeypatch.setenv("VIDOPS_ASSETS", str(tmp_path))
    with pytest.raises(AssetError, match="file.bin"):
        assets.fetch("toy")
    (tmp_path / "file.bin").write_bytes(b"other")
    with pytest.raises(AssetError, match="SHA-256"):
        assets.fetch("toy")
    (tmp_path / "file.bin").write_bytes(b"payload")
    assert assets.fetch("toy").read_bytes() == b"payload"


def test_offline_cache(tmp_path, monkeypatch):
    monkeypatch.setitem(assets.ASSETS, "toy", dataclasses.replace(_asset(), requirement="no-such-package-here==1"))
    monkeypatch.setenv("VIDOPS_CACHE", str(tmp_path))
    monkeypatch.delenv("VIDOPS_ASSETS", raising=False)
    with pytest.raises(AssetError, match="downloads are off"):
        assets.fetch("toy", download=False)


@pytest.mark.network
def test_real_clip(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDOPS_CACHE", str(tmp_path))
    path = assets.fetch("carphone")
    assert assets.file_sha256(path) == assets.ASSETS["carphone"].sha256
