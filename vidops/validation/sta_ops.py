"""Golden kinds of sta that check ops: pruning in one and three stages, the first frame, filling, and merging."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vidops
from vidops.validation.case import Case, Check, device_of
from vidops.validation.outcomes import Outcome, Tensors, checked

# Of values that are sums of few products of unit vectors; indices and copies are exact.
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-6}


def _limit(name: str, dtype: torch.dtype) -> float:
    return LIMIT[dtype]


def _inputs(case: Case, backend: str, dtype: torch.dtype, *names: str) -> list[torch.Tensor]:
    return [case.tensor(f"in.{name}", dtype).to(device_of(backend)).requires_grad_() for name in names]


def _scalar(case: Case, out: torch.Tensor) -> torch.Tensor | None:
    if "in.grad_out" not in case.arrays:
        return None
    return (out * case.tensor("in.grad_out", out.dtype).to(out.device)).sum()


def _merge(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    x, metric = _inputs(case, backend, dtype, "x", "metric")
    pruned = vidops.sta_prune(
        x, metric, int(case.cfg("T", 1)), int(case.cfg("r", 0)), bool(case.cfg("reverse", False)),
        first_frame_pruned=bool(case.cfg("first_frame_pruned", False)), backend=backend,
    )  # fmt: skip
    scores = pruned.scores
    results = {
        "x": pruned.x,
        "keep_idx": pruned.keep,
        "aam": scores.activation,
        "acc": scores.acc,
        "score": scores.score,
        "first_order": scores.first_order,
        "first_sim": scores.first_similarity,
    }
    return results, {"x": x, "metric": metric}, _scalar(case, pruned.x)


def check_merge(case: Case, backend: str) -> list[Check]:
    return checked(case, backend, _merge, _limit, LIMIT, cuda_doubles=True)


def _chain(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    (x,) = _inputs(case, backend, dtype, "x")
    tokens, r = int(case.cfg("N", 0)), int(case.cfg("r", 0))
    frames = x.shape[1] // tokens
    results: Tensors = {}
    for stage in range(3):
        (metric,) = _inputs(case, backend, dtype, f"metric{stage}")
        pruned = vidops.sta_prune(x, metric, frames >> stage, r, stage == 1, backend=backend)
        x = results[f"x{stage}"] = pruned.x
        results[f"keep_idx{stage}"] = pruned.keep
    return results, {}, None


def check_chain(case: Case, backend: str) -> list[Check]:
    return checked(case, backend, _chain, _limit, LIMIT, cuda_doubles=True)


def _first_frame(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    x, metric = _inputs(case, backend, dtype, "x", "metric")
    found = vidops.first_frame_order(metric.detach(), backend=backend)
    kept = vidops.gather_tokens(x, found.order[:, : x.shape[1] - int(case.cfg("r", 0))], backend=backend)
    return {"order": found.order, "sim": found.similarity, "x": kept}, {}, None


def check_first_frame(case: Case, backend: str) -> list[Check]:
    return checked(case, backend, _first_frame, _limit, LIMIT)


def _fill(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    (x,) = _inputs(case, backend, dtype, "x")
    keep = case.tensor("in.keep_idx", torch.int64).to(x.device)
    side = round(case.arrays["out.src"].shape[-1] ** 0.5)
    filled = vidops.nearest_fill(x, keep, (side, side), backend=backend)
    return {"src": filled.source, "dense": filled.dense}, {"x": x}, _scalar(case, filled.dense)


def check_fill(case: Case, backend: str) -> list[Check]:
    return checked(case, backend, _fill, _limit, LIMIT, cuda_doubles=True)


def _tome(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    x, metric, size = _inputs(case, backend, dtype, "x", "metric", "size")
    merged = vidops.token_merge(
        x, metric, int(case.cfg("r", 0)), size, class_token=bool(case.cfg("class_token", False)),
        distill_token=bool(case.cfg("distill_token", False)), backend=backend,
    )  # fmt: skip
    results = {
        "x": merged.x,
        "size": merged.size,
        "source": F.one_hot(merged.source, merged.x.shape[1]).mT.to(dtype),
        "unmerged": vidops.gather_tokens(merged.x, merged.source, backend=backend),
    }
    return results, {"x": x}, _scalar(case, merged.x)


def check_tome_match(case: Case, backend: str) -> list[Check]:
    return checked(case, backend, _tome, _limit, LIMIT)


def _tome_attention(case: Case, backend: str, dtype: torch.dtype) -> Outcome:
    q, k, v = _inputs(case, backend, dtype, "q", "k", "v")
    size = case.tensor("in.size", dtype).to(q.device)
    y = vidops.proportional_attention(q, k, v, size)
    return {"y": y}, {"q": q, "k": k, "v": v}, _scalar(case, y)


def check_tome_attention(case: Case, backend: str) -> list[Check]:
    return checked(case, backend, _tome_attention, _limit, LIMIT)
