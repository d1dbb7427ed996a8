"""Patched SwinTransformer3d of torchvision: against its own attention on filled grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from patch_models import SWIN_SOURCES, package, swin, swin_clips

import vidops
from vidops.models.video_swin import VideoSwin, VideoSwinConfig, gflops


@pytest.fixture(params=SWIN_SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    return request.param


def by_hand(model: Any, x: torch.Tensor, drops: tuple[int, ...]) -> torch.Tensor:
    """Every attention runs on the whole grid, filled with copies of the nearest kept token."""
    x = model.patch_embed(x)
    for number, part in enumerate(model.features):
        stage, drop = number // 2, drops[number // 2]
        if number % 2 or drop == 0:
            x = part(x)
            continue
        grid = x.shape[1:4]
        tokens = x.detach().flatten(1, 3)
        keep = vidops.sta_score(tokens, tokens, grid[0], drop, stage == 2, backend="reference").keep.sort(-1).values
        y = vidops.gather_tokens(x.flatten(2, 3), keep, backend="reference")
        for block in part:
            dense, source = vidops.nearest_fill(block.norm1(y), keep, grid[1:], backend="reference")
            update = block.attn(dense.unflatten(2, grid[1:])).flatten(2, 3)
            y = y + vidops.gather_tokens(update, keep, backend="reference")
            y = y + block.mlp(block.norm2(y))
        if stage == 3:
            return model.head(model.norm(y).mean((1, 2)))
        x = vidops.gather_tokens(y, source, backend="reference").unflatten(2, grid[1:])
    return model.head(model.norm(x).mean((1, 2, 3)))


# The second has frames, rows and columns that are no multiples of the window, and merging that pads.
@pytest.mark.parametrize("size", [(8, 64, 64), (10, 72, 56), (4, 32, 32)])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_attention_sees_the_filled_grid(source: str, size: tuple[int, int, int], r: int) -> None:
    model = swin(source)
    with torch.no_grad():
        clips = swin_clips(size)
        if size == (4, 32, 32) and r == 8:
            with pytest.raises(vidops.PatchError, match="stage 4 drops 1 of every frame's tokens, .* the 1 that"):
                vidops.patch(model, r=r, clip_size=size)
            return
        unpatched, want = model(clips), by_hand(model, clips, (0, r, 3 * r // 8, r // 8))
        report = vidops.patch(model, r=r, clip_size=size, backend="reference")
        found = model(clips)
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
        assert (found - unpatched).abs().max() > 1e-4
        assert report.layers == ("features.2", "features.4", "features.6")
        model.r = 0
        assert torch.equal(model(clips), unpatched)


def test_counts(source: str) -> None:
    """Those of `vidops.models.video_swin` for the same sizes."""
    model = swin(source)
    sizes: dict[str, Any] = {"frames": 8, "img_size": 64, "dim": 8, "depths": (2, 2, 2, 2), "heads": (1, 2, 2, 4)}
    config = VideoSwinConfig(window=(2, 4, 4), classes=5, **sizes)
    for r in (0, 8, 30):
        report = vidops.patch(model, r=r, clip_size=(8, 64, 64))
        want = vidops.patch(VideoSwin(config), r=r)
        assert (report.tokens, report.gmacs, report.gmacs_unpatched) == (want.tokens, want.gmacs, want.gmacs_unpatched)
        assert report.gmacs == gflops(config, r)


@pytest.mark.parametrize(("r", "published"), [(0, 88), (192, 68), (256, 61), (320, 54)])
def test_published_costs(r: int, published: float) -> None:
    """Table 3 of Ding et al., ICCV 2023."""
    package("torchvision")
    from torchvision.models.video import swin3d_t

    with torch.device("meta"):
        model = swin3d_t()
    report = vidops.patch(model, r=r)
    assert abs(report.gmacs - published) < 1.01
    assert report.tokens[1:] == (16 * (784 - r), 16 * (196 - 3 * r // 8), 16 * (49 - r // 8))


def test_dropout_and_depth_run_in_training() -> None:
    package("torchvision")
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    torch.manual_seed(0)
    model = SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4], window_size=[2, 4, 4],
        attention_dropout=0.5, dropout=0.2, num_classes=5,
    )  # fmt: skip
    vidops.patch(model, r=8, clip_size=(4, 64, 64), backend="reference")
    clips = swin_clips().requires_grad_()
    assert not torch.equal(model(clips), model(clips))
    model(clips).sum().backward()
    assert clips.grad is not None and clips.grad.isfinite().all() and clips.grad.abs().max() > 0
    assert torch.equal(model.eval()(clips), model(clips))


def test_gradients(source: str) -> None:
    model, twin = swin(source), swin(source)
    clips, other = swin_clips().requires_grad_(), swin_clips().requires_grad_()
    vidops.patch(model, r=8, clip_size=(4, 64, 64), backend="reference")
    model(clips).square().sum().backward()
    by_hand(twin, other, (0, 8, 3, 1)).square().sum().backward()
    assert clips.grad is not None and other.grad is not None
    torch.testing.assert_close(clips.grad, other.grad, atol=1e-5, rtol=1e-3)


def test_refused(source: str) -> None:
    model = swin(source)
    for message, options in {
        "no place in its windows": {"method": "tome"},
        "num_frames: not an option": {"num_frames": 4},
        "proportional: not an option": {"proportional": False},
        r"clip_size: expected \(frames, height, width\), got 8": {"clip_size": 8},
        "clip_size: expected an integer >= 1": {"clip_size": (8, 0, 8)},
    }.items():
        with pytest.raises(ValueError, match=message):
            vidops.patch(model, r=1, **options)
    with pytest.raises(vidops.PatchError, match="stage 2 drops 64 of every frame's tokens, expected fewer than the 64"):
        vidops.patch(model, r=64, clip_size=(8, 64, 64))
    with pytest.raises(vidops.PatchError, match="expected 4 stages, got 3"):
        vidops.patch(swin(source, depths=[1, 1, 1], num_heads=[1, 1, 1]), r=1)


def test_a_smaller_clip_than_said_is_noticed(source: str) -> None:
    model = swin(source)
    vidops.patch(model, r=100, backend="reference")
    with pytest.raises(ValueError, match="^r: expected fewer than the 64 tokens"):
        model(swin_clips())
