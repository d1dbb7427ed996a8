"""Patched VisionTransformer of timm: against loops over its blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patch_models import TIMM_SOURCES, images, package, timm_vit

import vidops


@pytest.fixture(params=TIMM_SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    return request.param


# Class token alone, with one and four registers, and none.
PREFIXES = [{}, {"reg_tokens": 1}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}]


def embedded(model: Any, x: torch.Tensor) -> torch.Tensor:
    """What enters the first block."""
    found: list[torch.Tensor] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    model(x)
    handle.remove()
    return found[0]


def classified(model: Any, x: torch.Tensor) -> torch.Tensor:
    x = model.norm(x)
    if hasattr(model, "forward_head"):
        return model.forward_head(x)
    return model.head(x[:, 0] if model.global_pool == "token" else x[:, model.num_prefix_tokens :].mean(1))


def projections(attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


def pruned_by_hand(model: Any, x: torch.Tensor, r: int, frames: int) -> torch.Tensor:
    x, prefix = embedded(model, x), model.num_prefix_tokens
    depth = len(model.blocks)
    calls = {call * depth // 3: call for call in range(3)}
    for number, block in enumerate(model.blocks):
        keys = projections(block.attn, block.norm1(x))[1].mean(1)
        x = block(x)
        call = calls.get(number)
        if call is not None and r >> call:
            clips = x[:, prefix:].reshape(len(x) // frames, -1, x.shape[-1])
            metric = keys[:, prefix:].reshape(len(x) // frames, -1, keys.shape[-1])
            left = vidops.sta_prune(clips, metric, frames, r >> call, call == 1, backend="reference").x
            x = torch.cat([x[:, :prefix], left.reshape(len(x), -1, x.shape[-1])], 1)
    return classified(model, x)


def merged_by_hand(model: Any, x: torch.Tensor, drops: list[int], proportional: bool) -> torch.Tensor:
    x, prefix = embedded(model, x), model.num_prefix_tokens
    size = torch.ones(*x.shape[:2], 1)
    for block, r in zip(model.blocks, drops, strict=True):
        q, k, v = projections(block.attn, block.norm1(x))
        if proportional:
            out = vidops.proportional_attention(q, k, v, size)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        x = x + block.attn.proj(out.transpose(1, 2).flatten(2))
        keys, start = k.mean(1), prefix if prefix > 2 else 0
        options = {} if start else {"class_token": prefix > 0, "distill_token": prefix > 1}
        if r:
            given = (x[:, start:], keys[:, start:], r, size[:, start:])
            merged = vidops.token_merge(*given, backend="reference", **options)
            x, size = torch.cat([x[:, :start], merged.x], 1), torch.cat([size[:, :start], merged.size], 1)
        x = x + block.mlp(block.norm2(x))
    return classified(model, x)


@pytest.mark.parametrize("changes", PREFIXES)
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_sta_is_pruning_between_blocks(source: str, frames: int, changes: dict[str, Any]) -> None:
    model = timm_vit(source, **changes)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        unpatched, want = model(images()), pruned_by_hand(model, images(), 11, frames)
        report = vidops.patch(model, r=11, num_frames=frames, backend="reference")
        found = model(images())
        assert torch.equal(found, want)
        assert not torch.equal(found, unpatched)
        assert report.tokens == tuple(prefix + n for n in (64, 53, 48, 46))
        assert report.layers == ("blocks.0", "blocks.2", "blocks.4")
        assert model.forward_features(images()).shape == (4, prefix + 46, 32)
        model.r = 1
        assert torch.equal(model(images()), pruned_by_hand(timm_vit(source, **changes), images(), 1, frames))
        model.r = 0
        assert torch.equal(model(images()), unpatched)


def test_frames_of_a_clip_are_pruned_together(source: str) -> None:
    model = timm_vit(source)
    vidops.patch(model, r=11, num_frames=4, backend="reference")
    with torch.no_grad():
        clips = torch.cat([images(seed=1), images(seed=2)])
        whole = model(clips)
        torch.testing.assert_close(whole, torch.cat([model(images(seed=1)), model(images(seed=2))]))
        # The second frame has another one before it.
        assert not torch.allclose(model(clips[[4, 1, 2, 3]])[1], whole[1], atol=1e-5)
    with pytest.raises(ValueError, match="expected clips x 4 frames, got 6 images"):
        model(images(6))


@pytest.mark.parametrize("changes", PREFIXES)
@pytest.mark.parametrize("proportional", [None, False])
@pytest.mark.parametrize("r", [5, [0, 10, 0, 3, 20, 1]])
def test_tome_is_merging_inside_blocks(source: str, r: Any, proportional: Any, changes: dict[str, Any]) -> None:
    model = timm_vit(source, **changes)
    drops = r if isinstance(r, list) else [r] * 6
    with torch.no_grad():
        unpatched = model(images())
        want = merged_by_hand(model, images(), drops, proportional is None)
        other = merged_by_hand(model, images(), drops, proportional is not None)
        report = vidops.patch(model, r=r, method="tome", proportional=proportional, backend="reference")
        torch.testing.assert_close(model(images()), want, atol=2e-6, rtol=0)
        assert (want - other).abs().max() > 2e-5
        first = 64 + model.num_prefix_tokens
        assert report.tokens == tuple(first - sum(drops[:i]) for i in range(7))
        model.r = 0
        assert torch.equal(model(images()), unpatched)


def test_unfused_attention_is_proportional_too() -> None:
    package("timm")
    model = timm_vit("timm")
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        want = merged_by_hand(model, images(), [5] * 6, True)
        vidops.patch(model, r=5, method="tome", backend="reference")
        torch.testing.assert_close(model(images()), want, atol=2e-6, rtol=0)


def test_class_token_stays_first(source: str) -> None:
    """A block merges half of its tokens at most."""
    model = timm_vit(source)
    vidops.patch(model, r=32, method="tome", backend="reference")
    assert vidops.patching.report(model).tokens == (65, 33, 17, 9, 5, 3, 2)
    assert model.forward_features(images()).shape == (4, 2, 32)


def test_refused(source: str) -> None:
    model = timm_vit(source)
    for message, options in {
        "num_frames: VisionTransformer sees single images": {},
        "num_frames: not an option of .* 'tome'": {"method": "tome", "num_frames": 2},
        "clip_size: not an option": {"num_frames": 2, "clip_size": (2, 32, 32)},
        "proportional: not an option": {"num_frames": 2, "proportional": True},
        "num_frames: expected an integer >= 1": {"num_frames": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            vidops.patch(model, r=1, **options)
    unprotected = timm_vit(source, class_token=False, global_pool="avg")
    unprotected.global_pool = "token"
    with pytest.raises(vidops.PatchError, match="reads the first token"):
        vidops.patch(unprotected, r=1, method="tome")
    vidops.patch(model, r=1, method="tome", backend="reference")
    with pytest.raises(ValueError, match="attn_mask, is_causal"):
        model.blocks[0](torch.zeros(1, 65, 32), is_causal=True)
    model.r = 0
    model.blocks[0](torch.zeros(1, 65, 32), is_causal=True)


class OtherBlock(torch.nn.Module):
    pass


def test_others_of_the_name_are_refused() -> None:
    other = type("VisionTransformer", (torch.nn.Module,), {})()
    with pytest.raises(vidops.PatchError, match="VisionTransformer: looked for blocks, but VisionTransformer has no"):
        vidops.patch(other, r=1, method="tome")


def test_other_blocks_are_refused(source: str) -> None:
    model = timm_vit(source)
    model.blocks[2] = OtherBlock()
    with pytest.raises(vidops.PatchError, match=r"blocks\.2 is a OtherBlock, expected timm's Block"):
        vidops.patch(model, r=1, method="tome")
    model = timm_vit(source)
    del model.blocks[1].attn.k_norm
    with pytest.raises(vidops.PatchError, match=r"Block: looked for attn\.k_norm, but Attention has no k_norm"):
        vidops.patch(model, r=1, method="tome")
    model = timm_vit(source)
    model.blocks[1] = model.blocks[0]
    with pytest.raises(vidops.PatchError, match="blocks share modules"):
        vidops.patch(model, r=1, method="tome")


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_base_patch16_siglip_224", 0),
    ],
)
def test_models_of_timm(name: str, prefix: int) -> None:
    model = package("timm").create_model(name, pretrained=False, img_size=56, num_classes=3, depth=3).eval()
    assert model.num_prefix_tokens == prefix
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        want = model(x)
        for options in ({"method": "tome"}, {"num_frames": 2}):
            vidops.patch(model, r=1, backend="reference", **options)
            assert not torch.equal(model(x), want)
            model.r = 0
            assert torch.equal(model(x), want)
        vidops.unpatch(model)
        assert torch.equal(model(x), want)
