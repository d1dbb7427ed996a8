"""``vidops classify``: what it writes and prints, both checkpoint layouts, label files, and bad options in one line."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vidops.__main__ import main
from vidops.classify import command, labels, pictures
from vidops.models.sta import VideoViT, to_hf_state
from vidops.video import write_video

FILES = {"tokens.mp4", "tokens.png", "report.json"}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    frames = np.full((20, 64, 96, 3), 40, np.uint8)
    for t in range(20):
        frames[t, 10:40, 2 + 3 * t : 22 + 3 * t] = (220, 60, 60)
    path = tmp_path_factory.mktemp("video") / "square.mp4"
    write_video(path, frames, 10)
    return str(path)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = VideoViT("tiny").eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def classify(video, out, *options):
    return main(["classify", video, "-o", str(out), "--model", "sta_tiny", "--device", "cpu", "--r", "3", *options])


def test_random_weights_are_said(video, tmp_path, capsys):
    assert classify(video, tmp_path / "out", "--repeats", "1") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    shown = capsys.readouterr().out
    assert "random weights" in shown and "128 -> 104 -> 92 -> 86" in shown and "class 0" in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["weights"] == command.RANDOM and report["load_report"] is None
    assert report["tokens"] == {"start": 128, "after_calls": [104, 92, 86]}
    assert report["backends"] == {"sta_prune": "cpu"}
    assert len(report["frames"]) == 16 and report["seconds_whole"] > 0 and report["seconds_pruned"] > 0
    with Image.open(tmp_path / "out" / "tokens.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 8 * 32
    with av.open(str(tmp_path / "out" / "tokens.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 16 and frames[0].shape == (32, 64, 3)


@pytest.mark.parametrize("layout", ["plain", "module", "hugging face"])
def test_a_checkpoint_decides(layout, video, model, tmp_path):
    state = to_hf_state(model.state_dict()) if layout == "hugging face" else model.state_dict()
    torch.save({"module": state} if layout == "module" else state, tmp_path / "weights.pt")
    names = [f"name {i}" for i in range(10)]
    (tmp_path / "labels.txt").write_text("\n".join(names))
    given = ["--classes", "10", "--checkpoint", str(tmp_path / "weights.pt"), "--labels", str(tmp_path / "labels.txt")]
    assert classify(video, tmp_path / "out", *given, "--quiet") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["weights"] == str(tmp_path / "weights.pt") and "loaded" in report["load_report"]
    frames = command.read_video(video, max_frames=16)
    clip = command._clip(frames, model.config)
    with torch.inference_mode():
        for r, key in ((0, "top_whole"), (3, "top_pruned")):
            model.r = r
            share = model(clip).softmax(1)[0]
            best = report[key][0]
            assert len(report[key]) == command.TOP
            assert best["class"] == int(share.argmax()) and best["name"] == f"name {best['class']}"
            assert best["probability"] == pytest.approx(float(share.max()), abs=1e-5)
    model.r = 0


def test_the_picture_shows_what_was_dropped(video, model):
    clip = command._clip(command.read_video(video, max_frames=16), model.config)
    model.r = 3
    with torch.inference_mode():
        trace = model.trace(clip)
    model.r = 0
    dropped = command.dropped_by(trace, model.config.grid)
    assert [int((dropped == call).sum()) for call in range(4)] == [86, 24, 12, 6]
    assert (dropped == 1).sum((1, 2)).tolist() == [3] * 8  # of every frame in the first call
    kept = set(trace.stages[-1].position[0].tolist())
    assert kept == set(np.flatnonzero(dropped == 0).tolist())
    frames = np.full((16, 32, 32, 3), 200, np.uint8)
    shown = pictures.overlays(frames, dropped)
    for t, y, x in zip(*np.nonzero(dropped), strict=True):
        patch = shown[2 * t, 8 * y + 1 : 8 * y + 8, 8 * x + 1 : 8 * x + 8]
        assert patch.max() < 200
    assert (pictures.overlays(frames, np.zeros_like(dropped)) == frames).all()


def test_nothing_is_dropped_for_r_0(video, tmp_path):
    assert classify(video, tmp_path / "out", "--r", "0", "--quiet", "--repeats", "1") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tokens"]["after_calls"] == [] and report["top_whole"] == report["top_pruned"]


def test_short_videos_stand_still_at_the_end(video):
    config = VideoViT("tiny").config
    short = command.read_video(video, max_frames=5)
    clip = command._clip(short, config)
    assert clip.shape == (1, 3, 16, 32, 32)
    assert all(torch.equal(clip[:, :, 4], clip[:, :, t]) for t in range(5, 16))
    assert not torch.equal(clip[:, :, 3], clip[:, :, 4])


@pytest.mark.parametrize(
    "text,want",
    [
        ("a\nb\n\nc\n", ["a", "b", "c"]),
        ('["a", "b", "c"]', ["a", "b", "c"]),
        ('{"0": "a", "2": "c", "1": "b"}', ["a", "b", "c"]),
        ('{"a": 0, "c": 2, "b": 1}', ["a", "b", "c"]),
        ('{"id2label": {"0": "a", "1": "b", "2": "c"}, "other": 1}', ["a", "b", "c"]),
    ],
)
def test_label_files(text, want, tmp_path):
    path = tmp_path / "labels"
    path.write_text(text)
    assert labels.read_labels(path, 3) == want


@pytest.mark.parametrize("text", ["", "a\nb", '["a", "b", 3]', "{", '{"0": "a", "1": "b", "3": "c"}', "[" * 9999, "{}"])
def test_bad_label_files(text, video, tmp_path, capsys):
    path = tmp_path / "labels"
    path.write_text(text)
    assert classify(video, tmp_path / "out", "--classes", "3", "--labels", str(path)) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1 and str(path) in shown and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--r", "-1"], ["--r", "16"], ["--r", "x"], ["--model", "vit"], ["--model", "sta_vit"], ["--classes", "0"],
        ["--repeats", "0"], ["--seed", "-1"], ["--start", "-1"], ["--start", "99"], ["--end", "0"], ["--end", "nan"],
        ["--backend", "gpu"], ["--device", "tpu9"], ["--labels", "missing"], ["--checkpoint", "missing"],
        ["--labels", "."], ["--demo"], ["--surprise"], ["second.mp4"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_options_get_one_line(options, video, tmp_path, capsys):
    assert classify(video, tmp_path / "out", *options) == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and shown.err.startswith("vidops classify: ") and not shown.out
    assert not (tmp_path / "out").exists()


def test_damaged_inputs_get_one_line(video, model, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.write_bytes(b"neither a video nor weights")
    assert classify(str(bad), tmp_path / "out") == 2
    assert classify(video, tmp_path / "out", "--checkpoint", str(bad)) == 2
    torch.save(model.state_dict(), tmp_path / "ten.pt")
    assert classify(video, tmp_path / "out", "--classes", "7", "--checkpoint", str(tmp_path / "ten.pt")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("vidops classify: ") for line in errors)
    assert "head.weight" in errors[2]
