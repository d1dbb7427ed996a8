"""Native products of slot attention and its tokens' norm against float64, at every ISA level."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from vidops import _native
from vidops.ops import _slot_backends

C = _native.C
pytestmark = pytest.mark.skipif(C is None, reason=_native.WHY_NOT)

# avx512_bf16 runs the kernels of avx512.
LEVELS = [name for name in C.cpu_isas() if name != "avx512_bf16"] if C is not None else []
TOLERANCE = {torch.float32: 2e-6, torch.float64: 4e-15}
ABSENT = torch.empty(0)

# Both sides of a vector, a panel (32, 16 or 8 columns), a block of rows (112, 48 or 32), a slice of K (128), a slab of
# it (1024), few rows (16), a block of tiles (512 rows, 128 columns); none at all.
SIZES = [(1, 1, 1), (3, 5, 0), (14, 32, 128), (15, 33, 129), (7, 300, 31), (113, 130, 64), (230, 17, 1025)]
SIZES += [(16, 515, 130), (17, 513, 66), (520, 140, 1030)]
FORMS = [
    pytest.param(*size, *form, id=f"{size[0]}x{size[1]}x{size[2]}-{'a' * form[0]}{'b' * form[1]}")
    for size, form in itertools.product(SIZES, itertools.product((False, True), repeat=2))
]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    C.set_cpu_isa(request.param)
    yield request.param
    C.set_cpu_isa("")


def operand(g: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Rows that lie apart in memory."""
    return torch.randn(*shape[:-1], shape[-1] + 3, generator=g, dtype=dtype)[..., : shape[-1]]


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    turned: tuple[bool, bool] = (False, False),
    bias: torch.Tensor = ABSENT,
    add_to: torch.Tensor | None = None,
    threads: int = 2,
) -> torch.Tensor:
    """Of batches (B, M, K) and (B, K, N), or of their transposes."""
    rows, columns = a.shape[2 if turned[0] else 1], b.shape[1 if turned[1] else 2]
    out = a.new_full((len(a), rows, columns), torch.nan) if add_to is None else add_to.clone()
    views = map(_native.view, (a, b, bias, out))
    view_a, view_b, view_bias, view_out = views
    C.product_cpu(view_a, turned[0], view_b, turned[1], view_bias, view_out, add_to is not None, threads)
    return out


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got.double() - want).abs()
    assert error.numel() == 0 or error.max() <= TOLERANCE[got.dtype] * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("m, n, k, a_turned, b_turned", FORMS)
def test_product(
    m: int, n: int, k: int, a_turned: bool, b_turned: bool, dtype: torch.dtype, level: str
) -> None:
    g = torch.Generator().manual_seed(1)
    a = operand(g, dtype, 2, *((k, m) if a_turned else (m, k)))
    b = operand(g, dtype, 2, *((n, k) if b_turned else (k, n)))
    bias, start = torch.randn(n, generator=g, dtype=dtype), torch.randn(2, m, n, generator=g, dtype=dtype)
    turned = (a_turned, b_turned)
    want = (a.mT if a_turned else a).double() @ (b.mT if b_turned else b).double()
    close(product(a, b, turned), want)
    close(product(a, b, turned, bias), want + bias.double())
    close(product(a, b, turned, add_to=start), want + start.double())


def test_a_product_sums_as_exactly_as_short_runs(level: str) -> None:
    """The error of one run over a whole slab is 9.5e-8, that of a BLAS 7.8e-8."""
    g = torch.Generator().manual_seed(2)
    a, b = torch.rand(1, 60, 1024, generator=g), torch.rand(1, 1024, 60, generator=g)
    want = a.double() @ b.double()
    error = (product(a, b) - want).abs().mean() / want.mean()
    assert error < 7e-8


def test_the_number_of_threads_changes_no_bit(level: str) -> None:
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 250, 300, generator=g), torch.randn(2, 300, 90, generator=g)
    one = product(a, b, threads=1)
    assert all(torch.equal(one, product(a, b, threads=threads)) for threads in (2, 3, 7))


def test_a_row_and_a_column_stay_alone(level: str) -> None:
    """NaN reaches no other row or column, and none that is only there to fill a panel."""
    g = torch.Generator().manual_seed(4)
    a, b = torch.randn(1, 37, 50, generator=g), torch.randn(1, 50, 41, generator=g)
    clean = product(a, b)
    a[0, 36, 7], b[0, 7, 40] = torch.nan, torch.inf
    got = product(a, b)
    assert torch.equal(got[:, :36, :40], clean[:, :36, :40])
    assert got[0, 36].isnan().all() and not got[0, :36, 40].isfinite().any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [None, 2])
def test_the_backend_turns_operands_by_itself(heads: int | None, dtype: torch.dtype) -> None:
    """Above the size below which PyTorch multiplies, and below it."""
    g = torch.Generator().manual_seed(5)
    for size in (3, 120):
        shape = (size, size + 1) if heads is None else (heads, size, size + 1)
        a, b = (torch.randn(shape, generator=g, dtype=dtype) for _ in range(2))
        for x, y in ((a, b.mT), (a.mT, b), (a.mT.contiguous().mT, b.mT.contiguous())):
            want = x.double() @ y.double()
            close(_slot_backends._cpu_product(x, y), want)
            start = torch.ones_like(want, dtype=dtype)
            close(_slot_backends._cpu_product(x, y, add_to=start), want + 1)
            close(start, want + 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 100, 384])
def test_token_norm_grad(dtype: torch.dtype, width: int, level: str) -> None:
    g = torch.Generator().manual_seed(6)
    x, grad = operand(g, dtype, 3, 70, width), torch.randn(3, 70, width, generator=g, dtype=dtype)
    wide = x.double().requires_grad_()
    normed = torch.nn.functional.layer_norm(wide, (width,), eps=1e-3)
    (want,) = torch.autograd.grad(normed, wide, grad.double())
    mean, variance = x.double().mean(-1), x.double().var(-1, correction=0)
    statistics = mean.to(dtype), (variance + 1e-3).rsqrt().to(dtype)
    C.token_norm_grad_cpu(*map(_native.view, (x, *statistics, grad)), 2)
    scale = float(want.abs().max()) + 32 * (width == 1)  # a single channel passes back what its rounding leaves
    assert float((grad.double() - want).abs().max()) <= 8 * TOLERANCE[dtype] * scale


WRONG = {
    "another K": dict(b=torch.randn(1, 6, 4)),
    "another batch": dict(b=torch.randn(2, 5, 4)),
    "another dtype": dict(a=torch.randn(1, 3, 5).double()),
    "half precision": dict(a=torch.randn(1, 3, 5).half()),
    "a longer bias": dict(bias=torch.randn(5)),
    "another result": dict(out=torch.randn(1, 4, 4)),
    "another rank": dict(a=torch.randn(3, 5)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_products_are_refused(wrong: dict[str, torch.Tensor]) -> None:
    given = dict(a=torch.randn(1, 3, 5), b=torch.randn(1, 5, 4), bias=torch.randn(4), out=torch.randn(1, 3, 4)) | wrong
    a, b, bias, out = map(_native.view, given.values())
    with pytest.raises(C.ArgumentError):
        C.product_cpu(a, False, b, False, bias, out, False, 1)


@pytest.mark.parametrize("at, shape", [(0, (2, 5, 8)), (1, (2, 6)), (2, (1, 5)), (3, (2, 5, 6))])
def test_wrong_norms_are_refused(at: int, shape: tuple[int, ...]) -> None:
    given = [torch.randn(2, 5, 7), torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 5, 7)]
    given[at] = torch.randn(shape)
    with pytest.raises(C.ArgumentError):
        C.token_norm_grad_cpu(*map(_native.view, given), 1)
