"""Mask files that cannot be used give one line that starts with their path."""

import numpy as np
import pytest

from vidops.segment.scoring import MaskError, read_masks

GOOD = {"labels": np.array([[[0, 1], [2, 2]]]), "frames": np.array([4])}
CHANGED = {
    "no labels": {"frames": GOOD["frames"]},
    "no frames": {"labels": GOOD["labels"]},
    "rank": {**GOOD, "labels": GOOD["labels"][0]},
    "no pixel": {**GOOD, "labels": GOOD["labels"][:, :0]},
    "negative": {**GOOD, "labels": -GOOD["labels"]},
    "fractions": {**GOOD, "labels": GOOD["labels"] / 2},
    "words": {**GOOD, "labels": np.full((1, 2, 2), "x")},
    "objects": {**GOOD, "labels": np.full((1, 2, 2), None, dtype=object)},
    "frames of another number": {**GOOD, "frames": np.array([4, 5])},
    "frames of another type": {**GOOD, "frames": np.array([4.5])},
    "too few names": {**GOOD, "names": np.array(["person"])},
    "one name": {**GOOD, "names": np.array("person")},
    "complete of another number": {**GOOD, "complete": np.array([True, False])},
    "complete as one": {**GOOD, "complete": np.array(True)},
    "complete in words": {**GOOD, "complete": np.array(["yes"])},
}


def test_a_good_file(tmp_path):
    path = tmp_path / "masks.npz"
    np.savez(path, **GOOD, names=np.array(["person", "dog"]), unread=np.array([{}], dtype=object))
    masks = read_masks(path)
    assert masks.names == ("person", "dog") and masks.complete.tolist() == [True] and masks.frames.tolist() == [4]


@pytest.mark.parametrize("kind", CHANGED)
def test_wrong_content(tmp_path, kind):
    path = tmp_path / "masks.npz"
    np.savez(path, **CHANGED[kind])
    with pytest.raises(MaskError) as caught:
        read_masks(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["absent", "folder", "empty", "text", "one array", "truncated", "damaged"])
def test_no_archive(tmp_path, kind):
    path = tmp_path / "masks.npz"
    np.savez_compressed(path, **GOOD)
    content = path.read_bytes()
    if kind in ("absent", "folder"):
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "one array":
        with path.open("wb") as file:
            np.save(file, GOOD["labels"])
    elif kind != "absent":
        damaged = bytearray(content)
        damaged[60:90] = bytes(30)
        path.write_bytes(
            {"empty": b"", "text": b"no masks\n", "truncated": content[:-100], "damaged": bytes(damaged)}[kind]
        )
    with pytest.raises(MaskError) as caught:
        read_masks(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
