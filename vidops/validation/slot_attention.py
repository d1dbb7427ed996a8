"""Golden kinds of the slot attention family: values, and gradients of sum(out * R) over all outputs.

Variants with a module in `vidops.nn` run through it, with their state dict as stored; the others through the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import vidops
from vidops.validation.case import (
    Case,
    Check,
    device_of,
    dtypes,
    gradient_checks,
    nonempty,
    relative_error,
    state_of,
    tag_of,
)
from vidops.validation.outcomes import Tensors, loaded

VALUES = {torch.float32: 2e-5, torch.float64: 1e-9}
GRADIENTS = {torch.float32: 2e-4, torch.float64: 1e-9}

# Results by the name after "out.", and leaves by the name after "grad.".
Outcome = tuple[Tensors, Tensors]


def _checked(case: Case, backend: str, run: Callable[[Case, str, torch.dtype], Outcome]) -> list[Check]:
    checks: list[Check] = []
    for dtype in dtypes(backend):
        results, leaves = run(case, backend, dtype)
        scalar = torch.zeros((), dtype=dtype, device=device_of(backend))
        for name, value in results.items():
            for key in (f"out.{name}", f"out.{name}_f32"):
                if key in case.arrays:
                    # A stored float32 run has that run's own error.
                    limit = VALUES[torch.float32] if key.endswith("_f32") else VALUES[dtype]
                    error = relative_error(value, case.tensor(key, torch.float64))
                    checks.append(Check(f"{key.removeprefix('out.')} {tag_of(dtype)}", error, limit))
            if f"in.R_{name}" in case.arrays:
                scalar = scalar + (value * case.tensor(f"in.R_{name}", dtype).to(value.device)).sum()
        if scalar.requires_grad:
            wanted = {f"grad.{name}": leaf for name, leaf in leaves.items()}
            checks += gradient_checks(case, scalar, wanted, GRADIENTS[dtype], tag_of(dtype))
    return nonempty(checks)


def _leaves(case: Case, backend: str, dtype: torch.dtype, *names: str) -> Tensors:
    """Those of the inputs that the case has, each with a gradient."""
    return {
        name: case.tensor(f"in.{name}", dtype).to(device_of(backend)).requires_grad_(True)
        for name in names
        if f"in.{name}" in case.arrays
    }


def _weights(case: Case, backend: str, dtype: torch.dtype) -> Tensors:
    return {name: t.to(device_of(backend)).requires_grad_(True) for name, t in state_of(case, dtype).items()}


def _locatello(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    p, given = _weights(case, backend, dtype), _leaves(case, backend, dtype, "inputs", "noise")
    params = vidops.SlotParams(
        norm_input_weight=p["norm_inputs.weight"],
        norm_input_bias=p["norm_inputs.bias"],
        norm_slots_weight=p["norm_slots.weight"],
        norm_slots_bias=p["norm_slots.bias"],
        q_weight=p["project_q.weight"],
        k_weight=p["project_k.weight"],
        v_weight=p["project_v.weight"],
        norm_mlp_weight=p["norm_mlp.weight"],
        norm_mlp_bias=p["norm_mlp.bias"],
        **_gru_and_mlp(p, "mlp.0", "mlp.2"),
    )
    slots, attn = vidops.slot_attention(
        given["inputs"],
        p["slots_mu"] + p["slots_log_sigma"].exp() * given["noise"],
        params,
        iters=int(case.cfg("iters", 3)),
        eps=float(case.cfg("eps", 1e-8)),
        ln_eps=float(case.cfg("ln_eps", 1e-3)),
        return_attn=True,
        backend=backend,
    )
    return {"slots": slots, "attn": attn.transpose(1, 2)}, p | given


def _gru_and_mlp(p: Tensors, first: str, second: str) -> dict[str, torch.Tensor]:
    return {
        **{f"gru_{name}": p[f"gru.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
        "mlp_weight1": p[f"{first}.weight"],
        "mlp_bias1": p[f"{first}.bias"],
        "mlp_weight2": p[f"{second}.weight"],
        "mlp_bias2": p[f"{second}.bias"],
    }


def _dinosaur(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    p, given = _weights(case, backend, dtype), _leaves(case, backend, dtype, "inputs", "slots_init")
    mlp: dict[str, Any] = {}
    if "ff_mlp.module.1.weight" in p:
        mlp = {"norm_mlp_weight": p["ff_mlp.module.0.weight"], "norm_mlp_bias": p["ff_mlp.module.0.bias"]}
        mlp |= _gru_and_mlp(p, "ff_mlp.module.1", "ff_mlp.module.3")
    else:
        mlp = {f"gru_{name}": p[f"gru.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    params = vidops.SlotParams(
        norm_input_weight=p["norm_input.weight"],
        norm_input_bias=p["norm_input.bias"],
        norm_slots_weight=p["norm_slots.weight"],
        norm_slots_bias=p["norm_slots.bias"],
        q_weight=p["to_q.weight"],
        q_bias=p.get("to_q.bias"),
        k_weight=p["to_k.weight"],
        k_bias=p.get("to_k.bias"),
        v_weight=p["to_v.weight"],
        v_bias=p.get("to_v.bias"),
        **mlp,
    )
    mask = None
    if "in.slot_mask" in case.arrays:
        mask = case.tensor("in.slot_mask", torch.bool).to(device_of(backend))
    implicit = bool(case.cfg("implicit", 0))
    slots, attn = vidops.slot_attention(
        given["inputs"],
        given["slots_init"],
        params,
        iters=int(case.cfg("iters", 3)) + implicit,
        heads=int(case.cfg("heads", 1)),
        joint_heads=True,
        eps=float(case.cfg("eps", 1e-8)),
        ln_eps=float(case.cfg("ln_eps", 1e-5)),
        grad_mode="fixed_point" if implicit else "full",
        slot_mask=mask,
        return_attn=True,
        backend=backend,
    )
    return {"slots": slots, "attn": attn}, p | given


def _bo_qsa(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state = state_of(case, dtype) | state_of(case, dtype, "param.")
    given = _leaves(case, backend, dtype, "inputs", "noise")
    num_slots, dim = state["slots_init.weight"].shape
    module = vidops.nn.QueryOptimizedSlotAttention(
        num_slots,
        dim,
        iters=int(case.cfg("iters", 3)),
        eps=float(case.cfg("eps", 1.0)),
        hidden_dim=len(state["mlp.0.weight"]),
        input_dim=state["project_k.weight"].shape[1],
        truncate=("none", "bilevel", "fixed_point")[int(case.cfg("truncate", 1))],
    )
    parameters = loaded(module, state, backend, dtype)
    slots, attn = module(
        given["inputs"], float(case.cfg("sigma", 0.0)), noise=given.get("noise"), backend=backend
    )
    return {"slots": slots, "attn": attn}, parameters | given


def _learned_query(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state, given = state_of(case, dtype), _leaves(case, backend, dtype, "inputs")
    num_slots, dim = state["slots_embedding.weight"].shape
    module = vidops.nn.LearnedQuerySlotAttention(
        num_slots,
        dim,
        iters=int(case.cfg("iters", 3)),
        eps=float(case.cfg("eps", 1e-8)),
        hidden_dim=len(state["project_q.weight"]),
    )
    parameters = loaded(module, state, backend, dtype)
    slots, dots = module(given["inputs"], backend=backend)
    return {"slots": slots, "dots": dots}, parameters | given


def _lucidrains_options(case: Case, state: Tensors) -> dict[str, Any]:
    return {
        "dim": state["slots_mu"].shape[-1],
        "iters": int(case.cfg("iters", 3)),
        "eps": float(case.cfg("eps", 1e-8)),
        "hidden_dim": len(state["mlp.0.weight"]),
    }


def _multi_head_options(case: Case, state: Tensors) -> dict[str, Any]:
    heads = int(case.cfg("heads", 4))
    return _lucidrains_options(case, state) | {"heads": heads, "dim_head": len(state["to_q.weight"]) // heads}


def _lucidrains(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state, given = state_of(case, dtype), _leaves(case, backend, dtype, "inputs", "noise")
    count = given["noise"].shape[1]
    if "combine_heads.weight" in state:
        module: nn.Module = vidops.nn.MultiHeadSlotAttention(4, **_multi_head_options(case, state))
    else:
        module = vidops.nn.SlotAttention(4, **_lucidrains_options(case, state))
    parameters = loaded(module, state, backend, dtype)
    slots = module(given["inputs"], num_slots=count, noise=given["noise"], backend=backend)
    return {"slots": slots}, parameters | given


def _lucidrains_adaptive(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state, given = state_of(case, dtype), _leaves(case, backend, dtype, "inputs", "noise")
    inner = {name.removeprefix("slot_attn."): t for name, t in state.items() if name.startswith("slot_attn.")}
    if "combine_heads.weight" in inner:
        attention: Any = vidops.nn.MultiHeadSlotAttention(4, **_multi_head_options(case, inner))
    else:
        attention = vidops.nn.SlotAttention(4, **_lucidrains_options(case, inner))
    module = vidops.nn.AdaptiveSlotWrapper(attention, temperature=float(case.cfg("temperature", 1.0)))
    parameters = loaded(module, state, backend, dtype)
    uniform = case.tensor("in.uniform", dtype).to(device_of(backend))
    slots, keep = module(
        given["inputs"], uniform=uniform, num_slots=uniform.shape[1], noise=given["noise"], backend=backend
    )
    return {"slots": slots, "keep": keep}, parameters | given


def _savi_sequence(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state, given = state_of(case, dtype), _leaves(case, backend, dtype, "features", "slots_init")

    def part(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

    of_corrector, of_predictor = part("corrector_"), part("predictor_")
    qkv_size, dim = of_corrector["q.weight"].shape
    ln_eps = float(case.cfg("ln_eps", 1e-6))
    corrector = vidops.nn.SlotCorrector(
        dim,
        input_dim=of_corrector["k.weight"].shape[1],
        qkv_size=qkv_size,
        mlp_size=len(of_corrector["mlp.1.weight"]) if "mlp.1.weight" in of_corrector else None,
        iters=int(case.cfg("iters", 1)),
        eps=float(case.cfg("eps", 1e-8)),
        ln_eps=ln_eps,
    )
    predictor = vidops.nn.SlotPredictor(
        dim,
        heads=int(case.cfg("predictor_heads", 4)),
        qkv_size=len(of_predictor["q.weight"]),
        mlp_size=len(of_predictor["mlp.0.weight"]),
        ln_eps=ln_eps,
    )
    leaves = dict(given)
    for module, prefix, weights in ((corrector, "corrector_", of_corrector), (predictor, "predictor_", of_predictor)):
        leaves |= {prefix + name: p for name, p in loaded(module, weights, backend, dtype).items()}
    slots, frames = given["slots_init"], []
    for features in given["features"].unbind(1):
        corrected, attn = corrector(slots, features, backend=backend)
        slots = predictor(corrected)
        frames.append((corrected, slots, attn))
    stacked = [torch.stack(values, dim=1) for values in zip(*frames, strict=True)]
    return dict(zip(("corrected", "predicted", "attn"), stacked, strict=True)), leaves


def _slot_two_stage(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    state, given = state_of(case, dtype), _leaves(case, backend, dtype, "inputs", "instance_init")
    _, num_slots, num_instances, dim = given["instance_init"].shape
    module = vidops.nn.TwoStageSlotAttention(
        num_slots,
        num_instances,
        dim,
        iters=int(case.cfg("iters", 3)),
        eps=float(case.cfg("eps", 1e-8)),
        hidden_dim=len(state["mlp.0.weight"]),
        threshold=float(case.cfg("mask_threshold", 0.3)),
        soft_mask=bool(case.cfg("soft_mask", 0)),
    )
    parameters = loaded(module, state, backend, dtype)
    names = ("semantic_slots", "semantic_dots", "instance_slots", "instance_dots")
    results = module(given["inputs"], given["instance_init"], backend=backend)
    return dict(zip(names, results, strict=True)), parameters | given


def check_locatello(case: Case, backend: str) -> list[Check]:
    return _checked(case, backend, _locatello)


def check_dinosaur(case: Case, backend: str) -> list[Check]:
    return _checked(case, backend, _dinosaur)


def check_bo_qsa(case: Case, backend: str) -> list[Check]:
    return _checked(case, backend, _bo_qsa)


def check_learned_query(case: Case, backend: str) -> list[Check]:
    return _checked(case, backend, _learned_query)


def check_lucidrains(case: Case, backend: str) -> list[Check]:
    return _checked(case, backend, _lucidrains)


def check_lucidrains_adaptive(case: Case, backend: str) -> list[Check]:
    return _checked(case, backend, _lucidrains_adaptive)


def check_savi_sequence(case: Case, backend: str) -> list[Check]:
    return _checked(case, backend, _savi_sequence)


def check_slot_two_stage(case: Case, backend: str) -> list[Check]:
    """Of smtc, sheet 2.3 to 2.5."""
    return _checked(case, backend, _slot_two_stage)
