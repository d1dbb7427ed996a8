"""Groups for `gpu_window`: token pruning at the calls of ViT-L, batch 1 and 32, float32 and half."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import sta
import torch
from gpu_timing import Group, Variant, Verdict

import vidops
from vidops._registry import OPS

CALLS = [w for w in sta.WORKLOADS if w.name.startswith("ViT-L")]
WORKLOADS = (CALLS[0], *(replace(w, name=f"{w.name}, B 32", batch=32) for w in CALLS))

# Of the kept tokens, how many may be others than float64 keeps: scores nearer than a product resolves change places.
OTHERS = {False: 1e-3, True: 2e-1}

Pruned = tuple[torch.Tensor, torch.Tensor]
Call = Callable[[torch.Tensor, torch.Tensor], Pruned]


def eager(w: sta.Workload, tokens: torch.Tensor, metric: torch.Tensor) -> Pruned:
    """The published form on tokens widened first: a half cannot hold a score to the precision the choice needs."""
    kept, index = sta.public(tokens.float(), metric.float(), w)
    return kept.to(tokens.dtype), index


def own(w: sta.Workload, backend: str, tokens: torch.Tensor, metric: torch.Tensor) -> Pruned:
    pruned = vidops.sta_prune(tokens, metric, w.frames, w.r, w.reverse, backend=backend)
    return pruned.x, pruned.keep


def judge(w: sta.Workload, tokens: torch.Tensor, metric: torch.Tensor) -> Callable[[Pruned, bool], Verdict]:
    want = sta.public(tokens.double(), metric.double(), w)[1]
    grouped = tokens.unflatten(1, (w.frames, -1))

    def verdict(got: Pruned, tf32: bool) -> Verdict:
        kept, index = got
        others = float((index != want).double().mean())
        rows = grouped.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, w.width)).flatten(1, 2)
        return others, others <= OTHERS[tf32] and torch.equal(kept, rows)

    return verdict


def groups(
    device: torch.device, backends: list[str], compiled: bool, workloads: tuple[sta.Workload, ...] = WORKLOADS
) -> Iterator[Group]:
    ready = [backend for backend in backends if backend in OPS["sta_prune"].rows]
    for w in workloads:
        made = sta.clip(w)
        for dtype, kind in ((torch.float32, "fp32"), (torch.float16, "fp16")):
            inputs = tuple(t.to(device, dtype) for t in made)
            call: Call = functools.partial(eager, w)
            variants = [Variant("eager", call), Variant("eager tf32", call, tf32=True)]
            if compiled:
                torch.compiler.reset()
                variants.append(Variant("compile", torch.compile(call, dynamic=False)))
            variants += [Variant(backend, functools.partial(own, w, backend)) for backend in ready]
            yield Group(f"{w.name} {kind}", inputs, variants, judge(w, *inputs))
