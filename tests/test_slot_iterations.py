"""The driver of slot attention, around the plain pass over the tokens, is autograd of the plain iterations."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from vidops import _native
from vidops.ops import _slot_backends, _slot_iterations
from vidops.ops._slot_params import NAMES, SlotCall, SlotOptions, SlotParams, flat
from vidops.reference.slot_attend import attend_backward, attend_forward
from vidops.reference.slot_attention import slot_attention as reference

PLAIN = _slot_iterations.Attend(attend_forward, attend_backward)
WEIGHTS = 2 + len(NAMES)  # inputs, slots and the weights come first
LIMIT = 1e-10


class Draw:
    """A random call: every option and every weight is there in some of them."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def some(self) -> bool:
        return self.choose.random() < 0.6

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64) * 0.5

    def maybe(self, *shape: int) -> torch.Tensor | None:
        return self.normal(*shape) if self.some() else None

    def params(self, din: int, d: int, heads: int) -> SlotParams:
        choose = self.choose
        hq, gru, merge = heads * choose.choice([1, 3]), self.some(), self.some()
        hv = heads * choose.choice([1, 4]) if gru or merge else d
        du = hv if not merge else choose.choice([3, 7]) if gru else d
        weights: dict[str, Any] = {
            "norm_input_weight": self.maybe(din), "norm_input_bias": self.maybe(din),
            "norm_slots_weight": self.maybe(d), "norm_slots_bias": self.maybe(d),
            "q_weight": self.normal(hq, d), "q_bias": self.maybe(hq),
            "k_weight": self.normal(hq, din), "k_bias": self.maybe(hq),
            "v_weight": self.normal(hv, din), "v_bias": self.maybe(hv),
        }  # fmt: skip
        if merge:
            weights |= {"merge_weight": self.normal(du, hv), "merge_bias": self.maybe(du)}
        if gru:
            weights |= {"gru_weight_ih": self.normal(3 * d, du), "gru_weight_hh": self.normal(3 * d, d)}
            weights |= {"gru_bias_ih": self.maybe(3 * d), "gru_bias_hh": self.maybe(3 * d)}
        if self.some():
            weights |= {"norm_mlp_weight": self.maybe(d), "norm_mlp_bias": self.maybe(d)}
            weights |= {"mlp_weight1": self.normal(8, d), "mlp_bias1": self.maybe(8)}
            weights |= {"mlp_weight2": self.normal(d, 8), "mlp_bias2": self.maybe(d)}
        return SlotParams(**weights)

    def call(self) -> list[Any]:
        choose = self.choose
        batch, tokens, din = choose.choice([(2, 7, 5), (1, 1, 3), (3, 4, 6)])
        groups, each = choose.choice([1, 1, 2]), choose.choice([1, 2, 3])
        d, heads = choose.choice([(4, 1), (6, 1), (4, 2), (6, 3)])
        slots, in_denominator = groups * each, self.some()
        options = SlotOptions(
            iters=choose.choice([1, 2, 3]),
            heads=heads,
            scale=choose.choice([0.4, 3.0]),
            joint_heads=groups == 1 and self.some(),
            groups=groups,
            eps=choose.choice([1.0, 1e-3]),
            eps_in_denominator=in_denominator,
            extra_denominator=0.0 if in_denominator else choose.choice([0.0, 1e-2]),
            ln_eps=choose.choice([1e-5, 1e-2]),
            activation=choose.choice(["relu", "gelu"]),
            grad_mode=choose.choice(["full", "bilevel", "fixed_point"]),
            with_dots=self.some(),
            with_attn=self.some(),
            mask_grad=False,
        )
        token_mask = slot_mask = None
        if self.some() and options.extra_denominator + in_denominator > 0:  # else an empty mask is 0 / 0
            token_mask = torch.rand(batch, groups, tokens, generator=self.generator, dtype=torch.float64)
            token_mask = token_mask * (token_mask > 0.5)
            options = options._replace(mask_grad=self.some())
        if each > 1 and self.some():
            slot_mask = torch.zeros(batch, slots, dtype=torch.bool)
            slot_mask[:, 0] = True
        params = flat(self.params(din, d, heads))
        inputs, start = self.normal(batch, tokens, din), self.normal(batch, slots, d)
        return [inputs, start, *params, token_mask, slot_mask, *options]


def _finite(t: torch.Tensor) -> torch.Tensor:
    """The dots of masked slots are -inf, and constant."""
    return torch.where(t.isinf(), 0.0, t)


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    if got.numel():
        assert torch.equal(got.isinf(), want.isinf())
        error = (_finite(got) - _finite(want)).abs().max() / _finite(want).abs().max().clamp_min(1e-3)
        assert error <= LIMIT, float(error)


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("seed", range(150))
def test_driver_is_autograd_of_the_reference(seed, absorbed):
    draw = Draw(seed)
    args = draw.call()
    trained = WEIGHTS + SlotOptions(*args[WEIGHTS + 2 :]).mask_grad
    leaves = [t if t is None else t.clone().requires_grad_(True) for t in args[:trained]]
    want = reference(*leaves, *args[trained:])
    grads = [draw.normal(*t.shape) for t in want[:3]]
    present = [t for t in leaves if t is not None]
    scalar = sum((_finite(t) * g).sum() for t, g in zip(want[:3], grads, strict=True))
    expected = torch.autograd.grad(scalar, present, allow_unused=True)

    found = _slot_iterations.forward(PLAIN, *args, absorbed=absorbed)
    for a, b in zip(found, want, strict=True):
        _close(a, b.detach())
    gradients = _slot_iterations.backward(PLAIN, *grads, found[3], *args, absorbed=absorbed)
    for leaf, a, b in zip(present, gradients, expected, strict=True):
        _close(a, torch.zeros_like(leaf) if b is None else b)


def test_draws_cover_every_option():
    calls = [Draw(seed).call() for seed in range(150)]
    for index in range(WEIGHTS + 2):
        assert any(call[index] is not None for call in calls)
    for index in (*range(2, 6), *range(WEIGHTS - 12, WEIGHTS + 2)):
        assert any(call[index] is None for call in calls)
    options = [SlotOptions(*call[WEIGHTS + 2 :]) for call in calls]
    for name in ("joint_heads", "eps_in_denominator", "with_dots", "with_attn", "mask_grad"):
        assert {getattr(o, name) for o in options} == {True, False}
    modes = {(o.grad_mode, o.iters, o.heads > 1, o.groups > 1) for o in options}
    assert len({mode[:2] for mode in modes}) == 9 and len(modes) > 20


@pytest.mark.parametrize("mode", ["full", "bilevel", "fixed_point"])
def test_only_states_of_differentiated_iterations_are_kept(mode):
    args = Draw(3).call()
    args[WEIGHTS + 2 :] = SlotOptions(*args[WEIGHTS + 2 :])._replace(iters=4, grad_mode=mode)
    states = _slot_iterations.forward(PLAIN, *args)[3]
    assert len(states) == (4 if mode == "full" else 1)
    if mode == "full":
        assert torch.equal(states[0], args[1])
    one = [*args[:WEIGHTS], *args[WEIGHTS : WEIGHTS + 2], *SlotOptions(*args[WEIGHTS + 2 :])._replace(iters=1)]
    one[1] = states[-1]
    _close(_slot_iterations.forward(PLAIN, *one)[0], _slot_iterations.forward(PLAIN, *args)[0])


def test_no_map_reaches_the_driver_unasked():
    asked = []

    def recording(*args):
        asked.append(args[-2:])
        return attend_forward(*args)

    args = Draw(5).call()
    args[WEIGHTS + 2 :] = SlotOptions(*args[WEIGHTS + 2 :])._replace(iters=3, with_dots=True, with_attn=True)
    _slot_iterations.forward(PLAIN._replace(forward=recording), *args)
    assert asked == [(False, False), (False, False), (True, True)]


@pytest.mark.parametrize(
    "sizes,absorbed",
    [
        ((16384, 64, 7, 3, 1, 64, 64), True),  # Locatello
        ((256, 384, 64, 3, 1, 384, 384), True),  # SMTC, second stage
        ((196, 384, 8, 3, 1, 32, 384), True),  # object tokens
        ((1024, 64, 16, 3, 8, 64, 64), False),  # many heads of few channels
    ],
)
def test_choice_of_the_form(sizes, absorbed):
    tokens, channels, slots, iters, heads, q_width, v_width = sizes
    assert _slot_iterations.absorbs(*sizes) is absorbed
    one_pass = 2 * slots * heads * tokens * channels + slots * channels * (q_width + v_width)
    project = tokens * channels * (q_width + v_width) + iters * slots * tokens * (q_width + v_width)
    assert absorbed is (iters * one_pass <= project)


NATIVE = pytest.mark.skipif(_native.C is None, reason=_native.WHY_NOT)
# Those whose slots' side is different code.
LEVELS = [name for name in _native.C.cpu_isas() if name != "avx512_bf16"] if _native.C is not None else []


@pytest.fixture(params=LEVELS)
def level(request):
    _native.C.set_cpu_isa(request.param)
    yield request.param
    _native.C.set_cpu_isa("")


def _native_call(seed: int) -> SlotCall:
    call = SlotCall.of(*Draw(seed).call())
    return call._replace(options=call.options._replace(joint_heads=False, activation="relu", mask_grad=False))


def _recorded(call: SlotCall, recorded: bool) -> SlotCall:
    return call._replace(options=call.options._replace(recorded=recorded))


SINGLE_HEADS = [seed for seed in range(150) if _native_call(seed).options.heads == 1]


def _arguments(call: SlotCall) -> list[Any]:
    return [call.inputs, call.slots, *flat(call.params), call.token_mask, call.slot_mask, *call.options]


def _autograd(call: SlotCall, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of inputs, slots and every weight that is there, by the reference; `grads` as the torch op takes them."""
    arguments = _arguments(call)
    leaves = [t if t is None else t.clone().requires_grad_(True) for t in arguments[:WEIGHTS]]
    outputs = reference(*leaves, *arguments[WEIGHTS:])
    scalar = sum((_finite(t) * g).sum() for t, g in zip(outputs, grads, strict=False))
    present = [t for t in leaves if t is not None]
    found = torch.autograd.grad(scalar, present, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(present, found, strict=True)]


@NATIVE
@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("seed", SINGLE_HEADS)
def test_native_iterations_are_the_reference(seed, recorded):
    """Several heads take the driver."""
    call = _recorded(_native_call(seed), recorded)
    *found, record = _slot_backends._cpu_iterations(call)
    for got, want in zip(found, reference(*_arguments(call)), strict=True):
        _close(got, want)
    draw = Draw(seed)
    grads = [draw.normal(*t.shape) for t in found[:3]]
    want = _autograd(call, grads)
    assert (record.numel() > 0) is recorded
    for _ in range(2):  # a graph that is retained goes backward more than once
        gradients = _slot_backends._cpu_iterations_backward(*grads, found[3], record, call)
        for got, exact in zip(gradients, want, strict=True):
            _close(got, exact)


@NATIVE
@pytest.mark.usefixtures("level")
def test_a_record_of_items_one_by_one():
    """An item as large as a cache goes through all iterations before the next one; the backward takes all of them."""
    draw = Draw(0)
    options = SlotOptions(3, 1, 0.3, False, 1, 1e-3, False, 0.0, 1e-5, "relu", "full", True, False, False)
    call = SlotCall(draw.normal(3, 2100, 64), draw.normal(3, 2, 4), draw.params(64, 4, 1), None, None, options)
    gradients = []
    for recorded in (False, True):
        *found, record = _slot_backends._cpu_iterations(_recorded(call, recorded))
        grads = [Draw(1).normal(*t.shape) for t in found[:3]]
        gradients.append(_slot_backends._cpu_iterations_backward(*grads, found[3], record, call))
    for got, want in zip(*gradients, strict=True):
        _close(got, want)


@NATIVE
def test_a_record_of_another_call_is_refused():
    call = _recorded(_native_call(SINGLE_HEADS[0]), True)
    *found, record = _slot_backends._cpu_iterations(call)
    grads = [torch.zeros_like(t) for t in found[:3]]
    with pytest.raises(ValueError, match="record"):
        _slot_backends._cpu_iterations_backward(*grads, found[3], record[1:].clone(), call)


@NATIVE
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("gru", [False, True])
def test_native_iterations_of_wide_slots(gru, recorded, level):
    """Enough rows for weights that are laid out once, whose sizes are no multiple of anything; float32 against
    float64, which is as near as PyTorch's own float32, and the same bits on any number of threads."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    d, hq, hv, hidden = 98, 70, 98 if not gru else 76, 130
    shapes = {"q": (hq, d), "k": (hq, 83), "v": (hv, 83)}
    weights = {f"{name}_weight": normal(*shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
    weights |= {"mlp_weight1": normal(hidden, d) / 10, "mlp_weight2": normal(d, hidden) / 10, "v_bias": normal(hv)}
    weights |= {"mlp_bias2": normal(d), "norm_mlp_weight": normal(d)}
    weights |= {"norm_slots_bias": normal(d), "k_bias": normal(hq)}
    if gru:
        weights |= {"gru_weight_ih": normal(3 * d, hv) / 9, "gru_weight_hh": normal(3 * d, d) / 10}
        weights |= {"gru_bias_ih": normal(3 * d)}
    options = SlotOptions(3, 1, hq**-0.5, False, 1, 1e-8, False, 0.0, 1e-5, "relu", "full", True, True, False, recorded)
    wide = SlotCall(normal(5, 33, 83), normal(5, 17, d), SlotParams(**weights), None, None, options)
    narrow = SlotParams(**{name: None if w is None else w.float() for name, w in vars(wide.params).items()})
    call = wide._replace(inputs=wide.inputs.float(), slots=wide.slots.float(), params=narrow)

    def plain(c):
        return reference(*_arguments(c))

    def error(found, exact):
        return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]

    grads = [normal(*shape) for shape in ((5, 17, d), (5, 17, 33), (5, 17, 33))]
    narrow_grads = [g.float() for g in grads]
    runs = []
    saved = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        *found, record = _slot_backends._cpu_iterations(call)
        runs.append([*found, *_slot_backends._cpu_iterations_backward(*narrow_grads, found[3], record, call)])
    torch.set_num_threads(saved)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    exact = [*plain(wide), *_autograd(wide, grads)]
    torchs = [*plain(call), *_autograd(call, narrow_grads)]
    # Sums over slots that cancel come after those over tokens: some gradients keep a digit less than autograd's.
    limits = [1e-6] * len(found) + [2e-6] * (len(exact) - len(found))
    for mine, theirs, limit in zip(error(runs[0], exact), error(torchs, exact), limits, strict=True):
        assert mine <= max(2 * theirs, limit)
