"""Golden kinds of the object_adapter model: values, and gradients of the scalar that each file's README names."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

import vidops
from vidops.models.object_adapter import LossSettings, ObjectAdapter, ObjectAdapterConfig
from vidops.models.object_adapter_heads import Adapter3d, ObjectStateChange, SpaceTimeAttention, frame_pairs
from vidops.models.object_adapter_losses import distillation_loss, mask_diversity_loss, state_change_loss
from vidops.models.vit import DinoEncoder
from vidops.validation.case import Case, Check, state_of
from vidops.validation.outcomes import Outcome, Run, Tensors, checked, given, leaf, loaded

# Those of float32 are the README's.
VALUES = {torch.float32: 2e-6, torch.float64: 1e-9}
GRADIENTS = {torch.float32: 1e-5, torch.float64: 1e-9}

def _value_limit(case: Case, name: str, dtype: torch.dtype) -> float:
    if name == "mask" and "out.logits" in case.arrays and dtype == torch.float32:
        # A softmax moves by up to half of what its logits do, absolutely: those of the saturated case reach 394, and
        # their own allowed error is all that a float32 mask can be held to (plain PyTorch: 2.1e-5).
        return VALUES[dtype] * max(1.0, float(np.abs(case.arrays["out.logits"]).max()) / 2)
    return VALUES[dtype]


def _checked(case: Case, backend: str, run: Run) -> list[Check]:
    return checked(case, backend, run, lambda name, dtype: _value_limit(case, name, dtype), GRADIENTS)


def _weighted(case: Case, weighted: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Sum of the values times their fixed weights, by the weights' names; None where the case has none."""
    terms = [
        (value * case.tensor(f"in.{name}", value.dtype).to(value.device)).sum()
        for name, value in weighted.items()
        if f"in.{name}" in case.arrays
    ]
    return torch.stack(terms).sum() if terms else None


def _adapter3d(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state = state_of(case, dtype, "param.")
    hidden, dim = state["0.weight"].shape[:2]
    module = Adapter3d(dim, hidden)
    leaves = loaded(module, state, backend, dtype) | {"x": leaf(case, backend, "x", dtype)}
    y = module(leaves["x"])
    return {"y": y}, leaves, _weighted(case, {"R": y})


def _slot_attention(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state = state_of(case, dtype, "param.")
    num_slots, dim = state["slots_embedding.weight"].shape
    module = vidops.nn.LearnedQuerySlotAttention(
        num_slots,
        dim,
        iters=int(case.cfg("iters", 3)),
        eps=float(case.cfg("eps", 1e-8)),
        hidden_dim=len(state["project_q.weight"]),
    )
    leaves = loaded(module, state, backend, dtype)
    leaves |= {name: leaf(case, backend, name, dtype) for name in ("x", "init") if f"in.{name}" in case.arrays}
    slots, dots = module(leaves["x"], leaves.get("init"), backend=backend)
    results = {"slots": slots, "logits": dots, "mask": dots.softmax(1)}
    return results, leaves, _weighted(case, {"R_slots": slots, "R_logits": dots})


def _object_state_change(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state = state_of(case, dtype, "param.")
    module = ObjectStateChange(
        len(state["st_transformer.norm1.weight"]),
        len(state["mlp_state.0.weight"]),
        len(state["cls_layer.weight"]),
        heads=int(case.cfg("heads", 8)),
        hidden=len(state["st_transformer.mlp.fc1.weight"]),
        eps=float(case.cfg("ln_eps", 1e-5)),
    )
    leaves = loaded(module, state, backend, dtype) | {"x": leaf(case, backend, "x", dtype)}
    found = module(leaves["x"], backend=backend)
    results = {
        "slot_block": found.objects,
        "pairs": frame_pairs(leaves["x"].shape[1]),
        "pair_argmax": found.winner,
        "logit": found.logit,
        "state": found.state,
    }
    return results, leaves, _weighted(case, {"R_logit": found.logit, "R_state": found.state})


def _space_time_attention(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state = state_of(case, dtype, "param.")
    module = SpaceTimeAttention(
        state["st_token"].shape[-1],
        len(state["mlp_token.2.weight"]),
        len(state["cls_layer.weight"]),
        frames=state["time_embed"].shape[1],
        slots=state["slots_embed"].shape[1] - 1,
        heads=int(case.cfg("heads", 8)),
        depth=int(case.cfg("depth", 3)),
        hidden=len(state["st_transformer.0.mlp.fc1.weight"]),
        eps=float(case.cfg("ln_eps", 1e-5)),
    )
    leaves = loaded(module, state, backend, dtype) | {"x": leaf(case, backend, "x", dtype)}
    found = module(leaves["x"], backend=backend)
    scalar = _weighted(case, {"R_logit": found.logit, "R_token": found.video})
    return {"logit": found.logit, "token": found.video}, leaves, scalar


def _losses(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    default = LossSettings()
    settings = LossSettings(
        margin=float(case.cfg("margin", default.margin)),
        slot_temperature=float(case.cfg("tau_weight", default.slot_temperature)),
        temperature=float(case.cfg("tau", default.temperature)),
    )
    leaves = {name: leaf(case, backend, name, dtype) for name in ("mask_logits", "state", "slot_embed")}
    shared: Tensors = {}
    if "in.state_all" in case.arrays:
        shared["keys"] = given(case, backend, "state_all", dtype)
        shared["key_label"] = given(case, backend, "label_all", torch.int64)
    results = {
        "mask_diversity": mask_diversity_loss(leaves["mask_logits"]),
        "state_change": state_change_loss(
            leaves["state"],
            given(case, backend, "label", torch.int64),
            given(case, backend, "perm", torch.int64),
            keys=shared.get("keys"),
            key_label=shared.get("key_label"),
            settings=settings,
        ),
        "object_distill": distillation_loss(
            leaves["slot_embed"], given(case, backend, "teacher_cls", dtype), settings
        ),
    }
    return results, leaves, torch.stack(list(results.values())).sum()


def _model_e2e(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state = state_of(case, dtype)
    default = LossSettings()
    terms = (default.diversity, default.state_change, default.distillation, default.classification)
    diversity, change, distillation, classification = case.arrays.get("cfg.loss_terms", np.array(terms)).tolist()
    config = ObjectAdapterConfig.from_state_dict(
        state,
        encoder_heads=int(case.cfg("heads", 6)),
        encoder_eps=float(case.cfg("vit_ln_eps", 1e-6)),
        slot_iters=int(case.cfg("iters", 3)),
        slot_eps=float(case.cfg("slot_eps", 1e-8)),
        object_heads=int(case.cfg("state_heads", 8)),
        losses=LossSettings(classification, diversity, change, distillation),
    )
    model = ObjectAdapter(config)
    leaves = {name: p for name, p in loaded(model, state, backend, dtype).items() if p.requires_grad}
    video = given(case, backend, "video", dtype)
    with torch.no_grad():
        frames = video.flatten(0, 1)
        encoder = cast(DinoEncoder, model.encoder)
        encoded = encoder(frames, need_attention=False, backend=backend)
        keys = encoder.keys(frames, backend=backend)
    output = model(video, backend=backend)
    losses = model.losses(
        output,
        given(case, backend, "label", torch.int64),
        given(case, backend, "teacher_cls", dtype),
        given(case, backend, "perm", torch.int64),
    )
    results = {
        "vit_tokens": encoded.x.flatten(2).transpose(1, 2),
        "vit_cls": encoded.cls,
        "vit_keys": keys,
        "mask_logits": output.objects.dots,
        "slots": output.objects.slots,
        "slot_embed": output.embedding,
        "logit": output.logit,
        "state": output.state,
        "mask": output.objects.masks(),
        "loss": losses.total,
    }
    return {name: value for name, value in results.items() if value is not None}, leaves, losses.total


def check_adapter3d(case: Case, backend: str) -> list[Check]:
    """Sheet 3.1. Plain PyTorch on every backend: no vidops op takes part."""
    return _checked(case, backend, _adapter3d)


def check_slot_attention(case: Case, backend: str) -> list[Check]:
    """Sheet 3.2."""
    return _checked(case, backend, _slot_attention)


def check_object_state_change(case: Case, backend: str) -> list[Check]:
    """Sheet 3.3: outputs, the order of the pairs, and which pair each maximum is of."""
    return _checked(case, backend, _object_state_change)


def check_space_time_attention(case: Case, backend: str) -> list[Check]:
    """Sheet 3.4."""
    return _checked(case, backend, _space_time_attention)


def check_losses(case: Case, backend: str) -> list[Check]:
    """Sheet 3.6. Plain PyTorch on every backend: no vidops op takes part."""
    return _checked(case, backend, _losses)


def check_model_e2e(case: Case, backend: str) -> list[Check]:
    """Everything: from frames to the total loss and the gradients of all that is trained."""
    return _checked(case, backend, _model_e2e)
