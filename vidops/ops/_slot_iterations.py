"""All iterations of `vidops.slot_attention` around a backend's pass over the tokens, forward and backward.

What has a row per slot (norms, projections of slots, GRU, MLP) is done here, in PyTorch and in the accumulation dtype;
what has a row per token is the backend's `Attend`. Projections of the tokens are *absorbed* into the slot side where
that is less work: ``q . (W_k x)`` is ``(W_k^T q) . x`` and ``sum_j w_j W_v x_j`` is ``W_v sum_j w_j x_j``, so that the
raw inputs serve as keys and as values, and nothing of their size is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vidops.ops import _checks
from vidops.ops._slot_params import SlotCall, widened
from vidops.reference.slot_attention import row_statistics


def plain_statistics(inputs: torch.Tensor, dtype: torch.dtype, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return row_statistics(inputs.to(dtype), eps)


def plain_product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, add_to: torch.Tensor | None = None
) -> torch.Tensor:
    if add_to is not None:
        return add_to.addmm_(a, b) if a.dim() == 2 else add_to.baddbmm_(a, b)
    return a @ b if bias is None else torch.addmm(bias, a, b)


def plain_norm_backward(grad: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    statistics = mean[..., None], rstd[..., None]
    return torch.ops.aten.native_layer_norm_backward(
        grad, x.to(grad.dtype), x.shape[-1:], *statistics, None, None, [True, False, False]
    )[0]


class Attend(NamedTuple):
    """What one backend does itself: a pass over the tokens as `vidops.reference.slot_attend` defines it, and, unless
    PyTorch is good enough at it,

    statistics: mean and reciprocal deviation (B, N) of every row of the tokens;
    first_forward: `forward` of raw rows without `statistics`, which it returns beside its results, by the LayerNorm's
        constant;
    product: of two matrices or two batches of them, each possibly transposed; plus a bias per column (matrices only),
        or added to a given result;
    norm_backward: the gradient of the tokens from that of the normalised ones, which it may overwrite;
    writes: whether `backward` takes `add=False`, and then writes the gradients of the tokens that it else adds to.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    statistics: Callable[..., Any] = plain_statistics
    first_forward: Callable[..., Any] | None = None
    product: Callable[..., Any] = plain_product
    norm_backward: Callable[..., Any] = plain_norm_backward
    writes: bool = False


def absorbs(tokens: int, channels: int, slots: int, iters: int, heads: int, q_width: int, v_width: int) -> bool:
    """Whether the absorbed form takes fewer multiply-adds per item than projecting the tokens once."""
    per_channel = q_width + v_width
    absorbed = iters * slots * channels * (2 * heads * tokens + per_channel)
    projected = tokens * per_channel * (channels + iters * slots)
    return absorbed <= projected


def forward(attend: Attend, *args: Any, absorbed: bool | None = None) -> tuple[torch.Tensor, ...]:
    """Arguments of the torch op -> (slots, dots, attn, states)."""
    call = SlotCall.of(*args)
    options = call.options
    run = Run(attend, call, absorbed)
    slots = call.slots.to(run.dtype)
    entering, dots, attn = [], None, None
    for step in range(options.iters):
        last = step == options.iters - 1
        if last or options.grad_mode == "full":
            entering.append(slots)
        slots, dots, attn = run.advance(slots, last and options.with_dots, last and options.with_attn)
    none = slots.new_empty(0)
    if dots is not None and options.heads == 1:
        dots = dots.squeeze(1)
    return (
        slots.to(call.slots.dtype),
        none if dots is None else dots,
        slots.new_empty(0) if attn is None else attn.mean(1),
        torch.stack(entering),
    )


def backward(
    attend: Attend,
    grad_slots: torch.Tensor,
    grad_dots: torch.Tensor,
    grad_attn: torch.Tensor,
    states: torch.Tensor,
    *args: Any,
    absorbed: bool | None = None,
) -> list[torch.Tensor]:
    """Gradients of inputs, slots, of every weight that is there, and of the token mask if it wants one, from those of
    the forward's first three results.
    """
    call = SlotCall.of(*args)
    options = call.options
    run = Run(attend, call, absorbed)
    dots_of_last, attn_of_last = of_last(grad_dots, grad_attn, call)
    grad = grad_slots.to(run.dtype)
    for index in reversed(range(len(states))):
        last = index == len(states) - 1
        maps = (dots_of_last, attn_of_last) if last else (None, None)
        grad = run.step_backward(run.step(states[index]), grad, *maps)
    if options.grad_mode == "fixed_point":
        grad = torch.zeros_like(grad)
    weights = run.finish()
    return [
        run.grad_inputs().to(call.inputs.dtype),
        grad.to(call.slots.dtype),
        *(weights[name].to(p.dtype) for name, p in vars(call.params).items() if p is not None),
        *run.mask_gradients(),
    ]


def of_last(
    grad_dots: torch.Tensor, grad_attn: torch.Tensor, call: SlotCall
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the last iteration's maps per head (B, H, S, N), None where the map was not asked for."""
    options = call.options
    dots = attn = None
    if options.with_dots:
        dots = grad_dots.unsqueeze(1) if options.heads == 1 else grad_dots
        if call.slot_mask is not None:
            # A masked slot's dots are the constant -inf.
            dots = dots.masked_fill(call.slot_mask[:, None, :, None] != 0, 0.0)
        dots = dots.contiguous()
    if options.with_attn:
        attn = (grad_attn / options.heads)[:, None].expand(-1, options.heads, -1, -1).contiguous()
    return dots, attn


class _Norm(NamedTuple):
    """A LayerNorm's result and what its backward needs."""

    x: torch.Tensor
    out: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor


class _Gates(NamedTuple):
    reset: torch.Tensor
    keep: torch.Tensor
    candidate: torch.Tensor
    recurrent: torch.Tensor  # what `reset` scales inside the candidate


class _Mlp(NamedTuple):
    norm: _Norm
    hidden: torch.Tensor  # before the activation


@dataclass
class _Step:
    """One iteration, as far as its backward needs it."""

    slots: torch.Tensor
    norm: _Norm
    q: torch.Tensor  # (H, B * S, dk), scaled
    token_q: torch.Tensor  # (B, H, S, Dk), what the backend takes
    c: torch.Tensor
    mean_row: torch.Tensor  # (H, B * S, Dv): num / (den + constant)
    weight: torch.Tensor  # (H, B * S): den / (den + constant)
    total: torch.Tensor  # (H, B * S): den + constant
    heads_out: torch.Tensor  # (B, S, Hv)
    update: torch.Tensor  # (B, S, Du)
    gates: _Gates | None
    moved: torch.Tensor  # (B, S, D): the slots after the update
    mlp: _Mlp | None
    attn: torch.Tensor | None  # where the token mask wants a gradient


class Run:
    """A call with its weights in the accumulation dtype; the backward adds the weights' gradients up in it."""

    def __init__(self, attend: Attend, call: SlotCall, absorbed: bool | None) -> None:
        self.attend, self.call, options = attend, call, call.options
        self.dtype = _checks.accumulation_dtype(call.slots.dtype)
        self.batch, self.slots = call.slots.shape[:2]
        self.heads = options.heads
        p = self.params = widened(call.params, self.dtype)
        tokens, channels = call.inputs.shape[1:]
        if absorbed is None:
            q_width, v_width = len(p.q_weight), len(p.v_weight)
            absorbed = absorbs(tokens, channels, self.slots, options.iters, self.heads, q_width, v_width)
        self.absorbed = absorbed
        self.key, self.key_bias = self._folded(p.k_weight, p.k_bias)
        self.value, self.value_bias = self._folded(p.v_weight, p.v_bias)
        self.token_mask = None if call.token_mask is None else call.token_mask.to(self.dtype).contiguous()
        self.slot_mask = None if call.slot_mask is None else (call.slot_mask != 0).contiguous()
        # (B, N) each; the first pass over the tokens may find them.
        self._statistics: tuple[torch.Tensor, torch.Tensor] | None = None
        if not absorbed or attend.first_forward is None:
            self._statistics = attend.statistics(call.inputs, self.dtype, options.ln_eps)
        if absorbed:
            self.keys = self.values = call.inputs.unsqueeze(1)
        else:
            rows = self._normalised_rows()
            self.keys, self.values = self._projected(rows, self.key), self._projected(rows, self.value)
        wanted = self.token_mask if options.mask_grad else None
        self.grad_mask = None if wanted is None else torch.zeros_like(wanted)
        self.grads: dict[str, torch.Tensor] = {}
        # Gradients of what the backend took, and of the folded projections, both summed over iterations.
        self.grad_keys: torch.Tensor | None = None
        self.grad_values: torch.Tensor | None = None
        self.folded_grads: dict[str, torch.Tensor] = {}

    def _folded(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A projection of normalised inputs per head, (H, d, Din) and (H, d) or None, the norm's affine inside."""
        scale, shift = self.params.norm_input_weight, self.params.norm_input_bias
        if shift is not None:
            bias = weight @ shift if bias is None else bias + weight @ shift
        if scale is not None:
            weight = weight * scale
        return weight.unflatten(0, (self.heads, -1)), None if bias is None else bias.unflatten(0, (self.heads, -1))

    def _normalised_rows(self) -> torch.Tensor:
        mean, rstd = self.statistics()
        return (self.call.inputs.to(self.dtype) - mean[..., None]) * rstd[..., None]

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._statistics is not None
        return self._statistics

    def _projected(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(B, H, N, d); the bias is added on the slot side."""
        return self._linear(rows, weight.flatten(0, 1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.attend.product(x.flatten(0, -2), weight.T, bias).unflatten(0, x.shape[:-1])

    def _to_heads(self, t: torch.Tensor) -> torch.Tensor:
        """(B, S, H * d) to (H, B * S, d), one product per head whatever the batch."""
        return t.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(0, 1)

    def _from_heads(self, t: torch.Tensor) -> torch.Tensor:
        """(H, B * S, d) to (B, S, H * d)."""
        return t.transpose(0, 1).flatten(1).unflatten(0, (self.batch, self.slots))

    def _to_batch(self, t: torch.Tensor) -> torch.Tensor:
        """(H, B * S, ...) to (B, H, S, ...), contiguous."""
        return t.unflatten(1, (self.batch, self.slots)).transpose(0, 1).contiguous()

    def _from_batch(self, t: torch.Tensor) -> torch.Tensor:
        """(B, H, S, ...) to (H, B * S, ...)."""
        return t.transpose(0, 1).flatten(1, 2)

    def advance(
        self, slots: torch.Tensor, with_dots: bool, with_attn: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The slots that leave an iteration, and its maps. What is used up is dropped at once: with few tokens the
        slots' rows are most of the peak."""
        p = self.params
        num, den, dots, attn = self._attended(*self._queries(slots)[-2:], with_dots, with_attn)
        heads_out = self._gathered(num, den)[-1]
        del num, den
        moved = self._moved(heads_out, slots)[-1]
        del heads_out
        if p.mlp_weight2 is not None:
            activated = self._activated(self._mlp(moved).hidden)
            moved = self._linear(activated, p.mlp_weight2, p.mlp_bias2).add_(moved)
        return moved, dots, attn

    def step(self, slots: torch.Tensor) -> _Step:
        """`advance` up to the hidden layer of the MLP, with all that its backward needs."""
        with_attn = self.call.options.mask_grad
        norm, q, token_q, c = self._queries(slots)
        num, den, _, attn = self._attended(token_q, c, False, with_attn)
        mean_row, weight, total, heads_out = self._gathered(num, den)
        update, gates, moved = self._moved(heads_out, slots)
        mlp = None if self.params.mlp_weight1 is None else self._mlp(moved)
        return _Step(slots, norm, q, token_q, c, mean_row, weight, total, heads_out, update, gates, moved, mlp, attn)

    def _queries(self, slots: torch.Tensor) -> tuple[_Norm, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised slots, queries, and these with their constants as the backend takes them."""
        p = self.params
        norm = self._norm(slots, p.norm_slots_weight, p.norm_slots_bias)
        q = self._to_heads(self._linear(norm.out, p.q_weight, p.q_bias)) * self.call.options.scale
        token_q = self._to_batch(self.attend.product(q, self.key) if self.absorbed else q)
        c = q.new_zeros(q.shape[:2]) if self.key_bias is None else (q @ self.key_bias[..., None]).squeeze(-1)
        return norm, q, token_q, self._to_batch(c)

    def _gathered(self, num: torch.Tensor, den: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From what the backend sums up: mean_row, weight, total and heads_out of a `_Step`."""
        weight = self._from_batch(den)
        total = weight + self.call.options.denominator
        mean_row, weight = self._from_batch(num) / total[..., None], weight / total
        heads_out = self.attend.product(mean_row, self.value.mT) if self.absorbed else mean_row
        if self.value_bias is not None:
            heads_out = heads_out + weight[..., None] * self.value_bias[:, None]
        return mean_row, weight, total, self._from_heads(heads_out)

    def _moved(self, heads_out: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, _Gates | None, torch.Tensor]:
        """The update, the gates of a GRU, and the slots after the update."""
        p = self.params
        update = heads_out if p.merge_weight is None else self._linear(heads_out, p.merge_weight, p.merge_bias)
        if p.gru_weight_ih is None:
            return update, None, slots + update
        return update, *self._gru(update, slots)

    def _attended(self, token_q: torch.Tensor, c: torch.Tensor, with_dots: bool, with_attn: bool) -> Any:
        """num, den, dots and attn of a pass over the tokens."""
        attend, eps = self.attend, self.call.options.ln_eps
        if self._statistics is not None or attend.first_forward is None:
            return attend.forward(*self._pass(token_q, c), with_dots, with_attn)
        arguments = self.keys, self.values, *self._slot_side(token_q, c), with_dots, with_attn
        *found, mean, rstd = attend.first_forward(eps, *arguments)
        self._statistics = mean, rstd
        return found

    def _pass(self, token_q: torch.Tensor, c: torch.Tensor) -> tuple[Any, ...]:
        """The arguments that a backend's forward and backward share."""
        statistics = self.statistics() if self.absorbed else (None, None)
        return self.keys, self.values, *statistics, *self._slot_side(token_q, c)

    def _slot_side(self, token_q: torch.Tensor, c: torch.Tensor) -> tuple[Any, ...]:
        options = self.call.options
        masks = self.token_mask, self.slot_mask
        return token_q, c, *masks, options.groups, options.joint_heads, options.eps_add

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> _Norm:
        return _Norm(x, *torch.native_layer_norm(x, x.shape[-1:], weight, bias, self.call.options.ln_eps))

    def _gru(self, update: torch.Tensor, slots: torch.Tensor) -> tuple[_Gates, torch.Tensor]:
        p = self.params
        assert p.gru_weight_ih is not None and p.gru_weight_hh is not None
        width = slots.shape[-1]
        from_update, new = self._linear(update, p.gru_weight_ih, p.gru_bias_ih).split([2 * width, width], -1)
        from_slots, recurrent = self._linear(slots, p.gru_weight_hh, p.gru_bias_hh).split([2 * width, width], -1)
        reset, keep = from_update.add_(from_slots).sigmoid_().chunk(2, -1)
        candidate = torch.addcmul(new, reset, recurrent).tanh_()
        return _Gates(reset, keep, candidate, recurrent), (1 - keep) * candidate + keep * slots

    def _mlp(self, slots: torch.Tensor) -> _Mlp:
        p = self.params
        assert p.mlp_weight1 is not None
        norm = self._norm(slots, p.norm_mlp_weight, p.norm_mlp_bias)
        return _Mlp(norm, self._linear(norm.out, p.mlp_weight1, p.mlp_bias1))

    def _activated(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.relu(hidden) if self.call.options.activation == "relu" else F.gelu(hidden)

    def step_backward(
        self,
        taken: _Step,
        grad: torch.Tensor,
        grad_dots: torch.Tensor | None,
        grad_attn: torch.Tensor | None,
    ) -> torch.Tensor:
        """Gradient of the slots entering the iteration, from that of the slots leaving it."""
        # What is used up is dropped at once: with few tokens these rows are most of the peak.
        p, options = self.params, self.call.options
        gates = taken.gates
        if p.merge_weight is None:
            del taken.heads_out
        if gates is None:
            del taken.update
        del taken.gates, taken.moved
        if taken.mlp is not None:
            grad = self._mlp_backward(taken, grad)
        if gates is None:
            grad_update = grad_entering = grad
        else:
            grad_update, grad_entering = self._gru_backward(gates, taken.update, taken.slots, grad)
            del taken.update
        del gates, grad
        if p.merge_weight is not None:
            grad_update = self._linear_backward(
                grad_update, taken.heads_out, p.merge_weight, "merge_weight", "merge_bias"
            )
            del taken.heads_out

        grad_heads = self._to_heads(grad_update)
        del grad_update
        grad_weight = grad_heads.new_zeros(taken.weight.shape)
        if self.value_bias is not None:
            grad_weight = (grad_heads @ self.value_bias[..., None]).squeeze(-1)
            self._add(self.folded_grads, "value_bias", (taken.weight[:, None] @ grad_heads).squeeze(1))
        grad_row = grad_heads
        if self.absorbed:
            grad_row = self.attend.product(grad_heads, self.value)
            self._add_product(self.folded_grads, "value", grad_heads.mT, taken.mean_row)
        del grad_heads
        grad_total = -((grad_row * taken.mean_row).sum(-1) + grad_weight * taken.weight) / taken.total
        del taken.mean_row
        grad_num = self._to_batch(grad_row / taken.total[..., None])
        grad_den = self._to_batch(grad_weight / taken.total + grad_total)
        del grad_row

        if self.grad_mask is not None:
            self.grad_mask += self._mask_gradient(taken, grad_num, grad_den)
        how = {"add": False} if self.attend.writes and self.grad_keys is None else {}
        grad_keys, grad_values = self._buffers()
        passed = *self._pass(taken.token_q, taken.c), grad_keys, grad_values
        grad_token_q, grad_c = self.attend.backward(grad_num, grad_den, grad_dots, grad_attn, *passed, **how)
        del grad_num, grad_den, passed, taken.token_q

        grad_q, grad_c = self._from_batch(grad_token_q), self._from_batch(grad_c)
        del grad_token_q
        if self.absorbed:
            self._add_product(self.folded_grads, "key", taken.q.mT, grad_q)
            grad_q = self.attend.product(grad_q, self.key.mT)
        if self.key_bias is not None:
            grad_q = grad_q + grad_c[..., None] * self.key_bias[:, None]
            self._add(self.folded_grads, "key_bias", (grad_c[:, None] @ taken.q).squeeze(1))
        del taken.q
        grad_normed = self._linear_backward(
            self._from_heads(grad_q * options.scale), taken.norm.out, p.q_weight, "q_weight", "q_bias"
        )
        del grad_q
        return self._norm_backward(grad_normed, taken.norm, "norm_slots").add_(grad_entering)

    def _mask_gradient(self, taken: _Step, grad_num: torch.Tensor, grad_den: torch.Tensor) -> torch.Tensor:
        """dm_gj = sum over slots i of group g, and heads, of (a_ij + eps) (grad_num_i . V_j + grad_den_i)."""
        assert taken.attn is not None
        grad = grad_num @ self.values.to(self.dtype).mT
        if self.absorbed:
            mean, rstd = self.statistics()
            grad = (grad - grad_num.sum(-1, keepdim=True) * mean[:, None, None]) * rstd[:, None, None]
        grad = (taken.attn + self.call.options.eps_add) * (grad + grad_den[..., None])
        return grad.sum(1).unflatten(1, (self.call.options.groups, -1)).sum(2)

    def mask_gradients(self) -> list[torch.Tensor]:
        """That of the token mask in its own dtype, if it wants one."""
        if self.grad_mask is None or self.call.token_mask is None:
            return []
        return [self.grad_mask.to(self.call.token_mask.dtype)]

    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.grad_keys is None:
            new = torch.empty if self.attend.writes else torch.zeros
            self.grad_keys = new(self.keys.shape, dtype=self.dtype, device=self.keys.device)
            self.grad_values = self.grad_keys
            if not self.absorbed:
                self.grad_values = new(self.values.shape, dtype=self.dtype, device=self.keys.device)
        assert self.grad_values is not None
        return self.grad_keys, self.grad_values

    @staticmethod
    def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
        sums[name] = sums[name].add_(value) if name in sums else value

    def _add_product(self, sums: dict[str, torch.Tensor], name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        sums[name] = self.attend.product(a, b, add_to=sums.get(name))

    def _linear_backward(
        self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, name: str, bias: str
    ) -> torch.Tensor:
        rows = grad.flatten(0, -2)
        self._add_product(self.grads, name, rows.T, x.flatten(0, -2))
        self._add(self.grads, bias, rows.sum(0))
        return self.attend.product(rows, weight).unflatten(0, grad.shape[:-1])

    def _norm_backward(self, grad: torch.Tensor, norm: _Norm, name: str) -> torch.Tensor:
        weight, bias = getattr(self.params, name + "_weight"), getattr(self.params, name + "_bias")
        affine = [True, weight is not None, bias is not None]
        statistics = norm.mean, norm.rstd
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, norm.x, norm.x.shape[-1:], *statistics, weight, bias, affine
        )
        if weight is not None:
            self._add(self.grads, name + "_weight", grad_weight)
        if bias is not None:
            self._add(self.grads, name + "_bias", grad_bias)
        return grad_x

    def _gru_backward(
        self, gates: _Gates, update: torch.Tensor, slots: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the update and of the entering slots."""
        p = self.params
        assert p.gru_weight_ih is not None and p.gru_weight_hh is not None
        reset, keep, candidate, recurrent = gates
        grad_candidate = torch.ops.aten.tanh_backward(grad * (1 - keep), candidate)
        grad_keep = torch.ops.aten.sigmoid_backward(grad * (slots - candidate), keep)
        grad_reset = torch.ops.aten.sigmoid_backward(grad_candidate * recurrent, reset)
        from_update = torch.cat([grad_reset, grad_keep, grad_candidate], -1)
        from_slots = torch.cat([grad_reset, grad_keep, grad_candidate * reset], -1)
        grad_update = self._linear_backward(from_update, update, p.gru_weight_ih, "gru_weight_ih", "gru_bias_ih")
        through = self._linear_backward(from_slots, slots, p.gru_weight_hh, "gru_weight_hh", "gru_bias_hh")
        return grad_update, through + grad * keep

    def _mlp_backward(self, taken: _Step, grad: torch.Tensor) -> torch.Tensor:
        """Takes the MLP off `taken`."""
        p = self.params
        assert taken.mlp is not None and p.mlp_weight1 is not None and p.mlp_weight2 is not None
        norm, hidden = taken.mlp
        taken.mlp = None
        activated = self._activated(hidden)
        grad_hidden = self._linear_backward(grad, activated, p.mlp_weight2, "mlp_weight2", "mlp_bias2")
        del activated
        if self.call.options.activation == "relu":
            grad_hidden = torch.ops.aten.threshold_backward(grad_hidden, hidden, 0)
        else:
            grad_hidden = torch.ops.aten.gelu_backward(grad_hidden, hidden)
        del hidden
        grad_normed = self._linear_backward(grad_hidden, norm.out, p.mlp_weight1, "mlp_weight1", "mlp_bias1")
        del grad_hidden
        return self._norm_backward(grad_normed, norm, "norm_mlp").add_(grad)

    def finish(self) -> dict[str, torch.Tensor]:
        """Gradients of all weights: those of the folded projections are taken apart."""
        if not self.absorbed:
            rows = self._normalised_rows().flatten(0, 1)
            for name, buffer in (("key", self.grad_keys), ("value", self.grad_values)):
                assert buffer is not None
                flat = buffer.transpose(1, 2).flatten(2).flatten(0, 1)
                self.folded_grads[name] = self.attend.product(flat.T, rows)
        p = self.params
        for name, short, weight in (("key", "k", p.k_weight), ("value", "v", p.v_weight)):
            grad = self.folded_grads[name].reshape(weight.shape)
            grad_bias = self.folded_grads.get(name + "_bias")
            if p.norm_input_weight is not None:
                self._add(self.grads, "norm_input_weight", (grad * weight).sum(0))
                grad = grad * p.norm_input_weight
            if grad_bias is not None:
                grad_bias = grad_bias.flatten()
                self.grads[short + "_bias"] = grad_bias
                if p.norm_input_bias is not None:
                    self._add(self.grads, "norm_input_bias", grad_bias @ weight)
                    grad = grad + grad_bias[:, None] * p.norm_input_bias
            self.grads[short + "_weight"] = grad
        return self.grads

    def grad_inputs(self) -> torch.Tensor:
        """Through the projections, if the backend took projected tokens, and the LayerNorm of the inputs."""
        assert self.grad_keys is not None and self.grad_values is not None
        if self.absorbed:
            grad = self.grad_keys.squeeze(1)
        else:
            grad = self._through(self.grad_keys, self.key) + self._through(self.grad_values, self.value)
        return self.attend.norm_backward(grad.contiguous(), self.call.inputs, *self.statistics())

    def _through(self, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = grad.transpose(1, 2).flatten(2)
        return self.attend.product(rows.flatten(0, 1), weight.flatten(0, 1)).unflatten(0, rows.shape[:2])
