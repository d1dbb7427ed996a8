"""The sta model: names and sizes, golden files, costs, both checkpoint layouts, pruning on and off, views."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vidops.checkpoints import CheckpointError
from vidops.models import sta
from vidops.models.sta import (
    VideoViT,
    VideoViTConfig,
    convert,
    from_hf_state,
    gflops,
    sinusoid_table,
    to_hf_state,
    tokens_after,
    with_hf_eps,
)
from vidops.models.sta_checkpoints import layout_of
from vidops.models.views import classify_views, clip_indices, views
from vidops.validation import Case, sta_model
from vidops.validation.command import runnable

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "sta"
CHECKS = {
    "attention_keymean": sta_model.check_attention_keymean,
    "block": sta_model.check_block,
    "model_tiny": sta_model.check_model_tiny,
    "pos_embed": sta_model.check_pos_embed,
}
OPS = ("gather_tokens", "sta_score", "video_attention")
TINY = sta.CONFIGS["tiny"]


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in runnable(OPS):
        pytest.skip("no native CPU ops")
    return request.param


def golden(name: str) -> Case:
    return Case.load(GOLDEN / f"{name}.npz")


@pytest.mark.parametrize("name", CHECKS)
def test_golden(name: str, backend: str) -> None:
    checks = CHECKS[name](golden(name), backend)
    failed = [f"{c.name}: {c.error:.3e} > {c.limit:.0e}" for c in checks if not c.error <= c.limit]
    assert checks and not failed, failed


def test_golden_compares_every_array() -> None:
    case = golden("model_tiny")
    wanted = {name.removeprefix("out.") for name in case.arrays if name.startswith(("out.", "grad."))}
    seen = {check.name.split(" ")[0] for check in CHECKS["model_tiny"](case, "reference")}
    assert seen == wanted


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("attention_keymean", "out.metric"),
        ("attention_keymean", "grad.v_bias"),
        ("block", "out.y"),
        ("block", "grad.attn.qkv.weight"),
        ("model_tiny", "out.logits"),
        ("model_tiny", "out.logits_r0"),
        ("model_tiny", "out.keep_idx_block0"),
        ("model_tiny", "out.keep_idx_block4"),
        ("model_tiny", "out.num_tokens_after_block2"),
        ("model_tiny", "grad.video"),
        ("pos_embed", "out.table"),
    ],
)
def test_golden_checks_notice_a_wrong_array(name: str, key: str) -> None:
    case = golden(name)
    wrong = case.arrays[key].copy()
    first = wrong.reshape(-1)[:1]
    first += np.array(0.01 * np.abs(wrong).max() if wrong.dtype.kind == "f" else 1, wrong.dtype)
    case.arrays[key] = wrong
    assert any(not c.error <= c.limit for c in CHECKS[name](case, "reference"))


@pytest.mark.parametrize("name", CHECKS)
def test_golden_checks_refuse_a_case_without_outputs(name: str) -> None:
    case = golden(name)
    bare = {k: v for k, v in case.arrays.items() if not k.startswith(("out.", "grad.", "in.grad_"))}
    assert [c.error for c in CHECKS[name](replace(case, arrays=bare), "reference")] == [math.inf]


def expected_state(c: VideoViTConfig) -> dict[str, tuple[int, ...]]:
    """Section 6 of the sheet, name by name."""
    d = c.dim
    found: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (d, 3, c.tubelet, c.patch, c.patch),
        "patch_embed.proj.bias": (d,),
        "fc_norm.weight": (d,),
        "fc_norm.bias": (d,),
        "head.weight": (c.classes, d),
        "head.bias": (c.classes,),
    }
    for i in range(c.depth):
        block = f"blocks.{i}"
        for norm in ("norm1", "norm2"):
            found |= {f"{block}.{norm}.weight": (d,), f"{block}.{norm}.bias": (d,)}
        found |= {f"{block}.attn.q_bias": (d,), f"{block}.attn.v_bias": (d,), f"{block}.attn.qkv.weight": (3 * d, d)}
        for name, shape in {"attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}.items():
            found |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    return found


@pytest.mark.parametrize(
    ("name", "millions", "sizes", "blocks"),
    [
        ("vit_small", 22.03, (384, 12, 6, 64), (0, 4, 8)),
        ("vit_base", 86.53, (768, 12, 12, 64), (0, 4, 8)),
        ("vit_large", 304.27, (1024, 24, 16, 64), (0, 8, 16)),
        ("vit_huge", 632.12, (1280, 32, 16, 80), (0, 10, 21)),
    ],
)
def test_paper_scale(name: str, millions: float, sizes: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = VideoViT(name)
    c = model.config
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected_state(c)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert (c.dim, c.depth, c.heads, c.dim // c.heads) == sizes
    assert c.prune_blocks == blocks
    assert c.grid == (8, 14, 14)
    block = model.blocks[0]
    assert (block.norm1.eps, block.norm2.eps, model.fc_norm.eps) == (1e-6, 1e-6, 1e-6)
    assert (block.attn.heads, block.attn.scale) == (c.heads, sizes[3] ** -0.5)


# Table 2.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("vit_small", (57, 42, 35, 29)),
        ("vit_base", (180, 136, 116, 96)),
        ("vit_large", (597, 446, 376, 308)),
        ("vit_huge", (1192, 890, 748, 611)),
    ],
)
def test_published_costs(name: str, published: tuple[int, ...]) -> None:
    for r, expected in zip((0, 32, 48, 64), published, strict=True):
        assert abs(gflops(name, r) - expected) < 1, r
        assert gflops(replace(sta.CONFIGS[name], r=r)) == gflops(name, r)


@pytest.mark.parametrize("r", [0, 1, 32, 64, 98, 111])
def test_token_counts(r: int) -> None:
    assert tokens_after("vit_base", r) == (8 * (196 - r), 4 * (2 * (196 - r) - r), 1568 - 14 * r)
    assert tokens_after(replace(TINY, r=3)) == (104, 92, 86)


def test_limits_of_r() -> None:
    # The last call is the tightest: 2 (2 (196 - r) - r) > r up to 111.
    with pytest.raises(ValueError, match="r: expected fewer than the 112 tokens of a group in call 3, got 112"):
        tokens_after("vit_base", 112)
    with pytest.raises(ValueError, match="call 1"):
        tokens_after("vit_base", 196)
    model = VideoViT(TINY)
    model.r = 9
    for value, error in ((10, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="^r: "):
            model.r = value  # type: ignore[assignment]
        assert model.r == 9
    with pytest.raises(ValueError, match="^r: "):
        replace(TINY, r=10)


def test_sinusoid_table_is_its_definition() -> None:
    table = sinusoid_table(7, 6)
    for p in range(7):
        for j in range(6):
            angle = p / 10000 ** (2 * (j // 2) / 6)
            assert table[0, p, j] == np.float32(math.cos(angle) if j % 2 else math.sin(angle))


def golden_model(r: int = 0, dtype: torch.dtype = torch.float32) -> tuple[VideoViT, torch.Tensor]:
    case = golden("model_tiny")
    state = {k.removeprefix("state."): case.tensor(k) for k in case.arrays if k.startswith("state.")}
    config = VideoViTConfig.from_state_dict(state, heads=4, img_size=32)
    assert config == TINY
    model = VideoViT(replace(config, r=r))
    model.load_state_dict(state)
    return model.to(dtype).eval(), case.tensor("in.video", dtype)


def test_without_pruning_it_is_the_plain_net(backend: str) -> None:
    model, video = golden_model()
    x = model.patch_embed(video) + model.pos_embed
    for block in model.blocks:
        x, _ = block(x, backend=backend)
    plain = model.head(model.fc_norm(x.mean(1)))
    assert torch.equal(model(video, backend=backend), plain)
    pruned = []
    for r in (3, 9, 3, 0):
        model.r = r
        trace = model.trace(video, backend=backend)
        assert torch.equal(model(video, backend=backend), trace.logits)
        assert trace.tokens.shape[1] == tokens_after(TINY, r)[-1]
        assert len(trace.stages) == (3 if r else 0)
        pruned.append(trace.logits)
    assert torch.equal(pruned[0], pruned[2])
    assert not torch.equal(pruned[0], pruned[1])
    assert torch.equal(pruned[3], plain)


def test_trace_follows_every_token(backend: str) -> None:
    model, video = golden_model(r=3, dtype=torch.float64)
    outputs: dict[int, torch.Tensor] = {}
    for number in TINY.prune_blocks:
        model.blocks[number].register_forward_hook(
            lambda module, given, out, number=number: outputs.__setitem__(number, out[0])
        )
    trace = model.trace(video, backend=backend)
    before = torch.arange(128).expand(2, -1)
    for call, (stage, left) in enumerate(zip(trace.stages, tokens_after(TINY, 3), strict=True)):
        assert stage.block == TINY.prune_blocks[call]
        assert stage.position.shape == (2, left)
        groups = 8 >> call
        keep = stage.pruned.keep
        assert keep.shape == (2, groups, left // groups)
        # A token left is the block's output at its place, and its place lies in the frames of its group.
        for b in range(2):
            where = {int(place): row for row, place in enumerate(before[b])}
            rows = torch.tensor([where[int(place)] for place in stage.position[b]])
            assert torch.equal(stage.pruned.x[b], outputs[stage.block][b, rows])
            group = stage.position[b] // 16 * groups // 8
            assert torch.equal(group, torch.arange(groups).repeat_interleave(left // groups))
        mask = stage.mask(TINY.grid)
        assert mask.shape == (2, 8, 4, 4)
        assert mask.flatten(1).sum(1).tolist() == [left, left]
        # The most active token of a group comes first, but for the group processed first.
        most = stage.pruned.scores.activation.argmax(2)
        later = slice(0, -1) if call == 1 else slice(1, None)
        assert torch.equal(keep[:, later, 0], most[:, later])
        before = stage.position


def test_options_of_the_calls() -> None:
    model, video = golden_model(r=3, dtype=torch.float64)
    other = VideoViT(replace(TINY, r=3, first_frame_pruned=True)).double().eval()
    other.load_state_dict(model.state_dict())
    first, second = (m.trace(video, backend="reference").stages[0].pruned.scores.acc for m in (model, other))
    torch.testing.assert_close(first[:, 1].sum(1), torch.full((2,), 16.0, dtype=torch.float64))
    torch.testing.assert_close(second[:, 1].sum(1), torch.ones(2, dtype=torch.float64))


def test_gradients_reach_everything(backend: str) -> None:
    model, video = golden_model(r=3)
    model.train()
    video.requires_grad_()
    model(video, backend=backend).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert video.grad is not None and (video.grad.abs().amax((1, 2, 3, 4)) > 0).all()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(dtype: torch.dtype, limit: float, backend: str) -> None:
    exact, video = golden_model(dtype=torch.float64)
    half, _ = golden_model(dtype=dtype)
    want = exact.features(video, backend="reference")
    found = half.features(video.to(dtype), backend=backend)
    assert found.dtype == dtype
    assert (found - want).abs().max() < limit * want.abs().max()
    exact.r = half.r = 3
    masks = [
        model.trace(video.to(model.head.weight.dtype), backend=backend).stages[0].mask(TINY.grid)
        for model in (exact, half)
    ]
    assert (masks[0] & masks[1]).sum() > 0.95 * (masks[0] | masks[1]).sum()


def test_autocast() -> None:
    model, video = golden_model(r=3)
    with torch.autocast("cpu", torch.bfloat16):
        trace = model.trace(video, backend="reference")
    assert trace.logits.dtype == torch.bfloat16
    assert trace.tokens.shape == (2, 86, 32)


@pytest.mark.parametrize("r", [0, 3])
def test_small_batches(r: int, backend: str) -> None:
    model, video = golden_model(r=r)
    both = model(video, backend=backend)
    torch.testing.assert_close(model(video[:1], backend=backend), both[:1])
    assert model(video[:0], backend=backend).shape == (0, 10)
    assert [len(stage.position) for stage in model.trace(video[:0], backend=backend).stages] == [0] * (3 if r else 0)


def test_longer_clips_form_more_groups() -> None:
    model = VideoViT(replace(TINY, frames=24, depth=3, r=2)).eval()
    trace = model.trace(torch.randn(1, 3, 24, 32, 32), backend="reference")
    assert [tuple(stage.pruned.keep.shape) for stage in trace.stages] == [(1, 12, 14), (1, 6, 26), (1, 3, 50)]


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    model, video = golden_model(r=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for r in (3, 0):
        model.r = r
        torch.testing.assert_close(compiled(video, backend="reference"), model(video, backend="reference"))


def test_traps_of_the_layout() -> None:
    model, video = golden_model()
    state = model.state_dict()
    # The position table is part of the model and of no state dict.
    assert "pos_embed" in dict(model.named_buffers()) and not [name for name in state if "pos_embed" in name]
    # Keys have no bias, whatever the other two are.
    assert not [name for name in state if name.endswith("qkv.bias")]
    attention = model.blocks[0].attn
    with torch.no_grad():
        attention.q_bias.fill_(7.0)
        attention.v_bias.fill_(-7.0)
    x = torch.randn(1, 5, 32)
    q, k, v = attention.project(x, 0, 3)
    weight = attention.qkv.weight
    for got, rows, bias in ((q, weight[:32], 7.0), (k, weight[32:64], 0.0), (v, weight[64:], -7.0)):
        torch.testing.assert_close(got.transpose(1, 2).flatten(2), x @ rows.T + bias)
    assert torch.equal(attention.project(x, 1, 2)[0], k)
    # A wrong head count loads, and changes the result.
    other = VideoViT(replace(TINY, heads=8)).eval()
    other.load_state_dict(golden_model()[0].state_dict())
    assert not torch.allclose(other(video), golden_model()[0](video))
    # Hugging Face's epsilons are others.
    hf = VideoViT(with_hf_eps("tiny"))
    assert (hf.blocks[5].norm1.eps, hf.blocks[0].norm2.eps, hf.fc_norm.eps) == (1e-12, 1e-12, 1e-5)


def test_random_weights_of_the_recipe() -> None:
    torch.manual_seed(0)
    model = VideoViT(replace(TINY, dim=128, heads=4, hidden=512, classes=100))
    weight = model.blocks[0].mlp.fc1.weight
    assert abs(weight.std().item() - 0.02) < 5e-4
    assert abs(model.head.weight.std().item() - 2e-5) < 1e-6
    assert not model.head.bias.any() and not model.blocks[0].mlp.fc1.bias.any()


def test_stochastic_depth_in_training_only() -> None:
    torch.manual_seed(0)
    model = VideoViT(replace(TINY, drop_path=0.9))
    assert [block.drop_path for block in model.blocks] == pytest.approx([0.9 * i / 5 for i in range(6)])
    video = torch.randn(2, 3, 16, 32, 32)
    first, second = (model.features(video, backend="reference") for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(*(model.features(video, backend="reference") for _ in range(2)))


HF_LAYER = {
    "layernorm_before.weight": "norm1.weight",
    "layernorm_before.bias": "norm1.bias",
    "layernorm_after.weight": "norm2.weight",
    "layernorm_after.bias": "norm2.bias",
    "attention.attention.q_bias": "attn.q_bias",
    "attention.attention.v_bias": "attn.v_bias",
    "attention.output.dense.weight": "attn.proj.weight",
    "attention.output.dense.bias": "attn.proj.bias",
    "intermediate.dense.weight": "mlp.fc1.weight",
    "intermediate.dense.bias": "mlp.fc1.bias",
    "output.dense.weight": "mlp.fc2.weight",
    "output.dense.bias": "mlp.fc2.bias",
}
HF_OUTER = {
    "videomae.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "videomae.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "fc_norm.weight": "fc_norm.weight",
    "fc_norm.bias": "fc_norm.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
}


def test_names_of_hugging_face() -> None:
    model, _ = golden_model()
    state = model.state_dict()
    found = to_hf_state(state)
    expected = {theirs: state[ours] for theirs, ours in HF_OUTER.items()}
    for i in range(6):
        layer = f"videomae.encoder.layer.{i}."
        expected |= {layer + theirs: state[f"blocks.{i}.{ours}"] for theirs, ours in HF_LAYER.items()}
        for part, rows in enumerate(("query", "key", "value")):
            weight = state[f"blocks.{i}.attn.qkv.weight"][32 * part : 32 * part + 32]
            expected[f"{layer}attention.attention.{rows}.weight"] = weight
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    back = from_hf_state(found)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    for given, layout in ((state, "videomae"), (found, "hugging_face")):
        assert layout_of(given) == layout
        assert convert(given, "videomae").keys() == state.keys()
        assert convert(given, "hugging_face").keys() == found.keys()


def changed(state: dict[str, torch.Tensor], **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    found = {**state, **{name: value for name, value in changes.items() if value is not None}}
    return {name: value for name, value in found.items() if changes.get(name, value) is not None}


def test_conversion_refuses_what_it_cannot_convert() -> None:
    state = golden_model()[0].state_dict()
    theirs = to_hf_state(state)
    query = "videomae.encoder.layer.2.attention.attention.query.weight"
    wrong: list[tuple[Any, Any, str]] = [
        (from_hf_state, changed(theirs, **{query: None}), "layer.2.attention.attention.key"),
        (from_hf_state, changed(theirs, **{query: torch.zeros(32, 8)}), r"query.weight \(32, 8\)"),
        (from_hf_state, changed(theirs, **{query: torch.zeros(())}), "query, key and value"),
        (from_hf_state, {**theirs, "videomae.layernorm.weight": torch.zeros(32)}, "videomae.layernorm.weight"),
        (from_hf_state, {**theirs, "videomae.encoder.layer.x.output.dense.bias": torch.zeros(2)}, "layer.x"),
        (to_hf_state, {**state, "pos_embed": torch.zeros(1, 128, 32)}, "1 names are not of VideoViT"),
        (to_hf_state, {**state, "blocks.0.attn.qkv.bias": torch.zeros(96)}, "qkv.bias"),
        (to_hf_state, {**state, "blocks.0.attn.qkv.weight": torch.zeros(64, 32)}, r"\(64, 32\)"),
        (layout_of, {**state, **theirs}, "two layouts"),
        (layout_of, {"fc.weight": torch.zeros(1)}, "either layout"),
        (layout_of, {}, "either layout"),
        (lambda s: convert(s, "timm"), state, "'hugging_face'"),
    ]
    for function, given, message in wrong:
        with pytest.raises(ValueError, match=message):
            function(given)


def hf_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "videomae", "num_frames": 16, "tubelet_size": 2, "image_size": 32, "patch_size": 8,
        "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 128,
        "layer_norm_eps": 1e-12, "qkv_bias": True, "use_mean_pooling": True, "hidden_act": "gelu", "num_channels": 3,
        "id2label": {str(i): f"class {i}" for i in range(10)},
    } | changes  # fmt: skip


@pytest.mark.parametrize("layout", ["module", "model", "plain", "data parallel", "hf file", "hf folder", "safetensors"])
def test_checkpoints_round_trip(tmp_path: Path, layout: str) -> None:
    model, video = golden_model()
    state, config = model.state_dict(), "tiny"
    path = tmp_path / "weights.pt"
    if layout in ("module", "model"):
        torch.save({layout: state, "epoch": 99, "optimizer": {}}, path)
    elif layout == "plain":
        torch.save(dict(state), path)
    elif layout == "data parallel":
        torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, path)
    elif layout == "hf file":
        torch.save(to_hf_state(state), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(to_hf_state(state), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(hf_config()))
        path, config = (tmp_path, None) if layout == "hf folder" else (tmp_path / "model.safetensors", "tiny")
    found = VideoViT.from_pretrained(path, config)
    assert found.load_report is not None and found.load_report.complete
    hugging = layout.startswith("hf") or layout == "safetensors"
    assert found.load_report.layout.startswith("Hugging Face" if hugging else "VideoMAE")
    assert not found.training
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    assert found.config == (with_hf_eps("tiny") if config is None else TINY)
    if config is not None:
        assert torch.equal(found(video, backend="reference"), model(video, backend="reference"))


def test_a_folder_says_its_heads_and_epsilons(tmp_path: Path) -> None:
    state = golden_model()[0].state_dict()
    torch.save(to_hf_state(state), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(num_attention_heads=8, layer_norm_eps=1e-9)))
    found = VideoViT.from_pretrained(tmp_path)
    assert (found.config.heads, found.config.eps, found.config.head_eps) == (8, 1e-9, 1e-5)
    assert found.blocks[3].attn.heads == 8
    assert VideoViTConfig.from_hf_config(hf_config(id2label=None, num_labels=7)).classes == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting"),
        ("[1]", "list"),
        (json.dumps({"hidden_size": 32}), "num_frames, tubelet_size"),
        (json.dumps(hf_config(use_mean_pooling=False)), "use_mean_pooling is False"),
        (json.dumps(hf_config(hidden_act="relu")), "hidden_act is 'relu'"),
        (json.dumps(hf_config(qkv_bias=False)), "qkv_bias"),
        (json.dumps(hf_config(num_attention_heads=5)), "heads"),
        (json.dumps(hf_config(num_hidden_layers="6")), "depth"),
    ],
)
def test_bad_folders(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        VideoViT.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    model, _ = golden_model()
    state = model.state_dict()
    theirs = to_hf_state(state)
    path = tmp_path / "weights.pt"
    with pytest.raises(CheckpointError, match="head counts leave no trace"):
        VideoViT.from_pretrained(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors, pytorch_model\.bin"):
        VideoViT.from_pretrained(tmp_path / "empty", "tiny")
    key = "videomae.encoder.layer.1.attention.attention.key.weight"
    # Each: content, message of the strict load, and of the other, None where it passes.
    wrong: list[tuple[dict[str, torch.Tensor], str, str | None]] = [
        (changed(state, **{"blocks.1.attn.q_bias": None}), "blocks.1.attn.q_bias", "blocks.1.attn.q_bias"),
        (changed(state, **{"head.weight": None}), "head.weight", None),
        ({**state, "pos_embed": torch.zeros(1, 128, 32)}, "pos_embed", None),
        (changed(state, **{"head.weight": torch.zeros(11, 32)}), r"\(11, 32\)", r"\(11, 32\)"),
        (changed(theirs, **{key: None}), "blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.weight"),
        (changed(theirs, **{key: torch.zeros(32, 16)}), "blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.weight"),
        (changed(theirs, **{"classifier.bias": None}), "head.bias", None),
        ({**theirs, "videomae.layernorm.weight": torch.zeros(32)}, "videomae.layernorm.weight", None),
        ({**theirs, **state}, "two layouts", "two layouts"),
        ({"backbone.x": torch.zeros(1)}, "either layout", "either layout"),
    ]
    for content, strict, loose in wrong:
        torch.save({"module": content}, path)
        target = VideoViT("tiny")
        before = {name: value.clone() for name, value in target.state_dict().items()}
        with pytest.raises(CheckpointError, match=strict):
            target.load_checkpoint(path)
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
        if loose is not None:
            with pytest.raises(CheckpointError, match=loose):
                target.load_checkpoint(path, strict=False)
        else:
            report = target.load_checkpoint(path, strict=False)
            assert strict in (*report.missing, *report.unexpected)


def test_bad_arguments_are_refused() -> None:
    model = VideoViT("tiny")
    with pytest.raises(ValueError, match="vit_large"):
        VideoViT("vit_giant")
    for shape in ((3, 16, 32, 32), (1, 3, 8, 32, 32), (1, 3, 16, 32, 40), (1, 1, 16, 32, 32)):
        with pytest.raises(ValueError, match=r"video: expected shape \(B, 3, 16, 32, 32\)"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"transpose\(1, 2\)"):
        model(torch.zeros(1, 16, 3, 32, 32))
    for message, changes in {
        "frames": {"frames": 12},
        "frames: expected a multiple of 8": {"frames": 4},
        "img_size": {"img_size": 36},
        "depth": {"depth": 2},
        "heads": {"heads": 5},
        "drop_path": {"drop_path": 1.0},
        "classes": {"classes": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            replace(TINY, **changes)
    with pytest.raises(TypeError, match="dim"):
        replace(TINY, dim=32.0)
    with pytest.raises(ValueError, match="head.weight is missing"):
        VideoViTConfig.from_state_dict(changed(dict(model.state_dict()), **{"head.weight": None}), heads=4)


def test_clips_are_spread_over_the_video() -> None:
    found = clip_indices(100, frames=4, stride=5, clips=3)
    assert found.tolist() == [[0, 5, 10, 15], [42, 47, 52, 57], [84, 89, 94, 99]]
    assert clip_indices(100, frames=4, stride=5, clips=1).tolist() == [[42, 47, 52, 57]]
    assert clip_indices(3, frames=4, stride=2, clips=2).tolist() == [[0, 2, 2, 2]] * 2
    for name in ("frames", "stride", "clips"):
        with pytest.raises(ValueError, match=name):
            clip_indices(5, **({"frames": 1, "stride": 1, "clips": 1} | {name: 0}))
    with pytest.raises(TypeError, match="total"):
        clip_indices(5.0, frames=1, stride=1, clips=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("portrait", [False, True])
def test_views_are_clips_times_crops(portrait: bool) -> None:
    video = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).repeat(1, 8, 14, 3)
    video = video + 10 * torch.arange(14, dtype=torch.uint8)[:, None]
    if portrait:
        video = video.transpose(1, 2)
    found = views(video, frames=3, stride=4, clips=2, crops=3, size=8)
    assert found.shape == (6, 3, 3, 8, 8)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    raw = (found * std + mean) * 255
    for clip, start in enumerate((0, 11)):
        for crop, left in enumerate((0, 3, 6)):
            for t in range(3):
                along = start + 4 * t + 10 * torch.arange(left, left + 8)
                want = along.float().expand(3, 8, 8)
                want = want.mT if portrait else want
                torch.testing.assert_close(raw[3 * clip + crop, :, t], want, atol=1e-3, rtol=0)
    assert views(video, frames=2, clips=1, crops=1, size=16).shape == (1, 3, 2, 16, 16)
    for name in ("crops", "size"):
        with pytest.raises(ValueError, match=name):
            views(video, **{name: 0})
    with pytest.raises(ValueError, match="uint8"):
        views(video.float())


def test_probabilities_are_averaged_over_views() -> None:
    model, video = golden_model(r=3)
    clips = torch.cat([video, video.flip(0), 2 * video])
    found = classify_views(model, clips, batch=4, backend="reference")
    want = torch.stack([model(clip[None], backend="reference").softmax(-1)[0] for clip in clips]).mean(0)
    torch.testing.assert_close(found, want)
    assert not found.requires_grad
    with pytest.raises(ValueError, match="views"):
        classify_views(model, clips[:0])
    with pytest.raises(ValueError, match="batch"):
        classify_views(model, clips, batch=0)


def test_biases_under_their_newer_names_are_taken():
    """transformers 5 keeps them beside the weights in memory."""
    torch.manual_seed(0)
    state = VideoViT("tiny").state_dict()
    theirs = to_hf_state(state)
    newer = {
        name.replace("attention.q_bias", "attention.query.bias").replace("attention.v_bias", "attention.value.bias"): t
        for name, t in theirs.items()
    }
    assert newer.keys() != theirs.keys()
    found = from_hf_state(newer)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
