"""The smtc model: names and sizes, golden files, losses in their literal form, inference, training, checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from vidops import _native
from vidops.checkpoints import CheckpointError
from vidops.models import smtc, smtc_losses
from vidops.models.smtc import SMTC, Discovery, SMTCConfig, transport_fusion, update_teacher
from vidops.models.smtc_losses import (
    LossSettings,
    consistency_loss,
    instance_loss,
    match_instances,
    separation_loss,
    transport_plan,
    valid_instances,
)
from vidops.models.vit import stochastic_depth
from vidops.validation import Case, command

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "smtc"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and _native.C is None:
        pytest.skip(_native.WHY_NOT)
    return request.param


def golden(name: str) -> Case:
    return Case.load(GOLDEN / f"{name}.npz")


def checks_of(case: Case, backend: str) -> list[Any]:
    kinds = command.KINDS["smtc"]
    kind = command.kind_of(case.path.stem, kinds)
    assert kind is not None
    return kinds[kind].run(case, backend)


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, backend: str) -> None:
    checks = checks_of(golden(name), backend)
    assert checks
    failed = [f"{c.name}: {c.error:.3e} > {c.limit:.0e}" for c in checks if not c.error <= c.limit]
    assert not failed, failed


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("slot_two_stage_it3", "out.instance_dots"),
        ("slot_two_stage_empty_mask", "grad.slots_mu"),
        ("slot_two_stage_softmask", "grad.inputs"),
        ("transport_fusion", "out.resized_k"),
        ("transport_fusion", "grad.k"),
        ("losses", "out.match_index"),
        ("losses", "out.sinkhorn_mu_t"),
        ("losses", "grad.instance.objects"),
        ("e2e_model", "out.warp_instance"),
        ("e2e_model", "grad.clip"),
        ("e2e_model", "grad.encoder.blocks.1.attn.qkv.weight"),
        ("e2e_model", "out.video_masks"),
        ("e2e_model", "out.video_selected"),
        ("e2e_model", "out.postprocessed"),
    ],
)
def test_golden_checks_notice_a_wrong_array(name: str, key: str) -> None:
    case = golden(name)
    wrong = case.arrays[key].copy()
    first = wrong.reshape(-1)[:1]
    first += np.array(0.01 * np.abs(wrong).max() if wrong.dtype.kind == "f" else 1, wrong.dtype)
    case.arrays[key] = wrong
    assert any(not c.error <= c.limit for c in checks_of(case, "reference"))


@pytest.mark.parametrize("name", ["e2e_model", "losses", "slot_two_stage_it1", "transport_fusion"])
def test_golden_checks_refuse_a_case_without_outputs(name: str) -> None:
    case = golden(name)
    bare = {k: v for k, v in case.arrays.items() if not k.startswith(("out.", "grad.", "in.R"))}
    assert [c.error for c in checks_of(replace(case, arrays=bare), "reference")] == [math.inf]


def test_paper_scale_has_the_published_names_and_counts() -> None:
    with torch.device("meta"):
        model = SMTC("vit_small_16")
    expected: dict[str, tuple[int, ...]] = {
        "encoder.cls_token": (1, 1, 384),
        "encoder.pos_embed": (1, 197, 384),
        "encoder.patch_embed.proj.weight": (384, 3, 16, 16),
        "encoder.patch_embed.proj.bias": (384,),
        "transport_proj.weight": (384, 256, 1),
        "transport_proj.bias": (384,),
        "slot_attention.slots_mu": (1, 16, 1, 384),
        "slot_attention.slots_sigma": (1, 16, 1, 384),
    }
    linear = {"mlp_slot.0": (768, 384), "mlp_slot.2": (384, 768)}
    linear |= {f"slot_attention.{n}": (384, 384) for n in ("project_q", "project_k", "project_v", "mlp.0", "mlp.2")}
    norms = ["encoder.norm", *(f"slot_attention.norm_{n}" for n in ("input", "slots", "pre_ff"))]
    for i in range(12):
        block = f"encoder.blocks.{i}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        linear |= {f"{block}.attn.qkv": (1152, 384), f"{block}.attn.proj": (384, 384)}
        linear |= {f"{block}.mlp.fc1": (1536, 384), f"{block}.mlp.fc2": (384, 1536)}
    for name, shape in linear.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        expected |= {f"{name}.weight": (384,), f"{name}.bias": (384,)}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    parts = (model.encoder, model.transport_proj, model.slot_attention, model.mlp_slot, model)
    assert [count(part) for part in parts] == [21_665_664, 98_688, 753_792, 590_976, 23_109_120]
    assert (model.slot_attention.num_instances, model.slot_attention.iters) == (4, 3)
    assert [block.drop_path for block in model.encoder.blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert (model.encoder.norm.eps, model.slot_attention.norm_input.eps) == (1e-6, 1e-5)


def test_config_is_read_back_from_a_state_dict() -> None:
    for name, config in smtc.CONFIGS.items():
        with torch.device("meta"):
            state = SMTC(name).state_dict()
        found = SMTCConfig.from_state_dict(
            state, encoder_heads=config.encoder_heads, num_instances=config.num_instances
        )
        assert found == config
    state.pop("transport_proj.weight")
    with pytest.raises(ValueError, match=r"transport_proj\.weight"):
        SMTCConfig.from_state_dict(state, encoder_heads=3)


@pytest.mark.parametrize("size", [(2, 3), (9, 12)], ids=["correlation first", "projection first"])
def test_fusion_is_its_definition_in_either_order(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    grid, channels = (4, 5), 6
    keys = torch.randn(2, 3, channels, *size, dtype=torch.float64)
    weight, bias = torch.randn(channels, 20, 1, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    got = transport_fusion(keys, weight, bias, grid)
    for b in range(2):
        for t in range(3):
            current = keys[b, t].flatten(1)
            previous = F.interpolate(keys[b, t - 1 : t or None], size=grid, mode="bilinear")[0].flatten(1)
            want = current + F.conv1d((previous.T @ current)[None], weight, bias)[0]
            torch.testing.assert_close(got[b, t], want.T, rtol=1e-12, atol=1e-12)


def literal_losses(given: dict[str, torch.Tensor], s: LossSettings) -> list[torch.Tensor]:
    """Eqs. E4 to E6 index by index, as the sheet writes them."""
    dots, teacher_dots, frame = given["dots"], given["dots'"], given["frame'"]
    batch, frames, semantics, _ = dots.shape
    p, p_teacher = dots.softmax(2), teacher_dots.softmax(2)
    maps = F.normalize(p + 1e-8, dim=-1)
    pairs = list(permutations(range(semantics), 2))
    differ = [(maps[b, t, i] * maps[b, t, j]).sum() for b in range(batch) for t in range(frames) for i, j in pairs]
    consistency = []
    for b in range(batch):
        for i, j in permutations(range(frames), 2):
            source, target = F.normalize(frame[b, i], dim=-1), F.normalize(frame[b, j], dim=-1)
            mu, nu = (t.abs().sum(-1) / t.abs().sum() for t in (source, target))
            kernel = (-(1 - source @ target.T) / s.temperature).exp()
            v = torch.ones_like(nu)
            for _ in range(s.sinkhorn_iters):
                u = mu / (kernel @ v)
                v = nu / (kernel.T @ u)
            x = torch.einsum("sm,sn->nm", p_teacher[b, j], (p[b, i] + 1e-8).log())
            consistency.append((-x * (u.diag() @ kernel @ v.diag())).sum())
    objects, teacher_objects = given["objects"], given["objects'"]
    valid, teacher_valid = given["valid"], given["valid'"]
    total, count = torch.zeros((), dtype=dots.dtype), 0
    for b in range(batch):
        for i in range(frames):
            for j in range(frames):
                for k in range(semantics):
                    sim = objects[b, i, k] @ teacher_objects[b, j, k].T
                    for r, c in zip(*linear_sum_assignment(sim.detach().numpy(), maximize=True), strict=True):
                        if not valid[b, i, k, r]:
                            continue
                        others = [F.relu(sim[r, q] - s.margin) for q in range(len(sim)) if q != c]
                        repel = torch.stack(others).mean() if others else 0.0
                        total = total + repel - float(teacher_valid[b, j, k, c]) * sim[r, c]
                        count += 1
    none = torch.zeros((), dtype=dots.dtype)
    return [
        torch.stack(differ).mean() if differ else none,
        torch.stack(consistency).mean() if consistency else none,
        total / max(count, 1),
    ]


@pytest.mark.parametrize(
    ("batch", "frames", "semantics", "instances", "tokens"),
    [(2, 3, 3, 4, 7), (1, 2, 2, 7, 5), (1, 1, 1, 1, 1), (2, 4, 2, 1, 3)],
)
def test_losses_equal_their_literal_form(batch: int, frames: int, semantics: int, instances: int, tokens: int) -> None:
    torch.manual_seed(3)
    settings = LossSettings(margin=0.1)
    given: dict[str, torch.Tensor] = {}
    for owner in ("", "'"):
        given[f"dots{owner}"] = torch.randn(batch, frames, semantics, tokens, dtype=torch.float64)
        shape = (batch, frames, semantics, instances)
        given[f"objects{owner}"] = F.normalize(torch.randn(*shape, 5, dtype=torch.float64), dim=-1)
        given[f"valid{owner}"] = torch.rand(shape) > 0.4
    given["frame'"] = torch.randn(batch, frames, tokens, 5, dtype=torch.float64)
    given["valid"][0, 0, 0, 0] = True
    leaves = [given[name].requires_grad_() for name in ("dots", "objects")]
    got = [
        separation_loss(given["dots"]),
        consistency_loss(given["dots"], given["dots'"], given["frame'"], settings),
        instance_loss(given["objects"], given["objects'"], given["valid"], given["valid'"], settings),
    ]
    want = literal_losses(given, settings)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    grads = [torch.autograd.grad(sum(losses), leaves, allow_unused=True) for losses in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-9, atol=1e-12)


def test_no_valid_instance_gives_no_loss() -> None:
    objects = F.normalize(torch.randn(1, 2, 3, 4, 5), dim=-1).requires_grad_()
    nothing = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    loss = instance_loss(objects, objects.detach(), nothing, ~nothing)
    loss.backward()
    assert loss.item() == 0
    assert not objects.grad.any()


def test_transport_meets_the_target_marginal() -> None:
    torch.manual_seed(0)
    found = transport_plan(torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 9, 4))
    assert found.plan.shape == found.cost.shape == (2, 6, 9)
    assert not found.plan.requires_grad
    torch.testing.assert_close(found.plan.sum(1), found.target / found.target.sum(-1, keepdim=True))


@pytest.mark.parametrize("count", [1, 2, 4, 6, 7])
def test_matching_is_optimal(count: int) -> None:
    similarity = torch.randn(3, 2, count, count, generator=torch.Generator().manual_seed(count))
    match = match_instances(similarity)
    assert match.shape == (3, 2, count)
    assert match.dtype == torch.int64
    for found, matrix in zip(match.flatten(0, 1), similarity.flatten(0, 1), strict=True):
        assert found.tolist() == linear_sum_assignment(matrix.numpy(), maximize=True)[1].tolist()


def test_ties_go_to_the_lowest_order() -> None:
    assert match_instances(torch.zeros(4, 4)).tolist() == [0, 1, 2, 3]
    assert match_instances(torch.tensor([[0.0, 1, 1], [0, 1, 1], [0, 0, 0]])).tolist() == [1, 2, 0]
    assert smtc_losses.ENUMERATED == 6


def test_valid_instances_need_area_and_likeness() -> None:
    dots = torch.zeros(1, 1, 2, 10)
    dots[0, 0, 0, :2], dots[0, 0, 0, 2:] = 5, -5  # exactly a fifth: not more than that
    semantic = torch.tensor([[1.0, 0], [1, 0]])[None, None]
    instance = torch.tensor([[[1.0, 1], [1, 2]], [[2, 0], [-1, 0]]])[None, None]  # cosines 0.71, 0.45, 1, -1
    assert valid_instances(dots, semantic, instance)[0, 0].tolist() == [[False, False], [True, False]]
    dots[0, 0, 0, 2] = 5
    assert valid_instances(dots, semantic, instance)[0, 0].tolist() == [[True, False], [True, False]]


def golden_model(case: Case) -> SMTC:
    state = {k.removeprefix("state."): case.tensor(k) for k in case.arrays if k.startswith("state.")}
    model = SMTC(SMTCConfig.from_state_dict(state, encoder_heads=3, num_instances=3))
    model.load_state_dict(state)
    return model.eval()


def test_prediction_masks_are_nested_shares(backend: str) -> None:
    case = golden("e2e_model")
    found = golden_model(case).predict(case.tensor("in.clip"), backend=backend)
    assert found.grid == (3, 4)
    assert found.score.shape == (1, 4, 4, 3)
    torch.testing.assert_close(found.semantic_mask.sum(2), torch.ones(1, 4, 12))
    torch.testing.assert_close(found.instance_mask.sum(3), found.semantic_mask)
    assert not found.score.requires_grad


@pytest.mark.parametrize("frames", [1, 3, 4, 5])
def test_discovery_fills_the_last_chunk_with_the_last_frames(frames: int) -> None:
    case = golden("e2e_model")
    model = golden_model(case)
    video = case.tensor("in.video")[0, :frames]
    init = case.tensor("in.video_instance_init")
    found = model.discover(video, instance_init=init, backend="reference")
    assert found.score.shape == (frames, 4, 3)
    assert found.mask.shape == (frames, 4, 3, 3, 4)
    whole, rest = frames // 4, frames % 4
    if rest:
        chunk = torch.cat([video[4 * whole :], video[-(4 - rest) :]])
        alone = model.predict(chunk[None], instance_init=init[whole, : len(chunk)], backend="reference")
        torch.testing.assert_close(found.score[4 * whole :], alone.score[0, :rest])
    again = model.discover(video, instance_init=init, iters=smtc.DISCOVERY_ITERS, backend="reference")
    assert not torch.allclose(again.mask, found.mask)


def test_proposals() -> None:
    mask = torch.zeros(2, 1, 3, 2, 2)
    mask[0, 0, 0] = torch.tensor([[0.0, 0.2], [0.25, 1.0]])  # stretched: 0, 0.2, 0.25, 1
    mask[0, 0, 2] = 0.7  # constant: nothing is left of it
    mask[1, 0, 1] = torch.tensor([[0.5, 0.6], [0.5, 0.5]])
    score = torch.tensor([[[0.5, 0.1, 0.9]], [[0.49, 0.8, 0.2]]])
    found = Discovery(score, mask).proposals((4, 3))
    assert found.shape == (2, 2, 4, 3)
    assert found[0, 0].int().tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert found[0, 1].int().tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert not found[1].any()
    assert Discovery(score - 1, mask).proposals((4, 3)).shape == (0, 2, 4, 3)


def test_training_step_trains_all_it_should(backend: str) -> None:
    torch.manual_seed(0)
    student, teacher = SMTC("tiny").train(), SMTC("tiny").eval()
    clip = torch.randn(2, 3, 3, 24, 32)
    losses = student.training_step(clip, teacher, clip.flip(-1), backend=backend)
    parts = losses.consistency + losses.separation + losses.instance
    assert torch.equal(losses.total, parts)
    losses.total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    # Their gradient is that of keys alone: neither the last block's output nor the final norm takes part.
    unused = ("encoder.norm.", "encoder.blocks.1.attn.proj", "encoder.blocks.1.norm2", "encoder.blocks.1.mlp")
    for name, parameter in student.named_parameters():
        if name.startswith(unused):
            assert parameter.grad is None, name
        elif name == "slot_attention.slots_sigma":  # zero and not absent: weight decay acts on it
            assert parameter.grad is not None and not parameter.grad.any()
        elif not name.startswith("mlp_slot."):  # no instance of these weights need be valid
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_training_reduces_the_loss() -> None:
    torch.manual_seed(0)
    student, teacher = SMTC("tiny").eval(), SMTC("tiny").eval()
    teacher.load_state_dict(student.state_dict())
    clip = torch.randn(1, 3, 3, 24, 24)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    init = student.slot_attention.sample_instances(3).detach()
    losses = []
    for _ in range(20):
        with torch.no_grad():
            target = teacher(clip, instance_init=init, backend="reference")
        result = student.losses(student(clip, instance_init=init, backend="reference"), target)
        optimizer.zero_grad()
        result.total.backward()
        optimizer.step()
        losses.append((result.total.item(), result.separation.item()))
    # Validity is a step function and the gradient that of the last iteration: the fall is no steady one.
    assert losses[-1][0] < losses[0][0] - 0.2
    assert losses[-1][1] < 0.6 * losses[0][1]


def test_teacher_follows_and_keeps_its_encoder() -> None:
    torch.manual_seed(0)
    teacher, student = SMTC("tiny"), SMTC("tiny")
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    new = dict(student.named_parameters())
    for encoder in (False, True):
        teacher.load_state_dict(before)
        update_teacher(teacher, student, momentum=0.75, encoder=encoder)
        for name, p in teacher.named_parameters():
            moved = encoder or not name.startswith("encoder.")
            want = 0.75 * before[name] + 0.25 * new[name] if moved else before[name]
            torch.testing.assert_close(p, want, msg=name)


def test_stochastic_depth_drops_whole_samples_in_training_only() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    found = stochastic_depth(x, 0.25)
    kept = found[:, 0, 0] != 0
    assert torch.equal(found, torch.where(kept[:, None, None], torch.tensor(1 / 0.75), 0.0).expand_as(x))
    assert 0.7 < kept.float().mean() < 0.8
    encoder = SMTC(replace(smtc.CONFIGS["tiny"], depth=3, drop_path=0.9)).encoder
    images = torch.randn(2, 3, 24, 24)
    first, second = (encoder.keys(images, backend="reference") for _ in range(2))
    assert not torch.equal(first, second)
    encoder.eval()
    assert torch.equal(*(encoder.keys(images, backend="reference") for _ in range(2)))


def test_a_reparameterised_sample_reaches_means_and_deviations() -> None:
    torch.manual_seed(0)
    model = SMTC(replace(smtc.CONFIGS["tiny"], reparameterised=True))
    sample = model.slot_attention.sample_instances(2000)
    assert sample.shape == (2000, 4, 3, 24)
    spread = sample.std(0).mean(1)
    torch.testing.assert_close(spread, model.slot_attention.slots_sigma[0, :, 0].exp(), rtol=0.1, atol=0)
    sample.sum().backward()
    assert model.slot_attention.slots_sigma.grad.abs().min() > 0
    torch.testing.assert_close(model.slot_attention.slots_mu.grad, torch.full((1, 4, 1, 24), 6000.0))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_round_trip(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    model = SMTC("tiny").eval()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    path = tmp_path / "weights.pt"
    torch.save({"model_state_dict": state, "iteration": 7000, "loss": 0.5}, path)
    found = SMTC.from_pretrained(path, "tiny")
    assert found.load_report is not None and found.load_report.complete
    assert not found.training
    for name, value in found.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_bare_backbone_needs_consent(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SMTC("tiny")
    path = tmp_path / "dino.pth"
    torch.save(dict(model.encoder.state_dict()), path)
    with pytest.raises(CheckpointError, match="strict=False"):
        SMTC.from_pretrained(path, "tiny")
    found = SMTC.from_pretrained(path, "tiny", strict=False)
    assert found.load_report is not None
    assert found.load_report.layout == "DINO backbone"
    assert all(not name.startswith("encoder.") for name in found.load_report.missing)
    for name, value in found.encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name]), name
    torch.save({n: v for n, v in model.state_dict().items() if not n.startswith("encoder.")}, path)
    with pytest.raises(CheckpointError, match=r"encoder\.cls_token"):
        SMTC.from_pretrained(path, "tiny", strict=False)


def test_bad_arguments_are_refused() -> None:
    model = SMTC("tiny")
    with pytest.raises(ValueError, match="vit_small_16"):
        SMTC("vit_small_8")
    with pytest.raises(ValueError, match="clip"):
        model(torch.zeros(4, 3, 24, 24))
    with pytest.raises(ValueError, match="images"):
        model(torch.zeros(1, 4, 3, 20, 24))
    with pytest.raises(ValueError, match="video"):
        model.discover(torch.zeros(0, 3, 24, 24))
    with pytest.raises(ValueError, match="weight"):
        transport_fusion(torch.zeros(1, 2, 4, 3, 3), torch.zeros(4, 8, 1), torch.zeros(4), (3, 3))
    with pytest.raises(ValueError, match="keys"):
        transport_fusion(torch.zeros(2, 4, 3, 3), torch.zeros(4, 9, 1), torch.zeros(4), (3, 3))
    with pytest.raises(ValueError, match="drop_path"):
        SMTC(replace(smtc.CONFIGS["tiny"], drop_path=1.0))
