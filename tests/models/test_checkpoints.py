"""Checkpoints: every accepted layout, every kind of bad file, and no model left with a random encoder."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vidops import checkpoints
from vidops.checkpoints import CheckpointError
from vidops.models.ssl_uvos import SSLUVOS

UNEXPECTED = "temporal_transformer.7.norm1.weight"


@pytest.fixture(scope="module")
def model() -> SSLUVOS:
    torch.manual_seed(1)
    return SSLUVOS("tiny").eval()


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def assert_same(found: SSLUVOS, expected: SSLUVOS, prefix: str = "") -> None:
    for name, value in expected.state_dict().items():
        if name.startswith(prefix):
            assert torch.equal(found.state_dict()[name], value), name


def encoder_state(model: SSLUVOS) -> dict[str, torch.Tensor]:
    return dict(model.encoder.state_dict())


@pytest.mark.parametrize("layout", ["authors", "plain", "legacy", "data parallel", "safetensors", "half"])
def test_round_trip(tmp_path: Path, model: SSLUVOS, layout: str) -> None:
    state = model.state_dict()
    path = tmp_path / "weights.pt"
    if layout == "authors":
        saved(path, {"model_state_dict": state, "iteration": 60_000, "loss": 0.5, "optimizer_state_dict": {}})
    elif layout == "plain":
        saved(path, dict(state))
    elif layout == "legacy":
        saved(path, {"model_state_dict": state}, _use_new_zipfile_serialization=False)
    elif layout == "data parallel":
        saved(path, {"model_state_dict": {f"module.{name}": value for name, value in state.items()}})
    elif layout == "half":
        saved(path, {name: value.half() for name, value in state.items()})
    else:
        path = tmp_path / "weights.safetensors"
        pytest.importorskip("safetensors.torch").save_file(dict(state), path)
    found = SSLUVOS.from_pretrained(path, "tiny")
    assert found.load_report is not None
    assert found.load_report.complete
    assert len(found.load_report.loaded) == len(state)
    assert not found.training
    if layout == "half":
        for name, value in found.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, state[name].half().float())
    else:
        assert_same(found, model)
        video = torch.randn(3, 3, 16, 16)
        ours, theirs = (m.segment(video, tau=0.01, ratio=2, backend="reference") for m in (found, model))
        assert torch.equal(ours.labels, theirs.labels)


def test_bare_backbone_needs_consent_and_leaves_the_block(tmp_path: Path, model: SSLUVOS) -> None:
    path = saved(tmp_path / "dino.pth", encoder_state(model))
    with pytest.raises(CheckpointError, match="strict=False"):
        SSLUVOS.from_pretrained(path, "tiny")
    found = SSLUVOS.from_pretrained(path, "tiny", strict=False)
    assert_same(found, model, "encoder.")
    report = found.load_report
    assert report is not None
    assert report.layout == "DINO backbone"
    assert report.missing == tuple(n for n in model.state_dict() if n.startswith("temporal_transformer."))
    assert "missing" in str(report)


def test_full_dino_checkpoint_gives_its_teacher(tmp_path: Path, model: SSLUVOS) -> None:
    teacher = {f"backbone.{name}": value for name, value in encoder_state(model).items()}
    content = {
        "student": {f"module.{name}": torch.zeros_like(value) for name, value in teacher.items()},
        "teacher": {**teacher, "head.mlp.0.weight": torch.zeros(3, 3)},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=8),
    }
    found = SSLUVOS.from_pretrained(saved(tmp_path / "full.pth", content), "tiny", strict=False)
    assert_same(found, model, "encoder.")
    assert found.load_report is not None
    assert found.load_report.ignored == ("head.mlp.0.weight",)
    del content["teacher"]
    found = SSLUVOS.from_pretrained(saved(tmp_path / "student.pth", content), "tiny", strict=False)
    assert not found.encoder.patch_embed.proj.weight.any()


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message", "even_unstrict"),
    [
        (without("encoder.blocks.1.attn.qkv.bias"), "encoder.blocks.1.attn.qkv.bias", True),
        (without("temporal_transformer.0.norm1.bias"), "temporal_transformer.0.norm1.bias", False),
        (lambda s: {**s, UNEXPECTED: torch.zeros(48)}, UNEXPECTED, False),
        (lambda s: {**s, "encoder.cls_token": torch.zeros(1, 1, 49)}, r"\(1, 1, 49\); expected", True),
        (lambda s: {**s, "encoder.cls_token": torch.full((1, 1, 48), torch.nan)}, "NaN", True),
        (lambda s: {**s, "encoder.cls_token": torch.zeros(1, 1, 48, dtype=torch.int64)}, "int64", True),
        (lambda s: {f"visual.{name}": value for name, value in s.items()}, "no name fits", True),
        (lambda s: {n: v for n, v in s.items() if n.startswith("temporal")}, "encoder.cls_token", True),
    ],
)
def test_state_that_does_not_fit(
    tmp_path: Path, model: SSLUVOS, change: Any, message: str, even_unstrict: bool
) -> None:
    path = saved(tmp_path / "wrong.pt", {"model_state_dict": change(dict(model.state_dict()))})
    target = SSLUVOS("tiny")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        target.load_checkpoint(path)
    assert str(caught.value).startswith(str(path))
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    if even_unstrict:
        with pytest.raises(CheckpointError, match=message):
            target.load_checkpoint(path, strict=False)
    else:
        report = target.load_checkpoint(path, strict=False)
        assert not report.complete
        assert message in (*report.missing, *report.unexpected)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.zeros(3),
        {},
        {"epoch": 3},
        {1: torch.zeros(2)},
        {"model_state_dict": {}},
        {"model_state_dict": {"a": "text"}},
        {"a": torch.zeros(2, 2).to_sparse()},
    ],
    ids=["list", "tensor", "empty", "number", "integer key", "empty state", "text", "sparse"],
)
def test_files_that_hold_something_else(tmp_path: Path, content: Any) -> None:
    path = saved(tmp_path / "other.pt", content)
    with pytest.raises(CheckpointError, match="expected") as caught:
        checkpoints.read_state_dict(path)
    assert caught.value.path == str(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pt"
    empty.touch()
    for path, message in ((tmp_path / "absent.pt", "no such file"), (tmp_path, "folder"), (empty, "empty")):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.read_state_dict(path)
        with pytest.raises(ValueError, match=message):
            SSLUVOS.from_pretrained(path, "tiny")


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse_on_disk.pt"
    with open(path, "wb") as file:
        file.truncate(checkpoints.MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match="at most"):
        checkpoints.read_state_dict(path)
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**22))
    assert bomb.stat().st_size < 2**16
    with pytest.raises(CheckpointError, match="unpacks to"):
        checkpoints.read_state_dict(bomb, max_bytes=2**20)


class Payload:
    """Pickles into a call that leaves a mark in the file system."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_a_malicious_pickle_is_not_executed(tmp_path: Path, form: str) -> None:
    mark, path = tmp_path / "executed", tmp_path / "evil.pt"
    content = {"model_state_dict": {"encoder.cls_token": torch.zeros(1)}, "extra": Payload(mark)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Payload(mark), protocol=2))
    else:
        saved(path, content, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match="could run code") as caught:
        SSLUVOS.from_pretrained(path, "tiny")
    assert "mkdir" in str(caught.value)
    assert not mark.exists()
    if form == "bare pickle":
        # The file would have worked on a reader that is not careful.
        pickle.loads(path.read_bytes())
        assert mark.is_dir()


def damaged(raw: bytes, chance: random.Random) -> bytes:
    data = bytearray(raw)
    kind = chance.randrange(4)
    if kind == 0:
        return bytes(data[: chance.randrange(1, len(data))])
    if kind == 1:
        return chance.randbytes(chance.randrange(1, 2000))
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(min(len(data), 3000) if kind == 2 else len(data))] = chance.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_damaged_files_give_one_error(tmp_path: Path, form: str) -> None:
    state = {"encoder.cls_token": torch.zeros(1, 1, 48), "encoder.norm.weight": torch.ones(48)}
    suffix = ".safetensors" if form == "safetensors" else ".pt"
    path = tmp_path / f"source{suffix}"
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        saved(path, {"model_state_dict": state}, _use_new_zipfile_serialization=form == "zip")
    raw, chance, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(150):
        path.write_bytes(damaged(raw, chance))
        try:
            checkpoints.read_state_dict(path)
        except CheckpointError as error:
            refused += 1
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)
    # Damage to the numbers themselves leaves a readable file.
    assert refused > 60


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(CheckpointError("a.pt", "problem")))
    assert (error.path, str(error)) == ("a.pt", "a.pt: problem")
