"""Hub of `vidops.slot_attention`, and `vidops.slot_step`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypedDict, Unpack, overload

import torch

from vidops._registry import Backward, Impl, Op, resolve
from vidops.ops import _backends, _checks, _slot_iterations
from vidops.ops._slot_backends import (
    REFERENCE,
    cpu_backward,
    cpu_forward,
    cuda_backward,
    cuda_forward,
    triton_backward,
    triton_forward,
)
from vidops.ops._slot_params import NAMES, REQUIRED, SlotCall, SlotOptions, SlotParams, flat, record_size
from vidops.reference.slot_attention import slot_attention as reference


class Keywords(TypedDict, total=False):
    """Keywords of `slot_attention` that do not decide what it returns."""

    heads: int
    scale: float | None
    joint_heads: bool
    groups: int
    eps: float
    eps_in_denominator: bool
    extra_denominator: float
    ln_eps: float
    activation: str
    grad_mode: str
    token_mask: torch.Tensor | None
    slot_mask: torch.Tensor | None
    backend: str | None


@overload
def slot_attention(
    inputs: torch.Tensor,
    slots: torch.Tensor,
    params: SlotParams,
    *,
    iters: int,
    return_dots: Literal[False] = False,
    return_attn: Literal[False] = False,
    **options: Unpack[Keywords],
) -> torch.Tensor: ...
@overload
def slot_attention(
    inputs: torch.Tensor,
    slots: torch.Tensor,
    params: SlotParams,
    *,
    iters: int,
    return_dots: Literal[True],
    return_attn: Literal[False] = False,
    **options: Unpack[Keywords],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def slot_attention(
    inputs: torch.Tensor,
    slots: torch.Tensor,
    params: SlotParams,
    *,
    iters: int,
    return_dots: Literal[False] = False,
    return_attn: Literal[True],
    **options: Unpack[Keywords],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def slot_attention(
    inputs: torch.Tensor,
    slots: torch.Tensor,
    params: SlotParams,
    *,
    iters: int,
    return_dots: Literal[True],
    return_attn: Literal[True],
    **options: Unpack[Keywords],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
def slot_attention(
    inputs: torch.Tensor,
    slots: torch.Tensor,
    params: SlotParams,
    *,
    iters: int,
    heads: int = 1,
    scale: float | None = None,
    joint_heads: bool = False,
    groups: int = 1,
    eps: float = 1e-8,
    eps_in_denominator: bool = False,
    extra_denominator: float = 0.0,
    ln_eps: float = 1e-5,
    activation: str = "relu",
    grad_mode: str = "full",
    token_mask: torch.Tensor | None = None,
    slot_mask: torch.Tensor | None = None,
    return_dots: bool = False,
    return_attn: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """All iterations of slot attention, in any of its published forms, as one operation.

    Locatello et al., NeurIPS 2020 (arXiv 2006.15055). With K = W_k LN(x), V = W_v LN(x) and per head::

        q = W_q LN(s);  dots_ij = scale q_i . K_j;  a = softmax over slots i of dots
        w_ij = (a_ij + eps) m_ij / (sum_j (a_ij + eps) m_ij + extra_denominator)
        u_i = sum_j w_ij V_j;  s <- GRU(u, s) or s + u;  s <- s + W_2 act(W_1 LN(s))

    No map of slots x tokens is stored for the backward, only the slots entering each differentiated iteration and, on
    the CPU, for one head, rows of slots that products made in it.
    Projections of the tokens are folded into the slot side (``q . W_k x = W_k^T q . x``) where that takes fewer
    multiply-adds: ``R S Din (2 heads N + Hq + Hv)`` an item for R iterations, against
    ``N (Hq + Hv) (Din + R S)`` for projecting the tokens once. Results then differ by rounding.

    Args:
        inputs: tokens (B, N, Din), float16, bfloat16, float32 or float64; N, Din >= 1.
        slots: initial slots (B, S, D) in the dtype of `inputs`, or float32 beside float16 or bfloat16; S, D >= 1.
        params: the weights, `vidops.SlotParams`, in the dtype of `slots`.
        iters: R >= 1.
        heads: number of heads; Hq and Hv are divided head-major.
        scale: factor on the dots (default ``(Hq / heads) ** -0.5``).
        joint_heads: softmax over all pairs of slot and head, rather than over the slots for each head.
        groups: slots lie in this many consecutive groups of equal size; each has a softmax of its own.
        eps: added to every softmax weight.
        eps_in_denominator: w = a m / (sum_j a m + eps) instead.
        extra_denominator: see the equation; 0 with `eps_in_denominator`.
        ln_eps: of every LayerNorm.
        activation: ``"relu"`` or ``"gelu"`` (exact) in the MLP.
        grad_mode: ``"full"`` through all iterations; ``"bilevel"`` through the last one alone, the gradient of the
            slots that enter it passing unchanged to the initial `slots`; ``"fixed_point"`` the same, and none passes
            to `slots`.
        token_mask: m (B, groups, N), bool or floating, factors of the weights. A floating one that requires a
            gradient gets it; the backward then holds maps of slots x tokens.
        slot_mask: (B, S) bool, True where a slot takes no part: its dots are -inf. With every slot of an item
            masked the item is NaN.
        return_dots, return_attn: what else to return.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        Slots (B, S, D) in the dtype of `slots`; with `return_dots`, also the dots of the last iteration (B, S, N), or
        (B, heads, S, N) for several heads; with `return_attn`, also its softmax before eps, averaged over heads,
        (B, S, N): float64 for float64 slots, else float32, in which all sums are taken. All are differentiable, once.
        Under autocast `slots` and `params` are widened to float32.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong rank, shape or option.
        BackendError: no backend, or not the one asked for, can run the call.

    NaN or infinity in a token makes its item NaN, and no other; a token whose variance overflows counts as zeros. A
    slot whose tokens are all masked has u = 0 where a constant stands in the denominator, and is NaN where none does.

    Backends: reference, cpu, triton, cuda. The forward on cuda is one launch for all iterations where there is one head
    and one group, projections are folded, Din and D are at most 128 and S at most 32, and the slots' share fits shared
    memory; else it takes one pass over the tokens per iteration, as the backward does.

    >>> import torch, vidops
    >>> weight = torch.eye(4)
    >>> params = vidops.SlotParams(q_weight=weight, k_weight=weight, v_weight=weight)
    >>> tokens, slots = torch.randn(2, 9, 4), torch.randn(2, 3, 4)
    >>> out, attn = vidops.slot_attention(
    ...     tokens, slots, params, iters=3, return_attn=True, backend="reference"
    ... )
    >>> out.shape, attn.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 3, 9]))
    """
    slots, params = _autocast(slots, params)
    _check_tensors(inputs, slots, token_mask, slot_mask)
    options = SlotOptions(
        iters=_checks.integer("iters", iters, 1),
        heads=_checks.integer("heads", heads, 1),
        scale=1.0 if scale is None else _checks.number("scale", scale),
        joint_heads=_flag("joint_heads", joint_heads),
        groups=_checks.integer("groups", groups, 1),
        eps=_at_least_zero("eps", eps),
        eps_in_denominator=_flag("eps_in_denominator", eps_in_denominator),
        extra_denominator=_at_least_zero("extra_denominator", extra_denominator),
        ln_eps=_checks.number("ln_eps", ln_eps, positive=True),
        activation=_checks.choice("activation", activation, ("relu", "gelu")),
        grad_mode=_checks.choice("grad_mode", grad_mode, ("full", "bilevel", "fixed_point")),
        with_dots=_flag("return_dots", return_dots),
        with_attn=_flag("return_attn", return_attn),
        mask_grad=token_mask is not None and token_mask.requires_grad and torch.is_grad_enabled(),
    )
    _check_options(options, slots)
    _check_params(params, inputs, slots, options.heads)
    if token_mask is not None:
        shape = (inputs.shape[0], options.groups, inputs.shape[1])
        _checks.shape("token_mask", token_mask, shape, "(batch, groups, tokens)")
    if scale is None:
        options = options._replace(scale=_checks.scale(None, params.q_weight.shape[0] // options.heads))
    weights = flat(params)
    trained = any(t is not None and t.requires_grad for t in (inputs, slots, *weights, token_mask))
    options = options._replace(recorded=trained and torch.is_grad_enabled())
    masks = (token_mask,) if token_mask is not None and options.mask_grad else ()
    name = resolve(OP, backend, inputs, slots, *(w for w in weights if w is not None), *masks)
    out, dots, attn, *_ = OP.call(inputs, slots, *weights, token_mask, slot_mask, *options, name)
    results = (out, *((dots,) if options.with_dots else ()), *((attn,) if options.with_attn else ()))
    return results if len(results) > 1 else out


def slot_step(inputs: torch.Tensor, slots: torch.Tensor, params: SlotParams, **options: Any) -> Any:
    """One iteration of slot attention: `slot_attention` with ``iters=1``, and every other argument of it.

    For models that act between iterations, as SAVi's corrector and predictor do between frames.

    Raises:
        TypeError: as for `slot_attention`, or for `iters`. ValueError and BackendError: as for `slot_attention`.

    >>> import torch, vidops
    >>> weight = torch.eye(4)
    >>> params = vidops.SlotParams(q_weight=weight, k_weight=weight, v_weight=weight)
    >>> vidops.slot_step(torch.randn(2, 9, 4), torch.randn(2, 3, 4), params, backend="reference").shape
    torch.Size([2, 3, 4])
    """
    if "iters" in options:
        raise TypeError("iters: slot_step is one iteration; slot_attention takes their number")
    return slot_attention(inputs, slots, params, iters=1, **options)


def _autocast(slots: Any, params: Any) -> tuple[Any, Any]:
    """Slots and weights are float32 under autocast; inputs are read as they are."""
    device = slots.device.type if isinstance(slots, torch.Tensor) else ""
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device) or not isinstance(params, SlotParams):
        return slots, params

    def wide(t: Any) -> Any:
        return t.float() if isinstance(t, torch.Tensor) and t.dtype in (torch.float16, torch.bfloat16) else t

    return wide(slots), SlotParams(**{name: wide(getattr(params, name)) for name in NAMES})


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return value


def _at_least_zero(name: str, value: Any) -> float:
    value = _checks.number(name, value)
    if value < 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value}")
    return value


def _check_tensors(inputs: Any, slots: Any, token_mask: Any, slot_mask: Any) -> None:
    _checks.tensor("inputs", inputs, rank=3)
    _checks.tensor("slots", slots, rank=3)
    beside_halves = slots.dtype == torch.float32 and inputs.dtype in (torch.float16, torch.bfloat16)
    if slots.dtype != inputs.dtype and not beside_halves:
        expected = f"{inputs.dtype}{' or torch.float32' if inputs.dtype in (torch.float16, torch.bfloat16) else ''}"
        raise TypeError(f"slots: expected dtype {expected} beside inputs, got {slots.dtype}")
    if slots.device != inputs.device:
        raise ValueError(f"slots: expected device {inputs.device} like inputs, got {slots.device}")
    for name, value, axes in (("inputs", inputs, "token and channel"), ("slots", slots, "slot and channel")):
        if value.shape[1] == 0 or value.shape[2] == 0:
            raise ValueError(f"{name}: expected at least one {axes}, got shape {tuple(value.shape)}")
    if slots.shape[0] != inputs.shape[0]:
        raise ValueError(f"slots: expected batch {inputs.shape[0]} like inputs, got shape {tuple(slots.shape)}")
    if token_mask is not None:
        _checks.tensor("token_mask", token_mask, rank=3, floating=False)
        if token_mask.dtype != torch.bool and token_mask.dtype not in _checks.FLOATS:
            raise TypeError(f"token_mask: expected bool or a floating dtype, got {token_mask.dtype}")
    if slot_mask is not None:
        _checks.tensor("slot_mask", slot_mask, rank=2, floating=False)
        if slot_mask.dtype != torch.bool:
            raise TypeError(f"slot_mask: expected bool, got {slot_mask.dtype}")
        _checks.shape("slot_mask", slot_mask, tuple(slots.shape[:2]), "(batch, slots)")
    for name, mask in (("token_mask", token_mask), ("slot_mask", slot_mask)):
        if mask is not None and mask.device != inputs.device:
            raise ValueError(f"{name}: expected device {inputs.device} like inputs, got {mask.device}")


def _check_options(options: SlotOptions, slots: torch.Tensor) -> None:
    if slots.shape[1] % options.groups != 0:
        raise ValueError(f"groups: expected a divisor of the {slots.shape[1]} slots, got {options.groups}")
    if options.joint_heads and options.groups > 1:
        raise ValueError(f"groups: expected 1 with joint_heads, got {options.groups}")
    if options.eps_in_denominator and options.extra_denominator:
        raise ValueError("extra_denominator: expected 0 with eps_in_denominator, where eps is what is added")


def _check_params(params: Any, inputs: torch.Tensor, slots: torch.Tensor, heads: int) -> None:
    """Every weight's type and shape, and that what belongs together is there together."""
    if not isinstance(params, SlotParams):
        raise TypeError(f"params: expected a vidops.SlotParams, got {type(params).__name__}")
    for name in NAMES:
        value = getattr(params, name)
        if value is not None or name in REQUIRED:
            rank = 2 if "_weight" in name and "norm" not in name else 1
            weight = _checks.tensor(f"params.{name}", value, rank=rank)
            _checks.same(f"params.{name}", weight, "slots", slots)
    for name, owner in _OWNERS.items():
        if getattr(params, name) is not None and getattr(params, owner) is None:
            raise ValueError(f"params.{name}: expected None without params.{owner}")
    for name, (shape, meaning) in _shapes(params, inputs.shape[2], slots.shape[2]).items():
        value = getattr(params, name)
        if value is not None:
            _checks.shape(f"params.{name}", value, shape, meaning)
    for name in ("q_weight", "v_weight"):
        rows = getattr(params, name).shape[0]
        if rows == 0 or rows % heads != 0:
            raise ValueError(f"params.{name}: expected a positive multiple of {heads} heads as rows, got {rows}")
    if params.gru_weight_ih is None:
        name = "v_weight" if params.merge_weight is None else "merge_weight"
        rows = getattr(params, name).shape[0]
        if rows != slots.shape[2]:
            raise ValueError(f"params.{name}: expected {slots.shape[2]} rows, the width of slots, got {rows}")


# A weight that has a meaning only beside another one.
_OWNERS = {
    "merge_bias": "merge_weight",
    "gru_weight_ih": "gru_weight_hh",
    "gru_weight_hh": "gru_weight_ih",
    "gru_bias_ih": "gru_weight_ih",
    "gru_bias_hh": "gru_weight_hh",
    "norm_mlp_weight": "mlp_weight1",
    "norm_mlp_bias": "mlp_weight1",
    "mlp_weight1": "mlp_weight2",
    "mlp_bias1": "mlp_weight1",
    "mlp_weight2": "mlp_weight1",
    "mlp_bias2": "mlp_weight2",
}


def _shapes(params: SlotParams, din: int, d: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape of every weight as it follows from the others, and what it means."""
    hq, hv = params.q_weight.shape[0], params.v_weight.shape[0]
    du = hv if params.merge_weight is None else params.merge_weight.shape[0]
    hm = 0 if params.mlp_weight1 is None else params.mlp_weight1.shape[0]
    return {
        **dict.fromkeys(("norm_input_weight", "norm_input_bias"), ((din,), "(channels of inputs,)")),
        **dict.fromkeys(("norm_slots_weight", "norm_slots_bias"), ((d,), "(channels of slots,)")),
        "q_weight": ((hq, d), "(query width, channels of slots)"),
        "q_bias": ((hq,), "(query width,)"),
        "k_weight": ((hq, din), "(query width, channels of inputs)"),
        "k_bias": ((hq,), "(query width,)"),
        "v_weight": ((hv, din), "(value width, channels of inputs)"),
        "v_bias": ((hv,), "(value width,)"),
        "merge_weight": ((du, hv), "(update width, value width)"),
        "merge_bias": ((du,), "(update width,)"),
        "gru_weight_ih": ((3 * d, du), "(3 * channels of slots, update width)"),
        "gru_weight_hh": ((3 * d, d), "(3 * channels of slots, channels of slots)"),
        **dict.fromkeys(("gru_bias_ih", "gru_bias_hh"), ((3 * d,), "(3 * channels of slots,)")),
        **dict.fromkeys(("norm_mlp_weight", "norm_mlp_bias"), ((d,), "(channels of slots,)")),
        "mlp_weight1": ((hm, d), "(hidden width, channels of slots)"),
        "mlp_bias1": ((hm,), "(hidden width,)"),
        "mlp_weight2": ((d, hm), "(channels of slots, hidden width)"),
        "mlp_bias2": ((d,), "(channels of slots,)"),
    }


def _differentiable(call: SlotCall, make: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """What `make` makes of the shapes and dtypes of slots, dots and attn."""
    slots, options = call.slots, call.options
    (batch, count, _), tokens = slots.shape, call.inputs.shape[1]
    acc = _checks.accumulation_dtype(slots.dtype)
    dots = (batch, count, tokens) if options.heads == 1 else (batch, options.heads, count, tokens)
    attn = (batch, count, tokens)
    return (
        make(slots.shape, dtype=slots.dtype),
        make(dots if options.with_dots else (0,), dtype=acc),
        make(attn if options.with_attn else (0,), dtype=acc),
    )


def _fake(inputs: Any, slots: Any, *args: Any) -> tuple[Any, ...]:
    call = SlotCall.of(inputs, slots, *args[:-1])
    acc = _checks.accumulation_dtype(slots.dtype)
    return (
        *_differentiable(call, slots.new_empty),
        slots.new_empty((call.options.kept, *slots.shape), dtype=acc),
        slots.new_empty(record_size(call) if args[-1] == "cpu" else 0, dtype=acc),
    )


def _fake_backward(
    grad_slots: Any, grad_dots: Any, grad_attn: Any, states: Any, record: Any, inputs: Any, slots: Any, *args: Any
) -> list[Any]:
    present = [weight for weight in args[: len(NAMES)] if weight is not None]
    if SlotOptions(*args[len(NAMES) + 2 : -1]).mask_grad:
        present.append(args[len(NAMES)])
    return [t.new_empty(t.shape) for t in (inputs, slots, *present)]


_TENSORS = 2 + len(NAMES) + 2  # inputs, slots, weights, masks


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.scalars = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)  # nor zeros for what is not differentiable, the record above all
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*output[3:], *inputs[:_TENSORS])


def _gradient(ctx: Any, *grads: Any) -> Any:
    states, record, *tensors = ctx.saved_tensors
    call = SlotCall.of(*tensors, *ctx.scalars[:-1])
    zeros = _differentiable(call, tensors[1].new_zeros) if any(g is None for g in grads[:3]) else grads[:3]
    given = (zero if grad is None else grad for grad, zero in zip(grads, zeros, strict=False))
    found = torch.ops.vidops.slot_attention_backward(*given, states, record, *tensors, *ctx.scalars)
    following = iter(found)
    of_weights = [None if t is None else next(following) for t in tensors[:-2]]
    return *of_weights, next(following, None), None, *(None for _ in ctx.scalars)


_ARGUMENTS = (
    "Tensor inputs, Tensor slots, "
    + ", ".join(f"Tensor{'' if name in REQUIRED else '?'} {name}" for name in NAMES)
    + ", Tensor? token_mask, Tensor? slot_mask, int iters, int heads, float scale, bool joint_heads, int groups,"
    " float eps, bool eps_in_denominator, float extra_denominator, float ln_eps, str activation, str grad_mode,"
    " bool with_dots, bool with_attn, bool mask_grad, bool recorded, str backend"
)


def _recomputing(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], refuses: Callable[..., str | None]
) -> Impl:
    """A backend that records nothing: its backward computes again what it needs."""

    def with_record(*args: Any) -> tuple[torch.Tensor, ...]:
        results = forward(*args)
        return *results, results[3].new_empty(0)

    def without_record(*args: Any) -> list[torch.Tensor]:
        return backward(*args[:4], *args[5:])

    return Impl(name, with_record, without_record, refuses)


OP = Op(
    "slot_attention",
    schema=f"({_ARGUMENTS}) -> (Tensor slots, Tensor dots, Tensor attn, Tensor states, Tensor record)",
    fake=_fake,
    # Weights are widened by the hub; a cast of the inputs would only copy them.
    autocast_fp32=False,
    backward=Backward(
        schema="(Tensor grad_slots, Tensor grad_dots, Tensor grad_attn, Tensor states, Tensor record, "
        f"{_ARGUMENTS}) -> Tensor[]",
        fake=_fake_backward,
        setup_context=_setup_context,
        gradient=_gradient,
    ),
    impls=(
        _recomputing(
            "reference", reference, partial(_slot_iterations.backward, REFERENCE), _backends.reference_refuses
        ),
        Impl("cpu", cpu_forward, cpu_backward, _backends.cpu_refuses),
        _recomputing("triton", triton_forward, triton_backward, _backends.triton_refuses),
        _recomputing("cuda", cuda_forward, cuda_backward, _backends.cuda_refuses),
    ),
)
