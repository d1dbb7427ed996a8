"""Groups for `gpu_window`: slot attention at published sizes, forward and training, in float32 and bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import slots
import torch
from gpu_attention import LIMITS, TF32_LIMIT
from gpu_timing import Group, Variant, Verdict
from peers import SlotForm, eager_slots

import vidops
from vidops._registry import OPS

WORKLOADS = (
    slots.Workload("Locatello, B 64", 64, 16384, 64, 7, 128),
    slots.Workload("SMTC, B 128", 128, 256, 384, 16, 384, gru=False, bilevel=True),
    slots.Workload("ViT-S frames, B 1024", 1024, 196, 384, 8, 384, bilevel=True),
)

def own(backend: str) -> SlotForm:
    def call(
        inputs: torch.Tensor, start: torch.Tensor, params: vidops.SlotParams, iters: int, bilevel: bool
    ) -> torch.Tensor:
        mode = "bilevel" if bilevel else "full"
        return vidops.slot_attention(inputs, start, params, iters=iters, grad_mode=mode, backend=backend)

    return call


@dataclass(frozen=True)
class _Call:
    """One pass of a workload over its tensors laid out flat, as rotation needs them."""

    workload: slots.Workload
    names: tuple[str, ...]  # of the weights
    training: bool

    def __call__(self, form: SlotForm, *tensors: torch.Tensor) -> slots.Results:
        *leaves, grad = tensors
        if self.training:
            leaves = [t.detach().requires_grad_() for t in leaves]
        inputs, start, *weights = leaves
        params = vidops.SlotParams(**dict(zip(self.names, weights, strict=True)))
        run = slots.training if self.training else slots.forward
        return run(form, slots.Case(self.workload, inputs, start, params, grad))

    def variant(self, name: str, form: SlotForm, *, tf32: bool = False) -> Variant:
        # A training call builds an autograd graph.
        return Variant(name, functools.partial(self, form), tf32=tf32, capturable=not self.training)


def _judge(want: slots.Results, limit: float) -> Callable[[slots.Results, bool], Verdict]:
    def verdict(got: slots.Results, tf32: bool) -> Verdict:
        error = slots.error(got, want)
        return error, error <= (TF32_LIMIT if tf32 else limit)

    return verdict


def groups(
    device: torch.device, backends: list[str], compiled: bool, workloads: tuple[slots.Workload, ...] = WORKLOADS
) -> Iterator[Group]:
    """One after the other: the float64 results of all of them at once would fill the card."""
    ready = [backend for backend in backends if backend in OPS["slot_attention"].rows]
    for w in workloads:
        made = slots.case(w)
        names = tuple(f.name for f in fields(made.params) if getattr(made.params, f.name) is not None)
        for dtype, limit in LIMITS.items():
            flat = tuple(t.detach().to(device, dtype) for t in (*made.leaves(), made.grad))
            for training in (False, True):
                call = _Call(w, names, training)
                variants = [call.variant("eager", eager_slots)]
                if dtype == torch.float32:
                    variants.append(call.variant("eager tf32", eager_slots, tf32=True))
                if compiled:
                    torch.compiler.reset()
                    variants.append(call.variant("compile", torch.compile(eager_slots, dynamic=False)))
                variants += [call.variant(backend, own(backend)) for backend in ready]
                want = call(eager_slots, *(t.double() for t in flat))
                kind = f"{'fwd+bwd' if training else 'forward'} {'fp32' if dtype == torch.float32 else 'bf16'}"
                yield Group(f"{w.name}, {kind}", flat, variants, _judge(want, limit))
