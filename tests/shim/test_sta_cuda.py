"""CUDA token pruning on the host shim: the reference's decisions under every schedule, whatever the shapes."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import vidops
from vidops.ops import sta_score as hub

# Where every schedule would be slow.
FEW = pytest.mark.parametrize("seed", [0, 101], ids=lambda seed: f"seed{seed}")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Groups, tokens, channels, channels of keys, dropped: one token; less than a warp; odd sizes; several tiles and teams;
# more than are counted, but in a group or in the first one as well.
SIZES = [
    *((1, 1, 1, 1, 0), (3, 2, 4, 3, 1), (2, 7, 5, 2, 3), (4, 33, 24, 16, 12), (2, 70, 6, 33, 69), (3, 257, 8, 5, 40)),
    *((3, 330, 8, 5, 40), (2, 650, 4, 3, 100)),
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(x: torch.Tensor, metric: torch.Tensor, frames: int, r: int, **options: bool) -> None:
    got = vidops.sta_score(x, metric, frames, r, backend="cuda", **options)
    want = vidops.sta_score(x, metric, frames, r, backend="reference", **options)
    limit = 1e-12 if x.dtype == torch.float64 else 1e-6
    for name, a, b in zip(got._fields, got, want, strict=True):
        if a.dtype == torch.int64:
            assert torch.equal(a, b), name
        else:
            assert torch.allclose(a, b, rtol=limit, atol=limit, equal_nan=True), name


@FEW
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sta_score(shim: ModuleType, size: tuple[int, ...], seed: int) -> None:
    shim.set_seed(seed)
    frames, tokens, channels, width, r = size
    x, metric = normal(2, frames * tokens, channels), normal(2, frames * tokens, width, seed=1)
    check(x, metric, frames, r)
    check(x, metric, frames, r, reverse=True, first_frame_pruned=True)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What a kernel reads before it was written is no remainder of an earlier call: it is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2, 8, 132], ids=lambda count: f"{count}sm")
def multiprocessors(shim: ModuleType, request: pytest.FixtureRequest) -> Iterator[int]:
    """They decide into how many blocks a clip is cut: as many, for one clip, up to eight, if it has the tokens."""
    shim.set_multiprocessors(request.param)
    yield request.param
    shim.set_multiprocessors(2)


@FEW
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES[4:], ids=str)
def test_a_clip_of_several_blocks(
    shim: ModuleType, multiprocessors: int, size: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    """The bits of a clip depend neither on how many blocks it has nor on what else is in the batch."""
    shim.set_seed(seed)
    frames, tokens, channels, width, r = size
    x, metric = (normal(2, frames * tokens, n, seed=n, dtype=dtype) for n in (channels, width))
    for options in ({}, {"reverse": True, "first_frame_pruned": True}):
        shim.set_multiprocessors(multiprocessors)
        check(x[1:], metric[1:], frames, r, **options)
        alone = vidops.sta_score(x[1:], metric[1:], frames, r, backend="cuda", **options)
        shim.set_multiprocessors(2)
        both = vidops.sta_score(x, metric, frames, r, backend="cuda", **options)
        assert all(torch.equal(a[1:], b) for a, b in zip(both, alone, strict=True))


def test_a_cluster_of_eight_on_every_schedule(seeded: ModuleType) -> None:
    """260 tokens: pieces of four do not share out evenly, and the last of the eight blocks has none."""
    seeded.set_multiprocessors(132)
    try:
        x, metric = normal(1, 3 * 260, 4), normal(1, 3 * 260, 6, seed=1)
        check(x, metric, 3, 90)
    finally:
        seeded.set_multiprocessors(2)


def test_a_cluster_that_reads_from_global_memory(shim: ModuleType) -> None:
    """Its blocks take 166 KB with the columns of two pairs of groups, 16 without; the bits are the same."""
    shim.set_seed(101)
    shim.set_multiprocessors(4)
    x, metric = normal(1, 3 * 260, 4), normal(1, 3 * 260, 6, seed=1)
    found = vidops.sta_score(x, metric, 3, 90, backend="cuda")
    shim.set_shared_limit(99 * 1024)
    try:
        less = vidops.sta_score(x, metric, 3, 90, backend="cuda")
    finally:
        shim.set_shared_limit(227 * 1024)
        shim.set_multiprocessors(2)
    assert all(torch.equal(a, b) for a, b in zip(found, less, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_no_clips(shim: ModuleType, dtype: torch.dtype) -> None:
    for frames in (1, 3):
        check(torch.empty(0, 15, 4, dtype=dtype), torch.empty(0, 15, 2, dtype=dtype), frames, 2)


def test_similarities_that_round_to_negative_zero_tie_with_zero(shim: ModuleType) -> None:
    shim.set_seed(0)
    tiny = 1e-30  # the cosine of the third key with the others is -1e-60
    keys = torch.tensor([[[0, 1, 0], [-tiny, 0, 1], [tiny, 1, 0], [-tiny, 0, 1]]])
    found = vidops.sta_score(torch.ones(1, 4, 1), keys, 1, 1, backend="cuda")
    assert found.first_similarity.tolist() == [[0, 0]]
    assert found.first_order.tolist() == [[1, 3, 0, 2]]
    check(torch.ones(1, 4, 1), keys, 1, 1)
    check(torch.ones(1, 4, 1), -torch.zeros(1, 4, 3), 2, 1)


@FEW
@pytest.mark.parametrize("size", SIZES[2:7], ids=str)
def test_doubles(shim: ModuleType, size: tuple[int, ...], seed: int) -> None:
    """Keys whose squares are out of range, too."""
    shim.set_seed(seed)
    frames, tokens, channels, width, r = size
    for batch, far in ((2, 1.0), (1, 1e200), (1, 1e-200)):
        x = normal(batch, frames * tokens, channels, dtype=torch.float64)
        metric = far * normal(batch, frames * tokens, width, seed=1, dtype=torch.float64)
        check(x, metric, frames, r, reverse=batch == 1, first_frame_pruned=batch == 1)


def test_every_schedule(seeded: ModuleType) -> None:
    """Fewer tokens than threads, and more than a warp of them."""
    x, metric = normal(1, 3 * 35, 8), normal(1, 3 * 35, 6, seed=1)
    check(x, metric, 3, 9, reverse=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dtypes_and_strides(shim: ModuleType, dtype: torch.dtype) -> None:
    shim.set_seed(0)
    wide = normal(2, 40, 24, dtype=dtype)
    check(wide[..., :16], wide[..., 16:], 4, 3)
    check(wide[..., 3:], wide[..., :3], 4, 3)  # neither aligned nor a multiple of four
    turned = wide.transpose(0, 1).contiguous().transpose(0, 1)
    check(turned[..., 4:], turned[..., :4], 4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_extremes_and_what_is_not_finite(shim: ModuleType, dtype: torch.dtype) -> None:
    shim.set_seed(101)
    repeated = normal(1, 3, 4, 5, seed=2, dtype=dtype).repeat(1, 1, 3, 1).flatten(1, 2)
    tokens = normal(1, 3, 4, 6, seed=3, dtype=dtype).repeat(1, 1, 3, 1).flatten(1, 2)
    zero_key = repeated.clone()
    zero_key[:, 5:7] = 0
    for keys in (repeated, zero_key, torch.zeros_like(repeated), repeated * 1e30, repeated * 1e-38):
        check(tokens, keys, 3, 5)
        check(torch.ones_like(tokens), keys, 3, 5)
    for value in (float("nan"), float("inf")):
        for place in (0, 3, 16, 30):
            spoilt = repeated.clone()
            spoilt[0, place, 1] = value
            check(tokens, spoilt, 3, 5)
            check(spoilt, repeated, 3, 5)


@FEW
@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 70, 300])
def test_bipartite_match(shim: ModuleType, tokens: int, seed: int) -> None:
    shim.set_seed(seed)
    metric = normal(3, tokens, 7, seed=tokens)
    metric[1] = metric[1, :1]  # all equal
    for flags in ({}, {"class_token": True}, {"class_token": True, "distill_token": True}):
        got = vidops.bipartite_match(metric, backend="cuda", **flags)
        want = vidops.bipartite_match(metric, backend="reference", **flags)
        assert torch.equal(got.order, want.order) and torch.equal(got.partner, want.partner)
        assert torch.allclose(got.similarity, want.similarity, atol=1e-6)


@FEW
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 3, 8, 37])
def test_gather_and_scatter(shim: ModuleType, dtype: torch.dtype, width: int, seed: int) -> None:
    shim.set_seed(seed)
    for tokens, taken in ((1, 5), (40, 100), (7, 3)):
        x, rows = normal(2, tokens, width + 1, dtype=dtype), normal(2, taken, width + 2, seed=1, dtype=dtype)
        index = torch.randint(tokens, (2, taken), generator=torch.Generator().manual_seed(taken))
        for skip in (0, 1):  # rows that start in the middle of a vector
            part = x[..., skip : width + skip]
            got = vidops.gather_tokens(part, index, backend="cuda")
            assert torch.equal(got, vidops.gather_tokens(part, index, backend="reference"))
            part = rows[..., skip : width + skip]
            got = vidops.scatter_tokens(part, index, tokens + 2, backend="cuda")
            assert torch.equal(got, vidops.scatter_tokens(part, index, tokens + 2, backend="reference"))


def test_indices_out_of_range_touch_nothing(seeded: ModuleType) -> None:
    x = normal(2, 5, 4)
    index = torch.tensor([[0, 5, -1, 4], [2**40, 1, -(2**40), 1]])
    out = torch.ops.vidops.gather_tokens(x, index, "cuda")
    assert torch.equal(out[0, [0, 3]], x[0, [0, 4]]) and torch.equal(out[1, [1, 3]], x[1, [1, 1]])
    assert not out[0, 1:3].any() and not out[1, [0, 2]].any()
    total = torch.ops.vidops.scatter_tokens(x[:, :4], index, 5, "cuda")
    want = torch.zeros(2, 5, 4)
    want[0, 0], want[0, 4], want[1, 1] = x[0, 0], x[0, 3], x[1, 1] + x[1, 3]
    assert torch.equal(total, want)
    source = torch.ops.vidops.nearest_kept(torch.tensor([[2**40, 4, -3]]), 3, 3, "cuda")
    assert (source == 1).all()


@FEW
@pytest.mark.parametrize("grid", [(1, 1), (1, 200), (7, 5), (12, 13)])
def test_nearest_kept(shim: ModuleType, grid: tuple[int, int], seed: int) -> None:
    shim.set_seed(seed)
    places = grid[0] * grid[1]
    for count in {1, (places + 1) // 2, places}:
        keep = torch.stack([torch.randperm(places, generator=torch.Generator().manual_seed(s))[:count] for s in (0, 1)])
        assert torch.equal(
            vidops.nearest_kept(keep, grid, backend="cuda"), vidops.nearest_kept(keep, grid, backend="reference")
        )


def test_groups_that_no_block_sorts_are_refused(shim: ModuleType) -> None:
    tokens = hub.MAX_TOKENS + 1
    with pytest.raises(vidops.BackendError, match="a block sorts at most"):
        vidops.sta_score(normal(1, tokens, 1), normal(1, tokens, 1), 1, 0, backend="cuda")
    doubles = normal(1, hub.MAX_DOUBLES + 1, 1, dtype=torch.float64)
    with pytest.raises(vidops.BackendError, match="a block sorts at most"):
        vidops.sta_score(doubles, doubles, 1, 0, backend="cuda")
    with pytest.raises(vidops.BackendError, match="are sorted in a block"):
        vidops.bipartite_match(normal(1, 2 * tokens, 1), backend="cuda")


def test_the_largest_group_fits_the_least_shared_memory(shim: ModuleType) -> None:
    """99 KB, as on cards that have no more."""
    shim.set_seed(0)
    shim.set_shared_limit(99 * 1024)
    try:
        tokens = hub.MAX_TOKENS
        x, metric = normal(1, tokens, 2), normal(1, tokens, 8, seed=1)
        found = vidops.sta_score(x, metric, 1, 5, backend="cuda")
        want = vidops.sta_score(x, metric, 1, 5, backend="reference")
        # So many similarities are nearer to each other than they round: their order is that of their own values.
        assert torch.allclose(found.first_similarity, want.first_similarity, atol=1e-6)
        order = found.first_similarity[0].sort(stable=True).indices
        assert torch.equal(found.first_order[0, tokens // 2 :], 2 * order)
        assert torch.equal(found.keep[0, 0], found.first_order[0, :-5])
        tokens = hub.MAX_DOUBLES
        check(normal(1, tokens, 2, dtype=torch.float64), normal(1, tokens, 8, seed=1, dtype=torch.float64), 1, 5)
    finally:
        shim.set_shared_limit(227 * 1024)
