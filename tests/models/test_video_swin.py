"""The VideoSwin of sta: names and sizes, costs, windows against their literal form, pruning on and off, checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vidops
from vidops.checkpoints import CheckpointError
from vidops.models import video_swin
from vidops.models.video_swin import (
    Kept,
    PatchMerging,
    SwinBlock,
    VideoSwin,
    VideoSwinConfig,
    from_windows,
    gflops,
    relative_positions,
    shift_mask,
    to_windows,
)
from vidops.validation.command import runnable

TINY = video_swin.CONFIGS["tiny"]


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in runnable(("gather_tokens", "nearest_kept", "sta_score")):
        pytest.skip("no native CPU ops")
    return request.param


def tiny(r: int = 0, dtype: torch.dtype = torch.float32) -> tuple[VideoSwin, torch.Tensor]:
    """The tiny model with weights large enough that every part of it shows, and two clips."""
    torch.manual_seed(0)
    model = VideoSwin(replace(TINY, r=r)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype), torch.randn(2, 3, 8, 64, 64).to(dtype)


def expected_state(c: VideoSwinConfig) -> dict[str, tuple[int, ...]]:
    """Section 6 of the sheet, name by name."""
    found: dict[str, tuple[int, ...]] = {"backbone.patch_embed.proj.weight": (c.dim, 3, 2, 4, 4)}
    found["backbone.patch_embed.proj.bias"] = (c.dim,)
    linear = {"cls_head.fc_cls": (c.classes, 8 * c.dim)}
    norms = {"backbone.patch_embed.norm": c.dim, "backbone.norm": 8 * c.dim}
    area = math.prod(c.window)
    rows = {(8, 7, 7): 2535, (16, 7, 7): 5239}[c.window]
    for stage, (depth, heads) in enumerate(zip(c.depths, c.heads, strict=True)):
        dim = c.dim * 2**stage
        for number in range(depth):
            block = f"backbone.layers.{stage}.blocks.{number}"
            found[f"{block}.attn.relative_position_bias_table"] = (rows, heads)
            found[f"{block}.attn.relative_position_index"] = (area, area)
            norms |= {f"{block}.norm1": dim, f"{block}.norm2": dim}
            linear |= {f"{block}.attn.qkv": (3 * dim, dim), f"{block}.attn.proj": (dim, dim)}
            linear |= {f"{block}.mlp.fc1": (4 * dim, dim), f"{block}.mlp.fc2": (dim, 4 * dim)}
        if stage < 3:
            norms[f"backbone.layers.{stage}.downsample.norm"] = 4 * dim
            found[f"backbone.layers.{stage}.downsample.reduction.weight"] = (2 * dim, 4 * dim)
    for name, shape in linear.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, dim in norms.items():
        found |= {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
    return found


@pytest.mark.parametrize(
    ("name", "millions"), [("swin_tiny", 28), ("swin_small", 50), ("swin_base", 88), ("swin_base_window16", 89)]
)
def test_paper_scale(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = VideoSwin(name)
    c = model.config
    state = model.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected_state(c)
    integers = {key for key, value in state.items() if not value.is_floating_point()}
    assert integers == {key for key in state if key.endswith("relative_position_index")}
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert [c.grid(stage) for stage in range(4)] == [(16, 56, 56), (16, 28, 28), (16, 14, 14), (16, 7, 7)]
    time = (16, 0) if c.window[0] == 16 else (8, 4)
    assert c.windows(0) == ((time[0], 7, 7), (time[1], 3, 3))
    assert c.windows(3) == ((time[0], 7, 7), (time[1], 0, 0))
    assert model.backbone.norm.eps == model.backbone.layers[0].blocks[0].norm1.eps == 1e-5


# Table 3, and the figures of the sheet's reconstruction.
@pytest.mark.parametrize(
    ("name", "published", "counted"),
    [
        ("swin_tiny", (88, 68, 61, 54), (67.4, 60.6, 53.8)),
        ("swin_small", (166, 121, 106, 91), (120.8, 105.9, 90.9)),
        ("swin_base", (282, 202, 176, 149), (201.6, 175.0, 148.5)),
        ("swin_base_window16", (321, 241, 215, 188), (240.6, 214.1, 187.5)),
    ],
)
def test_published_costs(name: str, published: tuple[int, ...], counted: tuple[float, ...]) -> None:
    for r, expected in zip((0, 192, 256, 320), published, strict=True):
        assert abs(gflops(name, r) - expected) < 1, r
        assert gflops(replace(video_swin.CONFIGS[name], r=r)) == gflops(name, r)
    assert [round(gflops(name, r), 1) for r in (192, 256, 320)] == list(counted)


def test_drops_of_each_stage() -> None:
    config = video_swin.CONFIGS["swin_tiny"]
    assert config.drops() == (0, 0, 0, 0)
    assert config.drops(256) == (0, 256, 96, 32)
    assert config.drops(320) == (0, 320, 120, 40)
    assert config.drops(13) == (0, 13, 4, 1)
    assert config.drops(391) == (0, 391, 146, 48)
    with pytest.raises(ValueError, match="r: 392 takes 49 of the 49 tokens of a frame in stage 4"):
        config.drops(392)


def test_windows_and_back() -> None:
    x = torch.arange(2 * 4 * 6 * 4 * 3.0).view(2, 4, 6, 4, 3)
    parts = to_windows(x, (2, 3, 2))
    assert parts.shape == (2, 8, 12, 3)
    assert torch.equal(parts[1, 3], x[1, :2, 3:, 2:].reshape(12, 3))
    assert torch.equal(parts[0, 4], x[0, 2:, :3, :2].reshape(12, 3))
    assert torch.equal(from_windows(parts, (2, 3, 2), (4, 6, 4)), x)


def test_relative_positions_are_their_definition() -> None:
    window = (2, 3, 2)
    places = [(t, h, w) for t in range(2) for h in range(3) for w in range(2)]
    index = relative_positions(window)
    assert index.dtype == torch.int64
    for i, (t, h, w) in enumerate(places):
        for j, (u, y, x) in enumerate(places):
            assert index[i, j] == ((t - u + 1) * 5 + (h - y + 2)) * 3 + (w - x + 1)


def test_a_clipped_window_keeps_its_offsets() -> None:
    torch.manual_seed(0)
    full = video_swin.WindowAttention(4, 2, (2, 4, 3))
    torch.nn.init.normal_(full.relative_position_bias_table)
    whole = full.bias((2, 4, 3)).view(2, 2, 4, 3, 2, 4, 3)
    part = full.bias((1, 2, 3))
    assert torch.equal(part, whole[:, 1:, 1:3, :, 1:, 1:3].reshape(2, 6, 6))


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((4, 6, 4), (2, 3, 2), (1, 1, 1)), ((4, 4, 4), (2, 4, 2), (1, 0, 1)), ((2, 8, 4), (2, 4, 4), (0, 2, 0))],
)
def test_mask_parts_what_the_shift_joins(
    grid: tuple[int, int, int], window: tuple[int, int, int], shift: tuple[int, int, int]
) -> None:
    mask = shift_mask(grid, window, shift)
    assert mask is not None
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(1, *grid, 3)
    rolled = places.roll([-by for by in shift], (1, 2, 3))
    # Two tokens of a window may see each other if they are as near in the grid as in the window.
    for seen, real in zip(to_windows(places, window)[0], to_windows(rolled, window)[0], strict=True):
        number = 0
        for axis in range(3):
            number = number * (grid[axis] // window[axis]) + int(seen[0, axis]) // window[axis]
        near = ((real[:, None] - real[None]) == (seen[:, None] - seen[None])).all(-1)
        assert torch.equal(mask[number], ~near)
    assert shift_mask(grid, window, (0, 0, 0)) is None


def literal_block(block: SwinBlock, x: torch.Tensor, window: tuple[int, ...], shift: tuple[int, ...]) -> torch.Tensor:
    """A dense block on (T, H, W, C), token by token: each one's window found from its own place."""
    grid = x.shape[:3]
    attn, dim = block.attn, x.shape[-1]
    q, k, v = attn.qkv(block.norm1(x)).flatten(0, 2).view(-1, 3, attn.heads, dim // attn.heads).unbind(1)
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid))
    # Windows start at the shift, those cut off at the front are whole at the back: never seen together.
    number = torch.stack([torch.div(places[:, i] - shift[i], window[i], rounding_mode="floor") for i in range(3)], 1)
    out = torch.zeros(len(places), dim, dtype=x.dtype)
    ranges = [2 * size - 1 for size in attn.window]
    for i, place in enumerate(places):
        inside = (number == number[i]).all(1).nonzero()[:, 0]
        offset = place - places[inside] + torch.tensor([size - 1 for size in attn.window])
        rows = (offset[:, 0] * ranges[1] + offset[:, 1]) * ranges[2] + offset[:, 2]
        logits = torch.einsum("hc,jhc->jh", q[i], k[inside]) * (dim // attn.heads) ** -0.5
        weights = (logits + attn.relative_position_bias_table[rows]).softmax(0)
        out[i] = torch.einsum("jh,jhc->hc", weights, v[inside]).flatten()
    x = x + attn.proj(out).view(*grid, dim)
    hidden = F.gelu(block.mlp.fc1(block.norm2(x)))
    return x + block.mlp.fc2(hidden)


def random_block(dim: int, heads: int, window: tuple[int, int, int]) -> SwinBlock:
    block = SwinBlock(dim, heads, window, hidden=2 * dim, eps=1e-5).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return block


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((4, 6, 4), (2, 3, 2), (0, 0, 0)),
        ((4, 6, 4), (2, 3, 2), (1, 1, 1)),
        ((2, 8, 4), (2, 4, 4), (0, 2, 0)),
    ],
)
def test_block_equals_its_literal_form(grid: Any, window: Any, shift: Any) -> None:
    torch.manual_seed(0)
    block = random_block(6, 2, window)
    x = torch.randn(2, *grid, 6, dtype=torch.float64)
    got = block(x.flatten(2, 3), grid, window, shift, shift_mask(grid, window, shift))
    for clip, found in zip(x, got, strict=True):
        want = literal_block(block, clip, window, shift)
        torch.testing.assert_close(found.view(*grid, 6), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 2, 2)])
@pytest.mark.parametrize("kept", [1, 9, 31, 32])
def test_pruned_block_is_the_dense_one_on_the_filled_grid(kept: int, shift: Any, backend: str) -> None:
    torch.manual_seed(kept)
    grid, window = (4, 8, 4), (2, 4, 4)
    block = random_block(6, 3, window)
    index = torch.rand(2, 4, 32).argsort(-1)[..., :kept].sort(-1).values
    mask = shift_mask(grid, window, shift)
    x = torch.randn(2, 4, kept, 6, dtype=torch.float64, requires_grad=True)
    filled = vidops.nearest_fill(x, index, grid[1:], backend=backend).dense
    want = vidops.gather_tokens(block(filled, grid, window, shift, mask), index, backend=backend)
    got = block(x, grid, window, shift, mask, Kept.of(index, grid[1:], backend), backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(got)
    grads = [torch.autograd.grad((value * weight).sum(), [x, block.attn.qkv.weight]) for value in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_merging_takes_rows_before_columns() -> None:
    merging = PatchMerging(1, 1e-5)
    seen = []
    merging.norm.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    x = torch.arange(8.0).view(1, 1, 2, 4, 1)
    assert merging(x).shape == (1, 1, 1, 2, 2)
    assert seen[0].flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_without_pruning_it_is_the_dense_net(backend: str) -> None:
    model, video = tiny()
    x = model.backbone.patch_embed(video)
    for stage in model.backbone.layers:
        for number, block in enumerate(stage.blocks):
            shift = stage.shift if number % 2 else (0, 0, 0)
            x = block(x, stage.grid, stage.window, shift, shift_mask(stage.grid, stage.window, shift))
        if stage.downsample is not None:
            x = stage.downsample(x.unflatten(2, stage.grid[1:])).flatten(2, 3)
    dense = model.cls_head.fc_cls(model.backbone.norm(x).mean((1, 2)))
    found = []
    for r in (0, 24, 8, 24, 0):
        model.r = r
        found.append(model(video, backend=backend))
    assert torch.equal(found[0], dense) and torch.equal(found[4], dense)
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[1], found[2]) and not torch.equal(found[1], dense)


def test_trace_follows_the_definition(backend: str) -> None:
    model, video = tiny(r=24, dtype=torch.float64)
    merged: list[torch.Tensor] = []
    for stage in model.backbone.layers[:3]:
        stage.register_forward_hook(lambda module, given, out: merged.append(out))
    trace = model.trace(video, backend=backend)
    assert torch.equal(trace.logits, model(video, backend=backend))
    assert torch.equal(trace.feature, model.features(video, backend=backend))
    assert trace.kept[0] is None and trace.mask(0, TINY.grid(0)) is None
    for number, (kept, drop) in enumerate(zip(trace.kept[1:], (24, 9, 3), strict=True), start=1):
        assert kept is not None
        tokens = merged[number - 1].flatten(1, 2)
        want = vidops.sta_score(tokens.detach(), tokens.detach(), 4, drop, number == 2, backend=backend).keep
        assert torch.equal(kept, want.sort(-1).values)
        mask = trace.mask(number, TINY.grid(number))
        assert mask is not None
        assert mask.shape == (2, *TINY.grid(number))
        assert torch.equal(mask.flatten(2).nonzero()[:, 2].view(kept.shape), kept)


def test_merging_sees_the_filled_grid(backend: str) -> None:
    model, video = tiny(r=24, dtype=torch.float64)
    blocks: list[torch.Tensor] = []
    grids: list[torch.Tensor] = []
    for stage in model.backbone.layers:
        stage.blocks[-1].register_forward_hook(lambda module, given, out: blocks.append(out))
        if stage.downsample is not None:
            stage.downsample.register_forward_hook(lambda module, given, out: grids.append(given[0]))
    trace = model.trace(video, backend=backend)
    for number in (1, 2):
        kept, grid = trace.kept[number], TINY.grid(number)
        assert kept is not None
        want = vidops.nearest_fill(blocks[number], kept, grid[1:], backend=backend).dense
        assert torch.equal(grids[number].flatten(2, 3), want)
    # One token of each frame is left at the end, and the mean is over those.
    assert blocks[3].shape == (2, 4, 1, 64)
    torch.testing.assert_close(trace.feature, model.backbone.norm(blocks[3]).mean((1, 2)))


def test_a_small_r_prunes_only_where_something_goes(backend: str) -> None:
    model, video = tiny(r=2)
    kept = model.trace(video, backend=backend).kept
    assert [None if k is None else k.shape[2] for k in kept] == [None, 62, None, None]


def test_gradients_reach_everything(backend: str) -> None:
    model, video = tiny(r=24)
    video.requires_grad_()
    model(video, backend=backend).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert video.grad is not None and (video.grad.abs().amax((1, 2, 3, 4)) > 0).all()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_half_precision(dtype: torch.dtype, limit: float, backend: str) -> None:
    exact, video = tiny(dtype=torch.float64)
    half, _ = tiny(dtype=dtype)
    want = exact.features(video, backend="reference")
    found = half.features(video.to(dtype), backend=backend)
    assert found.dtype == dtype
    assert (found - want).abs().max() < limit * want.abs().max()
    exact.r = half.r = 24
    masks = [
        model.trace(video.to(model.cls_head.fc_cls.weight.dtype), backend=backend).mask(1, TINY.grid(1))
        for model in (exact, half)
    ]
    assert masks[0] is not None and masks[1] is not None
    assert (masks[0] & masks[1]).sum() > 0.95 * (masks[0] | masks[1]).sum()


def test_autocast() -> None:
    model, video = tiny(r=24)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(video, backend="reference").dtype == torch.bfloat16


@pytest.mark.parametrize("r", [0, 24])
def test_small_batches(r: int, backend: str) -> None:
    model, video = tiny(r=r)
    both = model(video, backend=backend)
    torch.testing.assert_close(model(video[:1], backend=backend), both[:1])
    assert model(video[:0], backend=backend).shape == (0, 10)


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    model, video = tiny(r=24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(video, backend="reference"), model(video, backend="reference"))


def test_windows_larger_than_the_grid() -> None:
    config = replace(TINY, frames=2, window=(4, 4, 4))
    assert config.windows(0) == ((1, 4, 4), (0, 2, 2))
    assert config.windows(3) == ((1, 2, 2), (0, 0, 0))
    assert VideoSwin(config).eval()(torch.randn(1, 3, 2, 64, 64), backend="reference").shape == (1, 10)


@pytest.mark.parametrize("layout", ["state_dict", "plain", "data parallel"])
def test_checkpoints_round_trip(tmp_path: Path, layout: str) -> None:
    model, video = tiny()
    state = model.state_dict()
    path = tmp_path / "weights.pth"
    if layout == "state_dict":
        torch.save({"state_dict": state, "meta": {"epoch": 30}}, path)
    elif layout == "plain":
        torch.save(dict(state), path)
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    found = VideoSwin.from_pretrained(path, "tiny")
    assert found.load_report is not None and found.load_report.complete
    assert not found.training
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    assert torch.equal(found(video, backend="reference"), model(video, backend="reference"))
    assert VideoSwinConfig.from_state_dict(state, window=(2, 4, 4), frames=8, img_size=64) == TINY


def test_config_is_read_back_from_a_state_dict() -> None:
    for config in video_swin.CONFIGS.values():
        with torch.device("meta"):
            state = VideoSwin(config).state_dict()
        found = VideoSwinConfig.from_state_dict(
            state, window=config.window, frames=config.frames, img_size=config.img_size
        )
        assert found == config
    del state["cls_head.fc_cls.weight"]
    with pytest.raises(ValueError, match=r"cls_head\.fc_cls\.weight"):
        VideoSwinConfig.from_state_dict(state, window=(2, 4, 4))


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    state = tiny()[0].state_dict()
    path = tmp_path / "weights.pth"
    index = "backbone.layers.2.blocks.1.attn.relative_position_index"
    table = "backbone.layers.2.blocks.1.attn.relative_position_bias_table"
    wrong: list[tuple[dict[str, torch.Tensor], str, bool]] = [
        ({**state, index: state[index].mT.contiguous()}, f"{index} differs", False),
        ({**state, index: state[index].float()}, f"{index} differs", False),
        ({**state, table: torch.zeros(245, 2)}, r"\(245, 2\)", False),
        ({name: value for name, value in state.items() if name != table}, table, False),
        ({name: value for name, value in state.items() if "cls_head" not in name}, "cls_head.fc_cls.weight", True),
        ({**state, "neck.weight": torch.zeros(1)}, "neck.weight", True),
        ({name.removeprefix("backbone."): value for name, value in state.items()}, "parameters are missing", False),
    ]
    for content, message, loose in wrong:
        torch.save({"state_dict": content}, path)
        model = VideoSwin("tiny")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            model.load_checkpoint(path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        if loose:
            report = model.load_checkpoint(path, strict=False)
            assert message in (*report.missing, *report.unexpected)
        else:
            with pytest.raises(CheckpointError, match=message):
                model.load_checkpoint(path, strict=False)


def test_bad_arguments_are_refused() -> None:
    model = VideoSwin("tiny")
    with pytest.raises(ValueError, match="swin_base_window16"):
        VideoSwin("swin_large")
    for shape in ((3, 8, 64, 64), (1, 3, 8, 64, 32), (1, 8, 3, 64, 64)):
        with pytest.raises(ValueError, match=r"video: expected shape \(B, 3, 8, 64, 64\)"):
            model(torch.zeros(shape))
    for value, error in ((32, ValueError), (-1, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="^r: "):
            model.r = value  # type: ignore[assignment]
        assert model.r == 0
    for message, changes in {
        "frames: expected a multiple of the patch's 2": {"frames": 7},
        "frames: the grid": {"frames": 6},
        "img_size: expected a multiple of 32": {"img_size": 48},
        "img_size: the grid": {"img_size": 96, "window": (2, 8, 4)},
        "heads": {"heads": (3, 2, 2, 4)},
        "depths": {"depths": (2, 2, 2)},
        "window": {"window": [2, 4, 4]},
        "patch": {"patch": (2, 0, 4)},
        "r": {"r": 64},
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            replace(TINY, **changes)
