"""The object_adapter model: names and sizes, golden files, heads and losses in their literal form, checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vidops import _native
from vidops.checkpoints import CheckpointError
from vidops.models.clip_vit import ClipEncoder, ResidualBlock
from vidops.models.object_adapter import CONFIGS, LossSettings, ObjectAdapter, ObjectAdapterConfig, make_encoder
from vidops.models.object_adapter_heads import Adapter3d, ObjectStateChange, SpaceTimeAttention, frame_pairs
from vidops.models.object_adapter_losses import distillation_loss, mask_diversity_loss, state_change_loss
from vidops.models.recipe import encoder_lr, parameter_groups
from vidops.models.smtc import SMTC
from vidops.validation import Case
from vidops.validation.command import KINDS, kind_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "object_adapter"
FILES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and _native.C is None:
        pytest.skip(_native.WHY_NOT)
    return request.param


def checks_of(name: str, case: Case, backend: str = "reference"):
    kinds = KINDS["object_adapter"]
    kind = kind_of(name, kinds)
    assert kind is not None
    return kinds[kind].run(case, backend)


def golden(name: str) -> Case:
    return Case.load(GOLDEN / f"{name}.npz")


@pytest.mark.parametrize("name", FILES)
def test_golden_checks_compare_every_output_and_gradient(name: str, backend: str) -> None:
    case = golden(name)
    checks = checks_of(name, case, backend)
    stored = [key for key in case.arrays if key.startswith(("out.", "grad."))]
    assert len(checks) == 2 * len(stored)  # float64 and float32
    assert not [c for c in checks if not c.ok]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("adapter3d", "grad.2.weight"),
        ("losses", "out.state_change"),
        ("losses", "grad.mask_logits"),
        ("model_e2e", "out.loss"),
        ("model_e2e", "grad.slot_attention.slots_embedding.weight"),
        ("object_state_change", "out.pairs"),
        ("object_state_change", "out.pair_argmax"),
        ("slot_attention_saturated", "out.mask"),
        ("slot_attention_given_init", "grad.init"),
        ("space_time_attention", "grad.time_embed"),
    ],
)
def test_golden_checks_notice_a_wrong_array(name: str, key: str) -> None:
    case = golden(name)
    wrong = case.arrays[key].copy()
    first = wrong.reshape(-1)[:1]
    first += np.array(0.01 * np.abs(wrong).max() if wrong.dtype.kind == "f" else 1, wrong.dtype)
    case.arrays[key] = wrong
    assert any(not c.ok for c in checks_of(name, case))


def test_golden_checks_refuse_a_case_without_outputs() -> None:
    for name in FILES:
        case = golden(name)
        case = replace(case, arrays={k: v for k, v in case.arrays.items() if not k.startswith(("out.", "grad."))})
        assert [c.error for c in checks_of(name, case)] == [math.inf]


def expected_shapes(config: ObjectAdapterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the sheet's section 6, state changes without an adapter."""
    c, h, s, o, nc = config.dim, config.slot_hidden, config.slots, config.embed_dim, config.classes
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.cls_token": (1, 1, c),
        "encoder.pos_embed": (1, 197, c),
        "encoder.patch_embed.proj.weight": (c, 3, 16, 16),
        "encoder.patch_embed.proj.bias": (c,),
        "slot_attention.slots_embedding.weight": (s, c),
        "st_block.st_transformer.attn.qkv.weight": (3 * c, c),
    }
    for cell in ("weight_ih", "weight_hh"):
        shapes[f"slot_attention.gru.{cell}"] = (3 * c, c)
        shapes[f"slot_attention.gru.{cell.replace('weight', 'bias')}"] = (3 * c,)
    blocks = [f"encoder.blocks.{i}" for i in range(12)]
    for prefix in (*blocks, "st_block.st_transformer"):
        for norm in ("norm1", "norm2"):
            shapes[f"{prefix}.{norm}.weight"] = shapes[f"{prefix}.{norm}.bias"] = (c,)
    for norm in ("encoder.norm", *(f"slot_attention.norm_{part}" for part in ("input", "slots", "pre_ff"))):
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (c,)
    layers = {
        "slot_attention.project_q": (h, c),
        "slot_attention.project_k": (h, c),
        "slot_attention.project_v": (c, c),
        "slot_attention.mlp.0": (h, c),
        "slot_attention.mlp.2": (c, h),
        "mlp_slot.0": (2 * c, c),
        "mlp_slot.2": (o, 2 * c),
        "st_block.mlp_token.0": (2 * c, 2 * c),
        "st_block.mlp_token.2": (o, 2 * c),
        "st_block.mlp_state.0": (o, o),
        "st_block.mlp_state.2": (o, o),
        "st_block.cls_layer": (nc, o),
        **{f"{prefix}.attn.qkv": (3 * c, c) for prefix in blocks},
    }
    for prefix in (*blocks, "st_block.st_transformer"):
        layers[f"{prefix}.attn.proj"] = (c, c)
        layers[f"{prefix}.mlp.fc1"] = (4 * c, c)
        layers[f"{prefix}.mlp.fc2"] = (c, 4 * c)
    for name, shape in layers.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    return shapes


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(("config", "millions"), [("vit_small_16", 5.15), ("vit_base_16", 17.1)])
def test_paper_scale_has_the_published_names_shapes_and_counts(config: str, millions: float) -> None:
    with torch.device("meta"):
        model = ObjectAdapter(config)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert shapes == expected_shapes(CONFIGS[config])
    assert trainable(model) / 1e6 == pytest.approx(millions, abs=0.05 if millions > 10 else 0.005)
    assert not any(p.requires_grad for p in model.encoder.parameters())


def test_counts_of_the_parts() -> None:
    with torch.device("meta"):
        model = ObjectAdapter("vit_small_16")
    head = model.st_block
    assert isinstance(head, ObjectStateChange)
    parts = (
        model.slot_attention, model.mlp_slot, head.st_transformer, head.mlp_token, head.mlp_state, head.cls_layer
    )  # fmt: skip
    assert [round(trainable(part) / 1e6, 2) for part in parts] == [1.09, 0.69, 1.77, 0.98, 0.53, 0.09]
    assert sum(map(trainable, parts)) == trainable(model)


def test_optional_parts_have_the_published_names() -> None:
    with torch.device("meta"):
        model = ObjectAdapter(ObjectAdapterConfig(adapter=True, interaction="space_time"))
    state = model.state_dict()
    assert state["adapter.0.weight"].shape == (96, 384, 1, 1, 1)
    assert state["adapter.2.weight"].shape == (96, 96, 3, 3, 3)
    assert state["adapter.4.bias"].shape == (384,)
    block = {name.removeprefix("st_block.") for name in state if name.startswith("st_block.")}
    assert block == {
        key.removeprefix("param.") for key in golden("space_time_attention").arrays if key.startswith("param.")
    }
    assert state["st_block.slots_embed"].shape == (1, 9, 384)
    assert ObjectAdapterConfig.from_state_dict(state, encoder_heads=6) == model.config


def test_pairs_are_ordered_by_distance() -> None:
    assert frame_pairs(4).tolist() == [[0, 1], [1, 2], [2, 3], [0, 2], [1, 3], [0, 3]]
    assert [len(frame_pairs(t)) for t in (1, 2, 8, 16, 32)] == [0, 1, 28, 120, 496]


def small_head() -> ObjectStateChange:
    torch.manual_seed(0)
    return ObjectStateChange(16, 6, 5).double().eval()


def test_changes_equal_those_of_the_concatenation() -> None:
    head = small_head()
    objects = torch.randn(2, 5, 3, 16, dtype=torch.float64, requires_grad=True)
    pairs = frame_pairs(5)
    literal = head.mlp_token(torch.cat([objects[:, pairs[:, 0]], objects[:, pairs[:, 1]]], dim=-1))
    split = head.changes(objects)
    torch.testing.assert_close(split, literal, rtol=1e-12, atol=1e-13)
    weight = torch.randn_like(literal)
    wanted = (objects, *head.mlp_token.parameters())
    torch.testing.assert_close(
        torch.autograd.grad((split * weight).sum(), wanted),
        torch.autograd.grad((literal * weight).sum(), wanted),
        rtol=1e-10,
        atol=1e-12,
    )


def test_gradient_of_a_maximum_goes_to_the_first_maximal_pair(backend: str) -> None:
    head = small_head()
    with torch.no_grad():
        # Every pair now gives exactly the bias, while its hidden features differ.
        head.mlp_token[2].weight.zero_()
    slots = torch.randn(2, 4, 3, 16, dtype=torch.float64)
    found = head(slots, backend=backend)
    assert not found.winner.any()
    (got,) = torch.autograd.grad(found.video[:, 0].sum(), head.mlp_token[2].weight)
    first_pair = head.mlp_token[:2](torch.cat([found.objects[:, 0], found.objects[:, 1]], dim=-1))
    torch.testing.assert_close(got[0], first_pair.mean(1).sum(0), rtol=1e-12, atol=1e-13)
    assert not got[1:].any()


def test_drop_path_keeps_the_mean_and_only_acts_in_training() -> None:
    torch.manual_seed(0)
    block = ObjectStateChange(16, 6, 5, drop_path=0.25).st_transformer
    update = torch.ones(4000, 3, 2)
    kept = block._kept(update)
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert abs(kept.mean().item() - 1) < 0.03
    assert block.eval()._kept(update) is update


def test_space_time_attention_follows_its_embeddings(backend: str) -> None:
    torch.manual_seed(0)
    head = SpaceTimeAttention(16, 6, 5, frames=4, slots=3).double().eval()
    with torch.no_grad():
        head.time_embed.zero_()
    slots = torch.randn(2, 4, 3, 16, dtype=torch.float64)
    still = head(slots, backend=backend).logit
    torch.testing.assert_close(head(slots.flip(1), backend=backend).logit, still, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        head.time_embed.normal_()
    assert not torch.allclose(head(slots.flip(1), backend=backend).logit, head(slots, backend=backend).logit)


@pytest.mark.parametrize("shape", [(2, 3, 3, 16), (2, 4, 2, 16)])
def test_space_time_attention_refuses_other_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SpaceTimeAttention(16, 6, 5, frames=4, slots=3)(torch.zeros(shape))


def test_one_frame_has_no_state_change_and_has_objects() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        small_head()(torch.zeros(1, 1, 3, 16, dtype=torch.float64))
    model = ObjectAdapter("tiny").eval()
    with pytest.raises(ValueError, match="at least 2"):
        model(torch.zeros(1, 1, 3, 32, 32))
    objects = model.find_objects(torch.randn(1, 1, 3, 32, 32), backend="reference")
    assert objects.slots.shape == (1, 1, 4, 48)


def literal_losses(
    dots: torch.Tensor, state: torch.Tensor, label: list[int], perm: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask diversity and state change as the sheet writes them, element by element."""
    batch, frames, slots, _ = dots.shape
    p = F.normalize(dots.softmax(2) + 1e-8, dim=-1)
    overlap = [
        p[b, t, i] @ p[b, t, j] for b in range(batch) for t in range(frames) for i in range(slots)
        for j in range(slots) if i != j
    ]  # fmt: skip
    q = F.normalize(state, dim=-1)
    pairs = range(state.shape[1])
    positive, negative, between = [], [], []
    for b in range(batch):
        for r in pairs:
            for s in range(slots):
                between += [F.relu(q[b, r, s] @ q[b, r, i].detach() - 0.3) for i in range(slots) if i != s]
                for n in range(batch):
                    d = q[b, r, s] @ q[n, perm[r], s].detach()
                    (positive if label[b] == label[n] else negative).append(d)

    def mean(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(values).mean() if values else torch.zeros((), dtype=dots.dtype)

    return mean(overlap), mean([F.relu(d - 0.3) for d in negative]) + mean(between) - mean(positive)


@pytest.mark.parametrize(
    ("label", "slots"), [([0, 1, 0], 3), ([2, 2, 2], 3), ([0, 1, 2], 1), ([4], 1)], ids=["all", "neg", "slots", "both"]
)
def test_losses_equal_their_literal_form_and_empty_means_are_zero(label: list[int], slots: int) -> None:
    torch.manual_seed(1)
    batch, perm = len(label), [2, 0, 1]
    dots = torch.randn(batch, 2, slots, 7, dtype=torch.float64, requires_grad=True)
    state = torch.randn(batch, 3, slots, 4, dtype=torch.float64, requires_grad=True)
    diversity = mask_diversity_loss(dots)
    change = state_change_loss(state, torch.tensor(label), torch.tensor(perm))
    expected = literal_losses(dots, state, label, perm)
    torch.testing.assert_close((diversity, change), expected, rtol=1e-12, atol=1e-13)
    got = torch.autograd.grad(diversity + change, (dots, state))
    want = torch.autograd.grad(sum(expected), (dots, state), allow_unused=True)
    torch.testing.assert_close(got[1], want[1], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(got[0], torch.zeros_like(dots) if want[0] is None else want[0], rtol=1e-10, atol=1e-13)


def test_keys_of_other_ranks_and_no_positive() -> None:
    torch.manual_seed(2)
    state = torch.randn(2, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(5, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    loss = state_change_loss(state, torch.tensor([0, 1]), torch.arange(3), keys=keys, key_label=torch.full((5,), 7))
    cosine = torch.einsum("brso,nrso->bnrs", F.normalize(state, dim=-1), F.normalize(keys, dim=-1))
    torch.testing.assert_close(loss, F.relu(cosine - 0.3).mean(), rtol=1e-12, atol=1e-13)
    assert torch.autograd.grad(loss, keys, allow_unused=True) == (None,)


def test_distillation_of_one_video_is_zero_and_prefers_its_own_frames() -> None:
    torch.manual_seed(3)
    teacher = F.normalize(torch.randn(4, 2, 6, dtype=torch.float64), dim=-1)
    own = teacher[:, :, None].expand(-1, -1, 3, -1)
    assert distillation_loss(own[:1], teacher[:1]).item() == 0
    assert distillation_loss(own, teacher) < distillation_loss(own.roll(1, 0), teacher)


def test_losses_refuse_wrong_shapes() -> None:
    state, label, perm = torch.zeros(2, 3, 4, 5), torch.zeros(2, dtype=torch.int64), torch.arange(3)
    with pytest.raises(ValueError, match="dots"):
        mask_diversity_loss(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="permutation"):
        state_change_loss(state, label, torch.arange(2))
    with pytest.raises(ValueError, match="both or neither"):
        state_change_loss(state, label, perm, keys=state)
    with pytest.raises(ValueError, match="keys"):
        state_change_loss(state, label, perm, keys=state[:, :2], key_label=label)
    with pytest.raises(ValueError, match="label"):
        state_change_loss(state, label[:1], perm)
    with pytest.raises(ValueError, match="teacher"):
        distillation_loss(state, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("adapter", [False, True])
def test_training_reaches_every_trained_parameter(adapter: bool, backend: str) -> None:
    torch.manual_seed(0)
    model = ObjectAdapter(replace(CONFIGS["tiny"], adapter=adapter, drop_path=0.0)).train()
    output = model(torch.randn(3, 3, 3, 32, 32), backend=backend)
    teacher = F.normalize(torch.randn(3, 3, 24), dim=-1)
    losses = model.losses(output, torch.tensor([0, 1, 0]), teacher)
    s = LossSettings()
    expected = losses.classification + s.diversity * losses.diversity
    expected = expected + s.state_change * losses.state_change + s.distillation * losses.distillation
    torch.testing.assert_close(losses.total, expected)
    losses.total.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("encoder."):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name


def test_adapter_lays_tokens_out_as_a_volume() -> None:
    torch.manual_seed(0)
    model = ObjectAdapter(replace(CONFIGS["tiny"], adapter=True)).eval()
    assert isinstance(model.adapter, Adapter3d)
    clip = torch.randn(2, 3, 3, 16, 32)
    found = model.find_objects(clip, backend="reference")
    keys = model.encoder(clip.flatten(0, 1), backend="reference").k  # (B*T, C, h, w)
    volume = torch.stack([torch.stack([keys[3 * b + t] for t in range(3)], dim=1) for b in range(2)])
    adapted = model.adapter(volume)
    for b in range(2):
        for t in range(3):
            slots, _ = model.slot_attention(adapted[b, :, t].flatten(1).T[None], backend="reference")
            torch.testing.assert_close(found.slots[b, t], slots[0], rtol=1e-4, atol=1e-5)


def test_space_time_model_classifies_and_has_no_state() -> None:
    torch.manual_seed(0)
    model = ObjectAdapter(replace(CONFIGS["tiny"], interaction="space_time")).eval()
    output = model(torch.randn(2, 3, 3, 32, 32), backend="reference")
    assert (output.logit.shape, output.video.shape, output.state) == ((2, 5), (2, 24), None)
    with pytest.raises(ValueError, match="states"):
        model.losses(output, torch.tensor([0, 1]), torch.zeros(2, 3, 24))
    with pytest.raises(ValueError, match="frames"):
        model(torch.zeros(1, 2, 3, 32, 32))


def test_states_are_computed_on_demand() -> None:
    torch.manual_seed(0)
    model = ObjectAdapter("tiny").eval()
    clip = torch.randn(1, 4, 3, 32, 32)
    with_state = model(clip, backend="reference")
    without = model(clip, need_state=False, backend="reference")
    assert with_state.state is not None and with_state.state.shape == (1, 6, 4, 24)
    assert without.state is None and torch.equal(without.logit, with_state.logit)


def test_segment_upsamples_the_masks_before_the_choice() -> None:
    torch.manual_seed(0)
    model = ObjectAdapter("tiny").eval()
    video = torch.randn(2, 3, 16, 24)
    masks = model.find_objects(video[None], backend="reference").masks()[0]
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 6))
    labels = model.segment(video, backend="reference")
    assert labels.shape == (2, 16, 24) and labels.dtype == torch.int64
    at_grid = model.segment(video, size=(2, 3), backend="reference")
    assert torch.equal(at_grid.flatten(1), masks.argmax(1))
    # Border pixels lie outside the first and last patch centre, so their choice is the patch's own.
    assert torch.equal(labels[:, [0, 0, -1, -1], [0, -1, 0, -1]], at_grid[:, [0, 0, -1, -1], [0, -1, 0, -1]])


def test_checkpoints_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ObjectAdapter("tiny").eval()
    state = model.state_dict()
    path = tmp_path / "weights.pt"
    torch.save({"iteration": 10, "model_state_dict": {f"module.{k}": v for k, v in state.items()}, "acc": 0.5}, path)
    found = ObjectAdapter.from_pretrained(path, "tiny")
    assert found.load_report is not None and found.load_report.complete and not found.training
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


def test_bare_backbone_needs_consent_and_an_encoder_is_required(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ObjectAdapter("tiny")
    path = tmp_path / "dino.pth"
    torch.save(dict(model.encoder.state_dict()), path)
    with pytest.raises(CheckpointError, match="strict=False"):
        ObjectAdapter.from_pretrained(path, "tiny")
    found = ObjectAdapter.from_pretrained(path, "tiny", strict=False)
    assert torch.equal(found.encoder.pos_embed, model.encoder.pos_embed)
    torch.save({k: v for k, v in model.state_dict().items() if not k.startswith("encoder.")}, path)
    with pytest.raises(CheckpointError, match="encoder"):
        ObjectAdapter.from_pretrained(path, "tiny", strict=False)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="vit_small_16"):
        ObjectAdapter("vit_small_17")
    with pytest.raises(ValueError, match="encoder"):
        ObjectAdapter(replace(CONFIGS["tiny"], encoder="vgg"))
    with pytest.raises(ValueError, match="interaction"):
        ObjectAdapter(replace(CONFIGS["tiny"], interaction="none"))
    with pytest.raises(ValueError, match="drop_path"):
        ObjectAdapter(replace(CONFIGS["tiny"], drop_path=1.0))
    with pytest.raises(ValueError, match="clip"):
        ObjectAdapter("tiny")(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="slots"):
        small_head()(torch.zeros(2, 3, 16))
    with pytest.raises(ValueError, match="cls_layer"):
        state = ObjectAdapter("tiny").state_dict()
        ObjectAdapterConfig.from_state_dict({k: v for k, v in state.items() if "cls_layer" not in k}, encoder_heads=3)


@pytest.mark.parametrize(
    ("config", "encoder", "trained"),
    [("dinov2_small_14", 22.06, 5.15), ("clip_base_16", 86.19, 17.1), ("clip_large_14", 303.97, 29.1)],
)
def test_other_students_have_the_public_counts(config: str, encoder: float, trained: float) -> None:
    with torch.device("meta"):
        model = ObjectAdapter(config)
    count = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    assert count == pytest.approx(encoder, abs=0.01)
    assert trainable(model) / 1e6 == pytest.approx(trained, abs=0.05 if trained > 10 else 0.005)
    found = ObjectAdapterConfig.from_state_dict(model.state_dict(), encoder_heads=CONFIGS[config].encoder_heads)
    assert found == CONFIGS[config]


TINY_CLIP = replace(CONFIGS["tiny"], encoder="clip", encoder_eps=1e-5)


def literal_clip(encoder: ClipEncoder, images: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Tokens of CLIP's last block with PyTorch's own attention."""
    x = F.conv2d(images, encoder.conv1.weight, stride=encoder.patch).flatten(2).mT
    x = torch.cat([encoder.class_embedding.expand(len(x), 1, -1), x], dim=1) + position
    x = encoder.ln_pre(x)
    for block in encoder.transformer.resblocks:
        assert isinstance(block, ResidualBlock)
        attention = torch.nn.MultiheadAttention(x.shape[-1], block.attn.heads, batch_first=True)
        attention.load_state_dict(block.attn.state_dict())
        normed = block.ln_1(x)
        x = x + attention.to(x)(normed, normed, normed, need_weights=False)[0]
        hidden = block.mlp[0](block.ln_2(x))
        x = x + block.mlp[2](hidden / (1 + torch.exp(-1.702 * hidden)))
    return x[:, 1:]


def test_clip_student_equals_pytorch_and_resizes_its_positions(backend: str) -> None:
    torch.manual_seed(0)
    encoder = make_encoder(TINY_CLIP).double()
    assert isinstance(encoder, ClipEncoder)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = literal_clip(encoder, images, encoder.positional_embedding)
    torch.testing.assert_close(encoder.features(images, backend=backend), expected, rtol=1e-9, atol=1e-10)
    wide = torch.randn(1, 3, 16, 40, dtype=torch.float64)
    stored = encoder.positional_embedding[1:].T.reshape(1, -1, 4, 4)
    resized = F.interpolate(stored, size=(2, 5), mode="bicubic", align_corners=False).flatten(2)[0].T
    expected = literal_clip(encoder, wide, torch.cat([encoder.positional_embedding[:1], resized]))
    torch.testing.assert_close(encoder.features(wide, backend=backend), expected, rtol=1e-9, atol=1e-10)


def test_clip_weights_load_by_their_public_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ObjectAdapter(TINY_CLIP)
    path = tmp_path / "clip.pt"
    public = {f"visual.{name}": t for name, t in model.encoder.state_dict().items()}
    torch.save({**public, "logit_scale": torch.ones(())}, path)
    found = ObjectAdapter.from_pretrained(path, TINY_CLIP, strict=False)
    assert found.load_report is not None and found.load_report.ignored == ("logit_scale",)
    assert not [name for name in found.load_report.missing if name.startswith("encoder.")]
    assert torch.equal(found.encoder.proj, model.encoder.proj)


def test_dinov2_student_scales_its_branches() -> None:
    torch.manual_seed(0)
    config = replace(CONFIGS["tiny"], encoder="dinov2")
    model, plain = ObjectAdapter(config).encoder, ObjectAdapter("tiny").encoder
    state = model.state_dict()
    names = set(state) - set(plain.state_dict())
    assert names == {"mask_token", *(f"blocks.{i}.ls{j}.gamma" for i in range(2) for j in (1, 2))}
    plain.load_state_dict({name: t for name, t in state.items() if name not in names})
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.keys(images, backend="reference"), plain.keys(images, backend="reference"))
    first = model.blocks[0]
    with torch.no_grad():
        first.ls1.gamma.fill_(0.5)
        first.ls2.gamma.fill_(2.0)
        plain.blocks[0].attn.proj.weight.mul_(0.5)
        plain.blocks[0].attn.proj.bias.mul_(0.5)
        plain.blocks[0].mlp.fc2.weight.mul_(2.0)
        plain.blocks[0].mlp.fc2.bias.mul_(2.0)
    torch.testing.assert_close(
        model.keys(images, backend="reference"), plain.keys(images, backend="reference"), rtol=1e-5, atol=1e-6
    )


def test_temporal_blocks_let_frames_see_each_other(backend: str) -> None:
    torch.manual_seed(0)
    model = ObjectAdapter(replace(CONFIGS["tiny"], temporal_blocks=2)).eval()
    assert "temporal_transformer.1.attn.qkv.weight" in model.state_dict()
    clip = torch.randn(1, 2, 3, 32, 32)
    changed = clip.clone()
    changed[:, 1] += 1
    assert not torch.equal(
        model.find_objects(clip, backend=backend).slots[:, 0], model.find_objects(changed, backend=backend).slots[:, 0]
    )
    still = ObjectAdapter("tiny").eval()
    torch.testing.assert_close(
        still.find_objects(clip, backend=backend).slots[:, 0], still.find_objects(changed, backend=backend).slots[:, 0]
    )


def test_strongest_change_one_gap_at_a_time_is_the_maximum_over_all_pairs() -> None:
    head = small_head()
    objects = torch.randn(2, 6, 3, 16, dtype=torch.float64)
    objects[:, 3:] = objects[:, :3]  # later pairs repeat earlier ones: ties
    weights = list(head.mlp_token.parameters())
    value, pair = head.changes(objects).max(dim=1)
    streamed = head.strongest(objects)
    torch.testing.assert_close(streamed, (value, pair), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(streamed[0].sum(), weights),
        torch.autograd.grad(value.sum(), weights),
        rtol=1e-10,
        atol=1e-12,
    )
    objects[1, 2, 1, 0] = torch.nan
    value = head.changes(objects).amax(1)
    assert torch.equal(head.strongest(objects)[0].isnan(), value.isnan()) and value.isnan().any()


def test_recipe_decays_matrices_only() -> None:
    for interaction, names in (("state_change", 1), ("space_time", 4)):
        model = ObjectAdapter(replace(CONFIGS["tiny"], interaction=interaction))
        decayed, plain = model.parameter_groups()
        assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
        assert sum(p.dim() > 1 for p in plain["params"]) == names
        assert len(decayed["params"]) + len(plain["params"]) == sum(p.requires_grad for p in model.parameters())


def test_groups_of_an_encoder_and_its_late_start() -> None:
    model = SMTC("tiny")
    groups = parameter_groups(model, encoder="encoder.")
    assert [g["name"] for g in groups] == ["model, decayed", "model, plain", "encoder, decayed", "encoder, plain"]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.1, 0.0]
    found = [p for g in groups for p in g["params"]]
    assert len(found) == len({id(p) for p in found}) == len(list(model.parameters()))
    assert {id(p) for g in groups[2:] for p in g["params"]} == {id(p) for p in model.encoder.parameters()}
    assert [encoder_lr(i, 1e-4) for i in (0, 2_999, 3_000)] == pytest.approx([0, 0, 1e-6])
    with pytest.raises(ValueError, match="undecayed"):
        parameter_groups(model, undecayed=["nothing"])
