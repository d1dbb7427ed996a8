"""All iterations of wide slots on CUDA, kernel by kernel in one native call, on the host shim: forward and backward
against the reference and its driver in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from slot_cases import HALVES, OPTIONS, RESULTS, Case, case, close, randn

import vidops
from vidops import _native
from vidops.ops import _slot_backends, _slot_iterations
from vidops.ops._slot_params import NAMES
from vidops.reference.slot_attention import slot_attention as reference

LIMIT = 4e-6
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def forward(c: Case) -> tuple[torch.Tensor, ...]:
    return _slot_backends._cuda_steps(c.call())


def incoming(c: Case, found: tuple[torch.Tensor, ...]) -> Grads:
    slots, dots, attn = (randn(*x.shape, seed=5 + i) for i, x in enumerate(found[:3]))
    return slots.to(c.slots.dtype), dots, attn


def backward(c: Case, grads: Grads, states: torch.Tensor) -> list[torch.Tensor]:
    return _slot_backends._cuda_steps_backward(*grads, states, c.call())


def exact_backward(c: Case, grads: Grads, states: torch.Tensor) -> list[torch.Tensor]:
    wide = (g.double() for g in grads)
    driver = _slot_iterations.backward
    return driver(_slot_backends.REFERENCE, *wide, states.double(), *c.arguments(torch.float64), absorbed=True)


def names(c: Case) -> tuple[str, ...]:
    return "inputs", "slots", *(name for name in NAMES if getattr(c.params, name) is not None)


def check(c: Case) -> None:
    found, exact = forward(c), reference(*c.arguments(torch.float64))
    close(found, exact)
    grads = incoming(c, found)
    # From the same states: ReLU turns where rounding changes a sign.
    close(tuple(backward(c, grads, found[3])), tuple(exact_backward(c, grads, found[3])), LIMIT, names(c))


def with_options(c: Case, **options: Any) -> Case:
    return replace(c, options=c.options._replace(**options))


@pytest.fixture(params=[0, 1, 4, 101])
def seeds(shim: ModuleType, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    shim.set_seed(request.param)
    yield shim
    shim.set_seed(0)


@pytest.mark.parametrize(
    ("batch", "n", "din", "slots", "d"),
    [(1, 1, 1, 1, 1), (2, 33, 20, 3, 24), (1, 50, 132, 7, 130), (2, 20, 68, 33, 36), (30, 9, 40, 5, 33)],
)
def test_shapes(seeds: ModuleType, batch: int, n: int, din: int, slots: int, d: int) -> None:
    check(case(batch, n, din, slots, d, hidden=d + 3))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    "widths",
    [
        {"gru": False},
        {"gru": False, "biases": False, "hidden": 80},
        {"gru": False, "hv": 70, "du": 24, "hidden": 7},
        {"hv": 11, "biases": False},
        {"hq": 300, "hv": 40, "du": 33, "hidden": 50},
    ],
    ids=str,
)
def test_forms(shim: ModuleType, widths: dict[str, Any], activation: str) -> None:
    for seed, more in ((1, {}), (101, {"eps_in_denominator": True, "eps": 1.0}), (2, {"extra_denominator": 0.5})):
        shim.set_seed(seed)
        check(case(2, 50, 20, 5, 24, options=OPTIONS._replace(activation=activation, scale=0.1, **more), **widths))


@pytest.mark.parametrize("half", ["scale", "shift"])
def test_half_an_affine(shim: ModuleType, half: str) -> None:
    c = case(2, 30, 20, 5, 24, hidden=30)
    other = {"scale": ("norm_input_bias", "norm_mlp_bias", "k_bias"), "shift": ("norm_input_weight", "norm_mlp_weight")}
    check(replace(c, params=replace(c.params, **dict.fromkeys(other[half]))))


def test_masks_and_groups(seeds: ModuleType) -> None:
    c = with_options(case(2, 61, 132, 12, 24), groups=3)
    factors = torch.rand(2, 3, 61, generator=torch.Generator().manual_seed(0))
    shut = torch.zeros(2, 12, dtype=torch.bool)
    shut[0, 2] = shut[1, 5] = shut[1, 6] = True
    check(replace(c, token_mask=factors))
    check(replace(c, slot_mask=shut))
    check(replace(c, token_mask=factors > 0.5, slot_mask=shut))


def test_iterations_kept(shim: ModuleType) -> None:
    c = with_options(case(2, 40, 20, 5, 24, hidden=30), iters=3)
    full = forward(c)
    assert full[3].shape == (3, 2, 5, 24)
    grads = incoming(c, full)
    for mode in ("bilevel", "fixed_point"):
        one = with_options(c, grad_mode=mode)
        found = forward(one)
        for x, y in zip(found[:3], full[:3], strict=True):
            assert torch.equal(x, y)
        assert torch.equal(found[3], full[3][2:])
        got, want = backward(one, grads, found[3]), exact_backward(one, grads, found[3])
        close(tuple(got), tuple(want), LIMIT, names(c))
        assert (mode == "fixed_point") == (not got[1].any())


def test_without_maps(shim: ModuleType) -> None:
    c = case(2, 40, 20, 5, 24)
    full, less = forward(c), with_options(c, with_dots=False, with_attn=False)
    found = forward(less)
    assert found[1].shape == found[2].shape == (0,)
    assert torch.equal(found[0], full[0]) and torch.equal(found[3], full[3])
    grads = incoming(less, found)
    got, want = backward(less, grads, found[3]), exact_backward(less, grads, found[3])
    shared = [w.abs().max() < 1e-12 for w in want]  # what all slots gain alike changes no softmax
    assert sum(shared) == 2
    for name, x, y, nothing in zip(names(c), got, want, shared, strict=True):
        assert (x - y).abs().max() < (1e-6 if nothing else LIMIT * y.abs().max()), name


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "din"), [(40, 64), (33, 132), (20, 35)])
def test_16_bit_inputs(shim: ModuleType, dtype: torch.dtype, n: int, din: int) -> None:
    """Beside float32 weights, as precise as these; the gradient of the inputs is rounded once."""
    c = case(2, n, din, 7, 24, hidden=30)
    c = replace(c, inputs=c.inputs.to(dtype))
    found = forward(c)
    close(found, reference(*c.arguments(torch.float64)))
    grads = incoming(c, found)
    got, want = backward(c, grads, found[3]), exact_backward(c, grads, found[3])
    assert got[0].dtype == dtype
    close(tuple(got[1:]), tuple(want[1:]), LIMIT, names(c)[1:])
    assert (got[0].double() - want[0]).abs().max() <= torch.finfo(dtype).eps * want[0].abs().max()


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_all(shim: ModuleType, dtype: torch.dtype) -> None:
    """Every result is rounded once, at the end."""
    c = case(2, 40, 132, 7, 24, hidden=48)
    half = vidops.SlotParams(**{k: None if w is None else w.to(dtype) for k, w in vars(c.params).items()})
    c = replace(c, inputs=c.inputs.to(dtype), slots=c.slots.to(dtype), params=half)
    found, exact = forward(c), reference(*c.arguments(torch.float64))
    assert found[0].dtype == dtype and found[3].dtype == torch.float32
    close(found[1:], exact[1:], names=RESULTS[1:])
    eps = torch.finfo(dtype).eps
    assert (found[0].double() - exact[0]).abs().max() <= eps * exact[0].abs().max()
    grads = incoming(c, found)
    for name, x, y in zip(
        names(c), backward(c, grads, found[3]), exact_backward(c, grads, found[3]), strict=True
    ):
        assert x.dtype == dtype, name
        assert (x.double() - y).abs().max() <= eps * y.abs().max(), name


def test_many_rows(seeds: ModuleType) -> None:
    """So many that gradients of weights come in parts, and sums over rows too."""
    c = case(60, 5, 24, 23, 20, hidden=70)
    check(c)
    found = forward(c)
    grads = incoming(c, found)
    want = backward(c, grads, found[3])
    seeds.set_seed(0)
    for x, y in zip(want, backward(c, grads, found[3]), strict=True):
        assert torch.equal(x, y)


def test_same_bits_for_every_batch(shim: ModuleType) -> None:
    c = case(3, 90, 132, 11, 24, hidden=30)
    found, alone = forward(c), forward(replace(c, inputs=c.inputs[1:2], slots=c.slots[1:2]))
    for name, x, y in zip(RESULTS, found, alone, strict=True):
        assert torch.equal(x[:, 1:2] if name == "states" else x[1:2], y)


def test_nobody_takes_part(seeds: ModuleType) -> None:
    """All slots of an item shut out: NaN in that item only. No token: 0 / 0, or an update of zero."""
    shut = torch.zeros(2, 3, dtype=torch.bool)
    shut[1] = True
    c = replace(case(2, 40, 132, 3, 24), slot_mask=shut)
    found = forward(c)
    close(found, reference(*c.arguments(torch.float64)))
    assert found[0][1].isnan().all() and found[0][0].isfinite().all()
    mask = torch.ones(2, 1, 40)
    mask[0] = 0
    c = replace(c, slot_mask=None, token_mask=mask)
    for more in ({}, {"extra_denominator": 1e-8}):
        again = with_options(c, **more)
        close(forward(again), reference(*again.arguments(torch.float64)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("din", [20, 132])
def test_what_is_not_finite_stays_in_its_item(seeds: ModuleType, value: float, din: int) -> None:
    c = case(3, 40, din, 4, 24, hidden=30)
    want = forward(c)
    c.inputs[1, 7, 3] = value
    found = forward(c)
    assert found[0][1].isnan().all()
    for x, y in zip(found[:3], want[:3], strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])


def test_overflow(seeds: ModuleType) -> None:
    """A token whose variance overflows is zeros; a slot whose does is NaN, as in torch."""
    c = with_options(case(2, 40, 132, 4, 24), iters=1)
    c.inputs[0, 5] *= 1e25
    c.inputs[0, 9] = torch.tensor([1e37, -1e37]).repeat(66)
    close(forward(c), reference(*c.arguments()))
    c.slots[1, 2] *= 1e25
    found = forward(c)
    assert found[0][1].isnan().all() and found[0][0].isfinite().all()


def test_products_that_overflow(seeds: ModuleType) -> None:
    """Infinite where torch's are, though split operands cannot give them."""
    c = with_options(case(1, 40, 20, 4, 24, gru=False, biases=False, hidden=30), iters=1)
    c.params.mlp_weight1[3] = 0
    c.params.mlp_weight1[3, 0] = 3e38
    c.params.mlp_weight2[:, 3] = 1
    want = reference(*c.arguments())
    assert want[0].isinf().any() and not want[0].isnan().any()
    close(forward(c), tuple(x.double() for x in want))


def test_large_mean(seeds: ModuleType) -> None:
    c = case(1, 40, 128, 6, 24)
    check(replace(c, inputs=(c.inputs * 64).round() / 64 + 1000))


def test_strides(seeds: ModuleType) -> None:
    """Rows that are not aligned, rows apart, a batch without a stride, and weights and slots that are views."""
    c = case(2, 30, 16, 5, 24)
    wide = randn(2, 30, 40)
    repeated, turned = wide[:1, :, :16].expand(2, -1, -1), wide.transpose(1, 2)[:, :30, :16]
    for rows in (wide[..., 1:17], wide[..., 8:24], repeated, turned):
        check(replace(c, inputs=rows))
    params = replace(c.params, q_weight=randn(24, 9).T, gru_weight_hh=randn(72, 48)[:, ::2] / 5)
    check(replace(c, params=params, slots=randn(2, 5, 30)[..., 3:27]))


def test_less_shared_memory(shim: ModuleType) -> None:
    shim.set_shared_limit(99 * 1024)
    try:
        check(case(1, 40, 384, 16, 64))
    finally:
        shim.set_shared_limit(227 * 1024)


@pytest.mark.parametrize(
    ("changed", "options", "taken"),
    [
        ({}, {}, (True, True)),
        ({"slots": 8}, {"groups": 2}, (True, True)),
        ({}, {"joint_heads": True}, (True, True)),
        ({}, {"heads": 2}, (False, False)),
        ({}, {"mask_grad": True}, (True, False)),
        ({"hq": 2, "hv": 2, "du": 48}, {"iters": 9}, (False, False)),  # projecting the tokens is less work
    ],
    ids=str,
)
def test_which_calls_it_takes(
    shim: ModuleType,
    changed: dict[str, Any],
    options: dict[str, Any],
    taken: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the others run in the driver of the other backends, to the same result."""
    calls: list[str] = []
    for name in ("_cuda_steps", "_cuda_steps_backward"):
        one = getattr(_slot_backends, name)
        monkeypatch.setattr(_slot_backends, name, lambda *a, one=one, name=name: calls.append(name) or one(*a))
    widths = {"n": 100, "din": 64, "slots": 40, "d": 48, "hq": 64, "hv": 48, "hidden": 96} | changed
    c = case(1, widths.pop("n"), widths.pop("din"), widths.pop("slots"), widths.pop("d"), gru=False, **widths)
    c = with_options(c, **options)
    if c.options.mask_grad:
        c = replace(c, token_mask=torch.rand(1, 1, 100, generator=torch.Generator().manual_seed(0)))
    found = _slot_backends.cuda_forward(*c.arguments())
    close(found, reference(*c.arguments(torch.float64)))
    grads = incoming(c, found)
    got = _slot_backends.cuda_backward(*grads, found[3], *c.arguments())
    want = _slot_iterations.backward(
        _slot_backends.REFERENCE, *(g.double() for g in grads), found[3].double(), *c.arguments(torch.float64)
    )
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() <= 2e-5 * y.abs().max()
    assert ("_cuda_steps" in calls, "_cuda_steps_backward" in calls) == taken


def test_refusals(shim: ModuleType) -> None:
    c = case(1, 5, 8, 4, 6, hidden=7)
    with pytest.raises(shim.ArgumentError, match="inputs has an unexpected dtype"):
        forward(replace(c, inputs=c.inputs.double()))
    with pytest.raises(shim.ArgumentError, match="inputs has an unexpected"):
        forward(replace(c, inputs=c.inputs.repeat(2, 1, 1)))
    with pytest.raises(shim.ArgumentError, match="at least one of everything"):
        forward(replace(c, inputs=c.inputs[:, :0]))
    with pytest.raises(shim.ArgumentError, match="a weight has an unexpected"):
        forward(replace(c, params=replace(c.params, mlp_weight2=randn(6, 8))))
    with pytest.raises(shim.ArgumentError, match="a weight has an unexpected"):
        forward(replace(c, params=replace(c.params, gru_weight_hh=None)))
    with pytest.raises(shim.ArgumentError, match="a bias or a norm's affine"):
        forward(replace(c, params=replace(c.params, q_bias=randn(3))))
    with pytest.raises(shim.ArgumentError, match="not as wide as the slots"):
        forward(case(1, 5, 8, 4, 6, gru=False, hv=5))
    with pytest.raises(shim.ArgumentError, match="groups must divide"):
        forward(with_options(c, groups=3))
    with pytest.raises(shim.ArgumentError, match="token_mask has an unexpected"):
        forward(replace(c, token_mask=torch.ones(1, 2, 5)))
    found = forward(c)
    grads = incoming(c, found)
    with pytest.raises(shim.ArgumentError, match="grad_slots has an unexpected"):
        backward(c, (grads[0][:, :2], *grads[1:]), found[3])
    with pytest.raises(shim.ArgumentError, match="grad_dots has an unexpected"):
        backward(c, (grads[0], grads[1][..., :3], grads[2]), found[3])


def test_scratch_and_weights_are_counted(shim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(1, 5, 8, 4, 6)
    views, (numbers, _, *where) = _slot_backends._steps_call(c.call())

    def too_little(words: int) -> Any:
        return _native.view(torch.empty(words - 1, dtype=torch.int64))

    monkeypatch.setattr(_slot_backends, "_steps_call", lambda call: (views, (numbers, too_little, *where)))
    with pytest.raises(shim.ArgumentError, match="workspace must hold"):
        forward(c)
    short = (views[0], views[1][:3], *views[2:])
    monkeypatch.setattr(_slot_backends, "_steps_call", lambda call: (short, (numbers, lambda words: None, *where)))
    with pytest.raises(shim.ArgumentError, match="weights: expected one entry for each"):
        forward(c)
