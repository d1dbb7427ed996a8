"""Groups for `gpu_window`: attention of the spatio-temporal block with its head-mean map, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_timing import Group, Variant, Verdict

import vidops
from vidops._registry import OPS

HEADS, CHANNELS = 8, 48
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
TF32_LIMIT = 2e-2

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Outputs:
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v, weights.mean(1)


def own(backend: str) -> Callable[..., Outputs]:
    return lambda q, k, v: vidops.video_attention(q, k, v, need="map", backend=backend)


def gradients(forward: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Forward and backward with an incoming gradient for both results."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Outputs:
        leaves = [t.detach().requires_grad_(True) for t in (q, k, v)]
        out, head_mean = forward(*leaves)
        return torch.autograd.grad((out, head_mean), leaves, (torch.ones_like(out), head_mean.detach()))

    return call


def judge(want: Outputs, limit: float) -> Callable[[Outputs, bool], Verdict]:
    """The largest error of any result relative to its largest value."""

    def verdict(got: Outputs, tf32: bool) -> Verdict:
        errors = [
            float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True)
        ]
        error = max(errors) if all(e == e for e in errors) else float("nan")
        return error, error <= (TF32_LIMIT if tf32 else limit)

    return verdict


def groups(rows: int, device: torch.device, backends: list[str], compiled: bool) -> list[Group]:
    g = torch.Generator().manual_seed(0)
    wide = tuple(torch.randn(1, HEADS, rows, CHANNELS, generator=g).to(device) for _ in range(3))
    ready = [backend for backend in backends if backend in OPS["video_attention"].rows]
    found = []
    for dtype, limit in LIMITS.items():
        inputs = tuple(t.to(dtype) for t in wide)
        exact = tuple(t.double() for t in inputs)
        for name, form, capturable in (("attention", lambda f: f, True), ("attention fwd+bwd", gradients, False)):
            variants = [Variant("eager", form(eager), capturable=capturable)]
            if dtype == torch.float32:
                variants.append(Variant("eager tf32", form(eager), tf32=True, capturable=capturable))
            if compiled:
                variants.append(Variant("compile", form(torch.compile(eager, dynamic=False)), capturable=capturable))
            variants += [Variant(backend, form(own(backend)), capturable=capturable) for backend in ready]
            title = f"{name} {'fp32' if dtype == torch.float32 else 'bf16'}"
            found.append(Group(title, inputs, variants, judge(form(eager)(*exact), limit)))
    return found
