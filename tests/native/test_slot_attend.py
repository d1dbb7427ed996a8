"""Native slot attention over the tokens against plain float64, at every ISA level and for both forms of its rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from vidops import _native

C = _native.C
pytestmark = pytest.mark.skipif(C is None, reason=_native.WHY_NOT)

# Levels above avx512 run its kernels.
LEVELS = [name for name in C.cpu_isas() if name in ("scalar", "avx2", "avx512")] if C is not None else []
ABSENT = torch.empty(0)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    C.set_cpu_isa(request.param)
    yield request.param
    C.set_cpu_isa("")


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 1
    slots: int = 4
    tokens: int = 70
    key_width: int = 20
    value_width: int = 0  # 0: values are the keys
    key_heads: int = 1
    value_heads: int = 1
    raw: bool = False
    groups: int = 1
    joint: bool = False
    eps: float = 1e-3
    token_mask: bool = False
    slot_mask: bool = False
    spread: int = 1  # of the dots; above 1 they are integers, exact in either precision
    dtype: torch.dtype = torch.float32


# Both sides of a vector, a panel, a tile (64 tokens), a block of rows (14, 6 or 4) and a chunk (256 tokens).
CASES = {
    "one of everything": Case(batch=1, slots=1, tokens=1, key_width=1),
    "one slot": Case(slots=1, tokens=33, raw=True),
    "one token": Case(slots=5, tokens=1, key_width=64, raw=True),
    "narrow": Case(batch=3, slots=7, tokens=300, key_width=64, raw=True),
    "wide": Case(slots=16, tokens=256, key_width=384, raw=True),
    "odd": Case(batch=3, slots=15, tokens=129, key_width=37, raw=True),
    "many rows": Case(slots=64, tokens=65, key_width=48, groups=16, token_mask=True, raw=True),
    "several chunks": Case(batch=1, slots=11, tokens=1000, key_width=33),
    "own values": Case(slots=6, tokens=100, key_width=32, value_width=64),
    "own odd values": Case(slots=6, tokens=100, key_width=31, value_width=65),
    "heads share rows": Case(heads=3, slots=5, tokens=80, raw=True),
    "heads share keys": Case(heads=3, slots=5, tokens=80, value_width=17, value_heads=3),
    "heads share values": Case(heads=2, slots=9, tokens=80, value_width=32, key_heads=2),
    "heads with own rows": Case(heads=4, slots=5, tokens=90, value_width=24, key_heads=4, value_heads=4),
    "heads with own keys as values": Case(heads=4, slots=15, tokens=90, key_heads=4, value_heads=4),
    "joint": Case(heads=3, slots=5, tokens=80, value_width=16, key_heads=3, value_heads=3, joint=True),
    "joint with masks": Case(
        heads=2, slots=6, tokens=70, joint=True, groups=2, token_mask=True, slot_mask=True, raw=True
    ),
    "groups": Case(slots=12, groups=4, heads=2, raw=True),
    "groups of one": Case(slots=3, groups=3),
    "masks": Case(slots=12, groups=3, token_mask=True, slot_mask=True, raw=True),
    "no eps": Case(eps=0.0, token_mask=True),
    "large dots": Case(slots=7, tokens=100, spread=10_000),
}
EVERY = [
    pytest.param(replace(case, dtype=dtype), id=f"{name}-{str(dtype)[6:]}")
    for (name, case), dtype in itertools.product(CASES.items(), TOLERANCE)
]
# A saturated softmax passes nothing back to the dots: without gradients of the maps there would be no scale to measure
# a rounding by.
EVERY_AND_MAPS = [
    pytest.param(*case.values, maps, id=f"{case.id}-{'maps' if maps else 'sums'}")
    for case, maps in itertools.product(EVERY, (False, True))
    if maps or case.values[0].spread == 1
]


@dataclass
class Inputs:
    keys: torch.Tensor
    values: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor
    q: torch.Tensor
    c: torch.Tensor
    token_mask: torch.Tensor
    slot_mask: torch.Tensor
    groups: int
    joint: bool
    eps: float

    def tensors(self) -> list[torch.Tensor]:
        return [self.keys, self.values, self.mean, self.rstd, self.q, self.c, self.token_mask, self.slot_mask]

    def views(self) -> list[object]:
        return [*map(_native.view, self.tensors()), self.groups, self.joint, self.eps]

    def double(self) -> Inputs:
        def wide(t: torch.Tensor) -> torch.Tensor:
            return t.double() if t.is_floating_point() else t

        keys = wide(self.keys)
        values = keys if self.values is self.keys else wide(self.values)
        return Inputs(keys, values, *map(wide, self.tensors()[2:]), self.groups, self.joint, self.eps)


def strided(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Normal rows that lie apart in memory."""
    wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=generator, dtype=dtype)
    return wide[..., : shape[-1]]


def make(case: Case) -> Inputs:
    g = torch.Generator().manual_seed(5)
    keys = strided(g, case.dtype, case.batch, case.key_heads, case.tokens, case.key_width)
    values = keys
    if case.value_width:
        values = strided(g, case.dtype, case.batch, case.value_heads, case.tokens, case.value_width)
    mean = rstd = token_mask = slot_mask = ABSENT
    if case.raw:
        mean = torch.randn(case.batch, case.tokens, generator=g, dtype=case.dtype)
        rstd = torch.rand(case.batch, case.tokens, generator=g, dtype=case.dtype) + 0.5
    q = torch.randn(case.batch, case.heads, case.slots, case.key_width, generator=g, dtype=case.dtype)
    c = torch.randn(case.batch, case.heads, case.slots, generator=g, dtype=case.dtype)
    if case.token_mask:
        token_mask = (torch.rand(case.batch, case.groups, case.tokens, generator=g) < 0.6).to(case.dtype)
        token_mask[0, 0] = 0
    if case.slot_mask:  # the first slot of every group stays
        slot_mask = (torch.rand(case.batch, case.slots, generator=g) < 0.5).int()
        slot_mask[:, :: case.slots // case.groups] = 0
    q *= case.spread / case.key_width**0.5
    if case.spread > 1:
        for t in (keys, q, c):
            t.round_()
    return Inputs(keys, values, mean, rstd, q, c, token_mask, slot_mask, case.groups, case.joint, case.eps)


def normalised(x: torch.Tensor, a: Inputs) -> torch.Tensor:
    return (x - a.mean[:, None, :, None]) * a.rstd[:, None, :, None] if a.mean.dim() > 1 else x


def expected_forward(
    a: Inputs, keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """num, den, dots, attn of given (already normalised) rows, differentiable."""
    dots = torch.einsum("bhsd,bhnd->bhsn", q, keys.expand(-1, q.shape[1], -1, -1)) + c[..., None]
    if a.slot_mask.numel():
        dots = torch.where(a.slot_mask[:, None, :, None] != 0, -torch.inf, dots)
    batch, heads, slots, tokens = dots.shape
    members = (batch, 1, heads * slots, tokens) if a.joint else (batch, heads * a.groups, slots // a.groups, tokens)
    attn = dots.reshape(members).softmax(2).reshape(dots.shape)
    weights = attn + a.eps
    if a.token_mask.numel():
        weights = weights * a.token_mask.repeat_interleave(slots // a.groups, dim=1)[:, None]
    num = torch.einsum("bhsn,bhnd->bhsd", weights, values.expand(-1, heads, -1, -1))
    return num, weights.sum(-1), dots, attn


def reference_forward(a: Inputs) -> tuple[torch.Tensor, ...]:
    a = a.double()
    return expected_forward(a, normalised(a.keys, a), normalised(a.values, a), a.q, a.c)


def native_forward(a: Inputs, maps: bool = True, threads: int = 2) -> tuple[torch.Tensor, ...]:
    batch, heads, slots, tokens = *a.q.shape[:3], a.keys.shape[2]
    num = a.q.new_full((batch, heads, slots, a.values.shape[3]), torch.nan)
    den = torch.full_like(a.c, torch.nan)
    dots, attn = (a.q.new_full((batch, heads, slots, tokens) if maps else (0,), torch.nan) for _ in range(2))
    C.slot_attend_forward_cpu(*a.views(), *map(_native.view, (num, den, dots, attn)), -1.0, threads)
    return num, den, dots, attn


@dataclass
class Gradients:
    num: torch.Tensor
    den: torch.Tensor
    dots: torch.Tensor
    attn: torch.Tensor

    @classmethod
    def of(cls, a: Inputs, maps: bool) -> Gradients:
        g = torch.Generator().manual_seed(6)
        shapes = [(*a.q.shape[:3], a.values.shape[3]), a.c.shape]
        shapes += [(*a.q.shape[:3], a.keys.shape[2]) if maps else (0,)] * 2
        return cls(*(torch.randn(shape, generator=g, dtype=a.q.dtype) for shape in shapes))

    def tensors(self) -> list[torch.Tensor]:
        return [self.num, self.den, self.dots, self.attn]


def reference_backward(a: Inputs, given: Gradients) -> list[torch.Tensor]:
    """Gradients of q, c, keys and values; where values are keys, those of both uses apart."""
    a = a.double()
    inputs = [a.q, a.c, normalised(a.keys, a), normalised(a.values, a)]
    q, c, keys, values = (t.clone().requires_grad_() for t in inputs)
    outputs = expected_forward(a, keys, values, q, c)
    total = sum(
        (o.masked_fill(o.isinf(), 0) * g.double()).sum()  # the dots of masked slots are constants
        for o, g in zip(outputs, given.tensors(), strict=True)
        if g.numel()
    )
    return list(torch.autograd.grad(total, [q, c, keys, values], allow_unused=True, materialize_grads=True))


def native_backward(
    a: Inputs, given: Gradients, threads: int = 2, start: float = 0.25, add: bool = True
) -> list[torch.Tensor]:
    """As above; one buffer for both uses where values are keys. Buffers start at `start`, which is taken off again;
    what is written, not added to, starts as NaN."""
    start = start if add else torch.nan
    grad_keys = torch.full_like(a.keys, start)
    grad_values = grad_keys if a.values is a.keys else torch.full_like(a.values, start)
    grad_q, grad_c = torch.full_like(a.q, torch.nan), torch.full_like(a.c, torch.nan)
    outputs = (grad_keys, grad_values, grad_q, grad_c)
    C.slot_attend_backward_cpu(
        *map(_native.view, given.tensors()), *a.views(), *map(_native.view, outputs), add, threads
    )  # fmt: skip
    start = start if add else 0.0
    if grad_values is grad_keys:
        return [grad_q, grad_c, grad_keys - start]
    return [grad_q, grad_c, grad_keys - start, grad_values - start]


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest entry; the same infinities and NaN."""
    finite = want.isfinite()
    assert torch.equal(got.double()[~finite], want[~finite]) or bool(want[~finite].isnan().any())
    assert torch.equal(got.isnan(), want.isnan())
    error = (got.double() - want)[finite].abs()
    scale = max(1e-30, want[finite].abs().max().item()) if finite.any() else 1.0
    assert error.numel() == 0 or error.max().item() <= tolerance * scale


@pytest.mark.parametrize("case", EVERY)
def test_forward(case: Case, level: str) -> None:
    a = make(case)
    for got, want in zip(native_forward(a), reference_forward(a), strict=True):
        close(got, want, TOLERANCE[case.dtype])


@pytest.mark.parametrize("case, maps", EVERY_AND_MAPS)
def test_backward(case: Case, maps: bool, level: str) -> None:
    a = make(case)
    given = Gradients.of(a, maps)
    want = reference_backward(a, given)
    if a.values is a.keys:
        want = [*want[:2], want[2] + want[3]]
    for add in (True, False):
        for x, y in zip(native_backward(a, given, add=add), want, strict=True):
            close(x, y, TOLERANCE[case.dtype])


@pytest.mark.parametrize("name", ["narrow", "several chunks", "heads with own rows", "joint with masks"])
def test_the_number_of_threads_changes_no_bit(name: str, level: str) -> None:
    a = make(replace(CASES[name], batch=2))
    given = Gradients.of(a, True)
    one = [*native_forward(a, threads=1), *native_backward(a, given, threads=1)]
    for threads in (2, 3, 7):
        many = [*native_forward(a, threads=threads), *native_backward(a, given, threads=threads)]
        assert all(map(torch.equal, one, many))


def test_an_item_does_not_depend_on_its_batch(level: str) -> None:
    a = make(Case(batch=3, slots=11, tokens=300, key_width=40, raw=True))
    alone = replace(a, keys=a.keys[1:2], mean=a.mean[1:2], rstd=a.rstd[1:2], q=a.q[1:2], c=a.c[1:2])
    alone.values = alone.keys
    for all_of_it, one in zip(native_forward(a), native_forward(alone), strict=True):
        assert torch.equal(all_of_it[1:2], one)


def test_maps_are_not_needed_for_sums(level: str) -> None:
    a = make(CASES["odd"])
    for with_maps, without in zip(native_forward(a)[:2], native_forward(a, maps=False)[:2], strict=True):
        close(without, with_maps.double(), 1e-6)


@pytest.mark.parametrize("where", ["keys", "q", "mean"])
def test_nan_stays_in_its_item(where: str, level: str) -> None:
    case = Case(batch=3, slots=5, tokens=100, raw=True)
    a, clean = make(case), make(case)
    getattr(a, where)[1, ..., 3] = torch.nan
    given = Gradients.of(a, False)
    got = [*native_forward(a, maps=False)[:2], *native_backward(a, given)]
    want = [*native_forward(clean, maps=False)[:2], *native_backward(clean, given)]
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])
        assert x[1].isnan().any()


def test_all_slots_masked_is_nan_in_that_item(level: str) -> None:
    a = make(Case(batch=2, slots=5, tokens=40, slot_mask=True))
    a.slot_mask[1] = 1
    num, den, dots, attn = native_forward(a)
    assert num[0].isfinite().all() and num[1].isnan().all() and den[1].isnan().all() and attn[1].isnan().all()
    assert (dots[1] == -torch.inf).all()


def test_a_masked_slot_has_weight_zero(level: str) -> None:
    a = make(Case(slots=6, tokens=90, slot_mask=True, eps=0.0, raw=True))
    num, den, _, attn = native_forward(a)
    masked = a.slot_mask.bool()[:, None]
    assert (attn[masked] == 0).all() and (num[masked] == 0).all() and (den[masked] == 0).all()


def test_a_group_without_tokens_sums_to_zero(level: str) -> None:
    a = make(Case(slots=6, groups=2, tokens=90, token_mask=True))
    num, den, _, _ = native_forward(a)
    assert (num[0, :, :3] == 0).all() and (den[0, :, :3] == 0).all() and (num[0, :, 3:] != 0).any()


def test_rows_far_from_zero_keep_their_accuracy(level: str) -> None:
    """Mean 1000, deviation 1: the dots are taken of the normalised rows, so only the rounding of x is magnified."""
    a = make(Case(slots=7, tokens=200, key_width=64, raw=True))
    x = (1000 + torch.randn(2, 1, 200, 64, generator=torch.Generator().manual_seed(1))).float()
    a.keys = a.values = x
    a.mean, a.rstd = x[:, 0].mean(-1), 1 / x[:, 0].var(-1, correction=0).add(1e-5).sqrt()
    for got, want in zip(native_forward(a), reference_forward(a), strict=True):
        close(got, want, 1e-5)


@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0)])
def test_nothing_to_do(batch: int, tokens: int) -> None:
    a = make(Case(batch=batch, tokens=tokens, slots=3, raw=True))
    num, den, _, _ = native_forward(a)
    grad_q, grad_c, _ = native_backward(a, Gradients.of(a, False))
    assert all((t == 0).all() for t in (num, den, grad_q, grad_c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 64, 100, 384])
def test_token_statistics(dtype: torch.dtype, width: int, level: str) -> None:
    g = torch.Generator().manual_seed(2)
    x = strided(g, dtype, 3, 300, width).add_(100)
    mean, rstd = (torch.full((3, 300), torch.nan, dtype=dtype) for _ in range(2))
    C.token_statistics_cpu(*map(_native.view, (x, mean, rstd)), 1e-5, 2)
    close(mean, x.double().mean(-1), 1e-6 if dtype == torch.float32 else 1e-14)
    want = 1 / (x.double().var(-1, correction=0) + 1e-5).sqrt()
    close(rstd, want, 1e-5 if dtype == torch.float32 else 1e-12)


WRONG = {
    "keys of another width": dict(keys=torch.randn(2, 1, 70, 19)),
    "keys of another number of heads": dict(keys=torch.randn(2, 3, 70, 20)),
    "values of other tokens": dict(values=torch.randn(2, 1, 69, 20)),
    "another dtype": dict(values=torch.randn(2, 1, 70, 20, dtype=torch.float64)),
    "half precision": dict(keys=torch.randn(2, 1, 70, 20).half()),
    "mean alone": dict(mean=torch.randn(2, 70)),
    "another rank": dict(c=torch.randn(2, 4)),
    "a token mask of other groups": dict(token_mask=torch.ones(2, 3, 70)),
    "a slot mask of floats": dict(slot_mask=torch.ones(2, 4)),
    "groups that do not divide": dict(groups=3),
    "no groups": dict(groups=0),
    "strided queries": dict(q=torch.randn(2, 1, 4, 40)[..., :20]),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_refused(wrong: dict[str, object]) -> None:
    a = make(Case())
    given = Gradients.of(a, False)
    bad = replace(a, **wrong)
    outputs = [torch.empty(2, 1, 4, 20), torch.empty(2, 1, 4), ABSENT, ABSENT]
    with pytest.raises(C.ArgumentError):
        C.slot_attend_forward_cpu(*bad.views(), *map(_native.view, outputs), -1.0, 1)
    gradients = [torch.zeros(2, 1, 70, 20), torch.zeros(2, 1, 70, 20), torch.empty(2, 1, 4, 20), torch.empty(2, 1, 4)]
    with pytest.raises(C.ArgumentError):
        C.slot_attend_backward_cpu(
            *map(_native.view, given.tensors()), *bad.views(), *map(_native.view, gradients), True, 1
        )  # fmt: skip


@pytest.mark.parametrize("output", range(4))
def test_outputs_of_another_shape_are_refused(output: int) -> None:
    a = make(Case())
    outputs = [torch.empty(2, 1, 4, 20), torch.empty(2, 1, 4), torch.empty(2, 1, 4, 70), torch.empty(2, 1, 4, 70)]
    outputs[output] = outputs[output][:, :, :3].contiguous()
    with pytest.raises(C.ArgumentError):
        C.slot_attend_forward_cpu(*a.views(), *map(_native.view, outputs), -1.0, 1)
