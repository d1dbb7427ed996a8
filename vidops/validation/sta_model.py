"""Golden kinds of the sta model: its attention, one block, the whole net with pruning, and the position table."""

from __future__ import annotations

import torch

from vidops.models.sta import VideoViT, VideoViTConfig, sinusoid_table, with_hf_eps
from vidops.models.vit import Attention, Block
from vidops.validation.case import Case, Check, state_of
from vidops.validation.outcomes import Outcome, checked, given, leaf, loaded

VALUES = {torch.float32: 2e-5, torch.float64: 1e-9}
GRADIENTS = {torch.float32: 2e-4, torch.float64: 1e-9}


def _value_limit(name: str, dtype: torch.dtype) -> float:
    return VALUES[dtype]


def _weighted(case: Case, weighted: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Sum of the values times their fixed weights, by the weights' names; None where the case has none."""
    terms = [
        (value * case.tensor(f"in.{name}", value.dtype).to(value.device)).sum()
        for name, value in weighted.items()
        if f"in.{name}" in case.arrays
    ]
    return torch.stack(terms).sum() if terms else None


def _attention(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state = state_of(case, dtype, "param.")
    module = Attention(len(state["q_bias"]), int(case.cfg("heads", 1)), qkv_bias=True, key_bias=False)
    leaves = loaded(module, state, backend, dtype) | {"x": leaf(case, backend, "x", dtype)}
    y, metric = module(leaves["x"], "keys", backend=backend)
    return {"y": y, "metric": metric}, leaves, _weighted(case, {"grad_out": y, "grad_metric": metric})


def _block(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state = state_of(case, dtype, "param.")
    module = Block(
        len(state["norm1.weight"]),
        int(case.cfg("heads", 1)),
        hidden=len(state["mlp.fc1.weight"]),
        qkv_bias=True,
        key_bias=False,
        eps=float(case.cfg("ln_eps", 1e-6)),
    )
    leaves = loaded(module, state, backend, dtype) | {"x": leaf(case, backend, "x", dtype)}
    y, metric = module(leaves["x"], "keys", backend=backend)
    return {"y": y, "metric": metric}, leaves, _weighted(case, {"grad_out": y, "grad_metric": metric})


def _model(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state = state_of(case, dtype)
    eps = float(case.cfg("ln_eps", 1e-6))
    config = VideoViTConfig.from_state_dict(
        state,
        heads=int(case.cfg("num_heads", 1)),
        frames=int(case.cfg("num_frames", 16)),
        img_size=int(case.cfg("img_size", 224)),
        eps=eps,
        head_eps=eps,
        r=int(case.cfg("r", 0)),
    )
    model = VideoViT(config)
    leaves = loaded(model, state, backend, dtype) | {"video": leaf(case, backend, "video", dtype)}
    trace = model.trace(leaves["video"], backend=backend)
    results = {"logits": trace.logits}
    for stage in trace.stages:
        results[f"keep_idx_block{stage.block}"] = stage.pruned.keep
        results[f"num_tokens_after_block{stage.block}"] = torch.tensor(stage.pruned.x.shape[1])
    video = given(case, backend, "video", dtype)
    with torch.no_grad():
        model.r = 0
        results["logits_r0"] = model(video, backend=backend)
        other = VideoViT(with_hf_eps(config))
        loaded(other, state, backend, dtype)
        results["logits_hf_eps"] = other(video, backend=backend)
    return results, leaves, _weighted(case, {"grad_out": trace.logits})


def _positions(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    table = sinusoid_table(int(case.cfg("n", 1)), int(case.cfg("d", 1)))
    return {"table": table}, {}, None


def check_attention_keymean(case: Case, backend: str) -> list[Check]:
    """Sheet 3: attention without a bias on the keys, and their mean over heads."""
    return checked(case, backend, _attention, _value_limit, GRADIENTS)


def check_block(case: Case, backend: str) -> list[Check]:
    """Sheet 3: a block, and the keys of its first norm."""
    return checked(case, backend, _block, _value_limit, GRADIENTS)


def check_model_tiny(case: Case, backend: str) -> list[Check]:
    """Everything: from frames to logits with and without pruning, what each call keeps, and all gradients."""
    return checked(case, backend, _model, _value_limit, GRADIENTS)


def check_pos_embed(case: Case, backend: str) -> list[Check]:
    """Sheet 3: the position table. Plain PyTorch on every backend: no vidops op takes part."""
    return checked(case, backend, _positions, _value_limit, GRADIENTS)
