"""The attention "vidops" of transformers: what it runs, counts and says. The function itself needs no transformers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patch_models import clips, package, videomae
from torch import nn

import vidops
from vidops.patching.attention import AttentionCalls, attention_calls, attention_forward


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 7, 8, generator=generator).to(dtype) for _ in range(3)]


class Module(nn.Module):
    """Runs the function as a layer of transformers does."""

    def __init__(self, is_causal: bool | None = False) -> None:
        super().__init__()
        if is_causal is not None:
            self.is_causal = is_causal

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return attention_forward(self, *args, None, **kwargs)[0]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_runs_video_attention(backend: str | None, scaling: float | None) -> None:
    q, k, v = tensors()
    want = F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
    if backend is None:
        found = attention_forward(Module(), q, k, v, None, scaling=scaling, dropout=0.0, is_causal=False)
    else:
        with vidops.use_backend(backend, op="video_attention"):
            found = attention_forward(Module(), q, k, v, None, scaling=scaling)
    assert found[1] is None and found[0].is_contiguous()
    torch.testing.assert_close(found[0], want)


def test_counts_only_inside_the_helper() -> None:
    q, k, v = tensors()
    module = Module()
    assert attention_calls(module, q, k, v) == AttentionCalls(1, 0)
    module(q, k, v)
    assert attention_calls(module, q, k, v) == AttentionCalls(1, 0)


def test_no_calls_is_an_error() -> None:
    with pytest.raises(vidops.PatchError, match='Linear: no call of the attention "vidops"; it is set to None; call'):
        attention_calls(nn.Linear(2, 2), torch.zeros(1, 2))


def test_counts_survive_an_error() -> None:
    with pytest.raises(RuntimeError):
        attention_calls(nn.Linear(2, 2), torch.zeros(1, 3))
    assert attention_calls(Module(), *tensors()) == AttentionCalls(1, 0)


def test_compiled_calls_are_not_counted_and_not_recompiled() -> None:
    torch._dynamo.reset()
    q, k, v = tensors()
    compiled = torch.compile(Module(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), Module()(q, k, v))
    torch._dynamo.reset()


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="register_attention: needs transformers with AttentionInterface"):
        vidops.register_attention()


def test_others_run_transformers_sdpa() -> None:
    package("transformers")
    q, k, v = tensors()
    mask = torch.randn(2, 1, 7, 7)
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    # Without a word on causality, transformers' layers are.
    for module, given, want in (
        (Module(), {"is_causal": True}, causal),
        (Module(True), {}, causal),
        (Module(None), {}, causal),
    ):
        torch.testing.assert_close(module(q, k, v, **given), want)
        assert attention_calls(module, q, k, v, **given) == AttentionCalls(0, 1)
    torch.testing.assert_close(attention_forward(Module(), q, k, v, mask)[0], masked)
    grouped = Module()
    grouped.num_key_value_groups = 3  # type: ignore[assignment]
    few = (q, k[:, :1], v[:, :1])
    want = F.scaled_dot_product_attention(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)).transpose(1, 2)
    torch.testing.assert_close(grouped(*few), want)
    assert attention_calls(grouped, *few) == AttentionCalls(0, 1)
    assert attention_calls(Module(), q, k, v, dropout=0.5) == AttentionCalls(0, 1)
    # One query attends to all keys, causal or not.
    assert attention_calls(Module(True), q[:, :, :1], k, v) == AttentionCalls(1, 0)


def test_models_that_use_it() -> None:
    transformers = package("transformers")
    assert vidops.register_attention() == vidops.register_attention() == "vidops"
    model = videomae("transformers")
    with torch.no_grad():
        want = model(clips()).logits
        with pytest.raises(vidops.PatchError, match=r"it is set to 'sdpa'; call model\.set_attn_implementation"):
            attention_calls(model, clips())
        model.set_attn_implementation("vidops")
        assert attention_calls(model, clips()) == AttentionCalls(6, 0)
        torch.testing.assert_close(model(clips()).logits, want)
        with vidops.use_backend("reference", op="video_attention"):
            torch.testing.assert_close(model(clips()).logits, want)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tokens = torch.arange(6)[None]
    llama = transformers.LlamaConfig(**config, num_key_value_heads=1, vocab_size=10, attn_implementation="vidops")
    assert attention_calls(transformers.LlamaModel(llama).eval(), tokens) == AttentionCalls(0, 2)


def test_models_that_ignore_it_are_named() -> None:
    transformers = package("transformers")
    vidops.register_attention()
    config = transformers.TimesformerConfig(
        image_size=32, patch_size=16, num_frames=2, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    model = transformers.TimesformerModel(config).eval()
    model.set_attn_implementation("vidops")
    with pytest.raises(vidops.PatchError, match='TimesformerModel: no call of the attention "vidops"'):
        attention_calls(model, torch.zeros(1, 2, 3, 32, 32))
