"""The Triton kernels of token pruning against the references and plain loops: interpreted, or on a card."""

from __future__ import annotations

import pytest
import torch
from matrix import DEVICE, INTERPRETED, equal

import vidops
from vidops.ops.bipartite_match import Matching
from vidops.ops.sta_score import StaScores

pytest.importorskip("triton")
# Slow: minutes under the interpreter, which the contract tests of tests/ops share out over fewer sizes.
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and DEVICE != "cuda", reason="Triton has no device to run on"),
    pytest.mark.slow,
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of figures computed in float32 or float64 from the same inputs, relative to the larger of 1e-3 and the figure.
TOLERANCE = {torch.float16: 2e-6, torch.bfloat16: 2e-6, torch.float32: 2e-6, torch.float64: 1e-12}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return equal((left,), (right,))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)


def inputs(items: int, groups: int, tokens: int, width: int, d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    rows = groups * tokens
    return [randn(items, rows, width, seed=1, dtype=dtype), randn(items, rows, d, seed=2, dtype=dtype) + 0.5]


def check(got: Matching | StaScores, want: Matching | StaScores, dtype: torch.dtype) -> None:
    for name, g, w in zip(got._fields, got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype, name
        if w.dtype == torch.int64:
            assert torch.equal(g, w), f"{name}: {(g != w).sum()} of {w.numel()} differ"
            continue
        finite = w.isfinite()
        assert torch.equal(g.isnan(), w.isnan()) and torch.equal(g.isinf(), w.isinf()), name
        error = (g - w)[finite].abs() / w[finite].abs().clamp_min(1e-3)
        assert not error.numel() or error.max() <= TOLERANCE[dtype], f"{name}: {error.max()}"


def compare(
    x: torch.Tensor, metric: torch.Tensor, groups: int, r: int, reverse: bool = False, pruned: bool = False
) -> StaScores:
    got, want = (
        vidops.sta_score(x, metric, groups, r, reverse, first_frame_pruned=pruned, backend=backend)
        for backend in ("triton", "reference")
    )
    check(got, want, x.dtype)
    return got


# Items, groups, tokens, width, key width, dropped.
SCORES = {
    "even": (2, 3, 16, 24, 8, 5),
    "odd": (1, 4, 33, 70, 17, 20),
    "one_group": (2, 1, 7, 5, 3, 2),
    "one_token": (2, 4, 1, 3, 1, 0),
    "two_tokens": (1, 3, 2, 3, 2, 1),
    "nothing_dropped": (2, 2, 70, 40, 80, 0),
    "one_kept": (1, 3, 34, 16, 16, 33),
    "no_item": (0, 3, 4, 3, 2, 1),
    "wide": (1, 2, 12, 1100, 600, 4),
    "more_than_one_tile": (1, 2, 530, 4, 4, 100),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str, dtype: torch.dtype) -> None:
    items, groups, tokens, width, d, r = SCORES[name]
    x, metric = inputs(items, groups, tokens, width, d, dtype)
    compare(x, metric, groups, r)
    if name != "more_than_one_tile":
        compare(x, metric, groups, r, reverse=True, pruned=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [21, 131])
def test_equal_tokens_have_equal_scores_and_go_by_index(tokens: int, dtype: torch.dtype) -> None:
    """Of every group a few different tokens, over and over, so that equal ones lie in different places of tiles."""
    groups, kinds = 4, 5
    x, metric = (t.unflatten(1, (groups, kinds)) for t in inputs(2, groups, kinds, 37, 19, dtype))
    metric[:, :, 3] = 0.0
    kind = torch.randint(kinds, (groups, tokens), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    taken = [torch.stack([t[:, g, kind[g]] for g in range(groups)], 1).flatten(1, 2) for t in (x, metric)]
    if dtype == torch.float64:
        # Cosines of equal keys are not all 1 in float64 products, so the reference has no ties in the first group.
        got = vidops.sta_score(*taken, groups, tokens // 3, backend="triton")
    else:
        got = compare(*taken, groups, tokens // 3)
    odd = [kind[0, 1::2].eq(k).any() for k in kind[0, 0::2]]
    alike = torch.stack(odd) & kind[0, 0::2].ne(3)
    assert (got.first_similarity[:, alike] == 1).all() and alike.sum() > 5
    alike = alike[got.first_order[0, tokens // 2 :] // 2]
    assert (got.first_order[:, tokens // 2 :][:, alike].diff() > 0).all()
    for g in range(1, groups):
        for k in range(kinds):
            for figure in (got.activation, got.acc, got.score):
                alike = figure[:, g, kind[g] == k]
                assert torch.equal(alike, alike[:, :1].expand_as(alike))


def test_constant_clip_keeps_the_first_tokens() -> None:
    x, metric = torch.full((1, 3 * 35, 4), 0.3, device=DEVICE), torch.full((1, 3 * 35, 5), 0.7, device=DEVICE)
    got = compare(x, metric, 3, 10)
    assert not got.activation.any()
    assert torch.equal(got.keep[0, 1:], torch.arange(25, device=DEVICE).expand(2, 25))


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 1e30), (torch.float32, 1e-38), (torch.bfloat16, 1e30), (torch.float64, 1e200)],
    ids=str,
)
def test_keys_of_any_size(dtype: torch.dtype, factor: float) -> None:
    x, metric = inputs(1, 3, 18, 6, 7, dtype)
    scaled = metric * factor
    scaled[:, ::5] = 0.0
    compare(x, scaled, 3, 5)


def test_activity_of_the_largest_numbers_and_beside_a_large_offset() -> None:
    x, metric = inputs(1, 2, 20, 300, 7, torch.float32)
    compare(x.abs().clamp(0.5, 1.0) * 3e38, metric, 2, 5)
    compare(x * 1e-3 + 100.0, metric, 2, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("where", ["first_group", "later_group", "tokens"])
def test_no_number_sorts_last_and_stays_in_its_item(where: str, dtype: torch.dtype, value: float) -> None:
    x, metric = inputs(2, 3, 17, 6, 9, dtype)
    clean = compare(x, metric, 3, 4)
    if where == "tokens":
        x[1, 20, 2] = value
    else:
        metric[1, 4 if where == "first_group" else 21, 2] = value
    got = compare(x, metric, 3, 4)
    assert got.score[1].isnan().any() or value == float("inf")
    assert equal(tuple(t[0] for t in got), tuple(t[0] for t in clean))


def test_all_numbers_are_none() -> None:
    none = torch.full((1, 12, 3), float("nan"), device=DEVICE)
    got = vidops.sta_score(none, none, 2, 2, backend="triton")
    assert torch.equal(got.keep[0, 1], torch.arange(4, device=DEVICE))
    assert torch.equal(got.first_order[0], torch.tensor([1, 3, 5, 0, 2, 4], device=DEVICE))


@pytest.mark.parametrize("pairs", [1, 2, 3, 5])
def test_rounds_of_a_small_workspace(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several launches of some pairs of some items give what one launch of all does."""
    from vidops.kernels import sta_score as kernel

    x, metric = inputs(3, 4, 18, 6, 7, torch.float32)
    whole = compare(x, metric, 4, 5, reverse=True)
    monkeypatch.setattr(kernel, "_WORKSPACE", pairs * 18 * 32 * 4)
    assert len(kernel._rounds(3, 3, pairs)) > 1
    assert equal(tuple(compare(x, metric, 4, 5, reverse=True)), tuple(whole))


def spread(t: torch.Tensor) -> torch.Tensor:
    """The same values with no two beside each other, and axes in another order."""
    wide = torch.full((*reversed(t.shape), 2), 7, dtype=t.dtype, device=t.device)[..., 1]
    return wide.permute(*reversed(range(t.dim()))).copy_(t)


def test_strides() -> None:
    x, metric = inputs(2, 3, 18, 6, 7, torch.float32)
    assert equal(tuple(compare(spread(x), spread(metric), 3, 5)), tuple(compare(x, metric, 3, 5)))
    index = torch.randint(54, (2, 20), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for tokens in (x, x.bfloat16()):
        rows = vidops.gather_tokens(spread(tokens), spread(index), backend="triton")
        assert same(rows, vidops.gather_tokens(tokens, index, backend="reference"))
        back = vidops.scatter_tokens(spread(rows), spread(index), 54, backend="triton")
        assert same(back, vidops.scatter_tokens(rows, index, 54, backend="triton"))
    keep = torch.tensor([[5, 0, 11], [3, 2, 8]], device=DEVICE)
    near = vidops.nearest_kept(spread(keep), (3, 4), backend="triton")
    assert same(near, vidops.nearest_kept(keep, (3, 4), backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 16, 8), (1, 1, 3), (2, 2, 1), (1, 3, 4), (2, 75, 33), (1, 70, 300), (0, 4, 2)], ids=str
)
def test_matching(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    metric = randn(*shape, seed=1, dtype=dtype)
    for tokens in ((False, False), (True, False), (True, True)):
        got, want = (
            vidops.bipartite_match(metric, class_token=tokens[0], distill_token=tokens[1], backend=backend)
            for backend in ("triton", "reference")
        )
        check(got, want, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_matching_of_equal_and_missing_numbers(dtype: torch.dtype) -> None:
    """The first of equal partners, of NaNs too; ties in the order of the positions."""
    kinds = randn(4, 6, seed=1, dtype=dtype)
    kinds[2] = 0.0
    metric = kinds[torch.randint(4, (2, 150), generator=torch.Generator().manual_seed(2))].to(DEVICE)
    metric[1, [8, 71]] = float("nan")
    got, want = (vidops.bipartite_match(metric, backend=backend) for backend in ("triton", "reference"))
    check(got, want, dtype)
    assert got.similarity[1].isnan().all()
    assert got.partner[1].tolist() == [0 if i == 4 else 35 for i in range(75)]


def added(x: torch.Tensor, index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Row by row in the order of k; indices out of range are left out."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(len(x), tokens, x.shape[2], dtype=dtype, device=x.device)
    for item, places in enumerate(index.tolist()):
        for k, n in enumerate(places):
            if 0 <= n < tokens:
                out[item, n] += x[item, k]
    return out.to(x.dtype)


# Items, rows taken from, width, rows taken.
MOVES = [(2, 17, 24, 9), (1, 5, 1, 200), (3, 40, 300, 33), (1, 1, 1, 1), (0, 3, 4, 2), (2, 3, 4, 0), (2, 3, 0, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MOVES, ids=str)
def test_moves(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Both ways, bit for bit, with indices that repeat."""
    items, n, width, k = shape
    x = randn(items, n, width, seed=1, dtype=dtype).requires_grad_()
    index = torch.randint(n, (items, k), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    rows = vidops.gather_tokens(x, index, backend="triton")
    assert same(rows.detach(), vidops.gather_tokens(x.detach(), index, backend="reference"))
    grad = randn(items, k, width, seed=3, dtype=dtype)
    rows.backward(grad)
    assert x.grad is not None and same(x.grad, added(grad, index, n))
    assert same(vidops.scatter_tokens(grad, index, n, backend="triton"), added(grad, index, n))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_indices_out_of_range_move_nothing(dtype: torch.dtype) -> None:
    from vidops.kernels import gather_tokens as kernel

    x = randn(1, 6, 20, seed=1, dtype=dtype)
    index = torch.tensor([[2, -1, 6, 0, 2**40, 5, -(2**62), 2]], device=DEVICE)
    got = kernel.gather(x, index)
    want = torch.zeros_like(got)
    for k, n in enumerate(index[0].tolist()):
        if 0 <= n < 6:
            want[0, k] = x[0, n]
    assert same(got, want)
    grad = randn(1, 8, 20, seed=2, dtype=dtype)
    assert same(kernel.scatter(grad, index, 6), added(grad, index, 6))


def test_a_row_that_is_nowhere_taken_is_zero_beside_one_without_number() -> None:
    x = torch.tensor([[[float("nan")], [1.0], [2.0]]], device=DEVICE)
    index = torch.tensor([[3, 1, 1]], device=DEVICE)
    got = vidops.scatter_tokens(x, index, 4, backend="triton")[0, :, 0].tolist()
    assert got[:3] == [0.0, 3.0, 0.0] and got[3] != got[3]


@pytest.mark.parametrize(
    ("grid", "kept"), [((7, 7), 33), ((1, 1), 1), ((5, 3), 15), ((9, 14), 2), ((40, 33), 70), ((1, 1400), 3)], ids=str
)
def test_nearest(grid: tuple[int, int], kept: int) -> None:
    """Also where distances do not fit 32 bits, and with ties everywhere: kept tokens in any order."""
    order = [torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(i))[:kept] for i in range(2)]
    keep = torch.stack(order).to(DEVICE)
    got = vidops.nearest_kept(keep, grid, backend="triton")
    if grid[0] > 1:
        assert same(got, vidops.nearest_kept(keep, grid, backend="reference"))
    else:
        place = torch.arange(grid[1], device=DEVICE)
        distance = (place[None, :, None] - keep[:, None, :]).abs()
        assert torch.equal(distance.gather(2, got[..., None]).squeeze(2), distance.amin(2))


def test_nearest_takes_no_token_that_is_not_on_the_grid() -> None:
    from vidops.kernels.nearest_kept import forward

    keep = torch.tensor([[-1, 4, 6, 2**40, 0], [-1, -7, 99, 6, 2**33]], device=DEVICE)
    got = forward(keep, 2, 3)
    assert got.tolist() == [[4, 4, 1, 4, 1, 1], [-1] * 6]
