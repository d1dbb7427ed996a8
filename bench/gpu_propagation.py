"""Groups for `gpu_window`: one frame of label propagation at the paper's two grids."""

from __future__ import annotations

from collections.abc import Callable

import propagation
import torch
from gpu_timing import Group, Variant, Verdict
from propagation import Frame, Workload

import vidops
from vidops._registry import OPS

WORKLOADS = {"fast": propagation.SHORT, "default": propagation.LONG}

# Affinities this near to each other may be ordered either way; products of TF32 are judged by their own precision.
APART = {False: propagation.APART, True: 1e-3}
LIMITS = {False: propagation.LIMIT, True: 2e-2}

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def eager(w: Workload) -> Call:
    """The eager form on features widened first: a half cannot hold an affinity to the precision the choice needs."""
    return lambda query, context, labels: propagation.eager(Frame(query.float(), context.float(), labels), w)[0]


def own(w: Workload, backend: str) -> Call:
    return lambda query, context, labels: vidops.label_propagation(
        query, context, labels, w.grid, top_k=w.top_k, radius=w.radius, temperature=propagation.TEMPERATURE,
        backend=backend,
    )  # fmt: skip


def judge(f: Frame, w: Workload) -> Callable[[torch.Tensor, bool], Verdict]:
    """The error of labels relative to the largest, of queries whose k-th affinity is apart from the next."""
    exact = Frame(f.query.double(), f.context.double(), f.labels.double())
    want, value = propagation.eager(exact, w, extra=1)
    gap = value[:, -2] - value[:, -1]

    def verdict(got: torch.Tensor, tf32: bool) -> Verdict:
        rows = gap > APART[tf32]
        error = propagation.error(got.double(), want, rows) if rows.any() else float("nan")
        return error, error <= LIMITS[tf32]

    return verdict


def groups(w: Workload, device: torch.device, backends: list[str], compiled: bool) -> list[Group]:
    wide = propagation.frame(w)
    ready = [backend for backend in backends if backend in OPS["label_propagation"].rows]
    found = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        inputs = wide.query.to(device, dtype), wide.context.to(device, dtype), wide.labels.to(device)
        variants = [Variant("eager", eager(w)), Variant("eager tf32", eager(w), tf32=True)]
        if compiled:
            variants.append(Variant("compile", torch.compile(eager(w), dynamic=False)))
        variants += [Variant(backend, own(w, backend)) for backend in ready]
        found.append(Group(f"propagation {name}", inputs, variants, judge(Frame(*inputs), w)))
    return found
