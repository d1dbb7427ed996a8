"""Patched VideoMAE: against loops over its layers, against VideoViT with the same weights, and golden files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from patch_models import VIDEOMAE_SOURCES, clips, package, videomae

import vidops
from vidops.models.sta import VideoViT, VideoViTConfig, from_hf_state, gflops, to_hf_state
from vidops.validation import Case
from vidops.validation.command import runnable

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "sta"


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in runnable(("gather_tokens", "scatter_tokens", "sta_score", "bipartite_match")):
        pytest.skip("no native CPU ops")
    return request.param


@pytest.fixture(params=VIDEOMAE_SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    return request.param


def mean_keys(layer: Any, x: torch.Tensor) -> torch.Tensor:
    keys = layer.attention.attention.key(layer.layernorm_before(x))
    return keys.unflatten(-1, (layer.attention.attention.num_attention_heads, -1)).mean(2)


def tokens_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def by_hand(model: Any, video: torch.Tensor, r: int, backend: str | None = None) -> torch.Tensor:
    """Logits of an unpatched model whose tokens are pruned between its layers."""
    x = model.videomae.embeddings(video, None)
    layers = model.videomae.encoder.layer
    calls = {call * len(layers) // 3: call for call in range(3)}
    for number, layer in enumerate(layers):
        keys, x = mean_keys(layer, x), tokens_of(layer(x))
        call = calls.get(number)
        if call is not None:
            x = vidops.sta_prune(x, keys, 8 >> call, r, call == 1, backend=backend).x
    return model.classifier(model.fc_norm(x.mean(1)))


def merged_by_hand(
    model: Any, video: torch.Tensor, drops: list[int], proportional: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the sizes of the tokens left."""
    x = model.videomae.embeddings(video, None)
    size = None
    for layer, r in zip(model.videomae.encoder.layer, drops, strict=True):
        attention, normed = layer.attention.attention, layer.layernorm_before(x)
        if proportional:
            q, k, v = attention.query(normed), attention.key(normed), attention.value(normed)
            if getattr(attention, "q_bias", None) is not None:
                q, v = q + attention.q_bias, v + attention.v_bias
            q, k, v = (t.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2) for t in (q, k, v))
            weight = 0 if size is None else size.log().mT[:, None]
            maps = (q @ k.mT * q.shape[-1] ** -0.5 + weight).softmax(-1)
            update = layer.attention.output((maps @ v).transpose(1, 2).flatten(2), normed)
        else:
            update = tokens_of(layer.attention(normed))
        keys, x = mean_keys(layer, x), update + x
        if r:
            x, size, _ = vidops.token_merge(x, keys, r, size, backend="reference")
        x = layer.output(layer.intermediate(layer.layernorm_after(x)), x)
    assert size is not None
    return model.classifier(model.fc_norm(x.mean(1))), size


@pytest.mark.parametrize("r", [1, 3, 9])
def test_sta_is_pruning_between_layers(source: str, r: int, backend: str) -> None:
    model = videomae(source)
    with torch.no_grad():
        unpatched, want = model(clips()).logits, by_hand(model, clips(), r, backend)
        report = vidops.patch(model, r=r, backend=backend)
        found = model(clips()).logits
        assert torch.equal(found, want)
        assert not torch.equal(found, unpatched)
        assert report.tokens == (128, 8 * (16 - r), 4 * (32 - 3 * r), 128 - 14 * r)
        assert report.layers == tuple(f"videomae.encoder.layer.{i}" for i in (0, 2, 4))
        model.r = 0
        assert torch.equal(model(clips()).logits, unpatched)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "vidops", "flex_attention"])
def test_every_attention_of_transformers(attention: str) -> None:
    model = videomae("transformers")
    if not hasattr(model, "set_attn_implementation"):
        pytest.skip("transformers before 4.53")
    vidops.register_attention()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        want = by_hand(model, clips(), 3, "reference")
        vidops.patch(model, r=3, backend="reference")
        assert torch.equal(model(clips()).logits, want)


def test_configured_for_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel needs a card and half precision; the model calls what stands in its place as often, and as it does."""
    model = videomae("transformers")
    modeling = package("transformers.modeling_utils")
    if not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("transformers before 4.48")
    lengths: list[int] = []

    def flash(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any) -> Any:
        assert mask is None
        lengths.append(q.shape[2])
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=options["scaling"])
        return out.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(modeling.ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    with torch.no_grad():
        want = by_hand(model, clips(), 3, "reference")
        model.config._attn_implementation = "flash_attention_2"
        vidops.patch(model, r=3, backend="reference")
        lengths.clear()
        torch.testing.assert_close(model(clips()).logits, want)
    assert lengths == [128, 104, 104, 92, 92, 86]


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("r", [4, [0, 10, 0, 3, 20, 1], (6, 0.5)])
def test_tome_is_merging_inside_layers(source: str, r: Any, proportional: bool, backend: str) -> None:
    model = videomae(source)
    drops = {4: [4] * 6, (6, 0.5): [3, 4, 5, 6, 7, 9]}.get(r) if not isinstance(r, list) else r
    assert drops is not None
    with torch.no_grad():
        unpatched = model(clips()).logits
        want, sizes = merged_by_hand(model, clips(), drops, proportional)
        other, _ = merged_by_hand(model, clips(), drops, not proportional)
        report = vidops.patch(model, r=r, method="tome", proportional=proportional, backend=backend)
        found = model(clips()).logits
        torch.testing.assert_close(found, want, atol=2e-6, rtol=0)
        assert (want - other).abs().max() > 2e-5
        assert sizes.sum(1).eq(128).all()
        assert report.tokens == tuple(128 - sum(drops[:i]) for i in range(7))
        assert report.layers == tuple(f"videomae.encoder.layer.{i}" for i in range(6))
        model.r = 0
        assert torch.equal(model(clips()).logits, unpatched)


def test_off_the_shelf_default_is_plain_attention(source: str) -> None:
    model = videomae(source)
    vidops.patch(model, r=4, method="tome", backend="reference")
    want = model(clips()).logits
    vidops.patch(model, r=4, method="tome", proportional=False, backend="reference")
    assert torch.equal(model(clips()).logits, want)


def test_the_encoder_alone(source: str) -> None:
    whole = videomae(source)
    with torch.no_grad():
        want = by_hand(whole, clips(), 2, "reference")
        report = vidops.patch(whole.videomae, r=2, backend="reference")
        assert report.layers[0] == "encoder.layer.0"
        tokens = whole.videomae(clips())
        tokens = tokens.last_hidden_state if source == "transformers" else tokens
        assert tokens.shape == (2, 100, 32)
        assert torch.equal(whole(clips()).logits, want)


def vit_state(model: Any) -> dict[str, torch.Tensor]:
    """For VideoViT; transformers 5 calls the biases of the checkpoint `query.bias` and `value.bias` in memory."""
    names = {".attention.query.bias": ".attention.q_bias", ".attention.value.bias": ".attention.v_bias"}
    found = {}
    for name, value in model.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = value
    return from_hf_state(found)


@pytest.mark.parametrize("r", [0, 3, 7])
def test_equals_video_vit_with_the_same_weights(source: str, r: int) -> None:
    model = videomae(source)
    config = VideoViTConfig(img_size=32, patch=8, classes=5, dim=32, depth=6, heads=4, hidden=64, eps=1e-12)
    vit = VideoViT(config).eval()
    vit.fc_norm.eps = 1e-5
    vit.load_state_dict(vit_state(model))
    vit.r = r
    report = vidops.patch(model, r=r, backend="reference")
    with torch.no_grad():
        want = vit(clips().transpose(1, 2), backend="reference")
        torch.testing.assert_close(model(clips()).logits, want, atol=1e-5, rtol=0)
    assert report.gmacs == gflops(config, r)
    assert report.gmacs_unpatched == gflops(config, 0)


@pytest.mark.parametrize("source", ["stand-in before 5", "transformers"])
@pytest.mark.parametrize("theirs", [False, True])
def test_golden_logits(source: str, theirs: bool) -> None:
    """Of the authors' model, by way of its weights under the names of transformers; with either pair of epsilons."""
    case = Case.load(GOLDEN / "model_tiny.npz")
    state = to_hf_state({k.removeprefix("state."): case.tensor(k) for k in case.arrays if k.startswith("state.")})
    if source == "transformers":
        state = {
            name.replace("attention.q_bias", "attention.query.bias").replace(
                "attention.v_bias", "attention.value.bias"
            ): value
            for name, value in state.items()
        }
    eps = 1e-12 if theirs else case.cfg("ln_eps", None)
    model = videomae(source, intermediate_size=128, num_labels=10, layer_norm_eps=eps)
    if not theirs:
        model.fc_norm.eps = eps
    model.load_state_dict(state)
    video = case.tensor("in.video").transpose(1, 2)
    with torch.no_grad():
        vidops.patch(model, r=case.cfg("r", None), backend="reference")
        want = case.tensor("out.logits_hf_eps" if theirs else "out.logits")
        torch.testing.assert_close(model(video).logits, want)
        if not theirs:
            model.r = 0
            torch.testing.assert_close(model(video).logits, case.tensor("out.logits_r0"))


def test_gradients_reach_the_kept_tokens_only(source: str) -> None:
    model, twin = videomae(source), videomae(source)
    video, other = clips().requires_grad_(), clips().requires_grad_()
    vidops.patch(model, r=3, backend="reference")
    model(video).logits.square().sum().backward()
    by_hand(twin, other, 3, "reference").square().sum().backward()
    assert video.grad is not None and other.grad is not None and other.grad.abs().max() > 0
    torch.testing.assert_close(video.grad, other.grad)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize("method", ["sta", "tome"])
def test_gradient_checkpointing(method: str) -> None:
    """Layers that run again in the backward find the keys and sizes of the forward that they belong to."""
    package("transformers")
    grads = []
    for checkpointing in (False, True):
        model = videomae("transformers").train()
        vidops.patch(model, r=3, method=method, backend="reference")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # Both forwards before the backwards.
        first, second = model(clips(seed=1)).logits, model(clips(seed=2)).logits
        (first.sum() + second.square().sum()).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_reentrant_checkpointing() -> None:
    """Loses what travels with a tensor: nothing for "sta", an error for "tome"."""
    package("transformers")
    model = videomae("transformers").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    vidops.patch(model, r=3, backend="reference")
    video = clips().requires_grad_()
    model(video).logits.sum().backward()
    assert video.grad is not None and video.grad.abs().max() > 0
    vidops.patch(model, r=3, method="tome", backend="reference")
    with pytest.raises(RuntimeError, match="block 5: .*use_reentrant=False"):
        model(video).logits.sum().backward()


def test_lost_sizes_are_noticed(source: str) -> None:
    model = videomae(source)
    vidops.patch(model, r=3, method="tome", backend="reference")
    layer = model.videomae.encoder.layer[2]
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0].clone(), *args[1:]))
    with pytest.raises(RuntimeError, match="block 2: .*was lost.*use_reentrant=False"):
        model(clips())
    handle.remove()
    model(clips())


def test_tokens_must_be_all_of_the_clip(source: str) -> None:
    model = videomae(source, "Model")
    vidops.patch(model, r=3, backend="reference")
    masked = torch.zeros(2, 128, dtype=torch.bool)
    masked[:, ::2] = True
    with pytest.raises(ValueError, match="stage 1 .* expected 128 tokens after block 0, got 64: .* bool_masked_pos"):
        model(clips(), masked)
    assert model(clips()) is not None


@pytest.mark.parametrize("method", ["sta", "tome"])
def test_refused_configurations(source: str, method: str) -> None:
    with pytest.raises(vidops.PatchError, match="VideoMAEForPreTraining: its decoder"):
        vidops.patch(videomae(source, "ForPreTraining"), r=1, method=method)
    if source == "transformers":  # the stand-in has mean pooling only
        with pytest.raises(vidops.PatchError, match="use_mean_pooling=False"):
            vidops.patch(videomae(source, use_mean_pooling=False), r=1, method=method)
        encoder = videomae(source, "Model", use_mean_pooling=False)
        assert vidops.patch(encoder, r=1, method=method).layers
    broken = videomae(source)
    del broken.videomae.encoder.layer[3].attention.attention.key
    with pytest.raises(vidops.PatchError, match=r"Layer: looked for attention\.attention\.key, but Video.* no key"):
        vidops.patch(broken, r=1, method=method)


def test_sta_needs_groups_of_frames(source: str) -> None:
    with pytest.raises(vidops.PatchError, match="multiple of 4 token-frames.* got 6"):
        vidops.patch(videomae(source, num_frames=12), r=1)
    with pytest.raises(vidops.PatchError, match="at least 3 blocks"):
        vidops.patch(videomae(source, num_hidden_layers=2), r=1)
    assert vidops.patch(videomae(source, num_frames=12, num_hidden_layers=2), r=1, method="tome").tokens == (96, 95, 94)


def test_proportional_attention_has_no_dropout(source: str) -> None:
    model = videomae(source, attention_probs_dropout_prob=0.1)
    vidops.patch(model, r=3, method="tome", proportional=True, backend="reference")
    model(clips())
    with pytest.raises(ValueError, match="attention_probs_dropout_prob"):
        model.train()(clips())
    vidops.patch(model, r=3, method="tome", backend="reference")
    model.train()(clips())


def test_example_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    package("transformers")
    text = (Path(__file__).resolve().parents[2] / "docs" / "patching.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    with vidops.use_backend("reference"):
        exec(block, {})
    (shown,) = re.findall(r"print\(.*\n# (.*\n# .*)\n", block)
    assert capsys.readouterr().out.strip() == shown.replace("\n# ", " ")


@pytest.mark.parametrize("method", ["sta", "tome"])
def test_transformers_own_features(method: str, tmp_path: Path) -> None:
    transformers = package("transformers")
    model = videomae("transformers")
    names = list(model.state_dict())
    model.set_attn_implementation("eager")
    vidops.patch(model, r=3, method=method, backend="reference")
    assert isinstance(model, transformers.VideoMAEForVideoClassification)
    assert type(model).__name__ == "VideoMAEForVideoClassification"
    with torch.no_grad():
        found = model(clips(), output_hidden_states=True, output_attentions=True, labels=torch.tensor([0, 1]))
        pair = model(clips(), return_dict=False)
    assert torch.equal(pair[0], found.logits) and found.loss > 0
    after = vidops.patching.report(model).tokens
    assert {h.shape[1] for h in found.hidden_states} == set(after)
    assert len(found.attentions) == 6
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert again.config.architectures == ["VideoMAEForVideoClassification"]
    vidops.unpatch(model)
    with torch.no_grad():
        assert torch.equal(again.eval()(clips()).logits, model(clips()).logits)
