"""CUDA slot attention over the tokens on the host shim, against plain torch in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch.utils.dlpack import to_dlpack

EMPTY = torch.empty(0)
EPS = 1e-3
HALVES = [torch.float16, torch.bfloat16]


@dataclass
class Call:
    """Arguments of one pass; keys and values (B,Hk,N,Dk) and (B,Hv,N,Dv), q (B,H,S,Dk)."""

    keys: torch.Tensor
    values: torch.Tensor
    q: torch.Tensor
    c: torch.Tensor
    mean: torch.Tensor = EMPTY
    rstd: torch.Tensor = EMPTY
    token_mask: torch.Tensor = EMPTY
    slot_mask: torch.Tensor = EMPTY
    groups: int = 1
    joint: bool = False

    @property
    def heads(self) -> int:
        return self.q.shape[1]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed))


def absorbed(batch: int, n: int, d: int, slots: int, heads: int = 1, **more: object) -> Call:
    """Keys and values are the inputs themselves, normalised on the way."""
    x = randn(batch, n, d) * 2 + 3
    mean, variance = x.mean(-1), x.var(-1, unbiased=False)
    q = randn(batch, heads, slots, d, seed=1) / d**0.5
    rows = x[:, None]
    return Call(rows, rows, q, randn(batch, heads, slots, seed=2), mean, (variance + 1e-5).rsqrt(), **more)


def projected(
    batch: int,
    n: int,
    dk: int,
    dv: int,
    slots: int,
    heads: int = 1,
    own: tuple[bool, bool] = (True, True),
    **more: object,
) -> Call:
    keys = randn(batch, heads if own[0] else 1, n, dk)
    values = randn(batch, heads if own[1] else 1, n, dv, seed=1)
    q = randn(batch, heads, slots, dk, seed=2) / dk**0.5
    return Call(keys, values, q, randn(batch, heads, slots, seed=3), **more)


def rows_of(call: Call, rows: torch.Tensor) -> torch.Tensor:
    if call.mean.numel() == 0:
        return rows
    return (rows - call.mean[:, None, :, None].double()) * call.rstd[:, None, :, None].double()


def formula(
    call: Call, keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """(num, den, dots, attn) of normalised keys and values."""
    batch, heads, slots, _ = q.shape
    n = keys.shape[2]
    dots = q @ keys.transpose(2, 3) + c[..., None]
    if call.slot_mask.numel():
        dots = dots.masked_fill(call.slot_mask[:, None, :, None] == 0, -torch.inf)
    if call.joint:
        attn = dots.reshape(batch, heads * slots, n).softmax(1).view_as(dots)
    else:
        attn = dots.reshape(batch, heads, call.groups, -1, n).softmax(3).view_as(dots)
    weights = attn + EPS
    if call.token_mask.numel():
        mask = call.token_mask.double().repeat_interleave(slots // call.groups, 1)
        weights = weights * mask[:, None]
    return weights @ values, weights.sum(-1), dots, attn


def workspace(module: ModuleType, call: Call, backward: bool) -> torch.Tensor:
    batch, heads, slots, dk = call.q.shape
    words = module.slot_attend_workspace_cuda(
        batch, heads, slots, call.keys.shape[2], dk, call.values.shape[3], call.keys.shape[1], call.values.shape[1],
        call.groups, call.keys.element_size(), call.joint, call.keys is call.values, backward, 0,
    )  # fmt: skip
    return torch.full((words,), -1)  # NaN for floats


def inputs(call: Call) -> tuple[torch.Tensor, ...]:
    return call.keys, call.values, call.mean, call.rstd, call.q, call.c, call.token_mask, call.slot_mask


def forward(module: ModuleType, call: Call, maps: bool = True) -> tuple[torch.Tensor, ...]:
    shape = (*call.q.shape[:3], call.keys.shape[2])
    num = torch.full((*call.q.shape[:3], call.values.shape[3]), torch.nan)
    den = torch.full(call.q.shape[:3], torch.nan)
    dots, attn = (torch.full(shape, torch.nan) if maps else EMPTY for _ in range(2))
    tensors = (*inputs(call), num, den, dots, attn, workspace(module, call, False))
    module.slot_attend_forward_cuda(*map(to_dlpack, tensors), call.groups, call.joint, EPS, 0, 0)
    return (num, den, dots, attn) if maps else (num, den)


def backward(
    module: ModuleType, call: Call, grads: tuple[torch.Tensor, ...], add: bool = True
) -> tuple[torch.Tensor, ...]:
    """(grad_keys, grad_values, grad_q, grad_c); the first two are one where keys are values, and were ones before if
    they are added to."""
    before = 1.0 if add else torch.nan
    grad_keys = torch.full(call.keys.shape, before)
    grad_values = grad_keys if call.keys is call.values else torch.full(call.values.shape, before)
    grad_q, grad_c = torch.full(call.q.shape, torch.nan), torch.full(call.c.shape, torch.nan)
    outputs = (grad_keys, grad_values, grad_q, grad_c)
    tensors = (*grads, *inputs(call), *outputs, workspace(module, call, True))
    module.slot_attend_backward_cuda(*map(to_dlpack, tensors), call.groups, call.joint, EPS, add, 0, 0)
    return outputs


def close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Within float32 rounding of the largest value; NaN and infinities in the same places."""
    expected = expected.detach()
    assert torch.equal(found.isnan(), expected.isnan()), name
    assert torch.equal(found.isinf(), expected.isinf()), name
    finite = expected.isfinite()
    scale = expected[finite].abs().max().clamp_min(1e-3) if finite.any() else 1.0
    error = (found.double() - expected)[finite].abs().max() / scale if finite.any() else 0.0
    assert error < 4e-6, (name, float(error))


def shut_out(call: Call) -> torch.Tensor:
    """Where a slot mask made the dots infinite, whatever gradient arrives there."""
    if call.slot_mask.numel() == 0:
        return torch.zeros(1, dtype=torch.bool)
    return call.slot_mask[:, None, :, None] == 0


def check(module: ModuleType, call: Call) -> None:
    """Both directions, with all outputs and without the optional ones."""
    leaves = [rows_of(call, call.keys.double()).requires_grad_()]
    leaves.append(leaves[0] if call.keys is call.values else rows_of(call, call.values.double()).requires_grad_())
    leaves += [call.q.double().requires_grad_(), call.c.double().requires_grad_()]
    expected = formula(call, *leaves)
    found = forward(module, call)
    for name, x, y in zip(("num", "den", "dots", "attn"), found, expected, strict=True):
        close(x, y, name)
    for x, y in zip(forward(module, call, maps=False), found, strict=False):
        assert torch.equal(x, y)

    grads = [randn(*x.shape, seed=7 + i) for i, x in enumerate(found)]
    loss = sum((x * g.double()).sum() for x, g in zip(expected[:2], grads[:2], strict=True))
    close_gradients(module, call, leaves, loss, (*grads[:2], EMPTY, EMPTY))
    grads[2][~expected[2].isfinite() & ~shut_out(call)] = 0  # nothing asks for the gradient of an infinite dot
    loss = loss + (expected[2] * grads[2].double()).where(expected[2].isfinite(), 0).sum()
    loss = loss + (expected[3] * grads[3].double()).sum()
    close_gradients(module, call, leaves, loss, tuple(grads))


def close_gradients(
    module: ModuleType, call: Call, leaves: list[torch.Tensor], loss: torch.Tensor, grads: tuple[torch.Tensor, ...]
) -> None:
    expected = list(torch.autograd.grad(loss, leaves, retain_graph=True))
    found = backward(module, call, grads)
    for i in range(2):
        expected[i] = expected[i] + 1
    for name, x, y in zip(("grad_keys", "grad_values", "grad_q", "grad_c"), found, expected, strict=True):
        close(x, y, name)


@pytest.mark.parametrize(
    ("batch", "n", "d", "slots"),
    [(1, 1, 1, 1), (2, 50, 33, 7), (1, 100, 20, 11), (2, 37, 64, 8), (1, 140, 64, 7)],
)
def test_absorbed(seeded: ModuleType, batch: int, n: int, d: int, slots: int) -> None:
    check(seeded, absorbed(batch, n, d, slots))


@pytest.mark.parametrize(
    ("n", "d", "slots"), [(40, 384, 16), (70, 384, 33), (33, 1024, 8), (20, 128, 64), (70, 256, 64)]
)
def test_wide(shim: ModuleType, n: int, d: int, slots: int) -> None:
    for seed in (0, 3, 102):
        shim.set_seed(seed)
        check(shim, absorbed(1, n, d, slots))


@pytest.mark.parametrize("d", [40, 128])
def test_gradients_of_tokens_are_written_or_added(shim: ModuleType, d: int) -> None:
    call = absorbed(2, 40, d, 40, groups=2)
    grads = *(randn(*x.shape) for x in forward(shim, call)[:2]), EMPTY, EMPTY
    added = backward(shim, call, grads)
    written = backward(shim, call, grads, add=False)
    close(written[0], (added[0] - 1).double(), "grad_keys")
    for x, y in zip(added[2:], written[2:], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("own", "dk", "dv"), [((True, True), 16, 24), ((False, True), 20, 9), ((True, False), 7, 40)])
@pytest.mark.parametrize("joint", [False, True])
def test_heads(seeded: ModuleType, own: tuple[bool, bool], dk: int, dv: int, joint: bool) -> None:
    check(seeded, projected(2, 45, dk, dv, 5, heads=3, own=own, joint=joint))


@pytest.mark.parametrize("joint", [False, True])
def test_shared_heads(seeded: ModuleType, joint: bool) -> None:
    check(seeded, absorbed(2, 35, 24, 7, heads=4, joint=joint))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("slots", "heads"), [(24, 4), (70, 1), (70, 2)])
def test_more_rows_than_a_block_takes(shim: ModuleType, slots: int, heads: int, joint: bool) -> None:
    for seed in (1, 4, 101):
        shim.set_seed(seed)
        check(shim, absorbed(1, 36, 16, slots, heads=heads, joint=joint))
        check(shim, projected(1, 36, 16, 12, slots, heads=heads, joint=joint))


def test_groups_and_masks(seeded: ModuleType) -> None:
    masks = {
        "token_mask": torch.rand(2, 6, 41, generator=torch.Generator().manual_seed(0)),
        "slot_mask": torch.ones(2, 24),
    }
    masks["token_mask"][0, 2] = 0
    masks["slot_mask"][0, 5] = masks["slot_mask"][1, 20:23] = 0
    check(seeded, absorbed(2, 41, 32, 24, groups=6, **masks))
    check(seeded, projected(2, 41, 8, 8, 24, heads=2, groups=6, **masks))


def test_semantics_of_smtc(shim: ModuleType) -> None:
    """16 groups of 4 in one block."""
    mask = (torch.rand(1, 16, 48, generator=torch.Generator().manual_seed(1)) > 0.7).float()
    for seed in (2, 103):
        shim.set_seed(seed)
        check(shim, absorbed(1, 48, 96, 64, groups=16, token_mask=mask))


def test_nobody_takes_part(seeded: ModuleType) -> None:
    """All slots of an item shut out: NaN in that item only; no token of an item: zeros."""
    slot_mask = torch.ones(2, 5)
    slot_mask[1] = 0
    call = absorbed(2, 20, 16, 5, slot_mask=slot_mask)
    num, den, dots, attn = forward(seeded, call)
    for x, y in zip((num, den, dots, attn), formula(call, *reference_leaves(call)), strict=True):
        close(x, y, "masked")
    assert num[1].isnan().all() and attn[1].isnan().all() and dots[1].isinf().all() and num[0].isfinite().all()
    call = replace(call, slot_mask=EMPTY, token_mask=torch.zeros(2, 1, 20))
    num, den = forward(seeded, call, maps=False)
    assert not num.any() and not den.any()
    check(seeded, call)


def reference_leaves(call: Call) -> tuple[torch.Tensor, ...]:
    keys = rows_of(call, call.keys.double())
    return keys, keys if call.keys is call.values else call.values.double(), call.q.double(), call.c.double()


def test_nan_stays_in_its_item(seeded: ModuleType) -> None:
    call = absorbed(3, 30, 20, 4)
    call.keys[1, 0, 7, 3] = torch.nan
    call.mean[1, 7] = call.rstd[1, 7] = torch.nan
    found = forward(seeded, call)
    for name, x, y in zip(("num", "den", "dots", "attn"), found, formula(call, *reference_leaves(call)), strict=True):
        close(x, y, name)
    assert found[0][1].isnan().all() and found[0][[0, 2]].isfinite().all()
    gradients = backward(seeded, call, (*(randn(*x.shape) for x in found[:2]), EMPTY, EMPTY))
    assert all(x[[0, 2]].isfinite().all() for x in gradients)
    assert gradients[2][1].isnan().all()


@pytest.mark.parametrize("value", [1e30, torch.inf])
def test_extreme_dots(seeded: ModuleType, value: float) -> None:
    """A dot that overflows decides the softmax of its token, or ends it, as in torch."""
    call = projected(1, 20, 8, 8, 4)
    call.c[0, 0, 2] = -value
    check(seeded, call)
    call.c[0, 0, 1] = value
    for name, x, y in zip(
        ("num", "den", "dots", "attn"), forward(seeded, call), formula(call, *reference_leaves(call)), strict=True
    ):
        close(x, y, name)


def test_infinite_products(seeded: ModuleType) -> None:
    """Products of infinities and overflow are torch's, though split operands cannot give them."""
    call = projected(2, 40, 12, 8, 9)
    call.q[0, 0, :, 3] = -call.q[0, 0, :, 3].abs() - 0.5
    call.q[0, 0, 4, 3] = 1.0
    call.keys[0, 0, 5, 3] = 3e38  # far below all others for every slot but one
    call.keys[1, 0, 6, 2] = torch.inf
    call.values[1, 0, 7, 1] = -torch.inf
    call.q[0, 0, 2] *= 1e3  # overflows, to a dot of -inf
    single = [x.float() for x in reference_leaves(call)]
    for name, x, y in zip(("num", "den", "dots", "attn"), forward(seeded, call), formula(call, *single), strict=True):
        close(x, y, name)


def test_overflowing_dots_of_a_backward(seeded: ModuleType) -> None:
    call = projected(1, 40, 12, 8, 9)
    call.q[..., 3] = 0
    call.q[0, 0, 2:7, 3] = -1e8 * torch.linspace(1.01, 1.97, 5)  # remainders of either sign overflow, too
    call.keys[..., 3] = 0
    call.keys[0, 0, 5, 3] = 3e38
    leaves = [x.float().requires_grad_() for x in reference_leaves(call)]
    num, den, dots, _ = formula(call, *leaves)
    assert dots.isinf().any() and not dots.isnan().any()
    grads = (randn(*num.shape), randn(*den.shape))
    expected = torch.autograd.grad([num, den], leaves, grads)
    found = backward(seeded, call, (*grads, EMPTY, EMPTY))
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        close(x, y + (i < 2), "gradient")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "d"), [(40, 64), (37, 20), (20, 33), (33, 384)])
def test_16_bit_storage(shim: ModuleType, dtype: torch.dtype, n: int, d: int) -> None:
    for seed in (0, 1, 104):
        shim.set_seed(seed)
        call = absorbed(2, n, d, 9)
        rows = call.keys.to(dtype)
        check(shim, replace(call, keys=rows, values=rows))
        call = projected(2, n, d, 24, 5, heads=2)
        check(shim, replace(call, keys=call.keys.to(dtype), values=call.values.to(dtype)))


def test_strides(seeded: ModuleType) -> None:
    """Heads that lie between tokens and channels, rows that are not aligned, and a batch without a stride."""
    wide = randn(2, 30, 3 * 16)
    keys = wide.view(2, 30, 3, 16).transpose(1, 2)
    values = randn(2, 30, 3 * 9 + 1)[..., 1:].unflatten(-1, (3, 9)).transpose(1, 2)
    call = projected(2, 30, 16, 9, 6, heads=3)
    check(seeded, replace(call, keys=keys, values=values))
    check(seeded, replace(call, keys=keys[:1].expand(2, -1, -1, -1), values=values[:, :1]))


def test_many_shares_of_the_tokens(seeded: ModuleType) -> None:
    """So many tokens per item that blocks share them: the same bits on every schedule, and for every batch."""
    call = absorbed(2, 600, 48, 5)
    first = forward(seeded, call)
    seeded.set_seed(0)
    for x, y in zip(first, forward(seeded, call), strict=True):
        assert torch.equal(x, y)
    check(seeded, call)


def test_large_mean(seeded: ModuleType) -> None:
    """Rows are centred before anything is multiplied."""
    call = absorbed(1, 40, 64, 6)
    rows = call.keys + 1000
    call = replace(call, keys=rows, values=rows, mean=rows.double().mean(-1)[:, 0].float())
    check(seeded, call)


def test_less_shared_memory(shim: ModuleType) -> None:
    """99 KB: one stage, and the rows of one softmax over two blocks."""
    shim.set_shared_limit(99 * 1024)
    try:
        shim.set_seed(3)
        check(shim, absorbed(1, 40, 384, 16))
        check(shim, absorbed(1, 40, 384, 64))
        with pytest.raises(shim.ArgumentError, match="shared memory"):
            forward(shim, absorbed(1, 4, 4096, 8))
    finally:
        shim.set_shared_limit(227 * 1024)


def test_nothing(shim: ModuleType) -> None:
    call = projected(1, 0, 8, 4, 3)
    num, den, *_ = forward(shim, call)
    assert not num.any() and not den.any()
    _, _, grad_q, grad_c = backward(shim, call, (num, den, EMPTY, EMPTY))
    assert not grad_q.any() and not grad_c.any()


def test_refusals(shim: ModuleType) -> None:
    call = projected(1, 5, 8, 4, 6)
    with pytest.raises(shim.ArgumentError, match="must be float32, float16 or bfloat16"):
        forward(shim, replace(call, keys=call.keys.double()))
    with pytest.raises(shim.ArgumentError, match="do not agree"):
        forward(shim, replace(call, keys=call.keys[..., :4]))
    with pytest.raises(shim.ArgumentError, match="groups must divide"):
        forward(shim, replace(call, groups=4))
    with pytest.raises(shim.ArgumentError, match="joint heads take one group"):
        forward(shim, replace(call, groups=2, joint=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("d", [1, 33, 64, 388, 1024])
def test_token_statistics(seeded: ModuleType, dtype: torch.dtype, d: int) -> None:
    x = (randn(2, 5, d) + 100).to(dtype).transpose(0, 1)
    mean, rstd = torch.full((5, 2), torch.nan), torch.full((5, 2), torch.nan)
    seeded.token_statistics_cuda(*map(to_dlpack, (x, mean, rstd)), 1e-5, 0, 0)
    wide = x.double()
    variance = wide.var(-1, unbiased=False)
    torch.testing.assert_close(mean.double(), wide.mean(-1), rtol=5e-7, atol=0)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=2e-5, atol=0)
