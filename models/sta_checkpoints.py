"""Names of a fine-tuned VideoMAE: those of its authors' files, and those of Hugging Face's, either way."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vidops.checkpoints import shortened

State = dict[str, torch.Tensor]

LAYOUTS = ("videomae", "hugging_face")

# Authors' name to Hugging Face's; of a block, what follows its number.
_OUTER = {
    "patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
    "fc_norm": "fc_norm",
    "head": "classifier",
}
_OUTER_NAMES = {f"{a}.{kind}": f"{b}.{kind}" for a, b in _OUTER.items() for kind in ("weight", "bias")}
_INNER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_INNER_NAMES = {f"{a}.{kind}": f"{b}.{kind}" for a, b in _INNER.items() for kind in ("weight", "bias")}
_INNER_NAMES |= {f"attn.{name}": f"attention.attention.{name}" for name in ("q_bias", "v_bias")}
# What transformers calls the biases from version 5 on, in memory; its files keep the older names.
_NEWER_BIASES = {
    "attention.attention.query.bias": "attn.q_bias",
    "attention.attention.value.bias": "attn.v_bias",
}
_BLOCK, _LAYER = "blocks.", "videomae.encoder.layer."
_QKV = "attn.qkv.weight"
_PROJECTIONS = tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value"))


def layout_of(state: Mapping[str, torch.Tensor]) -> str:
    """``"videomae"`` or ``"hugging_face"``, by the names; ValueError for neither, or both."""
    theirs = [name for name in state if name.startswith("videomae.") or name.startswith("classifier.")]
    ours = [name for name in state if name.startswith((_BLOCK, "patch_embed.", "head."))]
    if theirs and ours:
        raise ValueError(f"state: names of two layouts ({shortened(ours, 2)}; {shortened(theirs, 2)})")
    if not theirs and not ours:
        raise ValueError(
            f"state: no VideoMAE of either layout (found {shortened(state)}); expected names such as "
            "blocks.0.norm1.weight, or videomae.encoder.layer.0.layernorm_before.weight"
        )
    return LAYOUTS[1] if theirs else LAYOUTS[0]


def _numbered(name: str, prefix: str) -> tuple[str, str] | None:
    """Number and rest of the name of something in block `number`, as text."""
    if not name.startswith(prefix):
        return None
    number, _, rest = name.removeprefix(prefix).partition(".")
    return (number, rest) if number.isdecimal() else None


def split_hf_state(state: Mapping[str, torch.Tensor]) -> tuple[State, State]:
    """The authors' names for all of a Hugging Face state dict that has one; and the rest, under its own.

    Query, key and value of a block become one tensor when all three are there and square.
    """
    found: State = {}
    rest: State = {}
    outer = {theirs: ours for ours, theirs in _OUTER_NAMES.items()}
    inner = {theirs: ours for ours, theirs in _INNER_NAMES.items()} | _NEWER_BIASES
    for name, value in state.items():
        block = _numbered(name, _LAYER)
        if name in outer:
            found[outer[name]] = value
        elif block is None:
            rest[name] = value
        elif block[1] in inner:
            found[f"{_BLOCK}{block[0]}.{inner[block[1]]}"] = value
        elif block[1] in _PROJECTIONS:
            parts = [state.get(f"{_LAYER}{block[0]}.{part}") for part in _PROJECTIONS]
            present = [part for part in parts if part is not None]
            dim = value.shape[-1] if value.dim() else 0
            if len(present) < 3 or any(tuple(part.shape) != (dim, dim) for part in present):
                rest[name] = value
            elif block[1] == _PROJECTIONS[0]:
                found[f"{_BLOCK}{block[0]}.{_QKV}"] = torch.cat(present)
        else:
            rest[name] = value
    return found, rest


def from_hf_state(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of Hugging Face's `VideoMAEForVideoClassification` -> of `VideoViT`, which has the authors' names.

    Raises ValueError for names that no fine-tuned model has, and for a query, key or value that lacks the other two
    or is not square.
    """
    found, rest = split_hf_state(state)
    halves = [name for name in rest if name.endswith(_PROJECTIONS)]
    if halves:
        shapes = ", ".join(f"{name} {tuple(rest[name].shape)}" for name in halves[:3])
        raise ValueError(f"state: query, key and value of a block must be there, all (D, D); got {shapes}")
    if rest:
        raise ValueError(f"state: {len(rest)} names are not of VideoMAEForVideoClassification ({shortened(rest)})")
    return found


def to_hf_state(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of `VideoViT` -> of Hugging Face's `VideoMAEForVideoClassification`.

    Raises ValueError for a name that is not the model's, and for a qkv weight that is not (3 D, D).
    """
    found: State = {}
    unknown = []
    for name, value in state.items():
        block = _numbered(name, _BLOCK)
        if name in _OUTER_NAMES:
            found[_OUTER_NAMES[name]] = value
        elif block is not None and block[1] in _INNER_NAMES:
            found[f"{_LAYER}{block[0]}.{_INNER_NAMES[block[1]]}"] = value
        elif block is not None and block[1] == _QKV:
            if value.dim() != 2 or value.shape[0] != 3 * value.shape[1]:
                raise ValueError(f"state: {name} must be (3 D, D), got {tuple(value.shape)}")
            for part, rows in zip(_PROJECTIONS, value.chunk(3), strict=True):
                # Not a view: tensors of a file may not share memory.
                found[f"{_LAYER}{block[0]}.{part}"] = rows.clone()
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"state: {len(unknown)} names are not of VideoViT ({shortened(unknown)})")
    return found


def convert(state: Mapping[str, torch.Tensor], layout: str) -> State:
    """A fine-tuned VideoMAE's state dict, in either layout, in the one asked for.

    Args:
        state: of either layout, told by its names.
        layout: ``"videomae"`` or ``"hugging_face"``.

    >>> import torch
    >>> from vidops.models.sta_checkpoints import convert
    >>> list(convert({"head.bias": torch.zeros(3)}, "hugging_face"))
    ['classifier.bias']
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if layout_of(state) == layout:
        return dict(state)
    return to_hf_state(state) if layout == "hugging_face" else from_hf_state(state)
