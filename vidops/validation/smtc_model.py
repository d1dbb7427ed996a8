"""Golden checks of the smtc model: fusion, losses, and the whole model with discovery.

Each function takes a case of its kind, whatever its sizes and whichever optional arrays it has, and compares
everything the case holds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from vidops.models.smtc import SMTC, SMTCConfig, projected_correlation, resized_keys, transport_fusion
from vidops.models.smtc_losses import (
    LossSettings,
    consistency_loss,
    instance_loss,
    match_instances,
    separation_loss,
    transport_plan,
    valid_instances,
)
from vidops.validation.case import (
    STORED_FLOAT32,
    Check,
    device_of,
    dtypes,
    gradient_checks,
    mismatches,
    nonempty,
    relative_error,
    state_of,
    tag_of,
)

if TYPE_CHECKING:
    from vidops.validation import Case

VALUES = {torch.float32: 2e-5, torch.float64: 1e-9}
GRADIENTS = {torch.float32: 2e-4, torch.float64: 1e-9}


def _value(case: Case, key: str, got: torch.Tensor) -> list[Check]:
    """The comparison with `key`, if the case has it."""
    if key not in case.arrays:
        return []
    limit = VALUES[got.dtype]
    if case.arrays[key].dtype == np.float32:
        limit = max(limit, STORED_FLOAT32)
    error = relative_error(got, case.tensor(key, torch.float64))
    return [Check(f"{key.removeprefix('out.')} {tag_of(got.dtype)}", error, limit)]


def _exact(case: Case, key: str, got: torch.Tensor, tag: str) -> list[Check]:
    if key not in case.arrays:
        return []
    expected = case.arrays[key]
    return [
        Check(f"{key.removeprefix('out.')} {tag}", mismatches(got.cpu().numpy().astype(expected.dtype), expected), 0.0)
    ]


def check_transport_fusion(case: Case, backend: str) -> list[Check]:
    """E1 with its gradients. Plain PyTorch on every backend: no vidops op takes part."""
    device, checks = device_of(backend), []
    weight_name, bias_name = "transport_proj.weight", "transport_proj.bias"
    grid = (int(case.cfg("grid_h", 16)), int(case.cfg("grid_w", 16)))
    for dtype in dtypes(backend):
        k = case.tensor("in.k", dtype).to(device).requires_grad_(True)
        state = {n: t.to(device).requires_grad_(True) for n, t in state_of(case, dtype, "param.").items()}
        weight, bias = state[weight_name], state[bias_name]
        keys = k.unflatten(0, (-1, int(case.cfg("T", 4))))
        fused = transport_fusion(keys, weight, bias, grid)
        checks += _value(case, "out.resized_k", resized_keys(keys, grid).flatten(0, 1))
        checks += _value(case, "out.correlation", projected_correlation(keys, weight, bias, grid))
        checks += _value(case, "out.fused", fused)
        if "in.R" in case.arrays:
            scalar = (fused * case.tensor("in.R", dtype).to(device)).sum()
            wanted = {"grad.k": k, f"grad.{weight_name}": weight, f"grad.{bias_name}": bias}
            checks += gradient_checks(case, scalar, wanted, GRADIENTS[dtype], tag_of(dtype))
    return nonempty(checks)


def _match_order(match: torch.Tensor) -> torch.Tensor:
    """(..., P, P): the match first, the others in index order with 0 in the match's place."""
    count = match.shape[-1]
    order = torch.arange(count, device=match.device).expand(*match.shape, count).clone()
    order.scatter_(-1, match[..., None], 0)
    order[..., 0] = match
    return order


def check_losses(case: Case, backend: str) -> list[Check]:
    """Eqs. E4 to E6 with their gradients. Plain PyTorch on every backend: no vidops op takes part."""
    settings = LossSettings(
        temperature=float(case.cfg("sinkhorn_eps", 0.05)), sinkhorn_iters=int(case.cfg("sinkhorn_iters", 3))
    )
    device, checks = device_of(backend), []
    for dtype in dtypes(backend):
        given = {
            name.removeprefix("in."): case.tensor(name, dtype).to(device)
            for name in case.arrays
            if name.startswith("in.")
        }
        dots, objects = given["semantic_dots"].requires_grad_(True), given["objects"].requires_grad_(True)
        frame, objects_teacher = given["frame_teacher"], given["objects_teacher"]
        valid, valid_teacher = (
            valid_instances(
                given[f"semantic_dots{owner}"], given[f"semantic{owner}"], given[f"instance{owner}"], settings
            )
            for owner in ("", "_teacher")
        )
        losses = {
            "differ": separation_loss(dots),
            "consistency": consistency_loss(dots, given["semantic_dots_teacher"], frame, settings),
            "instance": instance_loss(objects, objects_teacher, valid, valid_teacher, settings),
        }
        tag = tag_of(dtype)
        for name, loss in losses.items():
            checks += _value(case, f"out.{name}_loss", loss)
            leaf, leaf_name = (objects, "objects") if name == "instance" else (dots, "semantic_dots")
            checks += gradient_checks(case, loss, {f"grad.{name}.{leaf_name}": leaf}, GRADIENTS[dtype], tag)
        checks += _exact(case, "out.valid", valid, tag) + _exact(case, "out.valid_teacher", valid_teacher, tag)
        if frame.shape[1] < 2:
            continue
        found = transport_plan(frame[:, 0], frame[:, 1], settings)
        for name, value in zip(("cost", "mu_s", "mu_t", "plan"), found, strict=True):
            checks += _value(case, f"out.sinkhorn_{name}", value)
        match = match_instances(objects[:, 0] @ objects_teacher[:, 1].mT)
        checks += _exact(case, "out.match_index", _match_order(match), tag)
    return nonempty(checks)


def check_e2e_model(case: Case, backend: str) -> list[Check]:
    """Everything: training outputs with all gradients, and the discovery in a video with its post-processing."""
    checks = []
    for dtype in dtypes(backend):
        state = state_of(case, dtype)
        config = SMTCConfig.from_state_dict(
            state,
            encoder_heads=int(case.cfg("heads", 6)),
            num_instances=int(case.cfg("num_instances", 4)),
            iters=int(case.cfg("iters", 3)),
            frames=int(case.cfg("T", 4)),
            **_grid(case),
        )
        model = SMTC(config)
        model.load_state_dict(state, strict=True)
        model.to(device=device_of(backend), dtype=dtype).eval()
        checks += _check_clip(case, model, backend, dtype)
        checks += _check_video(case, model, backend, dtype)
    return nonempty(checks)


def _grid(case: Case) -> dict[str, tuple[int, int]]:
    if "cfg.grid_h" not in case.arrays:
        return {}
    return {"grid": (int(case.cfg("grid_h", 0)), int(case.cfg("grid_w", 0)))}


def _check_clip(case: Case, model: SMTC, backend: str, dtype: torch.dtype) -> list[Check]:
    if "in.clip" not in case.arrays:
        return []
    device, checks = device_of(backend), []
    clip, init = (
        case.tensor(f"in.{name}", dtype).to(device).requires_grad_(True) for name in ("clip", "instance_init")
    )
    output = model(clip, instance_init=init, backend=backend)
    names = ("semantic_dots", "frame", "slots", "instance", "warp_instance")
    scalar = torch.zeros((), dtype=dtype, device=device)
    for name, value in zip(names, output, strict=True):
        checks += _value(case, f"out.{name}", value)
        if f"in.R_{name}" in case.arrays:
            scalar = scalar + (value * case.tensor(f"in.R_{name}", dtype).to(device)).sum()
    if not scalar.requires_grad:
        return checks
    wanted = {f"grad.{name}": p for name, p in model.named_parameters()}
    wanted |= {"grad.clip": clip, "grad.instance_init": init}
    return checks + gradient_checks(case, scalar, wanted, GRADIENTS[dtype], tag_of(dtype))


def _check_video(case: Case, model: SMTC, backend: str, dtype: torch.dtype) -> list[Check]:
    if "in.video" not in case.arrays:
        return []
    init = case.tensor("in.video_instance_init", dtype).to(device_of(backend))
    videos = case.tensor("in.video", dtype).to(device_of(backend))
    if len(videos) != 1:
        return [Check("one video", math.inf, 0.0)]
    found = model.discover(videos[0], instance_init=init, backend=backend)
    checks = _value(case, "out.video_scores", found.score) + _value(case, "out.video_masks", found.mask.flatten(3))
    selected = (found.score >= 0.5).flatten(1).sum(1)
    tag = tag_of(dtype)
    checks += _exact(case, "out.video_selected", selected, tag)
    if "out.postprocessed" in case.arrays:
        size = (int(case.cfg("post_h", videos.shape[-2])), int(case.cfg("post_w", videos.shape[-1])))
        packed = np.packbits(found.proposals(size).cpu().numpy(), axis=-1)
        checks.append(Check(f"postprocessed {tag}", mismatches(packed, case.arrays["out.postprocessed"]), 0.0))
    return checks
