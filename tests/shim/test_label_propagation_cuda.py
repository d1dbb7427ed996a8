"""CUDA label_propagation on the host shim: exact choices, whatever the schedule and however the work is cut."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch.utils.dlpack import to_dlpack

import vidops

MOST, LESS = 227 * 1024, 99 * 1024
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Where every schedule would be slow.
FEW = pytest.mark.parametrize("seed", [0, 101, 104], ids=lambda seed: f"seed{seed}")


def whole_numbers(grid: tuple[int, int], frames: int, channels: int, dtype: torch.dtype, labels: int = 3):
    """Features whose affinities are exact and full of ties, and labels."""
    tokens = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(tokens)
    features = torch.randint(-2, 3, (frames + 1, tokens, channels), generator=generator).to(dtype)
    soft = torch.rand(frames, tokens, labels, generator=generator, dtype=torch.float64)
    return features[0], features[1:], soft.to(torch.promote_types(dtype, torch.float32))


def normal(grid: tuple[int, int], frames: int, channels: int, dtype: torch.dtype):
    tokens = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(channels)
    features = torch.randn(frames + 1, tokens, channels, generator=generator, dtype=torch.float64)
    features = torch.nn.functional.normalize(features, dim=-1).to(dtype)
    soft = torch.rand(frames, tokens, 4, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return features[0], features[1:], soft


def run(query, context, labels, grid, backend: str = "cuda", **options):
    out, matches = vidops.label_propagation(
        query, context, labels, grid, return_matches=True, backend=backend, **options
    )
    return out, matches.positions, matches.weights


def same(a, b) -> bool:
    return all(torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0)) for x, y in zip(a, b, strict=True))


def check(query, context, labels, grid, **options) -> None:
    """Of whole numbers the reference's choice is exact, ties included."""
    out, positions, weights = run(query, context, labels, grid, **options)
    want, want_positions, want_weights = run(query, context, labels, grid, "reference", **options)
    assert torch.equal(positions, want_positions)
    assert torch.allclose(weights, want_weights, atol=1e-6, equal_nan=True)
    assert torch.allclose(out, want, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("grid", "frames", "channels", "options"),
    [
        ((1, 1), 1, 1, {"top_k": 3}),
        ((1, 13), 2, 5, {"top_k": 4, "radius": 3.0, "repeats": 3}),
        ((9, 10), 2, 40, {"top_k": 5, "radius": 2.5, "unrestricted": 0}),
    ],
)
def test_schedules(seeded: ModuleType, grid, frames, channels, options, dtype: torch.dtype) -> None:
    check(*whole_numbers(grid, frames, channels, dtype), grid, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 16, 32, 64, 72, 130])
@FEW
def test_channels(shim: ModuleType, seed: int, channels: int, dtype: torch.dtype) -> None:
    """Whole and partial chunks; rows that can be copied in pieces and rows that cannot."""
    shim.set_seed(seed)
    grid = (6, 11)
    check(*whole_numbers(grid, 3, channels, dtype), grid, top_k=7, radius=3.5, repeats=1)


@pytest.mark.parametrize("grid", [(1, 150), (150, 1), (2, 37), (37, 2), (8, 16), (17, 9)])
@pytest.mark.parametrize("radius", [1e-3, 1.0, 4.3, 1e9])
@FEW
def test_grids(shim: ModuleType, seed: int, radius: float, grid: tuple[int, int]) -> None:
    shim.set_seed(seed)
    check(*whole_numbers(grid, 3, 8, torch.float32), grid, top_k=9, radius=radius, unrestricted=1, repeats=2)


@pytest.mark.parametrize("top_k", [1, 31, 32, 33, 64, 65, 127, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@FEW
def test_matches(shim: ModuleType, seed: int, dtype: torch.dtype, top_k: int) -> None:
    shim.set_seed(seed)
    grid = (5, 9)
    for frames, radius in ((1, 2.0), (4, 4.0)):  # fewer positions than matches, and more
        check(*whole_numbers(grid, frames, 8, dtype), grid, top_k=top_k, radius=radius, repeats=5)


@pytest.mark.parametrize("count", [1, 3, 33, 200])
def test_labels(seeded: ModuleType, count: int) -> None:
    grid = (4, 5)
    query, context, labels = whole_numbers(grid, 2, 8, torch.float32, count)
    check(query, context, labels, grid, top_k=6)
    check(query, context, labels[:1].expand(2, -1, -1), grid, top_k=6)


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_temperatures(shim: ModuleType, temperature: float) -> None:
    grid = (4, 5)
    check(*whole_numbers(grid, 2, 8, torch.float32), grid, top_k=6, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [7, 128])
def test_the_cut_changes_no_bit(shim: ModuleType, top_k: int, dtype: torch.dtype) -> None:
    """Less shared memory makes other patches, hence other windows, tiles and shares of the work."""
    grid = (9, 17)
    inputs = normal(grid, 3, 50, dtype)
    want = run(*inputs, grid, top_k=top_k, radius=5.0)
    found = []
    for limit in (LESS, 76 * 1024):
        shim.set_shared_limit(limit)
        try:
            found.append(run(*inputs, grid, top_k=top_k, radius=5.0))
        finally:
            shim.set_shared_limit(MOST)
    assert all(same(one, want) for one in found)
    wide = run(*(t.double() for t in inputs), grid, backend="reference", top_k=top_k, radius=5.0)
    assert (want[0] - wide[0]).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)


def test_float32_affinities_are_those_of_float32(shim: ModuleType) -> None:
    """The softmax at a low temperature magnifies errors of affinities: they are as good as single precision."""
    grid = (7, 9)
    query, context, labels = normal(grid, 2, 384, torch.float32)
    temperature = 1e-3
    out, positions, weights = run(query, context, labels, grid, top_k=5, temperature=temperature)
    value = torch.einsum("nc,nkc->nk", query.double(), context.double().flatten(0, 1)[positions])
    want = (value / temperature).softmax(1)
    error = ((weights - want).abs() / want)[want > 1e-6].max() * temperature
    assert error < 1.5e-7  # the reference's is 9e-8, that of products of TF32 alone 4e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_stride(seeded: ModuleType, dtype: torch.dtype) -> None:
    grid = (5, 6)
    query, context, labels = normal(grid, 2, 32, dtype)
    want = run(query, context, labels, grid, top_k=4, radius=3.0)
    for before, after in ((1, 2), (0, 16)):  # unaligned, and aligned with gaps
        wide = [torch.full((*t.shape[:-1], before + t.shape[-1] + after), torch.nan, dtype=t.dtype)
                for t in (query, context, labels)]  # fmt: skip
        inner = []
        for padded, t in zip(wide, (query, context, labels), strict=True):
            inner.append(padded[..., before : before + t.shape[-1]])
            inner[-1].copy_(t)
        assert same(run(*inner, grid, top_k=4, radius=3.0), want)
    swapped = query.T.contiguous().T, context.transpose(0, 1).contiguous().transpose(0, 1), labels
    assert same(run(*swapped, grid, top_k=4, radius=3.0), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_not_finite(seeded: ModuleType, dtype: torch.dtype) -> None:
    grid = (3, 5)
    query, context, labels = whole_numbers(grid, 2, 6, dtype)
    query[2, 1], query[7, 0], query[9] = torch.nan, torch.inf, 0
    context[0, 4, 2], context[1, 3, 0], context[1, 8, 5] = torch.nan, -torch.inf, torch.inf
    check(query, context, labels, grid, top_k=5, radius=3.0)
    context[:] = torch.nan
    out, positions, weights = run(query, context, labels, grid, top_k=5)
    assert out.isnan().all() and weights.isnan().all() and positions.eq(-1).all()


def test_features_near_the_largest_number(seeded: ModuleType) -> None:
    """Their upper parts round to infinity; the affinities are finite all the same."""
    grid = (2, 6)
    largest = torch.finfo(torch.float32).max
    query, context, labels = whole_numbers(grid, 2, 4, torch.float32)
    query = torch.full_like(query, 0.25)
    context = torch.full_like(context, largest) * torch.linspace(0.5, 1.0, 12)[None, :, None]
    context[0, 3] *= -1
    check(query, context, labels, grid, top_k=5, temperature=1e38)


def test_scratch_is_checked(shim: ModuleType) -> None:
    query, context, labels = whole_numbers((2, 3), 2, 8, torch.float32)
    words = shim.label_propagation_workspace_cuda(2, 6, 3, 4, 4, 0)
    out, index, weight = torch.empty(6, 3), torch.empty(6, 4, dtype=torch.int64), torch.empty(6, 4)
    tensors = [query, context, labels, out, index, weight]
    arguments = (3, 2, 0.2, 1, 0, 0, 0)
    shim.label_propagation_forward_cuda(*map(to_dlpack, (*tensors, torch.full((words,), -1))), *arguments)
    assert same((out, index, weight), run(query, context, labels, (2, 3), top_k=4, radius=2**0.5))
    with pytest.raises(shim.ArgumentError, match="workspace must hold"):
        shim.label_propagation_forward_cuda(*map(to_dlpack, (*tensors, index.new_empty(words - 1))), *arguments)


def test_no_call_is_refused_for_its_dtype(shim: ModuleType) -> None:
    for dtype in DTYPES:
        plan = vidops.explain("label_propagation", *whole_numbers((2, 3), 2, 8, dtype), (2, 3), backend="cuda")
        assert plan.backend == "cuda"
