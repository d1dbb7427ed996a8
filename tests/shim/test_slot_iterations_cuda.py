"""All iterations of slot attention in one CUDA launch, on the host shim, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from slot_cases import HALVES, OPTIONS, RESULTS, Case, case, close, randn

import vidops
from vidops.ops import _slot_backends, _slot_iterations
from vidops.ops._slot_params import NAMES
from vidops.reference.slot_attention import slot_attention as reference

MOST = 227 * 1024


def words(module: ModuleType, c: Case, cluster: int) -> int:
    p, (batch, n, din), (_, slots, d) = c.params, c.inputs.shape, c.slots.shape
    rows = [0 if w is None else len(w) for w in (p.q_weight, p.v_weight, p.merge_weight, p.mlp_weight1)]
    sizes = batch, n, din, slots, d, *rows, c.inputs.element_size()
    return module.slot_iterations_workspace_cuda(*sizes, p.gru_weight_ih is not None, cluster, 0)


def run(module: ModuleType, c: Case, cluster: int = 1) -> tuple[torch.Tensor, ...]:
    workspace = torch.full((words(module, c, cluster),), -1)  # NaN for floats
    return _slot_backends._cuda_iterations(c.call(), workspace, cluster)


def check(module: ModuleType, c: Case, cluster: int = 1) -> None:
    close(run(module, c, cluster), reference(*c.arguments(torch.float64)))


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("batch", "n", "din", "slots", "d"),
    [(1, 1, 1, 1, 1), (1, 1, 64, 7, 64), (3, 33, 20, 3, 24), (2, 170, 64, 7, 48), (1, 133, 100, 11, 128)],
)
def test_shapes(seeded: ModuleType, batch: int, n: int, din: int, slots: int, d: int, cluster: int) -> None:
    check(seeded, case(batch, n, din, slots, d), cluster)


@pytest.mark.parametrize(("slots", "width"), [(8, 128), (9, 32), (16, 40), (17, 128), (32, 128)])
def test_many_slots(shim: ModuleType, slots: int, width: int) -> None:
    for seed, cluster in ((0, 1), (3, 2), (102, 4)):
        shim.set_seed(seed)
        check(shim, case(1, 90, width, slots, width, hq=width, hidden=2 * width), cluster)


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    "widths",
    [
        {"gru": False},
        {"gru": False, "biases": False, "hidden": 512},
        {"gru": False, "hv": 70, "du": 24, "hidden": 7},
        {"hv": 11, "biases": False},
        {"hq": 300, "hv": 40, "du": 33, "hidden": 50},
    ],
    ids=str,
)
def test_forms(shim: ModuleType, widths: dict[str, Any], activation: str, cluster: int) -> None:
    for seed, more in ((1, {}), (101, {"eps_in_denominator": True, "eps": 1.0}), (2, {"extra_denominator": 0.5})):
        shim.set_seed(seed)
        options = OPTIONS._replace(activation=activation, **more)
        check(shim, case(2, 50, 20, 5, 24, options=options, **widths), cluster)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "din"), [(200, 64), (40, 20), (65, 33)])
def test_16_bit_inputs(shim: ModuleType, dtype: torch.dtype, n: int, din: int) -> None:
    for seed, cluster in ((0, 2), (1, 1), (104, 4)):
        shim.set_seed(seed)
        c = case(2, n, din, 7, 24)
        check(shim, replace(c, inputs=c.inputs.to(dtype)), cluster)


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_slots(shim: ModuleType, dtype: torch.dtype) -> None:
    """Rounded once, at the end."""
    c = case(2, 40, 32, 7, 24, hidden=48)
    half = vidops.SlotParams(**{k: None if w is None else w.to(dtype) for k, w in vars(c.params).items()})
    c = replace(c, inputs=c.inputs.to(dtype), slots=c.slots.to(dtype), params=half)
    found, exact = run(shim, c, 2), reference(*c.arguments(torch.float64))
    assert found[0].dtype == dtype and found[3].dtype == torch.float32
    close(found[1:], exact[1:], names=RESULTS[1:])
    assert (found[0].double() - exact[0]).abs().max() <= torch.finfo(dtype).eps * exact[0].abs().max()


@pytest.mark.parametrize(("limit", "stay"), [(MOST, True), (100 * 1024, False), (60 * 1024, False)])
def test_tokens_that_do_not_stay(seeded: ModuleType, limit: int, stay: bool) -> None:
    """Of a share that does not fit the shared memory some tiles stay, and others come again in every iteration."""
    seeded.set_shared_limit(limit)
    try:
        c = case(1, 600, 64, 7, 24, options=OPTIONS._replace(iters=3))
        for cluster in (1, 2):
            assert (words(seeded, c, cluster) == 0) == stay
            check(seeded, c, cluster)
    finally:
        seeded.set_shared_limit(MOST)


def test_many_tokens_that_do_not_stay(shim: ModuleType) -> None:
    for seed, cluster in ((0, 1), (4, 2), (103, 4)):
        shim.set_seed(seed)
        c = case(1, 3001, 64, 7, 64, hq=64, hidden=128, options=OPTIONS._replace(iters=3))
        assert words(shim, c, cluster) > 0
        check(shim, c, cluster)


def test_same_bits_on_every_schedule_and_for_every_batch(seeded: ModuleType) -> None:
    c = case(3, 400, 33, 11, 24, hidden=30)
    seeded.set_shared_limit(100 * 1024)
    try:
        for cluster in (1, 4):
            found = run(seeded, c, cluster)
            alone = run(seeded, replace(c, inputs=c.inputs[1:2], slots=c.slots[1:2]), cluster)
            seeded.set_seed(0)
            for name, x, y, z in zip(RESULTS, found, run(seeded, c, cluster), alone, strict=True):
                assert torch.equal(x, y)
                assert torch.equal(x[:, 1:2] if name == "states" else x[1:2], z)
    finally:
        seeded.set_shared_limit(MOST)


@pytest.mark.parametrize("cluster", [1, 2])
def test_masks(seeded: ModuleType, cluster: int) -> None:
    c = case(2, 61, 20, 7, 24)
    factors = torch.rand(2, 1, 61, generator=torch.Generator().manual_seed(0))
    shut = torch.zeros(2, 7, dtype=torch.bool)
    shut[0, 2] = shut[1, 5] = shut[1, 6] = True
    check(seeded, replace(c, token_mask=factors), cluster)
    check(seeded, replace(c, slot_mask=shut), cluster)
    check(seeded, replace(c, token_mask=factors > 0.5, slot_mask=shut), cluster)


def test_nobody_takes_part(seeded: ModuleType) -> None:
    """All slots of an item shut out: NaN in that item only. No token: 0 / 0, or an update of zero."""
    shut = torch.zeros(2, 3, dtype=torch.bool)
    shut[1] = True
    c = case(2, 40, 20, 3, 24)
    check(seeded, replace(c, slot_mask=shut), 2)
    found = run(seeded, replace(c, slot_mask=shut), 2)
    assert found[0][1].isnan().all() and found[0][0].isfinite().all()
    mask = torch.ones(2, 1, 40)
    mask[0] = 0
    check(seeded, replace(c, token_mask=mask), 2)
    check(seeded, replace(c, token_mask=mask, options=OPTIONS._replace(extra_denominator=1e-8)), 2)


def test_maps_and_states_as_asked(shim: ModuleType) -> None:
    full = run(shim, case(2, 50, 20, 5, 24, options=OPTIONS._replace(iters=3)), 2)
    assert full[3].shape == (3, 2, 5, 24)
    for mode in ("bilevel", "fixed_point"):
        options = OPTIONS._replace(iters=3, grad_mode=mode, with_dots=False, with_attn=False)
        slots, dots, attn, states = run(shim, case(2, 50, 20, 5, 24, options=options), 2)
        assert dots.shape == attn.shape == (0,)
        assert torch.equal(slots, full[0]) and torch.equal(states, full[3][2:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_item(seeded: ModuleType, value: float) -> None:
    c = case(3, 40, 20, 4, 24)
    want = run(seeded, c, 2)
    c.inputs[1, 7, 3] = value
    found = run(seeded, c, 2)
    assert found[0][1].isnan().all()
    for x, y in zip(found[:3], want[:3], strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])


def test_overflow(seeded: ModuleType) -> None:
    """A token whose variance overflows is zeros."""
    c = case(1, 40, 20, 4, 24, options=OPTIONS._replace(iters=1))
    c.inputs[0, 5] *= 1e25
    c.inputs[0, 9] = torch.tensor([1e37, -1e37]).repeat(10)
    close(run(seeded, c, 2), reference(*c.arguments()))


def test_overflowing_dots(seeded: ModuleType) -> None:
    """Infinite where torch's are, though split operands cannot give them."""
    c = case(1, 40, 20, 4, 24, biases=False, options=OPTIONS._replace(iters=1, scale=1.0))
    c.params.k_weight[:, 3] = 0
    c.params.k_weight[0, 3] = 3e38
    found = run(seeded, c, 2)
    want = _slot_iterations.forward(_slot_backends.REFERENCE, *c.arguments(), absorbed=True)
    assert (want[1] == torch.inf).any() and (want[1] == -torch.inf).any() and want[1].isfinite().any()
    close(found, tuple(x.double() for x in want))


def test_large_mean(seeded: ModuleType) -> None:
    """Rows are centred before anything is multiplied."""
    c = case(1, 40, 64, 6, 24)
    rows = (c.inputs * 64).round() / 64 + 1000  # exact: the reference's rows are the same
    check(seeded, replace(c, inputs=rows), 2)


def test_strides(seeded: ModuleType) -> None:
    """Rows that are not aligned, rows apart, and a batch without a stride."""
    c = case(2, 30, 16, 5, 24)
    wide = randn(2, 30, 40)
    repeated, turned = wide[:1, :, :16].expand(2, -1, -1), wide.transpose(1, 2)[:, :30, :16]
    for rows in (wide[..., 1:17], wide[..., 8:24], repeated, turned):
        check(seeded, replace(c, inputs=rows), 2)


def test_no_items(shim: ModuleType) -> None:
    found = run(shim, case(0, 30, 16, 5, 24))
    assert [x.shape[-3] for x in found] == [0, 0, 0, 0]


ELIGIBLE = {"din": 64, "d": 48, "slots": 7, "hq": 64, "hv": 48, "hidden": 96}


@pytest.mark.parametrize(
    ("changed", "options", "taken"),
    [
        ({}, {}, True),
        ({"gru": False}, {"joint_heads": True}, True),
        ({"slots": 32}, {}, True),
        ({"slots": 33}, {}, False),
        ({"din": 128, "d": 128, "hv": 128, "hidden": 512}, {}, True),
        ({"din": 129}, {}, False),
        ({"d": 129, "hv": 129}, {}, False),
        ({"hidden": 513}, {}, False),
        ({"hv": 8, "du": 129}, {}, False),
        ({}, {"heads": 2}, False),
        ({"slots": 8}, {"groups": 2}, False),
        ({"hq": 2, "hv": 2}, {"iters": 9}, False),  # projecting the tokens is less work
    ],
    ids=str,
)
def test_which_calls_take_one_launch(
    shim: ModuleType, changed: dict[str, Any], options: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others run iteration by iteration, on the same backend, to the same result."""
    launched = []
    one_launch = _slot_backends._cuda_iterations
    monkeypatch.setattr(_slot_backends, "_cuda_iterations", lambda *a: launched.append(1) or one_launch(*a))
    widths = {**ELIGIBLE, **changed}
    c = case(1, 100, widths.pop("din"), widths.pop("slots"), widths.pop("d"), **widths)
    c = replace(c, options=OPTIONS._replace(**options))
    found = _slot_backends.cuda_forward(*c.arguments())
    assert bool(launched) == taken
    close(found, reference(*c.arguments(torch.float64)))
    if taken:
        close(_slot_iterations.forward(_slot_backends._CUDA, *c.arguments()), tuple(x.double() for x in found), 8e-6)


def test_too_much_for_the_device(shim: ModuleType) -> None:
    c = case(1, 40, 128, 32, 128, hidden=512)
    shim.set_shared_limit(99 * 1024)
    try:
        assert words(shim, c, 1) == -1
        assert _slot_backends._one_launch_workspace(c.call()) is None
        with pytest.raises(shim.ArgumentError, match="does not fit"):
            _slot_backends._cuda_iterations(c.call(), torch.empty(0, dtype=torch.int64))
        close(_slot_backends.cuda_forward(*c.arguments()), reference(*c.arguments(torch.float64)))
    finally:
        shim.set_shared_limit(MOST)
    many = replace(c, inputs=torch.empty(1, 1, 128).expand(1, 1024 * 16 * 8 + 1, 128))
    assert words(shim, many, 8) == -1 and words(shim, replace(many, inputs=many.inputs[:, 1:]), 8) > 0


def test_gradients_of_a_forward_in_one_launch(shim: ModuleType) -> None:
    """The backward starts from the states that the launch wrote."""
    c = case(2, 40, 32, 5, 24, hidden=48)
    leaves = [c.inputs.requires_grad_(), c.slots.requires_grad_()]

    def gradients(backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        params = vidops.SlotParams(**{k: None if w is None else w.to(dtype) for k, w in vars(c.params).items()})
        inputs, slots = (t.to(dtype) for t in leaves)
        out = vidops.slot_attention(inputs, slots, params, iters=3, return_dots=True, backend=backend)
        return torch.autograd.grad(out[0].sin().sum() + out[1].sin().sum(), leaves)

    for x, y in zip(gradients("cuda", torch.float32), gradients("reference", torch.float64), strict=True):
        assert (x - y).abs().max() < 2e-5 * y.abs().max()


def test_refusals(shim: ModuleType) -> None:
    c = case(1, 5, 8, 4, 6)
    with pytest.raises(shim.ArgumentError, match="must be float32, float16 or bfloat16"):
        run(shim, replace(c, inputs=c.inputs.double()))
    with pytest.raises(shim.ArgumentError, match="do not agree"):
        run(shim, replace(c, slots=c.slots.repeat(2, 1, 1)))
    with pytest.raises(shim.ArgumentError, match="norm_slots has an unexpected"):
        run(shim, replace(c, slots=c.slots[..., :4]))
    with pytest.raises(shim.ArgumentError, match="weights are missing"):
        run(shim, replace(c, params=replace(c.params, gru_weight_hh=None, gru_bias_hh=None)))
    long = case(1, 3000, 64, 4, 6)
    with pytest.raises(shim.ArgumentError, match="workspace must hold"):
        _slot_backends._cuda_iterations(long.call(), torch.empty(0, dtype=torch.int64), 1)


def test_order_of_the_weights(shim: ModuleType) -> None:
    with pytest.raises(shim.ArgumentError, match="one entry for every weight"):
        views = _slot_backends._native_views(*[torch.zeros(1)] * 8)
        shim.slot_iterations_forward_cuda(
            *views[:2], views[:3], *views[:7], 1, 1.0, 0.0, 0.0, 1e-5, False, 1, 0, 0
        )
    assert len(NAMES) == 22
