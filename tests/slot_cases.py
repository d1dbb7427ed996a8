"""Calls of slot attention as its backends take them, and what their results are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import vidops
from vidops.ops._slot_params import SlotCall, SlotOptions, flat

HALVES = [torch.float16, torch.bfloat16]
RESULTS = "slots", "dots", "attn", "states"
OPTIONS = SlotOptions(
    iters=2, heads=1, scale=0.3, joint_heads=False, groups=1, eps=1e-3, eps_in_denominator=False,
    extra_denominator=0.0, ln_eps=1e-5, activation="relu", grad_mode="full", with_dots=True, with_attn=True,
    mask_grad=False,
)  # fmt: skip


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed))


def weights(
    din: int, d: int, hq: int = 9, hv: int = 0, du: int = 0, hidden: int = 0, gru: bool = True, biases: bool = True
) -> vidops.SlotParams:
    """Every weight of a module of these widths; `hv` 0: d, `du` 0: no merge, `hidden` 0: no MLP."""
    hv = hv or d
    shapes: dict[str, tuple[int, ...]] = {"q_weight": (hq, d), "k_weight": (hq, din), "v_weight": (hv, din)}
    if biases:
        shapes |= {"norm_input_weight": (din,), "norm_input_bias": (din,), "norm_slots_weight": (d,)}
        shapes |= {"norm_slots_bias": (d,), "q_bias": (hq,), "k_bias": (hq,), "v_bias": (hv,)}
    if du:
        shapes |= {"merge_weight": (du, hv), "merge_bias": (du,)}
    if gru:
        shapes |= {"gru_weight_ih": (3 * d, du or hv), "gru_weight_hh": (3 * d, d)}
        shapes |= {"gru_bias_ih": (3 * d,), "gru_bias_hh": (3 * d,)}
    if hidden:
        shapes |= {"norm_mlp_weight": (d,), "norm_mlp_bias": (d,), "mlp_weight1": (hidden, d)}
        shapes |= {"mlp_bias1": (hidden,), "mlp_weight2": (d, hidden), "mlp_bias2": (d,)}
    drawn = {name: randn(*shape, seed=i) / shape[-1] ** 0.5 for i, (name, shape) in enumerate(shapes.items())}
    return vidops.SlotParams(**{name: w + 1 if w.dim() == 1 and "norm" in name else w for name, w in drawn.items()})


@dataclass
class Case:
    inputs: torch.Tensor
    slots: torch.Tensor
    params: vidops.SlotParams
    token_mask: torch.Tensor | None = None
    slot_mask: torch.Tensor | None = None
    options: SlotOptions = OPTIONS

    def call(self) -> SlotCall:
        return SlotCall(self.inputs, self.slots, self.params, self.token_mask, self.slot_mask, self.options)

    def arguments(self, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        tensors = (self.inputs, self.slots, *flat(self.params), self.token_mask)
        cast = [t if t is None or dtype is None or t.dtype == torch.bool else t.to(dtype) for t in tensors]
        return *cast, self.slot_mask, *self.options


def case(batch: int, n: int, din: int, slots: int, d: int, *, options: SlotOptions = OPTIONS, **widths: Any) -> Case:
    inputs, start = randn(batch, n, din) * 2 + 3, randn(batch, slots, d, seed=1)
    return Case(inputs, start, weights(din, d, **widths), options=options)


def close(
    found: tuple[torch.Tensor, ...],
    exact: tuple[torch.Tensor, ...],
    limit: float = 4e-6,
    names: tuple[str, ...] = RESULTS,
) -> None:
    """Within float32 rounding of the largest value; NaN and infinities in the same places."""
    for name, x, y in zip(names, found, exact, strict=True):
        assert x.shape == y.shape, name
        assert torch.equal(x.isnan(), y.isnan()), name
        assert torch.equal(x.isinf(), y.isinf()), name
        x, y = x.double()[y.isfinite()], y[y.isfinite()]
        if y.numel():
            error = (x - y).abs().max() / y.abs().max().clamp_min(1e-3)
            assert error < limit, (name, float(error))
