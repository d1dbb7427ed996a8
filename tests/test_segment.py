"""The main job: what it writes, and that what it cannot use gets one line and exit code 2."""

import json

import av
import numpy as np
import pytest
import torch

from vidops import features
from vidops.__main__ import main

FILES = {"overlay.mp4", "contact.png", "labels.npz", "report.json"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pt"
    torch.save(features.MobileNetV2().state_dict(), path)
    return path


def _video(path, frames, size=(64, 96), codec="mpeg4"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for t in range(frames):
            image = np.full((*size, 3), 60, np.uint8)
            image[20:44, 4 + 6 * t : 24 + 6 * t] = (220, 40, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def _audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return path


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_short_videos_work(tmp_path, weights, frames, capsys):
    out = tmp_path / "out"
    video = _video(tmp_path / "v.mp4", frames)
    arguments = ["segment", str(video), "-o", str(out), "--weights", str(weights), "--size", "64x96"]
    assert main(arguments) == 0
    assert {p.name for p in out.iterdir()} == FILES
    labels = np.load(out / "labels.npz")["labels"]
    assert labels.shape == (frames, 8, 12)
    report = json.loads((out / "report.json").read_text())
    assert set(report["backends"].values()) == {"cpu"}
    assert report["clusters"] == labels.max() + 1
    with av.open(str(out / "overlay.mp4")) as overlay:
        assert sum(1 for _ in overlay.decode(video=0)) == frames
    assert "backend" in capsys.readouterr().out


def test_backends_agree(tmp_path, weights):
    video = _video(tmp_path / "v.mp4", 4)
    found = []
    for backend in ("reference", "cpu"):
        out = tmp_path / backend
        common = ["-o", str(out), "--weights", str(weights), "--size", "64x96", "--quiet"]
        assert main(["segment", str(video), *common, "--backend", backend]) == 0
        found.append(np.load(out / "labels.npz")["labels"])
    assert np.array_equal(*found)


def _broken(kind, folder):
    good = _video(folder / "good.mp4", 12)
    path = folder / f"{kind}.mp4"
    data = good.read_bytes()
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
        return path
    if kind == "audio":
        return _audio(folder / "audio.wav")
    content = {
        "empty": b"",
        "text": b"this is not a video\n" * 50,
        "truncated": data[: len(data) // 3],
        "zeros": bytes(5000),
        "header_only": data[:64],
    }[kind]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "audio", "empty", "text", "truncated", "zeros", "header_only"]
)
def test_broken_videos(tmp_path, weights, capsys, kind):
    out = tmp_path / "out"
    code = main(["segment", str(_broken(kind, tmp_path)), "-o", str(out), "--weights", str(weights), "--quiet"])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("vidops segment: ") and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err and not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--frames", "0"], ["--frames", "x"], ["--tau", "-1"], ["--tau", "nan"], ["--window", "0"], ["--ratio", "0"],
        ["--size", "10x10"], ["--size", "big"], ["--start", "9", "--end", "1"], ["--start", "99"],
        ["--backend", "gpu"], ["--device", "nowhere"], ["--weights", "absent.pt"], ["--checkpoint", "absent.pt"],
        ["--masks", "absent.npz"], ["--model", "huge", "--checkpoint", "absent.pt"], ["--demo"], ["--unknown"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_options(tmp_path, weights, capsys, options):
    video = _video(tmp_path / "v.mp4", 3)
    out = tmp_path / "out"
    extra = [] if "--weights" in options else ["--weights", str(weights)]
    code = main(["segment", str(video), "-o", str(out), "--size", "64x96", *extra, *options])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.splitlines()[-1].startswith("vidops segment: ") and "Traceback" not in captured.err
    assert not out.exists()


def test_output_that_is_a_file(tmp_path, weights, capsys):
    out = tmp_path / "out"
    out.write_text("mine")
    assert main(["segment", str(_video(tmp_path / "v.mp4", 2)), "-o", str(out), "--weights", str(weights)]) == 2
    assert out.read_text() == "mine" and "out" in capsys.readouterr().err
