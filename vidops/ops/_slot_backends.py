"""What the backends of `vidops.slot_attention` run: the driver around each one's pass over the tokens."""

from __future__ import annotations

from typing import Any

import torch

from vidops import _native
from vidops.ops import _backends, _slot_iterations
from vidops.reference.slot_attend import attend_backward, attend_forward

REFERENCE = _slot_iterations.Attend(attend_forward, attend_backward)


def _cpu_attend_forward(
    keys: torch.Tensor,
    values: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    q: torch.Tensor,
    c: torch.Tensor,
    token_mask: torch.Tensor | None,
    slot_mask: torch.Tensor | None,
    groups: int,
    joint: bool,
    eps_add: float,
    with_dots: bool,
    with_attn: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    shape = (*q.shape[:3], keys.shape[2])
    num, den = q.new_empty(*q.shape[:3], values.shape[3]), q.new_empty(q.shape[:3])
    dots, attn = (q.new_empty(shape) if asked else None for asked in (with_dots, with_attn))
    tokens = _native_views(keys, values, mean, rstd, q, c, token_mask, _words(slot_mask))
    results = _native_views(num, den, dots, attn)
    _native.C.slot_attend_forward_cpu(*tokens, groups, joint, eps_add, *results, _native.threads())
    return num, den, dots, attn


def _cpu_attend_backward(
    grad_num: torch.Tensor,
    grad_den: torch.Tensor,
    grad_dots: torch.Tensor | None,
    grad_attn: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    q: torch.Tensor,
    c: torch.Tensor,
    token_mask: torch.Tensor | None,
    slot_mask: torch.Tensor | None,
    groups: int,
    joint: bool,
    eps_add: float,
    grad_keys: torch.Tensor,
    grad_values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    grads = _native_views(grad_num, grad_den, grad_dots, grad_attn)
    tokens = _native_views(keys, values, mean, rstd, q, c, token_mask, _words(slot_mask))
    grad_q, grad_c = q.new_empty(q.shape), c.new_empty(c.shape)
    results = _native_views(grad_keys, grad_values, grad_q, grad_c)
    _native.C.slot_attend_backward_cpu(*grads, *tokens, groups, joint, eps_add, *results, _native.threads())
    return grad_q, grad_c


def _cpu_statistics(inputs: torch.Tensor, dtype: torch.dtype, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    mean, rstd = (torch.empty(inputs.shape[:2], dtype=dtype) for _ in range(2))
    _native.C.token_statistics_cpu(*_native_views(inputs, mean, rstd), eps, _native.threads())
    return mean, rstd


def _native_views(*tensors: torch.Tensor | None) -> list[Any]:
    """Absent tensors are empty ones, on the device of the others."""
    given = next(t for t in tensors if t is not None)
    return [_native.view(given.new_empty(0) if t is None else t) for t in tensors]


def _words(slot_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if slot_mask is None else slot_mask.to(torch.int32)


_CPU = _slot_iterations.Attend(_cpu_attend_forward, _cpu_attend_backward, _cpu_statistics)


def cpu_forward(inputs: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    return _slot_iterations.forward(_CPU, *_backends.upcast(inputs), *args)


def cpu_backward(*args: Any) -> list[torch.Tensor]:
    *grads, states, inputs = args[:5]
    found = _slot_iterations.backward(_CPU, *grads, states, *_backends.upcast(inputs), *args[5:])
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
    return q.new_empty(
        _native.C.slot_attend_workspace_cuda(*sizes, *kind, _native.stream(q)[0]), dtype=torch.int64
    )


def _open_slots(slot_mask: torch.Tensor | None) -> torch.Tensor | None:
    """1 for a slot that takes part, 0 for one that does not."""
    return None if slot_mask is None else (~slot_mask).float()


def _cuda_attend_forward(
    keys: torch.Tensor,
    values: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    q: torch.Tensor,
    c: torch.Tensor,
    token_mask: torch.Tensor | None,
    slot_mask: torch.Tensor | None,
    groups: int,
    joint: bool,
    eps_add: float,
    with_dots: bool,
    with_attn: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    shape = (*q.shape[:3], keys.shape[2])
    num, den = q.new_empty(*q.shape[:3], values.shape[3]), q.new_empty(q.shape[:3])
    dots, attn = (q.new_empty(shape) if asked else None for asked in (with_dots, with_attn))
    workspace = _cuda_workspace(keys, values, q, groups, joint, False)
    tokens = (keys, values, mean, rstd, q.contiguous(), c.contiguous(), token_mask, _open_slots(slot_mask))
    views = _native_views(*tokens, num, den, dots, attn, workspace)
    _native.C.slot_attend_forward_cuda(*views, groups, joint, eps_add, *_native.stream(q))
    return num, den, dots, attn


def _cuda_attend_backward(
    grad_num: torch.Tensor,
    grad_den: torch.Tensor,
    grad_dots: torch.Tensor | None,
    grad_attn: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    q: torch.Tensor,
    c: torch.Tensor,
    token_mask: torch.Tensor | None,
    slot_mask: torch.Tensor | None,
    groups: int,
    joint: bool,
    eps_add: float,
    grad_keys: torch.Tensor,
    grad_values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_q, grad_c = q.new_empty(q.shape), c.new_empty(c.shape)
    workspace = _cuda_workspace(keys, values, q, groups, joint, True)
    grads = (grad_num.contiguous(), grad_den.contiguous(), grad_dots, grad_attn)
    tokens = (keys, values, mean, rstd, q.contiguous(), c.contiguous(), token_mask, _open_slots(slot_mask))
    views = _native_views(*grads, *tokens, grad_keys, grad_values, grad_q, grad_c, workspace)
    _native.C.slot_attend_backward_cuda(*views, groups, joint, eps_add, *_native.stream(q))
    return grad_q, grad_c


def _cuda_statistics(inputs: torch.Tensor, dtype: torch.dtype, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    mean, rstd = (inputs.new_empty(inputs.shape[:2], dtype=dtype) for _ in range(2))
    _native.C.token_statistics_cuda(*_native_views(inputs, mean, rstd), eps, *_native.stream(inputs))
    return mean, rstd


_CUDA = _slot_iterations.Attend(_cuda_attend_forward, _cuda_attend_backward, _cuda_statistics)


def cuda_forward(*args: Any) -> tuple[torch.Tensor, ...]:
    return _slot_iterations.forward(_CUDA, *args)


def cuda_backward(*args: Any) -> list[torch.Tensor]:
    return _slot_iterations.backward(_CUDA, *args)
