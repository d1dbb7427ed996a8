"""The Triton pass of slot attention against plain PyTorch in float64: interpreted, or on a card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from matrix import DEVICE, INTERPRETED, equal

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED and DEVICE != "cuda", reason="Triton has no device to run on")

HALF = torch.bfloat16
# Largest errors relative to the largest value. Inputs are rounded before both sides see them, and nothing else is.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-6, HALF: 2e-6}


@dataclass(frozen=True)
class Case:
    items: int = 2
    heads: int = 1
    slots: int = 5
    tokens: int = 37
    width: int = 20
    value_width: int | None = None  # of projected keys and values; raw inputs are both
    own: bool = True  # projected keys and values of every head
    groups: int = 1
    joint: bool = False
    token_mask: bool = False
    slot_mask: bool = False
    eps: float = 1e-3
    dtype: torch.dtype = torch.float32


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(case: Case) -> dict[str, Any]:
    """Inputs of the forward by name."""
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    b, h, s, n = case.items, case.heads, case.slots, case.tokens
    raw = case.value_width is None
    kv_heads = 1 if raw or not case.own else h
    keys = (randn(b, kv_heads, n, case.width, seed=1) + 0.5).to(DEVICE, case.dtype)
    values = keys if raw else randn(b, kv_heads, n, case.value_width or 1, seed=2).to(DEVICE, case.dtype)
    mean = rstd = token_mask = slot_mask = None
    if raw:
        rows = keys[:, 0].to(acc)
        mean, rstd = rows.mean(-1), (rows.var(-1, unbiased=False) + 1e-5).rsqrt()
    if case.token_mask:
        token_mask = (randn(b, case.groups, n, seed=3) > -0.5).to(DEVICE)
    if case.slot_mask:
        slot_mask = (randn(b, s, seed=4) > 0.3).to(DEVICE)
        slot_mask[:, :: s // case.groups] = False  # one slot of every group takes part
    return {
        "keys": keys, "values": values, "mean": mean, "rstd": rstd,
        "q": (randn(b, h, s, case.width, seed=5) * case.width**-0.5).to(DEVICE, acc),
        "c": randn(b, h, s, seed=6).to(DEVICE, acc), "token_mask": token_mask, "slot_mask": slot_mask,
        "groups": case.groups, "joint": case.joint, "eps_add": case.eps,
    }  # fmt: skip


def expected(inputs: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """num, den, dots, attn in float64, and the tensors their gradients are wanted of: rows as used, q, c."""
    q, c = inputs["q"].double().requires_grad_(), inputs["c"].double().requires_grad_()
    keys, values = inputs["keys"].double(), inputs["values"].double()
    if inputs["mean"] is not None:
        keys = (keys - inputs["mean"].double()[:, None, :, None]) * inputs["rstd"].double()[:, None, :, None]
    keys.requires_grad_()
    raw = inputs["values"] is inputs["keys"]
    values = keys if raw else values.requires_grad_()
    b, h, s, _ = q.shape
    dots = q @ keys.transpose(-1, -2) + c[..., None]
    if inputs["slot_mask"] is not None:
        dots = dots.masked_fill(inputs["slot_mask"][:, None, :, None], -float("inf"))
    units = (1, h * s) if inputs["joint"] else (h * inputs["groups"], s // inputs["groups"])
    attn = dots.reshape(b, *units, dots.shape[-1]).softmax(2).reshape(dots.shape)
    w = attn + inputs["eps_add"]
    if inputs["token_mask"] is not None:
        w = w * inputs["token_mask"].double().repeat_interleave(s // inputs["groups"], 1)[:, None]
    return [w @ values, w.sum(-1), dots, attn], [keys, *([] if raw else [values]), q, c]


def forward(inputs: dict[str, Any], maps: bool = True) -> list[torch.Tensor]:
    from vidops.kernels.slot_attention import attend_forward

    return [t for t in attend_forward(**inputs, with_dots=maps, with_attn=maps) if t is not None]


def backward(inputs: dict[str, Any], grads: list[torch.Tensor], start: float = 0.0) -> list[torch.Tensor]:
    """Gradients of rows, q and c; the buffers of the former begin with `start`."""
    from vidops.kernels.slot_attention import attend_backward

    keys, values, q = inputs["keys"], inputs["values"], inputs["q"]
    grads = [g.to(q.dtype) for g in grads] + [None] * (4 - len(grads))  # type: ignore[list-item]
    grad_keys = torch.full(keys.shape, start, dtype=q.dtype, device=DEVICE)
    grad_values = grad_keys if values is keys else torch.full(values.shape, start, dtype=q.dtype, device=DEVICE)
    grad_q, grad_c = attend_backward(*grads, **inputs, grad_keys=grad_keys, grad_values=grad_values)
    return [grad_keys, *([] if values is keys else [grad_values]), grad_q, grad_c]


def check(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        finite = w.isfinite()
        assert torch.equal(g.isneginf(), w.isneginf())
        size = w[finite].abs().max().clamp_min(1e-6)
        assert ((g.double() - w)[finite].abs().max() / size) <= tolerance


def compare(case: Case, maps: bool = True) -> None:
    """Forward, and gradients from random gradients of every output, against float64."""
    inputs = make(case)
    outputs, leaves = expected(inputs)
    outputs = outputs if maps else outputs[:2]
    tolerance = TOLERANCE[case.dtype]
    check(forward(inputs, maps), [t.detach() for t in outputs], tolerance)
    grads = [randn(*t.shape, seed=10 + i).to(DEVICE) for i, t in enumerate(outputs)]
    grads[0] = grads[0] / case.tokens  # the size of gradients of weighted means
    # The constant dots of masked slots have no gradient.
    objective = sum((t.masked_fill(t.isneginf(), 0.0) * g).sum() for t, g in zip(outputs, grads, strict=True))
    assert isinstance(objective, torch.Tensor)
    want = list(torch.autograd.grad(objective, leaves))
    start = 0.25
    rows = len(leaves) - 2
    check(backward(inputs, grads, start), [g + start if i < rows else g for i, g in enumerate(want)], tolerance)


CASES = {
    "plain": Case(),
    "one_slot": Case(slots=1),
    "one_token": Case(tokens=1),
    "one_of_all": Case(items=1, slots=1, tokens=1, width=1),
    "no_token": Case(tokens=0),
    "odd": Case(items=3, slots=7, tokens=131, width=33),
    "narrow": Case(tokens=70, width=64, slots=7),
    "wide": Case(items=1, width=384, slots=3, tokens=18),
    "several_shares": Case(items=1, width=300, slots=3, tokens=10),
    "many_slots": Case(items=1, slots=70, width=24, token_mask=True, slot_mask=True),
    "groups": Case(slots=64, groups=16, tokens=70, token_mask=True),
    "odd_groups": Case(slots=15, groups=5, token_mask=True, slot_mask=True),
    "heads_and_groups": Case(heads=3, slots=6, groups=2, token_mask=True, slot_mask=True),
    "heads": Case(heads=2, slots=6, slot_mask=True),
    "joint": Case(heads=3, slots=5, joint=True, slot_mask=True, token_mask=True),
    "joint_of_many": Case(items=1, heads=4, slots=20, joint=True, slot_mask=True, token_mask=True),
    "projected": Case(value_width=36),
    "projected_to_few": Case(width=6, value_width=384, items=1, tokens=18),
    "own_keys": Case(heads=2, value_width=12, slot_mask=True, token_mask=True),
    "own_keys_groups": Case(heads=2, value_width=12, slots=6, groups=2, token_mask=True),
    "own_keys_many": Case(items=1, heads=2, value_width=12, slots=40),
    "own_keys_joint": Case(heads=3, value_width=20, joint=True, slot_mask=True, token_mask=True),
    "shared_projected": Case(heads=3, value_width=12, own=False),
    "published_eps": Case(eps=1e-8, slot_mask=True),
    "no_eps": Case(eps=0.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name: str, dtype: torch.dtype) -> None:
    if CASES[name].tokens:
        compare(replace(CASES[name], dtype=dtype))
        return
    got = forward(make(replace(CASES[name], dtype=dtype)))
    assert not got[0].any() and not got[1].any() and got[2].numel() == got[3].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float16, HALF], ids=str)
@pytest.mark.parametrize("name", ["narrow", "wide", "groups", "joint_of_many", "own_keys", "published_eps"])
def test_halves(name: str, dtype: torch.dtype) -> None:
    compare(replace(CASES[name], dtype=dtype))


@pytest.mark.parametrize("name", ["plain", "own_keys_joint", "groups"])
def test_without_maps(name: str) -> None:
    compare(CASES[name], maps=False)


def test_float16_keeps_weights_below_its_own_range() -> None:
    """A masked slot gets eps of every token: 1e-8 is zero in float16, and the mean of the values is not."""
    inputs = make(Case(dtype=torch.float16, eps=1e-8, slots=4, value_width=20))
    inputs["slot_mask"] = torch.tensor([[True, False, False, False]] * 2, device=DEVICE)
    num, den, *_ = forward(inputs)
    mean = inputs["values"].double().mean(2)
    assert ((num / den[..., None])[:, :, 0].double() - mean).abs().max() < 1e-5


def test_soft_token_mask() -> None:
    inputs = make(Case(groups=1))
    inputs["token_mask"] = randn(2, 1, 37, seed=8).abs().float().to(DEVICE)
    check(forward(inputs), [t.detach() for t in expected(inputs)[0]], TOLERANCE[torch.float32])


def test_empty_token_mask_gives_zero() -> None:
    inputs = make(Case(slots=4, groups=2, token_mask=True))
    inputs["token_mask"][:, 1] = False
    num, den, *_ = forward(inputs)
    assert not num[:, :, 2:].any() and not den[:, :, 2:].any() and den[:, :, :2].all()


@pytest.mark.parametrize("case", [Case(slot_mask=True), Case(heads=4, slots=20, joint=True, slot_mask=True)], ids=str)
def test_all_slots_masked_is_nan_in_that_item(case: Case) -> None:
    inputs = make(case)
    alone = forward(inputs)
    inputs["slot_mask"][1] = True
    got = forward(inputs)
    assert got[0][1].isnan().all() and got[1][1].isnan().all() and got[3][1].isnan().all()
    assert equal(tuple(t[0] for t in got), tuple(t[0] for t in alone))


@pytest.mark.parametrize("name", ["plain", "odd_groups", "own_keys_joint"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_stays_in_its_item(name: str, value: float) -> None:
    case = replace(CASES[name], items=3)
    inputs = make(case)
    clean = forward(inputs)
    grads = [randn(*t.shape, seed=9).to(DEVICE) for t in clean]
    clean_grads = backward(inputs, grads)
    inputs["keys"][1, 0, 3, 2] = value
    got, got_grads = forward(inputs), backward(inputs, grads)
    assert got[0][1].isnan().any() and got_grads[-2][1].isnan().any()
    for dirty, other in zip([*got, *got_grads], [*clean, *clean_grads], strict=True):
        assert equal((dirty[0], dirty[2]), (other[0], other[2]))


def test_tokens_far_from_zero() -> None:
    """The mean is taken off the products, not the tokens."""
    for dtype, offset in ((torch.float32, 100.0), (torch.float16, 8.0), (HALF, 8.0)):
        inputs = make(replace(CASES["narrow"], dtype=dtype))
        keys = (inputs["keys"].double() + offset).to(dtype)
        inputs["keys"] = inputs["values"] = keys
        rows = keys[:, 0].float()
        inputs["mean"] = rows.mean(-1)
        inputs["rstd"] = (rows.var(-1, unbiased=False) + 1e-5).rsqrt()
        check(forward(inputs), [t.detach() for t in expected(inputs)[0]], offset * TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["groups", "own_keys_joint", "wide"])
def test_repeats_its_bits(name: str) -> None:
    inputs = make(CASES[name])
    first = forward(inputs)
    grads = [randn(*t.shape, seed=9).to(DEVICE) for t in first]
    assert equal(tuple(first), tuple(forward(inputs)))
    assert equal(tuple(backward(inputs, grads)), tuple(backward(inputs, grads)))


def test_items_do_not_depend_on_tokens_of_others() -> None:
    """Division of the tokens is by shape, and a lone item of few tokens is divided most: many parts, same sums."""
    inputs = make(Case(items=1, tokens=600, slots=3))
    check(forward(inputs), [t.detach() for t in expected(inputs)[0]], TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["plain", "own_keys"])
def test_strides(name: str) -> None:
    """Any strides: transposed tokens and heads, a step in the channels, masks and queries that are views."""
    inputs = make(CASES[name])
    want = forward(inputs)
    grads = [randn(*t.shape, seed=9).to(DEVICE) for t in want]
    want_grads = backward(inputs, grads)
    raw = inputs["values"] is inputs["keys"]

    def scattered(t: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros(*reversed(t.shape), 2, dtype=t.dtype, device=t.device)[..., 1]
        view = wide.permute(*reversed(range(t.dim())))
        return view.copy_(t)

    def by_token(t: torch.Tensor) -> torch.Tensor:
        return t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)

    for change in (scattered, by_token):
        changed = dict(inputs)
        changed["keys"] = change(inputs["keys"])
        changed["values"] = changed["keys"] if raw else change(inputs["values"])
        for key in ("mean", "rstd", "q", "c", "token_mask", "slot_mask"):
            if inputs[key] is not None:
                changed[key] = scattered(inputs[key])
        assert equal(tuple(forward(changed)), tuple(want))
        assert equal(tuple(backward(changed, [scattered(g) for g in grads])), tuple(want_grads))


def test_no_item() -> None:
    inputs = make(Case(items=0))
    got = forward(inputs)
    assert [t.shape for t in got] == [(0, 1, 5, 20), (0, 1, 5), (0, 1, 5, 37), (0, 1, 5, 37)]
    assert [t.shape for t in backward(inputs, got)] == [(0, 1, 37, 20), (0, 1, 5, 20), (0, 1, 5)]
