"""The distance and clustering ops against float64 and their sequential definitions, on every backend."""

import math

import pytest
import torch
from matrix import close, device_for, heads, maps, on_backends, skip_dtype

import vidops

SIZES = [(1, 1), (63, 70), (64, 5), (130, 33)]
DTYPES = [torch.float32, torch.float64]


def _tau_between(p):
    """A threshold of a third of all pairs, and the pairs whose decision rounding cannot change."""
    distance = vidops.symmetric_kl(p.double(), backend="reference")
    tau = float(distance.flatten().sort().values[distance.numel() // 3]) + 1e-3
    near = distance <= tau
    near.fill_diagonal_(True)
    safe = ((distance - tau).abs() > 1e-4) | torch.eye(len(p), dtype=torch.bool, device=p.device)
    return tau, near, safe


@on_backends("symmetric_kl")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,m", SIZES)
def test_symmetric_kl(backend, dtype, n, m):
    skip_dtype(backend, dtype)
    p, x = maps(n, m, dtype, on=backend), maps(7, m, dtype, seed=3, on=backend)
    exact = vidops.symmetric_kl(p.double(), x.double(), backend="reference")
    own = vidops.symmetric_kl(p, x, backend="reference")
    got = vidops.symmetric_kl(p, x, backend=backend)
    size = (p * p.log()).sum(-1).abs().max().double()  # the terms that cancel are as large as an entropy
    assert (got.double() - exact).abs().max() <= 2 * (own.double() - exact).abs().max() + 1e-6 * size + 1e-12
    square = vidops.symmetric_kl(p, backend=backend)
    assert torch.equal(square, square.T)


@on_backends("symmetric_kl_adjacency")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,m", SIZES)
def test_adjacency(backend, dtype, n, m):
    skip_dtype(backend, dtype)
    p = maps(n, m, dtype, on=backend)
    tau, near, safe = _tau_between(p)
    bits = {f: vidops.symmetric_kl_adjacency(p, tau, precision=f, backend=backend) for f in ("filtered", "exact")}
    relation = vidops.unpack_adjacency(bits["exact"])
    assert torch.equal(bits["filtered"], bits["exact"])
    assert torch.equal(relation[safe], near[safe]) and torch.equal(relation, relation.T)
    assert torch.equal(vidops.pack_adjacency(relation), bits["exact"])  # no bit beyond n is set


@on_backends("neighbour_mean")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,m", SIZES)
def test_neighbour_mean(backend, dtype, n, m):
    skip_dtype(backend, dtype)
    p = maps(n, m, dtype, on=backend)
    adjacency = vidops.pack_adjacency(_tau_between(p)[1])
    close(
        vidops.neighbour_mean(adjacency, p, backend=backend),
        vidops.neighbour_mean(adjacency, p, backend="reference"),
        vidops.neighbour_mean(adjacency, p.double(), backend="reference"),
        2e-6,
    )


@on_backends("greedy_absorb")
@pytest.mark.parametrize("n,m", SIZES)
def test_greedy_absorb(backend, n, m):
    adjacency = vidops.pack_adjacency(_tau_between(maps(n, m, on=backend))[1])
    found = vidops.greedy_absorb(adjacency, backend=backend)
    want = vidops.greedy_absorb(adjacency, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@on_backends("greedy_absorb_kl", "symmetric_kl_adjacency")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,m", SIZES)
def test_greedy_absorb_kl(backend, dtype, n, m):
    """The lazy form decides exactly as the backend's own adjacency does, ties included."""
    skip_dtype(backend, dtype)
    p = maps(n, m, dtype, on=backend)
    tau = _tau_between(p)[0]
    adjacency = vidops.symmetric_kl_adjacency(p, tau, precision="exact", backend=backend)
    want = vidops.greedy_absorb(adjacency, backend="reference")
    found = vidops.greedy_absorb_kl(p, tau, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@on_backends("segment_mean")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,m", SIZES)
def test_segment_mean(backend, dtype, n, m):
    skip_dtype(backend, dtype)
    x = maps(n, m, dtype, on=backend)
    label = vidops.greedy_absorb(vidops.pack_adjacency(_tau_between(x)[1]), backend="reference").label
    count = int(label.max()) + 2  # the last segment has no rows
    got = vidops.segment_mean(x, label, count, backend=backend)
    same = vidops.segment_mean(x, label, count, backend="reference")
    close(got, same, vidops.segment_mean(x.double(), label, count, backend="reference"))
    assert not got[-1].any()


@on_backends("assign_rows")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,m", SIZES)
def test_assign_rows(backend, dtype, n, m):
    skip_dtype(backend, dtype)
    p, x = maps(n, m, dtype, on=backend), maps(7, m, dtype, seed=3, on=backend)
    exact = vidops.symmetric_kl(p.double(), x.double(), backend="reference")
    labels = vidops.assign_rows(p, x, backend=backend)
    gaps = exact.sort(1).values
    clear = gaps[:, 1] - gaps[:, 0] > 1e-5
    assert torch.equal(labels[clear], exact.argmin(1)[clear])
    assert bool(clear.any()) or m == 1  # rows of one column are all equal


@on_backends(
    "symmetric_kl", "symmetric_kl_adjacency", "neighbour_mean", "greedy_absorb_kl", "segment_mean", "assign_rows"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_widened(backend, dtype):
    p = maps(40, 19, dtype, on=backend)
    label = torch.arange(40, device=p.device) % 3
    adjacency = vidops.symmetric_kl_adjacency(p, 1.0, backend=backend)
    for function in (
        lambda x: vidops.symmetric_kl(x, backend=backend),
        lambda x: vidops.symmetric_kl(x, x[:3], backend=backend),
        lambda x: vidops.symmetric_kl_adjacency(x, 1.0, backend=backend),
        lambda x: vidops.neighbour_mean(adjacency, x, backend=backend),
        lambda x: vidops.greedy_absorb_kl(x, 1.0, backend=backend).owner,
        lambda x: vidops.segment_mean(x, label, 3, backend=backend),
        lambda x: vidops.assign_rows(x, p[:4].float(), backend=backend),
    ):
        half, wide = function(p), function(p.float())
        assert half.dtype == wide.dtype and torch.equal(half, wide)


@on_backends("assign_clusters")
def test_assign_clusters_equals_assign_rows(backend):
    q, k = heads(3, 50, 16, on=backend), heads(3, 70, 16, seed=1, on=backend)
    p, log_p, lse = vidops.attention_head_mean(q, k, return_log=True, return_lse=True, backend="reference")
    x = p[::9].contiguous()
    want = vidops.assign_rows(p, x, log_p=log_p, backend="reference")
    assert torch.equal(vidops.assign_clusters(q, k, x, backend=backend), want)
    assert torch.equal(vidops.assign_clusters(q, k, x, lse=lse, backend=backend), want)


@on_backends("assign_rows")
def test_exact_ties_take_the_smallest_label(backend):
    x = maps(3, 9, on=backend)
    twice = torch.cat([x, x])
    assert vidops.assign_rows(x, twice, backend=backend).tolist() == [0, 1, 2]


@on_backends("symmetric_kl")
def test_symmetric_kl_without_rows(backend):
    none, some = torch.ones(0, 3, device=device_for(backend)), torch.ones(2, 3, device=device_for(backend))
    assert vidops.symmetric_kl(none, backend=backend).shape == (0, 0)
    assert vidops.symmetric_kl(some, none, backend=backend).shape == (2, 0)


@on_backends("symmetric_kl_adjacency", "neighbour_mean")
def test_adjacency_and_mean_without_rows(backend):
    none = torch.ones(0, 3, device=device_for(backend))
    adjacency = vidops.symmetric_kl_adjacency(none, 1.0, backend=backend)
    assert adjacency.shape == (0, 0)
    assert vidops.neighbour_mean(adjacency, none, backend=backend).shape == (0, 3)


@on_backends("greedy_absorb")
def test_greedy_absorb_without_rows(backend):
    found = vidops.greedy_absorb(torch.ones(0, 0, dtype=torch.int64, device=device_for(backend)), backend=backend)
    assert found.owner.shape == (0,) and int(found.count) == 0


@on_backends("greedy_absorb_kl")
def test_greedy_absorb_kl_without_rows(backend):
    found = vidops.greedy_absorb_kl(torch.ones(0, 3, device=device_for(backend)), 1.0, backend=backend)
    assert found.owner.shape == (0,) and int(found.count) == 0


@on_backends("segment_mean")
def test_segment_mean_without_rows(backend):
    none = torch.ones(0, 3, device=device_for(backend))
    label = torch.zeros(0, dtype=torch.int64, device=device_for(backend))
    assert vidops.segment_mean(none, label, 2, backend=backend).tolist() == [[0.0] * 3] * 2
    assert vidops.segment_mean(none, label, 0, backend=backend).shape == (0, 3)


def _maps_with_nan(backend):
    p = maps(40, 20, on=backend)
    p[3] = math.nan
    return p


@on_backends("symmetric_kl_adjacency")
@pytest.mark.parametrize("precision", ["filtered", "exact"])
def test_a_nan_row_has_no_neighbours(backend, precision):
    p = _maps_with_nan(backend)
    bits = vidops.symmetric_kl_adjacency(p, 1e9, precision=precision, backend=backend)
    relation = vidops.unpack_adjacency(bits)
    assert relation[3].nonzero().flatten().tolist() == [3] and relation[:, 3].nonzero().flatten().tolist() == [3]


@on_backends("greedy_absorb_kl")
def test_a_nan_row_leads_alone(backend):
    assert vidops.greedy_absorb_kl(_maps_with_nan(backend), 1e9, backend=backend).owner.unique().tolist() == [0, 3]


@on_backends("assign_rows")
def test_a_nan_centroid_never_wins(backend):
    p = _maps_with_nan(backend)
    x = p[:2].clone()
    x[0] = math.nan
    assert vidops.assign_rows(p, x, backend=backend).tolist() == [0 if i == 3 else 1 for i in range(40)]


@on_backends("segment_mean")
def test_a_nan_row_spoils_only_its_segment(backend):
    p = _maps_with_nan(backend)
    mean = vidops.segment_mean(p, torch.arange(40, device=p.device) % 4, 4, backend=backend)
    assert mean.isnan().all(1).tolist() == [False, False, False, True] and not mean[:3].isnan().any()
