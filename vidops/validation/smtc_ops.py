"""Golden kinds of smtc that check ops: label_propagation."""

from __future__ import annotations

import torch

import vidops
from vidops.ops.label_propagation import squared_limit
from vidops.validation.case import Case, Check, device_of, mismatches, relative_error, tag_of

# Files hold float32 runs of the authors' code, whose rounding is that of a float32 softmax.
LIMIT = 2e-5


def check_label_propagation(case: Case, backend: str) -> list[Check]:
    """Sheet 5: the whole clip, and every frame from the padded sequence and the file's own predictions."""
    dtypes = (torch.float64, torch.float32) if backend in ("reference", "cpu") else (torch.float32,)
    return [check for dtype in dtypes for check in _check(case, backend, dtype)]


def _check(case: Case, backend: str, dtype: torch.dtype) -> list[Check]:
    device, tag = device_of(backend), tag_of(dtype)
    padded = case.tensor("in.feats", dtype).movedim(0, -1).to(device)
    first = case.tensor("in.first_label", dtype).to(device)
    n_context, radius = int(case.cfg("n_context", 20)), float(case.cfg("radius", 7.0))
    choice = {"top_k": int(case.cfg("topk", 7)), "radius": radius, "temperature": float(case.cfg("temperature", 0.2))}
    _, height, width, _ = padded.shape
    checks = []

    def value(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        checks.append(Check(f"{name} {tag}", relative_error(got, expected), LIMIT))

    if "out.radius_mask" in case.arrays:
        y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < squared_limit(radius, height, width)
        mask = case.arrays["out.radius_mask"].astype(bool)
        checks.append(Check(f"radius_mask {tag}", mismatches(near.numpy(), mask), 0.0))
    if "out.pred" not in case.arrays:
        return checks
    pred = case.tensor("out.pred", dtype)
    clip = vidops.propagate_labels(padded[n_context:], first, n_context=n_context, backend=backend, **choice)
    value("pred", clip, pred)
    if "out.key_indices" not in case.arrays:
        return checks
    # Before the clip the first frame is repeated, its labels too.
    soft = torch.cat([first.expand(n_context, *first.shape), pred.to(device)]).flatten(1, 2)
    rows = padded.flatten(1, 2)
    for t in range(1, len(pred)):
        keys = case.tensor("out.key_indices", torch.int64)[t].to(device)
        labels, matches = vidops.label_propagation(
            rows[n_context + t], rows[keys], soft[keys], (height, width), return_matches=True, backend=backend, **choice
        )
        value(f"frame {t}", labels.view(height, width, -1), pred[t])
        if "out.weights" in case.arrays:
            value(f"weights {t}", matches.weights.T, case.tensor("out.weights", dtype)[t])
    return checks
