"""The ssl_uvos model: names and sizes, golden files, losses in their literal form, inference, training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vidops import _native, evaluation
from vidops.models import ssl_uvos
from vidops.models.ssl_uvos import SSLUVOS, SSLUVOSConfig, with_losses
from vidops.models.ssl_uvos_losses import LossSettings, motion_loss, sample_patches, semantic_loss
from vidops.models.vit import Block, DinoEncoder
from vidops.validation import Case, ssl_uvos_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "ssl_uvos"
SMALL = with_losses(
    "tiny", samples=3, semantic_positives=3, semantic_negatives=4, motion_positives=2, motion_negatives=3
)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and _native.C is None:
        pytest.skip(_native.WHY_NOT)
    return request.param


def golden(name: str) -> Case:
    return Case.load(GOLDEN / f"{name}.npz")


CASES = (
    ("encoder", "encoder"),
    ("st_block", "st_block"),
    ("e2e_model", "e2e_model"),
    ("losses", "losses_small"),
    ("losses", "losses_paper_constants"),
    ("davis_eval", "davis_eval"),
)


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[name for _, name in CASES])
def test_golden(kind: str, name: str, backend: str) -> None:
    checks = getattr(ssl_uvos_model, f"check_{kind}")(golden(name), backend)
    assert checks
    failed = [f"{c.name}: {c.error:.3e} > {c.limit:.0e}" for c in checks if not c.error <= c.limit]
    assert not failed, failed


@pytest.mark.parametrize(
    ("kind", "name", "key"),
    [
        ("encoder", "encoder", "out.k1"),
        ("encoder", "encoder", "out.pos1"),
        ("st_block", "st_block", "grad.attn.qkv.weight"),
        ("st_block", "st_block", "out.attn_headmean"),
        ("e2e_model", "e2e_model", "out.attn_temporal"),
        ("e2e_model", "e2e_model", "out.masks"),
        ("e2e_model", "e2e_model", "grad.temporal_transformer.0.norm1.bias"),
        ("losses", "losses_small", "grad.motion_mask"),
        ("davis_eval", "davis_eval", "out.F"),
    ],
)
def test_golden_checks_notice_a_wrong_array(kind: str, name: str, key: str) -> None:
    case = golden(name)
    wrong = case.arrays[key].copy()
    first = wrong.reshape(-1)[:1]
    first += np.array(0.01 * np.abs(wrong).max() if wrong.dtype.kind == "f" else 1, wrong.dtype)
    case.arrays[key] = wrong
    checks = getattr(ssl_uvos_model, f"check_{kind}")(case, "reference")
    assert any(not c.error <= c.limit for c in checks)


def test_golden_checks_refuse_a_case_without_outputs() -> None:
    for kind, name in CASES[:5]:
        case = golden(name)
        bare = {k: v for k, v in case.arrays.items() if not k.startswith(("out.", "grad.", "in.R"))}
        case = replace(case, arrays=bare)
        checks = getattr(ssl_uvos_model, f"check_{kind}")(case, "reference")
        assert [c.error for c in checks] == [math.inf]


def with_arrays(case: Case, **changes: Any) -> Case:
    """A variant of a case: inputs replaced, everything else the case holds about them dropped."""
    kept = {k: v for k, v in case.arrays.items() if k.startswith(("state.", "cfg."))}
    return replace(case, arrays=kept | {k.replace("__", "."): v for k, v in changes.items()})


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"), [(2, 2, 8, 16), (1, 1, 8, 8), (1, 4, 32, 32)]
)
def test_golden_checks_take_other_sizes(
    batch: int, frames: int, height: int, width: int, backend: str
) -> None:
    torch.manual_seed(0)
    model = golden_model(golden("e2e_model")).double()
    clip = torch.randn(batch, frames, 3, height, width)
    output = model(clip.double(), backend="reference")
    found = model.segment(clip[0].double(), ratio=2, backend="reference")
    case = with_arrays(
        golden("e2e_model"),
        in__clip=clip.numpy(),
        out__attn_temporal=output.attention.detach().numpy(),
        out__k=output.slot.detach().numpy(),
        in__video=clip[:1].numpy(),
        out__masks=found.masks()[:, None, :, None].numpy(),
    )
    checks = ssl_uvos_model.check_e2e_model(case, backend)
    assert len(checks) == 6
    assert all(c.error <= c.limit for c in checks), checks


def test_paper_scale_has_the_published_names_and_counts() -> None:
    with torch.device("meta"):
        model = SSLUVOS("vit_small_8")
    state = model.state_dict()
    expected = {
        "encoder.cls_token": (1, 1, 384),
        "encoder.pos_embed": (1, 785, 384),
        "encoder.patch_embed.proj.weight": (384, 3, 8, 8),
        "encoder.patch_embed.proj.bias": (384,),
        "encoder.norm.weight": (384,),
        "encoder.norm.bias": (384,),
    }
    prefixes = [f"encoder.blocks.{i}" for i in range(12)] + ["temporal_transformer.0"]
    for prefix in prefixes:
        for norm in ("norm1", "norm2"):
            expected[f"{prefix}.{norm}.weight"] = expected[f"{prefix}.{norm}.bias"] = (384,)
        for name, rows, columns in (
            ("attn.qkv", 1152, 384),
            ("attn.proj", 384, 384),
            ("mlp.fc1", 1536, 384),
            ("mlp.fc2", 384, 1536),
        ):
            expected[f"{prefix}.{name}.weight"] = (rows, columns)
            if (prefix, name) != ("temporal_transformer.0", "attn.qkv"):
                expected[f"{prefix}.{name}.bias"] = (rows,)
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert len(state) == 161
    assert sum(p.numel() for p in model.encoder.parameters()) == 21_670_272
    assert sum(p.numel() for p in model.temporal_transformer.parameters()) == 1_773_312
    assert sum(p.numel() for p in model.parameters()) == 23_443_584
    block = model.temporal_transformer[0]
    assert (block.norm1.eps, model.encoder.norm.eps) == (1e-5, 1e-6)
    assert (block.attn.heads, model.encoder.blocks[0].attn.heads) == (8, 6)
    assert (block.attn.attention_dropout, block.attn.proj_drop.p, block.mlp.drop.p) == (0.4, 0.1, 0.1)


def test_patch_16_differs_in_patches_and_positions_only() -> None:
    with torch.device("meta"):
        wide, narrow = SSLUVOS("vit_small_8").state_dict(), SSLUVOS("vit_small_16").state_dict()
    different = {name for name in wide if wide[name].shape != narrow[name].shape}
    assert wide.keys() == narrow.keys()
    assert different == {"encoder.pos_embed", "encoder.patch_embed.proj.weight"}
    assert narrow["encoder.pos_embed"].shape == (1, 197, 384)


def test_paper_scale_position_embedding_on_meta() -> None:
    with torch.device("meta"):
        encoder = DinoEncoder()
        position = encoder.position_embedding(40, 60)
    assert position.shape == (1, 2401, 384)
    assert encoder.position_embedding(28, 28) is encoder.pos_embed


def bicubic_by_hand(grid: np.ndarray, scale: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """Keys' cubic with A = -0.75 at (i + 0.5) / s - 0.5, border clamped: grid (h, w, C) -> (*size, C)."""

    def weight(x: float) -> float:
        a, x = -0.75, abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    def matrix(have: int, want: int, factor: float) -> np.ndarray:
        out = np.zeros((want, have))
        for i in range(want):
            at = (i + 0.5) / factor - 0.5
            for tap in range(math.floor(at) - 1, math.floor(at) + 3):
                out[i, min(max(tap, 0), have - 1)] += weight(at - tap)
        return out

    rows, columns = (matrix(h, w, s) for h, w, s in zip(grid.shape[:2], size, scale, strict=True))
    return np.einsum("ih,jw,hwc->ijc", rows, columns, grid)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (5, 3), (4, 7), (9, 2)])
def test_position_embedding_keeps_the_tenth_in_its_scale(size: tuple[int, int]) -> None:
    encoder = DinoEncoder(dim=6, depth=1, heads=2, img_size=32).double()
    got = encoder.position_embedding(*size)[0]
    grid = encoder.pos_embed[0, 1:].detach().reshape(4, 4, 6).numpy()
    expected = bicubic_by_hand(grid, ((size[0] + 0.1) / 4, (size[1] + 0.1) / 4), size)
    np.testing.assert_allclose(got[1:].detach().numpy(), expected.reshape(-1, 6), atol=1e-12)
    assert torch.equal(got[0], encoder.pos_embed[0, 0])


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 3, 32, 4), (1, 4, 32, 32), (3, 32, 32)])
def test_encoder_refuses_images_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images"):
        SSLUVOS("tiny").encoder(torch.zeros(shape), backend="reference")


def naive_losses(
    attention: torch.Tensor, slot: torch.Tensor, sample: list[int], s: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eqs. E6 and E7 patch by patch, as the sheet writes them."""
    batch, frames, patches, _ = slot.shape
    a = attention.reshape(batch, frames, patches, frames, patches)
    attract, repel, margins = [], [], []

    def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y) / (x.norm(dim=-1).clamp_min(1e-12) * y.norm().clamp_min(1e-12))

    def l1(v: torch.Tensor) -> torch.Tensor:
        return v / v.abs().sum().clamp_min(1e-12)

    for b in range(batch):
        for f in range(frames):
            entropy, per_patch = [], []
            for n in sample:
                for t in range(frames):
                    order = a[b, f, n, t].argsort(descending=True)
                    query = slot[b, f, n]
                    attract.append(F.relu(0.9 - cosine(slot[b, t, order[: s.semantic_positives]], query)))
                    repel.append(F.relu(cosine(slot[b, t, order[-s.semantic_negatives :]], query) - 0.1))
                order = a[b, f, n, f].argsort(descending=True)
                query = l1(attention[b, f * patches + n].detach())

                def u(p: int, b: int = b, f: int = f, query: torch.Tensor = query) -> torch.Tensor:
                    return (query * (l1(attention[b, f * patches + p]) + 1e-10).log()).sum()

                margin = [
                    F.relu(u(int(low)) - u(int(high)) + 1)
                    for low in order[-s.motion_negatives :]
                    for high in order[: s.motion_positives]
                ]
                per_patch.append(torch.stack(margin))
                entropy.append((query * (query + 1e-10).log()).sum())
            weight = torch.stack(entropy).softmax(0)
            margins.append((weight[:, None] * torch.stack(per_patch)).sum(0))
    semantic = torch.cat(attract).mean() + torch.cat(repel).mean()
    return semantic, torch.stack(margins).mean()


@pytest.mark.parametrize(
    ("batch", "frames", "patches", "samples"), [(2, 3, 7, 3), (1, 1, 5, 2), (1, 2, 2, 2), (2, 2, 1, 1)]
)
def test_losses_equal_their_literal_form(batch: int, frames: int, patches: int, samples: int) -> None:
    torch.manual_seed(3)
    settings = LossSettings(
        semantic_positives=3, semantic_negatives=4, motion_positives=2, motion_negatives=3
    )
    size = frames * patches
    attention = torch.randn(batch, size, size, dtype=torch.float64).softmax(-1).requires_grad_()
    slot = torch.randn(batch, frames, patches, 6, dtype=torch.float64, requires_grad=True)
    sample = sample_patches(patches, samples)
    semantic = semantic_loss(attention, slot, sample, settings)
    motion, weight = motion_loss(attention, frames, sample, settings)
    expected = naive_losses(attention, slot, sample.tolist(), settings)
    torch.testing.assert_close((semantic, motion), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.sum(-1), torch.ones(batch, frames, dtype=torch.float64))
    got = torch.autograd.grad(semantic + motion, (attention, slot))
    want = torch.autograd.grad(sum(expected), (attention, slot))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_losses_refuse_wrong_shapes() -> None:
    sample = torch.tensor([0])
    with pytest.raises(ValueError, match="attention"):
        motion_loss(torch.zeros(1, 6, 6), 4, sample)
    with pytest.raises(ValueError, match="sample"):
        motion_loss(torch.zeros(1, 6, 6), 2, torch.tensor([0.0]))
    with pytest.raises(ValueError, match="slot"):
        semantic_loss(torch.zeros(1, 6, 6), torch.zeros(1, 6, 4), sample)
    with pytest.raises(ValueError, match="motion_positives"):
        LossSettings(motion_positives=0)


def test_sampling_is_without_replacement() -> None:
    assert sorted(sample_patches(6, 10).tolist()) == list(range(6))
    draws = [sample_patches(50, 8, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    assert all(len(set(draw.tolist())) == 8 for draw in draws)
    assert len({tuple(draw.tolist()) for draw in draws}) == 20


def test_all_heads_average_to_the_map_under_dropout(backend: str) -> None:
    torch.manual_seed(0)
    block = Block(16, 4, hidden=32, qkv_bias=False, eps=1e-5, attention_dropout=0.4).double().train()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y_map, mean = block(x, "map", seed=5, backend=backend)
    y_heads, heads = block(x, "heads", seed=5, backend=backend)
    torch.testing.assert_close(heads.mean(1), mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(y_heads, y_map, rtol=1e-12, atol=1e-13)
    dropped = (heads == 0).double().mean().item()
    assert 0.3 < dropped < 0.5
    block.eval()
    kept = block(x, "heads", seed=5, backend=backend)[1]
    torch.testing.assert_close(heads, torch.where(heads == 0, 0.0, kept / 0.6), rtol=1e-12, atol=1e-13)


def test_training_step_is_fixed_by_the_generator_and_trains_the_block(backend: str) -> None:
    torch.manual_seed(0)
    model = SSLUVOS(SMALL).train()
    clip = torch.randn(2, 3, 3, 24, 32)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model.training_step(clip, backend=backend))
    assert results[0].total.item() == results[1].total.item() != results[2].total.item()
    assert torch.equal(results[0].total, results[0].semantic + results[0].motion)
    results[0].total.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("encoder."):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name


def test_training_reduces_the_loss() -> None:
    torch.manual_seed(0)
    model = SSLUVOS(SMALL).train()
    clip = torch.randn(1, 3, 3, 24, 32)
    sample = torch.tensor([1, 5, 9])
    optimizer = torch.optim.AdamW(ssl_uvos.parameter_groups(model), lr=1e-3)
    losses = []
    for _ in range(15):
        result = model.training_step(clip, sample=sample, seed=4, backend="reference")
        optimizer.zero_grad()
        result.total.backward()
        optimizer.step()
        losses.append(result.total.item())
    assert losses[-1] < 0.9 * losses[0]


def test_unfrozen_encoder_receives_gradients() -> None:
    torch.manual_seed(0)
    model = SSLUVOS(SMALL, freeze_encoder=False)
    model.training_step(torch.randn(1, 2, 3, 16, 16), backend="reference").total.backward()
    assert model.encoder.patch_embed.proj.weight.grad.abs().max() > 0


def test_training_map_drops_the_class_tokens() -> None:
    torch.manual_seed(0)
    model = SSLUVOS(SMALL).eval()
    output = model(torch.randn(2, 3, 3, 16, 24), backend="reference")
    assert output.attention.shape == (2, 18, 18)
    assert output.dino_map.shape == (6, 6, 6)
    assert output.x.shape == output.slot.shape == (2, 3, 6, 48)
    sums = output.attention.sum(-1)
    assert (sums < 1).all()
    assert (sums > 0.5).all()


@pytest.mark.parametrize(
    ("frames", "ratio", "keys"), [(1, 10, 1), (5, 10, 1), (7, 3, 2), (6, 3, 2), (4, 1, 4)]
)
def test_key_frames(frames: int, ratio: int, keys: int) -> None:
    torch.manual_seed(0)
    model = SSLUVOS("tiny").eval()
    video = torch.randn(frames, 3, 16, 24)
    done: list[int] = []
    q, k = model.queries_keys(video, ratio=ratio, progress=done.append, backend="reference")
    assert (q.shape, k.shape) == ((frames, 8, 6, 6), (keys, 8, 6, 6))
    assert done == list(range(1, frames + 1))
    # All frames as key frames: the sparse ones must be every ratio-th of them.
    q_all, k_all = model.queries_keys(video, ratio=1, frames_per_batch=4, backend="reference")
    torch.testing.assert_close(q, q_all, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(k, k_all[::ratio][:keys], rtol=1e-5, atol=1e-6)


def test_segment_does_not_depend_on_batching_or_backend(backend: str) -> None:
    case = golden("e2e_model")
    model = golden_model(case)
    video = case.tensor("in.video")[0]
    whole = model.segment(video, ratio=2, frames_per_batch=5, backend=backend)
    single = model.segment(video, ratio=2, frames_per_batch=2, backend="reference")
    assert whole.labels.shape == (5, 3, 4)
    assert torch.equal(whole.labels, single.labels)
    assert whole.num_clusters == int(case.arrays["out.masks"].shape[2])
    masks = whole.masks()
    assert torch.equal(masks.sum(1), torch.ones(5, 3, 4, dtype=torch.int64))
    assert torch.equal(masks.int().argmax(1), whole.labels)


def test_segment_of_one_frame_and_few_frames(backend: str) -> None:
    torch.manual_seed(0)
    model = SSLUVOS("tiny").eval()
    for frames in (1, 2):
        found = model.segment(torch.randn(frames, 3, 16, 16), tau=1e-6, backend=backend)
        assert found.labels.shape == (frames, 2, 2)
        assert 1 <= found.num_clusters <= 4 * frames


def golden_model(case: Case) -> SSLUVOS:
    state = {k.removeprefix("state."): case.tensor(k) for k in case.arrays if k.startswith("state.")}
    model = SSLUVOS(SSLUVOSConfig.from_state_dict(state, encoder_heads=3))
    model.load_state_dict(state)
    return model.eval()


def test_bad_arguments_are_refused() -> None:
    model = SSLUVOS("tiny")
    with pytest.raises(ValueError, match="video"):
        model.segment(torch.zeros(0, 3, 16, 16))
    with pytest.raises(ValueError, match="ratio"):
        model.segment(torch.zeros(1, 3, 16, 16), ratio=0)
    with pytest.raises(ValueError, match="clip"):
        model(torch.zeros(3, 3, 16, 16))
    with pytest.raises(ValueError, match="vit_small_8"):
        SSLUVOS("vit_small_9")
    with pytest.raises(ValueError, match="heads"):
        SSLUVOS(SSLUVOSConfig(dim=50))
    with pytest.raises(ValueError, match=r"mlp\.fc1\.weight"):
        state = SSLUVOS("tiny").state_dict()
        del state["temporal_transformer.0.mlp.fc1.weight"]
        SSLUVOSConfig.from_state_dict(state, encoder_heads=3)
    several = SSLUVOS(SSLUVOSConfig(dim=48, depth=1, encoder_heads=3, temporal_blocks=2))
    with pytest.raises(ValueError, match="temporal_blocks"):
        several.segment(torch.zeros(1, 3, 16, 16))


def test_config_is_read_back_from_a_state_dict() -> None:
    for name in ("tiny", "vit_small_16"):
        with torch.device("meta"):
            state = SSLUVOS(name).state_dict()
        config = ssl_uvos.CONFIGS[name]
        assert SSLUVOSConfig.from_state_dict(state, encoder_heads=config.encoder_heads) == config


def test_preprocess_uses_the_two_normalisations() -> None:
    frames = torch.randint(0, 256, (2, 21, 37, 3), dtype=torch.uint8)
    native = ssl_uvos.preprocess(frames, size=-1)
    assert native.shape == (2, 3, 16, 32)
    assert ssl_uvos.preprocess(frames).shape == (2, 3, 320, 480)
    exact = ssl_uvos.preprocess(frames[:, :16, :32], size=-1)
    train = ssl_uvos.preprocess(frames[:, :16, :32], size=(16, 32), normalisation="train")
    pixel = frames[0, 3, 5, 1].item() / 255
    assert exact[0, 1, 3, 5].item() == pytest.approx((pixel - 0.394666) / 0.22145, rel=1e-5, abs=1e-6)
    assert train[0, 1, 3, 5].item() == pytest.approx((pixel - 0.456) / 0.224, rel=1e-5, abs=1e-6)
    for bad, arguments in (
        (frames.float(), {}),
        (frames, {"size": (20, 32)}),
        (frames, {"size": 64}),
        (frames, {"normalisation": "imagenet"}),
        (frames[:, :4], {"size": -1}),
    ):
        with pytest.raises(ValueError):
            ssl_uvos.preprocess(bad, **arguments)


def test_recipe() -> None:
    model = SSLUVOS("tiny")
    decayed, plain = ssl_uvos.parameter_groups(model)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert sorted(tuple(p.shape) for p in decayed["params"]) == [(48, 48), (48, 192), (144, 48), (192, 48)]
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.temporal_transformer.parameters()))
    assert all(p.dim() == 1 for p in plain["params"])
    assert ssl_uvos.cosine_lr(0) == pytest.approx(1e-5)
    assert ssl_uvos.cosine_lr(30_000) == pytest.approx(5.5e-6)
    assert ssl_uvos.cosine_lr(60_000) == ssl_uvos.cosine_lr(70_000) == pytest.approx(1e-6)


def test_clusters_of_a_video_score_against_objects() -> None:
    case = golden("e2e_model")
    found = golden_model(case).segment(case.tensor("in.video")[0], ratio=2, backend="reference")
    labels = evaluation.upsample_nearest(found.labels.numpy(), (24, 32))
    assert evaluation.mean_iou(labels + 1, labels) == 1.0
    assert evaluation.fg_ari(labels + 1, labels) == 1.0
