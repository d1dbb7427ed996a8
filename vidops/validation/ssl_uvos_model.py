"""Golden checks of the ssl_uvos model: encoder, block, whole model, losses and the DAVIS evaluation.

Each function takes a case of its kind, whatever its sizes and whichever optional arrays it has, and compares
everything the case holds.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import torch

from vidops import evaluation
from vidops.models.ssl_uvos import SSLUVOS, SSLUVOSConfig
from vidops.models.ssl_uvos_losses import LossSettings, motion_loss, semantic_loss
from vidops.models.vit import Block, DinoEncoder
from vidops.validation.case import (
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

FLOAT32_VALUES = 1e-4
FLOAT32_GRADIENTS = 2e-4
FLOAT64 = 1e-9


def _numbered(case: Case, name: str) -> list[str]:
    """Suffixes under which `in.<name>` occurs: "" or numbers, in order."""
    pattern = re.compile(re.escape(f"in.{name}") + r"(\d*)$")
    found = [match.group(1) for match in map(pattern.match, case.arrays) if match]
    return sorted(found, key=lambda suffix: (len(suffix), suffix))


def _loaded(
    module: torch.nn.Module, state: dict[str, torch.Tensor], backend: str, dtype: torch.dtype
) -> torch.nn.Module:
    module.load_state_dict(state, strict=True)
    return module.to(device=device_of(backend), dtype=dtype).eval()


def check_encoder(case: Case, backend: str) -> list[Check]:
    """Sheet 2.1: the four outputs and the position embedding, float32."""
    state = state_of(case, torch.float32)
    heads = case.cfg("heads", None)
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    stored = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    encoder = DinoEncoder(
        dim=dim,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        heads=int(case.arrays["out.attn0"].shape[1] if heads is None else heads),
        patch=patch,
        img_size=stored * patch,
        hidden=state["blocks.0.mlp.fc1.weight"].shape[0],
        eps=float(case.cfg("ln_eps", 1e-6)),
    )
    _loaded(encoder, state, backend, torch.float32)
    checks = []
    for suffix in _numbered(case, "image"):
        images = case.tensor(f"in.image{suffix}", torch.float32).to(device_of(backend))
        with torch.no_grad():
            got = encoder(images, backend=backend)
            values = {
                "pos": encoder.position_embedding(*encoder.grid_of(images)),
                "x": got.x,
                "cls": got.cls,
                "attn": got.attn,
                "k": got.k,
            }
            keys = encoder.keys(images, backend=backend).transpose(1, 2).unflatten(2, got.k.shape[-2:])
        for name, value in (*values.items(), ("k", keys)):
            key = f"out.{name}{suffix}"
            if key in case.arrays:
                label = f"{name}{suffix} (keys only)" if value is keys else f"{name}{suffix}"
                error = relative_error(value, case.tensor(key, torch.float64))
                checks.append(Check(label, error, FLOAT32_VALUES))
    return nonempty(checks)


def check_st_block(case: Case, backend: str) -> list[Check]:
    """Sheet 2.2: outputs, per-head and head-mean weights, gradients of sum(y*Ry) + sum(attn*Ra)."""
    checks = []
    for dtype in dtypes(backend):
        state = state_of(case, dtype)
        dim = state["norm1.weight"].shape[0]
        block = Block(
            dim,
            int(case.cfg("heads", 8)),
            hidden=state["mlp.fc1.weight"].shape[0],
            qkv_bias="attn.qkv.bias" in state,
            eps=float(case.cfg("ln_eps", 1e-5)),
        )
        _loaded(block, state, backend, dtype)
        double = dtype == torch.float64
        limits = (FLOAT64, FLOAT64) if double else (FLOAT32_VALUES, FLOAT32_GRADIENTS)
        scalar = torch.zeros((), dtype=dtype, device=device_of(backend))
        inputs = {}
        for suffix in _numbered(case, "x"):
            x = case.tensor(f"in.x{suffix}", dtype).to(device_of(backend)).requires_grad_(True)
            inputs[f"grad.x{suffix}"] = x
            y, attention = block(x, "heads", backend=backend)
            with torch.no_grad():
                y_map, head_mean = block(x, "map", backend=backend)
                y_none, _ = block(x, "none", backend=backend)
            values = {
                "y": (y, y_map, y_none),
                "attn": (attention,),
                "attn_headmean": (head_mean, attention.mean(1)),
            }
            for name, results in values.items():
                for key in (f"out.{name}{suffix}", f"out.{name}{suffix}_f32"):
                    if key not in case.arrays or (double and key.endswith("_f32")):
                        continue
                    expected = case.tensor(key, torch.float64)
                    error = max(relative_error(result, expected) for result in results)
                    checks.append(Check(f"{key.removeprefix('out.')} {tag_of(dtype)}", error, limits[0]))
            for key, value in ((f"in.Ry{suffix}", y), (f"in.Ra{suffix}", attention)):
                if key in case.arrays:
                    scalar = scalar + (value * case.tensor(key, dtype).to(value.device)).sum()
        if scalar.requires_grad:
            wanted = {f"grad.{name}": parameter for name, parameter in block.named_parameters()} | inputs
            checks += gradient_checks(case, scalar, wanted, limits[1], tag_of(dtype))
    return nonempty(checks)


def _loss_settings(case: Case) -> LossSettings:
    default = LossSettings()
    return LossSettings(
        semantic_positives=int(case.cfg("k_sem_pos", default.semantic_positives)),
        semantic_negatives=int(case.cfg("k_sem_neg", default.semantic_negatives)),
        motion_positives=int(case.cfg("k_mot_pos", default.motion_positives)),
        motion_negatives=int(case.cfg("k_mot_neg", default.motion_negatives)),
    )


def check_losses(case: Case, backend: str) -> list[Check]:
    """Eqs. E6 and E7 with their gradients. Plain PyTorch on every backend: no vidops op takes part."""
    settings = _loss_settings(case)
    device = device_of(backend)
    sample = case.tensor("in.sample", torch.int64).to(device)
    checks = []
    for dtype in dtypes(backend):
        double = dtype == torch.float64
        limits = (FLOAT64, FLOAT64) if double else (FLOAT32_VALUES, FLOAT32_GRADIENTS)
        attention = case.tensor("in.motion_mask", dtype).to(device).requires_grad_(True)
        slot = case.tensor("in.slot", dtype).to(device).requires_grad_(True)
        semantic = semantic_loss(attention, slot, sample, settings)
        motion, weight = motion_loss(attention, slot.shape[1], sample, settings)
        for key, value in (
            ("out.slot_loss", semantic),
            ("out.motion_loss", motion),
            ("out.query_score", weight),
        ):
            if key in case.arrays:
                error = relative_error(value, case.tensor(key, torch.float64))
                checks.append(Check(f"{key.removeprefix('out.')} {tag_of(dtype)}", error, limits[0]))
        checks += gradient_checks(case, semantic, {"grad.slot": slot}, limits[1], tag_of(dtype))
        checks += gradient_checks(case, motion, {"grad.motion_mask": attention}, limits[1], tag_of(dtype))
    return nonempty(checks)


def check_e2e_model(case: Case, backend: str) -> list[Check]:
    """Everything: training forward, losses and gradients of the block, and the segmentation of a video."""
    checks = []
    for dtype in dtypes(backend):
        state = state_of(case, dtype)
        config = SSLUVOSConfig.from_state_dict(
            state,
            encoder_heads=int(case.cfg("heads", 3)),
            temporal_heads=int(case.cfg("temporal_heads", 8)),
            losses=_loss_settings(case),
        )
        model = SSLUVOS(config)
        _loaded(model, state, backend, dtype)
        checks += _check_clip(case, model, backend, dtype)
        checks += _check_video(case, model, backend, dtype)
    return nonempty(checks)


def _check_clip(case: Case, model: SSLUVOS, backend: str, dtype: torch.dtype) -> list[Check]:
    if "in.clip" not in case.arrays:
        return []
    checks = []
    output = model(case.tensor("in.clip", dtype).to(device_of(backend)), backend=backend)
    values = {
        "attn_dino": output.dino_map,
        "x": output.x,
        "attn_temporal": output.attention,
        "k": output.slot,
    }
    for name, value in values.items():
        if f"out.{name}" in case.arrays:
            # These goldens are float32 runs, so that a float64 run is no closer to them.
            error = relative_error(value, case.tensor(f"out.{name}", torch.float64))
            checks.append(Check(f"{name} {tag_of(dtype)}", error, FLOAT32_VALUES))
    if "in.sample" not in case.arrays:
        return checks
    losses = model.losses(output, case.tensor("in.sample", torch.int64))
    double = dtype == torch.float64
    limits = (FLOAT64, FLOAT64) if double else (FLOAT32_VALUES, FLOAT32_GRADIENTS)
    for key, value in (("out.slot_loss", losses.semantic), ("out.motion_loss", losses.motion)):
        if key in case.arrays:
            error = relative_error(value, case.tensor(key, torch.float64))
            checks.append(Check(f"{key.removeprefix('out.')} {tag_of(dtype)}", error, limits[0]))
    wanted = {f"grad.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    return checks + gradient_checks(case, losses.total, wanted, limits[1], tag_of(dtype))


def _check_video(case: Case, model: SSLUVOS, backend: str, dtype: torch.dtype) -> list[Check]:
    if "in.video" not in case.arrays:
        return []
    checks = []
    videos = case.tensor("in.video", dtype).to(device_of(backend))
    limit = FLOAT64 if dtype == torch.float64 else FLOAT32_VALUES
    for b, video in enumerate(videos):
        found = model.segment(
            video,
            tau=float(case.cfg("tau", 1.0)),
            ratio=int(case.cfg("ratio", 10)),
            window=int(case.cfg("window", 3)),
            backend=backend,
        )
        tag = tag_of(dtype) if len(videos) == 1 else f"video {b} {tag_of(dtype)}"
        if "out.masks" in case.arrays:
            expected = case.arrays["out.masks"][:, b, :, 0]  # (T, K, h, w)
            masks = found.masks().cpu().numpy().astype(expected.dtype)
            checks.append(Check(f"masks {tag}", mismatches(masks, expected), 0.0))
        if "out.labels" in case.arrays:
            expected = case.arrays["out.labels"].reshape(len(videos), *found.labels.shape)[b]
            checks.append(Check(f"labels {tag}", mismatches(found.labels.cpu().numpy(), expected), 0.0))
        if "out.centroids" in case.arrays and len(videos) == 1:
            error = relative_error(found.centroids, case.tensor("out.centroids", torch.float64))
            checks.append(Check(f"centroids {tag}", error, limit))
    return checks


def check_davis_eval(case: Case, backend: str) -> list[Check]:
    """Sheet section 5: upsampling, J and F, and both matchings. NumPy on every backend."""
    arrays = case.arrays
    objects = arrays["in.gt"] != 0
    void = arrays["in.void"] != 0 if "in.void" in arrays else None
    count = int(case.cfg("K", int(arrays["in.labels"].max()) + 1))
    frames, height, width = objects.shape[1:]
    labels = evaluation.upsample_nearest(arrays["in.labels"], (height, width), frames)
    proposals = evaluation.one_hot(labels, count)
    tolerance = float(case.cfg("bound_th", evaluation.BOUNDARY))
    scores = evaluation.evaluate_video(proposals, objects, void, tolerance=tolerance)
    checks = []
    if "out.upsampled" in arrays:
        packed = np.packbits(proposals, axis=-1)
        checks.append(Check("upsampled", mismatches(packed, arrays["out.upsampled"]), 0.0))
    values = {
        "J": scores.pairs.j,
        "F": scores.pairs.f,
        "js_per_frame": scores.per_frame.j,
        "fs_per_frame": scores.per_frame.f,
        "J_mean_per_frame": scores.per_frame.j_mean,
        "F_mean_per_frame": scores.per_frame.f_mean,
        "J_mean_per_sequence": scores.per_sequence.j_mean,
        "F_mean_per_sequence": scores.per_sequence.f_mean,
    }
    for name, value in values.items():
        if f"out.{name}" in arrays:
            expected = case.tensor(f"out.{name}", torch.float64)
            got = torch.as_tensor(np.asarray(value))
            if name in ("J", "F"):
                # Scores of the empty proposals that fill up to the number of objects may be left out.
                got = got[: max(count, len(expected))]
            error = relative_error(got, expected)
            checks.append(Check(name, error, FLOAT64))
    for name, indices in (
        ("official_rows", scores.per_sequence.rows),
        ("official_cols", scores.per_sequence.columns),
    ):
        if f"out.{name}" in arrays:
            checks.append(Check(name, mismatches(indices, arrays[f"out.{name}"]), 0.0))
    return nonempty(checks)
