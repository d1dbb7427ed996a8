"""What the backends of `vidops.slot_attention` run: the driver around each one's pass over the tokens.

Arguments of a pass are those of `vidops.reference.slot_attend`, in its order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from vidops import _native
from vidops.ops import _backends, _slot_iterations
from vidops.ops._slot_params import SlotCall, flat, record_size, widened
from vidops.reference.slot_attend import attend_backward, attend_forward

REFERENCE = _slot_iterations.Attend(attend_forward, attend_backward)


def _native_views(*tensors: torch.Tensor | None) -> list[Any]:
    """Absent tensors are empty ones, on the device of the others."""
    given = next(t for t in tensors if t is not None)
    return [_native.view(given.new_empty(0) if t is None else t) for t in tensors]


def _new_results(
    tokens: Sequence[torch.Tensor], with_dots: bool, with_attn: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    keys, values, _, _, q, *_ = tokens
    dots, attn = (q.new_empty(*q.shape[:3], keys.shape[2]) if asked else None for asked in (with_dots, with_attn))
    return q.new_empty(*q.shape[:3], values.shape[3]), q.new_empty(q.shape[:3]), dots, attn


def _words(slot_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if slot_mask is None else slot_mask.to(torch.int32)


def _cpu_attend_forward(*args: Any, norm_eps: float = -1.0) -> Any:
    *tokens, slot_mask, groups, joint, eps_add, with_dots, with_attn = args
    results = _new_results(tokens, with_dots, with_attn)
    views = _native_views(*tokens, _words(slot_mask))
    to = _native_views(*results)
    _native.C.slot_attend_forward_cpu(*views, groups, joint, eps_add, *to, norm_eps, _native.threads())
    return results


def _cpu_first_forward(eps: float, keys: torch.Tensor, values: torch.Tensor, *args: Any) -> Any:
    mean, rstd = (keys.new_empty(keys.shape[0], keys.shape[2]) for _ in range(2))
    return *_cpu_attend_forward(keys, values, mean, rstd, *args, norm_eps=eps), mean, rstd


def _cpu_attend_backward(*args: Any, add: bool = True) -> Any:
    *tensors, q, c, token_mask, slot_mask, groups, joint, eps_add, grad_keys, grad_values = args
    grads = q.new_empty(q.shape), c.new_empty(c.shape)
    views = _native_views(*tensors, q, c, token_mask, _words(slot_mask))
    results = _native_views(grad_keys, grad_values, *grads)
    _native.C.slot_attend_backward_cpu(*views, groups, joint, eps_add, *results, add, _native.threads())
    return grads


def _cpu_statistics(inputs: torch.Tensor, dtype: torch.dtype, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    mean, rstd = (torch.empty(inputs.shape[:2], dtype=dtype) for _ in range(2))
    _native.C.token_statistics_cpu(*_native_views(inputs, mean, rstd), eps, _native.threads())
    return mean, rstd


_SMALL_PRODUCT = 1 << 19  # multiply-adds that take no longer than handing tensors to native code


def _by_rows(t: torch.Tensor) -> tuple[Any, bool]:
    """A view (B, rows, columns) whose last axis is contiguous, and whether rows and columns changed places for it."""
    t = t if t.dim() == 3 else t[None]
    turned = t.stride(-1) != 1 and t.stride(-2) == 1
    return _native.view(t.mT if turned else t), turned


def _cpu_product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, add_to: torch.Tensor | None = None
) -> torch.Tensor:
    if a.numel() * b.shape[-1] < _SMALL_PRODUCT:
        return _slot_iterations.plain_product(a, b, bias, add_to)
    out = a.new_empty(*a.shape[:-1], b.shape[-1]) if add_to is None else add_to
    given = _native.view(a.new_empty(0) if bias is None else bias)
    to = _native.view(out if out.dim() == 3 else out[None])
    _native.C.product_cpu(*_by_rows(a), *_by_rows(b), given, to, add_to is not None, _native.threads())
    return out


def _cpu_norm_backward(grad: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    _native.C.token_norm_grad_cpu(*_native_views(x, mean, rstd, grad), _native.threads())
    return grad


_CPU = _slot_iterations.Attend(
    _cpu_attend_forward,
    _cpu_attend_backward,
    _cpu_statistics,
    _cpu_first_forward,
    _cpu_product,
    _cpu_norm_backward,
    writes=True,
)


def _absorbed_head(call: SlotCall) -> bool:
    """Whether native code runs all iterations: one head, in the absorbed form, and no empty axis."""
    p, options = call.params, call.options
    if options.heads > 1 or not call.inputs.numel() or not call.slots.numel():
        return False
    tokens, channels = call.inputs.shape[1:]
    widths = len(p.q_weight), len(p.v_weight)
    return min(widths) > 0 and _slot_iterations.absorbs(
        tokens, channels, call.slots.shape[1], options.iters, 1, *widths
    )


def _cpu_one_call(call: SlotCall) -> bool:
    if call.params.mlp_weight1 is not None and call.options.activation != "relu":
        return False
    return call.inputs.dtype == call.slots.dtype and _absorbed_head(call)


def _native_call(call: SlotCall) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Views of inputs, weights and masks, and the numbers that end the arguments of both entry points."""
    options, like = call.options, call.inputs
    token_mask = None if call.token_mask is None else call.token_mask.to(like.dtype).contiguous()
    weights = [w if w is None else w.contiguous() for w in flat(call.params)]
    inputs, *masks = _native_views(like, token_mask, _words(call.slot_mask))
    views = inputs, _native_views(like, *weights)[1:], *masks
    numbers = options.groups, options.scale, options.eps_add, options.denominator, options.ln_eps, _native.threads()
    return views, numbers


def _cpu_iterations(call: SlotCall) -> tuple[torch.Tensor, ...]:
    options = call.options
    (inputs, *views), numbers = _native_call(call)
    slots = call.slots.contiguous()
    map_shape = (*slots.shape[:2], call.inputs.shape[1])
    dots, attn = (slots.new_empty(map_shape if asked else 0) for asked in (options.with_dots, options.with_attn))
    out, states = torch.empty_like(slots), slots.new_empty(options.kept, *slots.shape)
    record = slots.new_empty(record_size(call))
    given, *results = _native_views(slots, out, states, record, dots, attn)
    _native.C.slot_iterations_forward_cpu(inputs, given, *views, *results, options.iters, *numbers)
    return out, dots, attn, states, record


def _cpu_iterations_backward(
    grad_slots: torch.Tensor,
    grad_dots: torch.Tensor,
    grad_attn: torch.Tensor,
    states: torch.Tensor,
    record: torch.Tensor,
    call: SlotCall,
) -> list[torch.Tensor]:
    options = call.options
    views, numbers = _native_call(call)
    packed = torch.contiguous_format
    grads = [None if w is None else torch.empty_like(w, memory_format=packed) for w in flat(call.params)]
    grad, grad_inputs = grad_slots.clone(memory_format=packed), torch.empty_like(call.inputs, memory_format=packed)
    maps = grad_dots.contiguous() if options.with_dots else None, grad_attn.contiguous() if options.with_attn else None
    given = _native_views(states, record, *maps, grad, grad_inputs)
    _native.C.slot_iterations_backward_cpu(*views, *given, _native_views(states, *grads)[1:], *numbers)
    if options.grad_mode == "fixed_point":
        grad.zero_()
    return [grad_inputs, grad, *(g for g in grads if g is not None)]


def cpu_forward(inputs: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    wide = _backends.upcast(inputs)
    call = SlotCall.of(*wide, *args)
    if _cpu_one_call(call):
        return _cpu_iterations(call)
    results = _slot_iterations.forward(_CPU, *wide, *args)
    return *results, results[3].new_empty(record_size(call))


def cpu_backward(
    grad_slots: torch.Tensor,
    grad_dots: torch.Tensor,
    grad_attn: torch.Tensor,
    states: torch.Tensor,
    record: torch.Tensor,
    inputs: torch.Tensor,
    *args: Any,
) -> list[torch.Tensor]:
    grads, wide = (grad_slots, grad_dots, grad_attn), _backends.upcast(inputs)
    call = SlotCall.of(*wide, *args)
    if _cpu_one_call(call) and not call.options.mask_grad:
        found = _cpu_iterations_backward(*grads, states, record, call)
    else:
        found = _slot_iterations.backward(_CPU, *grads, states, *wide, *args)
    return [found[0].to(inputs.dtype), *found[1:]]


def _triton() -> _slot_iterations.Attend:
    from vidops.kernels import slot_attention as kernel

    return _slot_iterations.Attend(kernel.attend_forward, kernel.attend_backward)


def triton_forward(*args: Any) -> tuple[torch.Tensor, ...]:
    return _slot_iterations.forward(_triton(), *args)


def triton_backward(*args: Any) -> list[torch.Tensor]:
    return _slot_iterations.backward(_triton(), *args)


def _cuda_workspace(
    keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor, groups: int, joint: bool, backward: bool
) -> torch.Tensor:
    batch, heads, slots, width = q.shape
    sizes = (batch, heads, slots, keys.shape[2], width, values.shape[3], keys.shape[1], values.shape[1], groups)
    kind = (keys.element_size(), joint, values is keys, backward)
    return q.new_empty(_native.C.slot_attend_workspace_cuda(*sizes, *kind, _native.stream(q)[0]), dtype=torch.int64)


def _open_slots(slot_mask: torch.Tensor | None) -> torch.Tensor | None:
    """1 for a slot that takes part, 0 for one that does not."""
    return None if slot_mask is None else (~slot_mask).float()


def _cuda_attend_forward(*args: Any) -> Any:
    keys, values, mean, rstd, q, c, token_mask, slot_mask, groups, joint, eps_add, with_dots, with_attn = args
    tokens = keys, values, mean, rstd, q.contiguous(), c.contiguous(), token_mask
    results = _new_results(tokens, with_dots, with_attn)
    workspace = _cuda_workspace(keys, values, q, groups, joint, False)
    views = _native_views(*tokens, _open_slots(slot_mask), *results, workspace)
    _native.C.slot_attend_forward_cuda(*views, groups, joint, eps_add, *_native.stream(q))
    return results


def _cuda_attend_backward(*args: Any, add: bool = True) -> Any:
    grad_num, grad_den, *maps, keys, values, mean, rstd, q, c, token_mask, slot_mask = args[:12]
    groups, joint, eps_add, grad_keys, grad_values = args[12:]
    grads = q.new_empty(q.shape), c.new_empty(c.shape)
    workspace = _cuda_workspace(keys, values, q, groups, joint, True)
    tokens = keys, values, mean, rstd, q.contiguous(), c.contiguous(), token_mask, _open_slots(slot_mask)
    results = grad_keys, grad_values, *grads, workspace
    views = _native_views(grad_num.contiguous(), grad_den.contiguous(), *maps, *tokens, *results)
    _native.C.slot_attend_backward_cuda(*views, groups, joint, eps_add, add, *_native.stream(q))
    return grads


def _cuda_statistics(inputs: torch.Tensor, dtype: torch.dtype, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    mean, rstd = (inputs.new_empty(inputs.shape[:2], dtype=dtype) for _ in range(2))
    _native.C.token_statistics_cuda(*_native_views(inputs, mean, rstd), eps, *_native.stream(inputs))
    return mean, rstd


_CUDA = _slot_iterations.Attend(_cuda_attend_forward, _cuda_attend_backward, _cuda_statistics, writes=True)


def _one_launch_workspace(call: SlotCall) -> torch.Tensor | None:
    """Scratch of the kernel that runs all iterations of a forward, None for a call that it does not take.

    Of calls of one head in the absorbed form it takes those of one group, of rows and slots of at most 128 channels and
    at most 32 slots, where what it holds per slot fits the shared memory of the device's blocks, and an item's tokens
    the blocks that may share it.
    """
    p = call.params
    (batch, tokens, channels), (_, slots, width) = call.inputs.shape, call.slots.shape
    widths = len(p.q_weight), len(p.v_weight)
    if call.options.groups > 1:
        return None
    updates, hidden = (0 if w is None else len(w) for w in (p.merge_weight, p.mlp_weight1))
    sizes = batch, tokens, channels, slots, width, *widths, updates, hidden, call.inputs.element_size()
    device, _ = _native.stream(call.inputs)
    words = _native.C.slot_iterations_workspace_cuda(*sizes, p.gru_weight_ih is not None, 0, device)
    return None if words < 0 else call.inputs.new_empty(words, dtype=torch.int64)


def _cuda_iterations(call: SlotCall, workspace: torch.Tensor, cluster: int = 0) -> tuple[torch.Tensor, ...]:
    options = call.options
    weights = widened(call.params, torch.float32)
    rows = [None if w is None else (w.T if w is weights.k_weight else w).contiguous() for w in flat(weights)]
    slots = call.slots.float().contiguous()
    token_mask = None if call.token_mask is None else call.token_mask[:, 0].float().contiguous()
    map_shape = (*slots.shape[:2], call.inputs.shape[1])
    dots, attn = (slots.new_empty(map_shape if asked else 0) for asked in (options.with_dots, options.with_attn))
    results = torch.empty_like(slots), slots.new_empty(options.kept, *slots.shape), dots, attn
    _native.C.slot_iterations_forward_cuda(
        *_native_views(call.inputs, slots), _native_views(slots, *rows)[1:],
        *_native_views(slots, token_mask, _open_slots(call.slot_mask))[1:], *_native_views(*results, workspace),
        options.iters, options.scale, options.eps_add, options.denominator, options.ln_eps,
        options.activation == "gelu", cluster, *_native.stream(slots),
    )  # fmt: skip
    out, states, dots, attn = results
    return out.to(call.slots.dtype), dots, attn, states


def _steps_call(call: SlotCall) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Views of inputs, weights and masks, and what ends the arguments of both entry points."""
    options, like = call.options, call.inputs
    token_mask = None if call.token_mask is None else call.token_mask.float().contiguous()
    weights = [w if w is None else w.contiguous() for w in flat(call.params)]
    inputs, *masks = _native_views(like, token_mask, _open_slots(call.slot_mask))
    views = inputs, _native_views(like, *weights)[1:], *masks
    numbers = (
        options.groups, options.scale, options.eps_add, options.denominator, options.ln_eps,
        options.activation == "gelu",
    )  # fmt: skip

    def allocate(words: int) -> Any:
        return _native.view(like.new_empty(words, dtype=torch.int64))

    return views, (numbers, allocate, *_native.stream(like))


def _cuda_steps(call: SlotCall) -> tuple[torch.Tensor, ...]:
    options = call.options
    views, rest = _steps_call(call)
    slots = call.slots.contiguous()
    map_shape = (*slots.shape[:2], call.inputs.shape[1])
    floats = functools.partial(slots.new_empty, dtype=torch.float32)
    dots, attn = (floats(map_shape if asked else 0) for asked in (options.with_dots, options.with_attn))
    out, states = torch.empty_like(slots), floats((options.kept, *slots.shape))
    tensors = _native_views(states, slots, out, dots, attn)
    _native.C.slot_steps_forward_cuda(*views, *tensors, options.iters, *rest)
    return out, dots, attn, states


def _cuda_steps_backward(
    grad_slots: torch.Tensor, grad_dots: torch.Tensor, grad_attn: torch.Tensor, states: torch.Tensor, call: SlotCall
) -> list[torch.Tensor]:
    views, rest = _steps_call(call)
    packed = torch.contiguous_format
    grads = [None if w is None else torch.empty_like(w, memory_format=packed) for w in flat(call.params)]
    grad = grad_slots.to(torch.float32, memory_format=packed, copy=True)
    grad_inputs = torch.empty_like(call.inputs, memory_format=packed)
    maps = [None if m is None else m[:, 0] for m in _slot_iterations.of_last(grad_dots, grad_attn, call)]
    given = _native_views(states, *maps, grad, grad_inputs)
    _native.C.slot_steps_backward_cuda(*views, *given, _native_views(states, *grads)[1:], *rest)
    if call.options.grad_mode == "fixed_point":
        grad.zero_()
    return [grad_inputs, grad.to(call.slots.dtype), *(g for g in grads if g is not None)]


def cuda_forward(*args: Any) -> tuple[torch.Tensor, ...]:
    call = SlotCall.of(*args)
    if not _absorbed_head(call):
        return _slot_iterations.forward(_CUDA, *args)
    workspace = _one_launch_workspace(call)
    return _cuda_steps(call) if workspace is None else _cuda_iterations(call, workspace)


def cuda_backward(*args: Any) -> list[torch.Tensor]:
    grad_slots, grad_dots, grad_attn, states, *rest = args
    call = SlotCall.of(*rest)
    if _absorbed_head(call) and not call.options.mask_grad:
        return _cuda_steps_backward(grad_slots, grad_dots, grad_attn, states, call)
    return _slot_iterations.backward(_CUDA, *args)
