"""Weights and options of `vidops.slot_attention`, in the order in which its torch op takes them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotParams:
    """The weights of one slot attention module; all in one dtype and on one device, None where it has none.

    D is the width of a slot, Din of an input; Hq and Hv are those of queries and values over all heads; Du is the
    width of what updates a slot (Hv, or the rows of `merge_weight`); Hm is the hidden width of the MLP.

    Attributes:
        norm_input_weight, norm_input_bias: (Din,) affine of the LayerNorm of the inputs.
        norm_slots_weight, norm_slots_bias: (D,) affine of the LayerNorm of the slots.
        q_weight, q_bias: (Hq, D), (Hq,).
        k_weight, k_bias: (Hq, Din), (Hq,).
        v_weight, v_bias: (Hv, Din), (Hv,).
        merge_weight, merge_bias: (Du, Hv), (Du,); without them the heads are concatenated.
        gru_weight_ih, gru_weight_hh, gru_bias_ih, gru_bias_hh: (3 D, Du), (3 D, D), (3 D,), (3 D,), gates in PyTorch's
            order r, z, n; without them the update is added to the slots.
        norm_mlp_weight, norm_mlp_bias: (D,) affine of the LayerNorm before the MLP.
        mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2: (Hm, D), (Hm,), (D, Hm), (D,) of the residual MLP; without
            them there is none.
    """

    norm_input_weight: torch.Tensor | None = None
    norm_input_bias: torch.Tensor | None = None
    norm_slots_weight: torch.Tensor | None = None
    norm_slots_bias: torch.Tensor | None = None
    q_weight: torch.Tensor
    q_bias: torch.Tensor | None = None
    k_weight: torch.Tensor
    k_bias: torch.Tensor | None = None
    v_weight: torch.Tensor
    v_bias: torch.Tensor | None = None
    merge_weight: torch.Tensor | None = None
    merge_bias: torch.Tensor | None = None
    gru_weight_ih: torch.Tensor | None = None
    gru_weight_hh: torch.Tensor | None = None
    gru_bias_ih: torch.Tensor | None = None
    gru_bias_hh: torch.Tensor | None = None
    norm_mlp_weight: torch.Tensor | None = None
    norm_mlp_bias: torch.Tensor | None = None
    mlp_weight1: torch.Tensor | None = None
    mlp_bias1: torch.Tensor | None = None
    mlp_weight2: torch.Tensor | None = None
    mlp_bias2: torch.Tensor | None = None


NAMES = tuple(field.name for field in fields(SlotParams))
REQUIRED = ("q_weight", "k_weight", "v_weight")


def flat(params: SlotParams) -> tuple[torch.Tensor | None, ...]:
    return tuple(getattr(params, name) for name in NAMES)


def widened(params: SlotParams, dtype: torch.dtype) -> SlotParams:
    wide: dict[str, Any] = {name: None if t is None else t.to(dtype) for name, t in vars(params).items()}
    return SlotParams(**wide)


class SlotOptions(NamedTuple):
    """What a call sets beside tensors; `vidops.slot_attention` documents each."""

    iters: int
    heads: int
    scale: float
    joint_heads: bool
    groups: int
    eps: float
    eps_in_denominator: bool
    extra_denominator: float
    ln_eps: float
    activation: str
    grad_mode: str
    with_dots: bool
    with_attn: bool
    mask_grad: bool  # whether the backward gives the gradient of the token mask
    recorded: bool = False  # whether a backward may follow, for which a backend may keep more than the slots

    @property
    def kept(self) -> int:
        """Iterations that are differentiated, the last ones."""
        return self.iters if self.grad_mode == "full" else 1

    @property
    def eps_add(self) -> float:
        """Added to every softmax weight."""
        return 0.0 if self.eps_in_denominator else self.eps

    @property
    def denominator(self) -> float:
        """Added to a slot's total weight."""
        return self.eps if self.eps_in_denominator else self.extra_denominator


class SlotCall(NamedTuple):
    """The arguments of the torch op, `backend` left out."""

    inputs: torch.Tensor
    slots: torch.Tensor
    params: SlotParams
    token_mask: torch.Tensor | None
    slot_mask: torch.Tensor | None
    options: SlotOptions

    @classmethod
    def of(cls, *args: object) -> SlotCall:
        inputs, slots, *rest = args
        weights, (token_mask, slot_mask, *options) = rest[: len(NAMES)], rest[len(NAMES) :]
        params = SlotParams(**dict(zip(NAMES, weights, strict=True)))  # type: ignore[arg-type]
        return cls(inputs, slots, params, token_mask, slot_mask, SlotOptions(*options))  # type: ignore[arg-type]


def record_size(call: SlotCall) -> int:
    """Elements of what native CPU code keeps for the backward beside the slots: the statistics of the tokens and, of
    iterations that are differentiated, the rows of slots that products made. None for calls that it does not take."""
    p, options = call.params, call.options
    if not options.recorded or options.mask_grad or options.heads > 1:
        return 0
    if p.mlp_weight1 is not None and options.activation != "relu":
        return 0
    (batch, tokens, channels), (_, slots, width) = call.inputs.shape, call.slots.shape
    row = 3 + p.q_weight.shape[0] + 2 * channels + p.v_weight.shape[0]
    row += 0 if p.merge_weight is None else p.merge_weight.shape[0]
    row += 0 if p.gru_weight_ih is None else 6 * width
    return 2 * batch * tokens + options.kept * batch * slots * row
