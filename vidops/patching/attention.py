"""`vidops.video_attention` as an attention implementation of transformers, by the name "vidops"."""

from __future__ import annotations

import importlib
import threading
from typing import Any, NamedTuple

import torch
from torch import nn

import vidops
from vidops.patching._schedule import PatchError

NAME = "vidops"


class AttentionCalls(NamedTuple):
    """Attention calls of one forward: through `vidops.video_attention`; and, because of a mask, causality, dropout or
    grouped heads, which that does not have, through transformers' own "sdpa"."""

    video_attention: int
    sdpa: int


class _Counter(threading.local):
    """Per thread, and only while `attention_calls` runs."""

    counts: list[int] | None = None


_counter = _Counter()


def _count(which: int) -> None:
    # A count in traced code would be a guard, and a recompilation each time.
    if not torch.compiler.is_compiling() and _counter.counts is not None:
        _counter.counts[which] += 1


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: query, key, value (B, H, N, d) -> output (B, N, H, d), and no map."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    extra = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "sliding_window", "s_aux"))
    same_heads = query.shape[1] == key.shape[1] and query.shape[-1] == value.shape[-1]
    if attention_mask is None and not (causal and query.shape[2] > 1) and dropout == 0 and same_heads and not extra:
        _count(0)
        out = vidops.video_attention(query, key, value, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    _count(1)
    return _transformers("integrations.sdpa_attention").sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        dropout=dropout,
        is_causal=is_causal,
        **kwargs,
    )


def register_attention() -> str:
    """Makes "vidops" an attention implementation of transformers; returns that name.

    Then ``model.set_attn_implementation("vidops")``, or ``attn_implementation="vidops"`` when a model is loaded. Calls
    without a mask, causality or dropout run `vidops.video_attention` (on the backend that it chooses, or the one that
    `vidops.use_backend` forces), others transformers' own "sdpa". Some models take the setting and ignore it:
    `vidops.patching.attention_calls` tells.

    Raises ImportError without transformers, or with one that has no AttentionInterface.
    """
    try:
        masks = _transformers("masking_utils")
        interface = _transformers("modeling_utils").AttentionInterface
    except (ImportError, AttributeError) as error:
        raise ImportError("register_attention: needs transformers with AttentionInterface (4.53 or newer)") from error
    interface.register(NAME, attention_forward)
    masks.AttentionMaskInterface.register(NAME, masks.sdpa_mask)
    return NAME


def _transformers(module: str) -> Any:
    # By name, because type checkers must pass where it is not installed.
    return importlib.import_module(f"transformers.{module}")


def attention_calls(model: nn.Module, *args: Any, **kwargs: Any) -> AttentionCalls:
    """Runs a model once, without gradients, and counts the calls of the attention "vidops".

    Args:
        model: a model of transformers, not compiled, set to "vidops".
        args, kwargs: of its forward.

    Raises PatchError when there were none: the model ignores the setting, or has another.
    """
    saved, counts = _counter.counts, [0, 0]
    _counter.counts = counts
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        _counter.counts = saved
    found = AttentionCalls(*counts)
    if not any(found):
        setting = getattr(getattr(model, "config", None), "_attn_implementation", None)
        why = (
            'it is set to that and ignores it: its layers do not look into transformers\' AttentionInterface'
            if setting == NAME
            else f'it is set to {setting!r}; call model.set_attn_implementation("{NAME}")'
        )
        raise PatchError(f'{type(model).__name__}: no call of the attention "{NAME}"; {why}')
    return found
