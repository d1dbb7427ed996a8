"""VideoMAE of transformers: joint attention of all frames, no class token.

Matched by the class name VideoMAEModel in a module's bases, alone or inside VideoMAEForVideoClassification or any other
module; then everything that is used is looked up, and named when it is not there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import vidops
from vidops.patching._patch import (
    Change,
    Family,
    Options,
    Patch,
    PatchError,
    StaPatch,
    TomePatch,
    lookup,
    mro_names,
    site_of,
)
from vidops.patching._schedule import Sizes, prune_blocks
from vidops.patching._swap import SIZE, Swapped

FAMILY = "transformers VideoMAE"


def _keys(layer: Any, normed: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor:
    """Head-mean keys (B, N, d) of the attention that just ran."""
    attention, tap = layer.attention.attention, site_of(layer).tap
    found = tap.take()
    if found is None:
        # transformers before 5 multiplies by the weight of `key` without calling it.
        attention.key(layer.layernorm_before(hidden_states) if normed is None else normed)
        found = tap.taken()
    return found.detach().unflatten(-1, (attention.num_attention_heads, -1)).mean(2)


class StaLayer(Swapped):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        patch, call, tap = site_of(self)
        output = super().forward(hidden_states, *args, **kwargs)
        stage = patch.stages[call]
        if stage.drop == 0:
            tap.take()
            return output
        # A tuple with attention maps behind the tokens, in some versions.
        x = output[0] if isinstance(output, tuple) else output
        expected = stage.groups * stage.tokens
        if x.shape[1] != expected:
            raise ValueError(
                f"stage {call + 1} of pruning expected {expected} tokens after block {stage.block}, got {x.shape[1]}: "
                "it needs all tokens of a clip, so bool_masked_pos must be None"
            )
        x = patch.prune(x, _keys(self, None, hidden_states), stage)
        return (x, *output[1:]) if isinstance(output, tuple) else x


class TomeLayer(Swapped):
    attention: Any
    intermediate: Any
    output: Any
    layernorm_before: Any
    layernorm_after: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        patch, block, tap = site_of(self)
        if not patch.active():
            output = super().forward(hidden_states, *args, **kwargs)
            tap.take()
            return output
        size = patch.sizes_of(hidden_states, block)
        normed = self.layernorm_before(hidden_states)
        if patch.proportional and size is not None:
            setattr(normed, SIZE, size)
        attended = self.attention(normed, *args, **kwargs)
        update = attended[0] if isinstance(attended, tuple) else attended
        x = update + hidden_states
        x, size = patch.merge(x, _keys(self, normed, hidden_states), size, block)
        x = patch.carry(self.output(self.intermediate(self.layernorm_after(x)), x), size, block)
        return (x, *attended[1:]) if isinstance(attended, tuple) else x


class ProportionalAttention(Swapped):
    """Of VideoMAESelfAttention: merged tokens count as often as tokens they stand for."""

    query: Any
    key: Any
    value: Any
    num_attention_heads: int
    q_bias: Any
    v_bias: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        size = getattr(hidden_states, SIZE, None)
        if size is None:
            return super().forward(hidden_states, *args, **kwargs)
        if self.training and site_of(self).patch.attention_dropout > 0:
            raise ValueError("proportional attention has no dropout; train with attention_probs_dropout_prob = 0")
        q, k, v = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        # transformers before 5 has the biases beside the projections.
        if getattr(self, "q_bias", None) is not None:
            q, v = q + self.q_bias.to(q.dtype), v + self.v_bias.to(v.dtype)
        q, k, v = (t.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = vidops.proportional_attention(q, k, v, size.to(q.dtype))
        return out.transpose(1, 2).flatten(2), None


def _matches(module: nn.Module) -> bool:
    return "VideoMAEModel" in mro_names(module)


def _check_use(root: nn.Module, mean_pooling: bool) -> None:
    for module in root.modules():
        names = mro_names(module)
        if "VideoMAEForPreTraining" in names:
            raise PatchError("VideoMAEForPreTraining: its decoder needs every visible token at its place")
        if "VideoMAEForVideoClassification" in names and not mean_pooling:
            raise PatchError(
                "VideoMAEForVideoClassification with use_mean_pooling=False classifies the first token, which neither "
                "method keeps in its place"
            )


def _build(root: nn.Module, target: nn.Module, r: Any, options: Options) -> Patch:
    reason = "the configuration says it"
    options.refuse(FAMILY, num_frames=reason, clip_size=reason)
    config = lookup(target, "config")
    _check_use(root, config.use_mean_pooling)
    layers = list(lookup(target, "encoder.layer"))
    projection = lookup(target, "embeddings.patch_embeddings.projection")
    for layer in layers:
        for path in ("attention.attention.key", "intermediate", "output", "layernorm_before", "layernorm_after"):
            lookup(layer, path)
    frames = config.num_frames // config.tubelet_size
    sizes = Sizes(
        depth=len(layers),
        dim=config.hidden_size,
        hidden=config.intermediate_size,
        frames=frames,
        tokens=lookup(target, "embeddings.patch_embeddings.num_patches") // frames,
        patch=projection.weight[0].numel(),
    )
    names = {module: name for name, module in root.named_modules()}
    if options.method == "sta":
        options.refuse(FAMILY, proportional="nothing is merged")
        chosen = [layers[block] for block in prune_blocks(len(layers))]
        changes = [
            Change(names[layer], layer, StaLayer, call, layer.attention.attention.key)
            for call, layer in enumerate(chosen)
        ]
        return StaPatch(sizes, r, target, FAMILY, options, changes, "clip")
    changes = [
        Change(names[layer], layer, TomeLayer, block, layer.attention.attention.key)
        for block, layer in enumerate(layers)
    ]
    proportional = bool(options.proportional)
    if proportional:
        inner = [layer.attention.attention for layer in layers]
        changes += [
            Change(names[module], module, ProportionalAttention, block, counted=False)
            for block, module in enumerate(inner)
        ]
    patch = VideoMaeTomePatch(sizes, r, proportional, target, FAMILY, options, changes, "clip")
    patch.attention_dropout = config.attention_probs_dropout_prob
    return patch


class VideoMaeTomePatch(TomePatch):
    attention_dropout: float = 0.0


VIDEOMAE = Family("VideoMAEModel (transformers)", _matches, _build)
