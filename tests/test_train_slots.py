"""``vidops train-slots``: sprites, training that finds objects, files, equal curves on two backends, bad options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vidops.__main__ import main
from vidops.segment import descriptors
from vidops.segment.scoring import ReferenceMasks
from vidops.train_slots import command, data, pictures, sprites, training
from vidops.train_slots.model import FeatureTracker, place_waves
from vidops.video import Video

FILES = {"sprites_curve.png", "sprites_masks.gif", "sprites_weights.pt", "report.json"}


@pytest.fixture(autouse=True)
def one_thread():
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def drawn(seed: int, count: int = 6, frames: int = 9, side: int = 16) -> sprites.Clips:
    return sprites.draw(count, frames, side, torch.Generator().manual_seed(seed))


def test_sprites_follow_their_generator():
    first, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(first.frames, again.frames) and torch.equal(first.ids, again.ids)
    assert not torch.equal(first.frames, other.frames)
    assert first.frames.shape == (6, 9, 3, 16, 16) and first.ids.shape == (6, 9, 16, 16)
    assert first.frames.min() >= 0 and first.frames.max() <= 1
    assert set(first.ids.unique().tolist()) == {0, 1, 2, 3}


def test_a_mask_is_where_its_colour_is():
    clips = drawn(3)
    for ids, frames in zip(clips.ids, clips.frames, strict=True):
        for number in range(4):
            colours = frames.movedim(1, -1)[ids == number]
            assert len(colours.unique(dim=0)) <= 1
    background = clips.frames.movedim(2, -1)[clips.ids == 0]
    assert background.max() <= 0.1


def test_sprites_move_and_stay_inside():
    clips = drawn(4, count=20, frames=30)
    assert (clips.ids[:, 0] != clips.ids[:, 1]).flatten(1).any(1).all()
    # A centre never leaves the picture, so that a part of every uncovered shape stays visible.
    assert (clips.ids > 0).flatten(2).any(2).all()


def test_places_are_told_apart():
    waves = place_waves(5, 7)
    assert waves.shape == (35, 18) and torch.cdist(waves, waves).fill_diagonal_(1).min() > 0.05


def test_learning_rate_warms_up_and_falls():
    rates = [training.learning_rate(2.0, step, 1000) for step in range(1001)]
    assert rates[0] < 0.04 and max(rates) <= 2.0
    assert rates[1000] == pytest.approx(0.2)


def test_training_finds_the_sprites():
    """A fifth of the default run: FG-ARI far above that of the untrained net, loss below that of no slots."""
    result = training.train(data.sprite_task(), steps=600, every=300)
    first, *_, last = result.points
    assert [p.step for p in result.points] == [0, 300, 600] and len(result.losses) == 600
    assert last.loss < 0.65 * np.mean(result.losses[:20])
    assert first.fg_ari < 0.1 and last.fg_ari > 0.3
    assert result.labels.shape == (data.TEST_CLIPS, data.TEST_FRAMES, data.SIDE, data.SIDE)


def test_a_seed_fixes_a_run_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    runs = [training.train(data.sprite_task(), steps=5, every=5, seed=seed).losses for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0] == runs[1] != runs[2]


def test_two_backends_train_alike():
    assert command.compare(data.sprite_task(batch=4), seed=0) <= command.TOLERANCE


def test_backends_that_differ_are_noticed(monkeypatch, tmp_path, capsys):
    def biased(task, *, backend=None, **options):
        result = training.train(task, backend=backend, **options)
        return replace(result, losses=[loss * (1 + 1e-3 * (backend == "cpu")) for loss in result.losses])

    monkeypatch.setattr(command, "train", biased)
    monkeypatch.setattr(command, "COMPARED_STEPS", 3)
    monkeypatch.setattr(command.compare, "__kwdefaults__", {"steps": 3})
    assert main(["train-slots", "--data", "sprites", "-o", str(tmp_path / "out"), "--compare", "--quiet"]) == 1
    assert "differ by" in capsys.readouterr().err and not (tmp_path / "out").exists()


def maps_of(strides: tuple[int, ...], frames: int = 9, channels: int = 8) -> tuple[list[torch.Tensor], np.ndarray]:
    """Feature maps of two squares that cross a still ground of 32 x 48, at each stride, and their masks."""
    generator = torch.Generator().manual_seed(0)
    still, coats = torch.randn(channels, 32, 48, generator=generator), torch.randn(2, channels, generator=generator)
    clip, truth = still.repeat(frames, 1, 1, 1), np.zeros((frames, 32, 48), np.int64)
    for t in range(frames):
        for number, (row, column) in enumerate([(2, 4 * t), (20, 38 - 4 * t)]):
            clip[t, :, row : row + 8, column : column + 8] = 3 * coats[number, :, None, None]
            truth[t, row : row + 8, column : column + 8] = number + 1
    clip += 0.02 * torch.randn(clip.shape, generator=generator)
    return [torch.nn.functional.avg_pool2d(clip, stride) for stride in strides], truth


def two_squares(truth: np.ndarray) -> tuple[Video, ReferenceMasks]:
    count = len(truth)
    frames = np.zeros((count, 32, 48, 3), np.uint8)
    video = Video("", frames, np.arange(count), np.arange(count) / 5, (32, 48), 5.0, count, "raw", "raw")
    return video, ReferenceMasks(truth, np.arange(count), ("upper", "lower"), np.ones(count, bool))


def descriptor_task(**options) -> data.Task:
    """Two moving squares, as descriptors of 8 x 12 places."""
    maps, truth = maps_of((2, 4, 8))
    apart = descriptors.DescriptorSettings(moving_place=data.MOVING_PLACE)
    found = descriptors.build(maps, (8, 12), ratio=1, settings=apart)
    assert found.change is not None
    video, masks = two_squares(truth)
    return data.feature_task(video, found.q[:, 0, :, :-1], (8, 12), masks, slots=4, **options)


def test_training_finds_what_moves_among_descriptors():
    task = descriptor_task()
    assert isinstance(task.model(), FeatureTracker) and task.test.shape == (1, 9, 96, 13)
    torch.testing.assert_close(task.test.mean((1, 2)), torch.zeros(1, 13), rtol=0, atol=1e-5)
    torch.testing.assert_close(task.test.std(), torch.tensor(1.0))
    result = training.train(task, steps=300)
    first, *_, last = result.points
    assert result.labels.shape == (1, 9, 8, 12)
    assert last.loss < 0.6 * first.loss and first.fg_ari < 0.2 and last.fg_ari > 0.5


def test_windows_are_of_consecutive_frames():
    task = descriptor_task(batch=50, frames=3)
    windows, clip = task.batch(torch.Generator().manual_seed(0)), task.test[0]
    assert windows.shape == (50, 3, 96, 13)
    starts = [int((clip - window[0]).flatten(1).norm(dim=1).argmin()) for window in windows]
    assert set(starts) == set(range(7))
    for start, window in zip(starts, windows, strict=True):
        assert torch.equal(window, clip[start : start + 3])


def test_the_clip_is_seen_as_descriptors(monkeypatch):
    asked = []

    def extract(net, frames, size, layers):
        asked.append((size, layers))
        return maps_of((1, 2, 4))[0]

    video, masks = two_squares(maps_of((1,))[1])
    monkeypatch.setattr(data.assets, "fetch", lambda name: Path(name))
    monkeypatch.setattr(data, "read_video", lambda path, max_frames: video)
    monkeypatch.setattr(data.features.MobileNetV2, "from_file", lambda path: None)
    monkeypatch.setattr(data.features, "extract", extract)
    monkeypatch.setattr(data.scoring, "read_masks", lambda path: masks)
    task = data.clip_task()
    assert asked == [((240, 432), descriptors.LAYERS)]
    assert task.test.shape == (1, 9, 30 * 54, 13) and task.target(task.test).shape == (1, 9, 13, 30, 54)
    # The constant channel of the queries would tell nothing.
    assert task.test.std((0, 1, 2)).min() > 0.01


def test_files(tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    arguments = ["train-slots", "--data", "sprites", "-o", str(out), "--steps", "6", "--every", "4", "--seed", "5"]
    assert main(arguments) == 0
    assert {path.name for path in out.iterdir()} == FILES
    shown = capsys.readouterr().out
    assert "step     4" in shown and "FG-ARI" in shown and "backend" in shown
    with Image.open(out / "sprites_masks.gif") as gif:
        assert gif.n_frames == data.TEST_FRAMES and gif.size == (4 * pictures.SCALE_TO, 2 * pictures.SCALE_TO)
    with Image.open(out / "sprites_curve.png") as curve:
        assert curve.size == (pictures.WIDTH, pictures.HEIGHT)
    (run,) = json.loads((out / "report.json").read_text())["runs"]
    assert [point["step"] for point in run["points"]] == [0, 4, 6] and run["backend"] in ("cpu", "reference")
    state = torch.load(out / "sprites_weights.pt", weights_only=True)
    data.sprite_task().model().load_state_dict(state)
    assert main([*arguments, "--quiet"]) == 0 and capsys.readouterr().out == ""


def test_a_run_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command.pictures, "write_masks", full_disk)
    assert main(["train-slots", "--data", "sprites", "-o", str(tmp_path / "out"), "--steps", "1", "--quiet"]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        [], ["--data", "cats"], ["--steps", "0"], ["--steps", "-3"], ["--steps", "many"], ["--steps", "1e3"],
        ["--steps", "10000000"], ["--every", "0"], ["--every", "x"], ["--seed", "-1"], ["--seed", "2147483648"],
        ["--backend", "gpu"], ["--backend", "cuda"], ["--device", "tpu9"], ["--device", "cuda:99"], ["--surprise"],
        ["extra.mp4"], ["--steps"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_options_get_one_line(options, tmp_path, capsys):
    out = ["-o", str(tmp_path / "out")] if options else []
    if options[:2] == ["--backend", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a card")
    fast = [] if "--steps" in options else ["--steps", "1"]
    assert main(["train-slots", *out, "--data", "sprites", *fast, *options]) == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and shown.err.startswith("vidops train-slots: ")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("kept")
    assert main(["train-slots", "-o", str(path), "--data", "sprites", "--steps", "1"]) == 2
    assert path.read_text() == "kept" and len(capsys.readouterr().err.splitlines()) == 1


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        main(["train-slots", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("--data", "--steps", "--seed", "--backend", "--compare", "--device"))


def test_curve_of_one_point(tmp_path: Path):
    pictures.write_curve(tmp_path / "c.png", [training.Point(0, 0.0, -0.2)], "alone")
    with Image.open(tmp_path / "c.png") as curve:
        assert curve.format == "PNG"
