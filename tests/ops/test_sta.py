"""Token pruning and merging: against loops over tokens in float64, on exact ties, through autograd and compilers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matrix import EMULATED, INTERPRETED, device_for, equal, heads, on_backends, skip_dtype
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vidops
from vidops.reference._tokens import ascending
from vidops.reference.gather_tokens import scatter_tokens as reference_scatter

# Groups, tokens, channels, channels of keys, dropped.
SIZES = [(1, 1, 3, 2, 0), (3, 2, 1, 1, 1), (4, 7, 5, 3, 6), (1, 9, 4, 3, 4), (5, 16, 8, 6, 3)]
SIZES += [] if INTERPRETED else [(3, 33, 20, 5, 0), (2, 40, 17, 80, 25), (8, 61, 24, 64, 20), (2, 130, 9, 16, 128)]
DTYPES = [torch.float32, torch.bfloat16]
DTYPES += ([] if INTERPRETED else [torch.float64]) + ([] if EMULATED else [torch.float16])
LIMIT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def inputs(size, dtype, backend, batch=2, seed=0):
    frames, tokens, channels, width, _ = size
    return (
        heads(batch, frames * tokens, channels, dtype=dtype, seed=seed, on=backend),
        heads(batch, frames * tokens, width, dtype=dtype, seed=seed + 1, on=backend),
    )


def cosine(a, b):
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm else 0.0


def first_frame(keys):
    """Order and similarities of one frame, token by token."""
    found = [max((cosine(keys[i], keys[j]) for j in range(1, len(keys), 2)), default=-np.inf)
             for i in range(0, len(keys), 2)]  # fmt: skip
    even = sorted(range(len(found)), key=lambda i: (found[i], i))
    return [*range(1, len(keys), 2), *(2 * i for i in even)], found


def literal(x, metric, frames, r, reverse, pruned):
    """The sheet's words for one clip: kept tokens per group, scores, and how close a decision was."""
    x, metric = (t.double().cpu().numpy().reshape(frames, -1, t.shape[-1]) for t in (x, metric))
    tokens = x.shape[1]
    order = list(range(frames))[:: -1 if reverse else 1]
    keep, score = [None] * frames, np.zeros((frames, tokens))
    drop, _ = first_frame(metric[order[0]])
    keep[order[0]] = drop[: tokens - r]
    refer, weight = (keep[order[0]], 1 / (tokens - r)) if pruned else (drop, 1.0)
    weight = [weight] * len(refer)
    closest = np.inf
    for before, t in itertools.pairwise(order):
        acc = np.zeros(tokens)
        for j, s in zip(refer, weight, strict=True):
            mass = np.exp([cosine(metric[t][i], metric[before][j]) for i in range(tokens)])
            acc += s * mass / mass.sum()
        activation = np.abs(x[t]).sum(1)
        spread = np.ptp(activation)
        activation = (activation - activation.min()) / spread if spread else 0 * activation
        score[t] = acc * (1 - activation)
        refer = sorted(range(tokens), key=lambda i: (score[t][i], i))
        gaps = np.diff(score[t][refer])
        closest = min(closest, gaps.min() / score[t].max() if len(gaps) and score[t].max() else np.inf)
        refer = keep[t] = refer[: tokens - r]
        weight = acc[refer] / acc[refer].sum()
    return keep, score, closest


@on_backends("sta_score", "gather_tokens")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("reverse,pruned", [(False, False), (True, False), (False, True)])
def test_against_the_sheet(size, dtype, reverse, pruned, backend):
    frames, tokens, *_, r = size
    x, metric = inputs(size, dtype, backend)
    found = vidops.sta_prune(x, metric, frames, r, reverse, first_frame_pruned=pruned, backend=backend)
    assert found.scores.score.dtype == torch.promote_types(dtype, torch.float32)
    for b in range(len(x)):
        keep, score, closest = literal(x[b], metric[b], frames, r, reverse, pruned)
        got = found.scores.score[b].double().cpu().numpy()
        slack = LIMIT[dtype] * max(1e-30, np.abs(score).max())
        assert np.abs(got - score).max() <= slack
        kept = found.scores.keep[b].tolist()
        rows = x[b].unflatten(0, (frames, tokens))
        want = [rows[t, n] for t in range(frames) for n in (range(tokens) if r == 0 else kept[t])]
        assert torch.equal(found.x[b], torch.stack(want))
        first = frames - 1 if reverse else 0
        for t in range(frames):
            # What rounding decides may change places with what is as good; nothing else may.
            ordered = score[t][kept[t] + sorted(set(range(tokens)) - set(kept[t]))]
            assert len(set(kept[t])) == tokens - r
            assert (np.diff(ordered[: tokens - r]) >= -2 * slack).all()
            assert t == first or (ordered[tokens - r :] >= ordered[: tokens - r].max() - 2 * slack).all()
        if closest >= 10 * LIMIT[dtype]:
            assert kept == keep


@on_backends("bipartite_match")
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 21])
def test_first_frame_order(tokens, backend):
    keys = heads(3, tokens, 6, seed=3, on=backend)
    order, similarity = vidops.first_frame_order(keys, backend=backend)
    for b in range(3):
        want, found = first_frame(keys[b].double().cpu().numpy())
        assert order[b].tolist() == want
        assert np.allclose(similarity[b].double().cpu(), found, atol=2e-7)


@on_backends("bipartite_match")
def test_partners_and_special_tokens(backend):
    keys = heads(2, 15, 6, seed=4, on=backend)
    for special in ({}, {"class_token": True}, {"class_token": True, "distill_token": True}):
        order, similarity, partner = vidops.bipartite_match(keys, backend=backend, **special)
        for b, i in itertools.product(range(2), range(8)):
            k = keys[b].double().cpu().numpy()
            cosines = [cosine(k[2 * i], k[2 * j + 1]) for j in range(7)]
            if "distill_token" in special:
                cosines[0] = -np.inf
            assert partner[b, i] == int(np.argmax(cosines))
            want = -np.inf if special and i == 0 else max(cosines)
            assert similarity[b, i].item() == pytest.approx(want, abs=2e-7)
        assert torch.equal(order, similarity.sort(dim=1, stable=True).indices)


@on_backends("bipartite_match")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_nearly_equal_keys(spread, dtype, backend):
    """Cosines that differ by less than a product of float32 rows is rounded by: the same matching on every backend."""
    skip_dtype(backend, dtype)
    noise = heads(4, 62, 24, seed=21, on=backend)
    keys = (heads(1, 1, 24, seed=20, on=backend) + spread * noise).to(dtype)
    order, similarity, partner = (t.cpu() for t in vidops.bipartite_match(keys, backend=backend))
    unit = torch.nn.functional.normalize(keys.double().cpu(), dim=-1)
    cosines = (unit[:, ::2] @ unit[:, 1::2].mT).to(similarity.dtype)
    if dtype == torch.float64:
        best = cosines.max(2).values
        assert (cosines.gather(2, partner.unsqueeze(-1)).squeeze(-1) >= best - 1e-15).all()
        assert ((similarity - best).abs() <= 1e-15).all()
    else:
        # Two roundings of the same cosine to float64 may fall to either side of a tie of float32.
        best, first = cosines.max(2)
        assert (similarity != best).double().mean() <= 0.02 and (partner != first).double().mean() <= 0.02
        assert ((similarity - best).abs() <= 6e-8).all()
    assert torch.equal(order, similarity.sort(dim=1, stable=True).indices)


@on_backends("sta_score")
@pytest.mark.parametrize("special", ["zero keys", "equal keys", "large keys", "small keys", "repeated tokens"])
def test_equal_scores_go_by_index(special, backend):
    """Where keys say nothing, or tokens repeat, the earlier of two equal tokens is kept first."""
    frames, tokens, r = 3, 12, 5
    keys = heads(1, frames, tokens // 3, 4, seed=5, on=backend).repeat(1, 1, 3, 1)
    keys = {
        "zero keys": torch.zeros_like(keys),
        "equal keys": keys[:, :, :1].expand_as(keys),
        "large keys": keys * 1e30,
        "small keys": keys * 1e-30,
        "repeated tokens": keys,
    }[special]
    x = heads(1, frames, tokens // 3, 6, seed=6, on=backend).repeat(1, 1, 3, 1)
    x, keys = x.flatten(1, 2), keys.flatten(1, 2)
    found = vidops.sta_score(x, keys, frames, r, backend=backend)
    assert torch.isfinite(found.score).all() and torch.isfinite(found.acc).all()
    for t in range(1, frames):
        score = found.score[0, t].cpu()
        assert torch.equal(score[:4], score[4:8]) and torch.equal(score[:4], score[8:])
        assert found.keep[0, t].tolist() == score.sort(stable=True).indices[: tokens - r].tolist()
    order, similarity = vidops.first_frame_order(keys[:, :tokens], backend=backend)
    wanted = similarity[0].cpu().sort(stable=True).indices
    assert order[0].tolist() == [*range(1, tokens, 2), *(2 * wanted).tolist()]


@on_backends("sta_score", "bipartite_match")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tokens_of_a_still_video(dtype, backend):
    """Every frame is the first one, and its tokens come in copies: each copy has the bits of the others."""
    frames, tokens, r = 4, 31, 11
    kind = torch.randint(9, (tokens,), generator=torch.Generator().manual_seed(4)).to(device_for(backend))
    x, keys = (t[:, kind] for t in (heads(2, 9, width, dtype=dtype, seed=width, on=backend) for width in (6, 64)))
    found = vidops.sta_score(x.repeat(1, frames, 1), keys.repeat(1, frames, 1), frames, r, backend=backend)
    for same in (kind == which for which in kind.unique()):
        for figures in (found.activation, found.acc, found.score):
            assert equal((figures[:, :, same],), (figures[:, :, same][..., :1].expand(-1, -1, int(same.sum())),))
    for t in range(1, frames):
        order = found.score[:, t].sort(dim=1, stable=True).indices
        assert torch.equal(found.keep[:, t], order[:, : tokens - r])
    skip_dtype(backend, dtype)  # `sta_score` has what `bipartite_match` has not
    matching = vidops.bipartite_match(keys, backend=backend)
    for same in (kind == which for which in kind.unique()):
        similarity = matching.similarity[:, same[::2]]
        assert torch.equal(similarity, similarity[:, :1].expand_as(similarity))


@on_backends("sta_score")
def test_a_group_of_equal_activation(backend):
    x, keys = torch.ones(1, 12, 3, device=device_for(backend)), heads(1, 12, 4, seed=7, on=backend)
    found = vidops.sta_score(x, keys, 2, 2, backend=backend)
    assert torch.equal(found.activation, torch.zeros_like(found.activation))
    assert torch.equal(found.score, found.acc)


@on_backends("sta_score")
def test_scale_of_keys_does_not_matter(backend):
    x, keys = inputs((4, 13, 5, 7, 4), torch.float32, backend)
    plain = vidops.sta_score(x, keys, 4, 4, backend=backend)
    for factor in (2.0**100, 2.0**-90):
        scaled = vidops.sta_score(x, keys * factor, 4, 4, backend=backend)
        assert torch.equal(scaled.keep, plain.keep)
        assert torch.allclose(scaled.acc, plain.acc, rtol=1e-5)


@on_backends("sta_score", "gather_tokens")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads(value, backend):
    """A key that is not finite takes the scores of its group and of those after it; these keep their first tokens."""
    frames, tokens = 4, 9
    x, keys = inputs((frames, tokens, 4, 3, 0), torch.float32, backend, batch=1)
    plain = vidops.sta_prune(x, keys, frames, 2, backend=backend)
    keys[0, 2 * tokens + 4] = value
    found = vidops.sta_prune(x, keys, frames, 2, backend=backend)
    assert torch.equal(found.keep[0, :2], plain.keep[0, :2])
    for t in (2, 3):
        assert torch.isnan(found.scores.acc[0, t]).all() and torch.isnan(found.scores.score[0, t]).all()
        assert found.keep[0, t].tolist() == list(range(tokens - 2))
    # In the first group a token that is not finite goes first, and an odd one takes all similarities.
    keys = inputs((1, tokens, 4, 3, 0), torch.float32, backend, batch=1)[1]
    keys[0, 2] = value
    order, similarity = vidops.first_frame_order(keys, backend=backend)
    assert order[0, -1] == 2 and torch.isnan(similarity[0]).tolist() == [False, True, False, False, False]
    keys[0, 3] = value
    order, similarity = vidops.first_frame_order(keys, backend=backend)
    assert torch.isnan(similarity).all() and order[0].tolist() == [1, 3, 5, 7, 0, 2, 4, 6, 8]


@pytest.mark.skipif(EMULATED, reason="plain PyTorch")
def test_nan_of_either_sign_comes_last(monkeypatch):
    """A card may sort by bits (pytorch/pytorch#190781)."""
    sort = torch.Tensor.sort

    def by_bits(x, **options):
        bits = x.view(torch.int32)
        return sort(torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits), **options)

    scores = torch.tensor([[1.0, torch.nan, -1.0, torch.nan, torch.inf, -torch.inf]])
    scores.view(torch.int32)[0, 1] |= -(2**31)
    monkeypatch.setattr(torch.Tensor, "sort", by_bits)
    assert scores.sort(dim=1, stable=True).indices[0, 0] == 1
    assert ascending(scores).tolist() == [[5, 2, 0, 4, 1, 3]]


@pytest.mark.skipif(EMULATED, reason="plain PyTorch")
def test_the_reference_adds_without_atomics_on_a_card():
    """Seen on fake tensors, which need none: index_add_ and scatter_add_ add in any order there."""
    called = set()

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Log():
        x, index = torch.empty(2, 5, 3, device="cuda"), torch.empty(2, 5, dtype=torch.int64, device="cuda")
        assert reference_scatter(x, index, 4).shape == (2, 4, 3)
    aten = torch.ops.aten
    assert called & {aten.index_put_, aten._index_put_impl_} and not called & {aten.index_add_, aten.scatter_add_}


@on_backends("sta_score")
@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_not_finite_in_a_token(reverse, backend):
    """It takes the scores of its group (of the token alone, where it is infinite), and no accumulation."""
    frames, tokens, r = 4, 9, 2
    x, keys = inputs((frames, tokens, 4, 3, r), torch.float32, backend, batch=1)
    broken = tokens + 4  # of the second group
    for value, lost in ((float("nan"), range(tokens)), (float("inf"), [4]), (-float("inf"), [4])):
        token = x.clone()
        token[0, broken, 1] = value
        found = vidops.sta_score(token, keys, frames, r, reverse, backend=backend)
        assert torch.isfinite(found.acc).all()
        figures = found.activation[0].cpu(), found.score[0].cpu()
        for t, n in itertools.product(range(frames), range(tokens)):
            assert all(bool(torch.isnan(f[t, n])) == (t == 1 and n in lost) for f in figures)
        if len(lost) == 1:
            assert 4 not in found.keep[0, 1].tolist() and not figures[0][1].nan_to_num().any()
        else:
            assert found.keep[0, 1].tolist() == list(range(tokens - r))


@on_backends("sta_score", "gather_tokens")
def test_nothing_is_dropped_and_nothing_moves(backend):
    x, keys = inputs((3, 5, 4, 3, 0), torch.float32, backend)
    found = vidops.sta_prune(x, keys, 3, 0, backend=backend)
    assert found.x is x
    assert torch.equal(found.keep.cpu(), torch.arange(5).expand(2, 3, 5))
    assert found.scores.keep.sort(-1).values.tolist() == found.keep.tolist()


@on_backends("sta_score", "gather_tokens")
def test_one_frame_and_empty_batch(backend):
    x, keys = inputs((1, 9, 4, 3, 4), torch.float32, backend)
    found = vidops.sta_prune(x, keys, 1, 4, backend=backend)
    assert torch.equal(found.keep[:, 0], vidops.first_frame_order(keys, backend=backend).order[:, :5])
    assert not found.scores.acc.any() and not found.scores.score.any()
    empty = vidops.sta_prune(x[:0], keys[:0], 3, 1, backend=backend)
    assert empty.x.shape == (0, 6, 4) and empty.keep.shape == (0, 3, 2)


@on_backends("sta_score", "gather_tokens")
def test_items_of_a_batch_do_not_mix(backend):
    size = (3, 19, 6, 5, 7)
    x, keys = inputs(size, torch.float32, backend, batch=4)
    keys[2, 30, 1] = torch.nan
    together = vidops.sta_prune(x, keys, 3, 7, backend=backend)
    for b in range(4):
        alone = vidops.sta_prune(x[b : b + 1], keys[b : b + 1], 3, 7, backend=backend)
        assert torch.equal(together.keep[b : b + 1], alone.keep) and torch.equal(together.x[b : b + 1], alone.x)
        for a, c in zip(together.scores, alone.scores, strict=True):
            assert torch.allclose(a[b : b + 1], c, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.skipif(EMULATED, reason="a million cosines take the emulators minutes")
@pytest.mark.usefixtures("threads")
@on_backends("sta_score")
def test_large_groups(backend):
    """More tokens than an implementation adds up in one run, on one thread and on two."""
    frames, tokens, r = 3, 1100, 400
    x, keys = inputs((frames, tokens, 5, 32, r), torch.float32, backend, batch=1)
    exact = vidops.sta_score(x.double(), keys.double(), frames, r, backend="reference")
    runs = []
    for count in (1, 2):
        torch.set_num_threads(count)
        runs.append(vidops.sta_score(x, keys, frames, r, backend=backend))
    if backend != "reference":  # a BLAS may split its sums by threads
        assert equal(tuple(runs[0]), tuple(runs[1]))
    assert torch.allclose(runs[0].acc.double(), exact.acc, rtol=2e-6, atol=0)
    assert torch.allclose(runs[0].activation.double(), exact.activation, rtol=2e-6, atol=2e-7)
    for t in range(1, frames):
        kept = exact.score[0, t][runs[0].keep[0, t]]
        dropped = exact.score[0, t].index_fill(0, runs[0].keep[0, t], torch.inf)
        assert len(runs[0].keep[0, t].unique()) == tokens - r
        assert dropped.min() >= kept.max() - 2e-6 * exact.score[0, t].max()


@on_backends("sta_score", "gather_tokens")
def test_strides(backend):
    x, keys = inputs((4, 9, 6, 5, 2), torch.float32, backend)
    plain = vidops.sta_prune(x, keys, 4, 2, backend=backend)
    wide = torch.cat([keys, x], -1)
    strided = wide[..., 5:], wide[..., :5]
    turned = x.mT.contiguous().mT, keys.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (strided, turned):
        found = vidops.sta_prune(*other, 4, 2, backend=backend)
        assert torch.equal(found.x, plain.x) and torch.equal(found.keep, plain.keep)


@on_backends("sta_score")
def test_same_bits_again(backend):
    x, keys = inputs((3, 10, 6, 5, 2), torch.float32, backend)
    first = vidops.sta_score(x, keys, 3, 2, backend=backend)
    for _ in range(5 if EMULATED else 100):
        assert equal(tuple(first), tuple(vidops.sta_score(x, keys, 3, 2, backend=backend)))


@pytest.mark.skipif(EMULATED, reason="drawn sizes take the emulators minutes")
@on_backends("sta_score", "gather_tokens")
@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_what_is_kept(data, backend):
    """Every group keeps N - r of its own tokens, in the order of (score, index), none of which scores higher."""
    frames, tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 24))
    r, reverse = data.draw(st.integers(0, tokens - 1)), data.draw(st.booleans())
    levels, seed = data.draw(st.sampled_from([2, 1000])), data.draw(st.integers(0, 999))
    # Few levels make many ties.
    x, keys = (t.mul(levels).round() for t in inputs((frames, tokens, 3, 2, r), torch.float32, backend, seed=seed))
    found = vidops.sta_score(x, keys, frames, r, reverse, backend=backend)
    first = frames - 1 if reverse else 0
    for b, t in itertools.product(range(2), range(frames)):
        order = found.score[b, t].cpu().sort(stable=True).indices if t != first else found.first_order[b].cpu()
        assert found.keep[b, t].tolist() == order[: tokens - r].tolist()
    assert found.activation.min() >= 0 and found.activation.max() <= 1


@on_backends("gather_tokens", gradient=True)
def test_dropped_tokens_have_no_gradient(backend):
    x, keys = (t.requires_grad_() for t in inputs((4, 9, 6, 5, 2), torch.float32, backend))
    found = vidops.sta_prune(x, keys, 4, 3, backend=backend)
    weight = heads(*found.x.shape, seed=12, on=backend)
    (found.x * weight).sum().backward()
    want = torch.zeros_like(x).view(2, 4, 9, 6)
    want.scatter_(2, found.keep[..., None].expand(-1, -1, -1, 6), weight.view(2, 4, 6, 6))
    assert x.grad is not None and torch.equal(x.grad, want.view_as(x))
    assert keys.grad is None or not keys.grad.any()


@pytest.mark.skipif(EMULATED, reason="registration does not depend on the kernels")
@on_backends("gather_tokens", gradient=True)
def test_compiles_whole_with_changing_sizes(backend):
    def pruned(x, keys, frames, r):
        kept = vidops.sta_prune(x, keys, frames, r, backend=backend)
        return kept.x * 2, kept.keep

    def filled(x, keep):
        return vidops.nearest_fill(x, keep, (6, 7), backend=backend).dense + 1

    torch._dynamo.reset()
    compiled, compiled_fill = (torch.compile(f, fullgraph=True, dynamic=True) for f in (pruned, filled))
    for frames, tokens, r in ((3, 8, 2), (4, 11, 5)):
        x, keys = (t.requires_grad_() for t in inputs((frames, tokens, 6, 5, r), torch.float32, backend))
        got, want = compiled(x, keys, frames, r), pruned(x, keys, frames, r)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        got[0].sum().backward()
        assert x.grad is not None and x.grad.sum().item() == 2 * 6 * 2 * frames * (tokens - r)
        keep = torch.stack([torch.arange(0, 3 * tokens, 3), torch.arange(tokens)]).to(x.device)
        rows = heads(2, tokens, 4, seed=13, on=backend)
        assert torch.equal(compiled_fill(rows, keep), filled(rows, keep))


@pytest.mark.skipif(EMULATED, reason="autocast is outside of the kernels")
@on_backends("sta_score", "gather_tokens")
def test_autocast_leaves_dtypes_alone(backend):
    x, keys = inputs((3, 8, 6, 5, 2), torch.float32, backend)
    with torch.autocast(x.device.type, torch.bfloat16):
        found = vidops.sta_prune(x, keys, 3, 2, backend=backend)
        halves = vidops.sta_prune(x.bfloat16(), keys.bfloat16(), 3, 2, backend=backend)
    assert found.x.dtype == torch.float32 and halves.x.dtype == torch.bfloat16
    assert torch.equal(found.keep, vidops.sta_prune(x, keys, 3, 2, backend=backend).keep)
    for dtype in (torch.float32, torch.bfloat16):
        tokens, index = x.to(dtype), torch.arange(5, device=x.device).expand(2, 5)
        with torch.autocast(x.device.type, torch.bfloat16):
            merged = vidops.token_merge(tokens, keys.to(dtype), 2, backend=backend)
            moved = vidops.nearest_fill(tokens[:, :5], index, (2, 4), backend=backend).dense
            summed = vidops.scatter_tokens(tokens[:, :5], index, 9, backend=backend)
        assert {merged.x.dtype, merged.size.dtype, moved.dtype, summed.dtype} == {dtype}


@pytest.mark.skipif(EMULATED, reason="plain PyTorch")
@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_pruning_is_scoring_and_gathering(backend):
    """One kernel on CPU, whatever the layout and dtype of the tokens, on any number of threads; see `contract`."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, keys = inputs((3, 8, 6, 5, 2), dtype, backend)
        for tokens in (x, x.flip(1), torch.cat([x, x], -1)[..., 3 : 3 + x.shape[-1]]):
            found = vidops.sta_prune(tokens, keys, 3, 2, backend=backend)
            alone = vidops.sta_score(tokens, keys, 3, 2, backend=backend)
            assert all(torch.equal(a, b) for a, b in zip(found.scores, alone, strict=True))
            kept = vidops.gather_tokens(tokens.unflatten(1, (3, -1)), found.keep, backend=backend)
            assert torch.equal(found.x, kept.flatten(1, 2))


@pytest.mark.skipif(EMULATED, reason="autograd does not depend on how kernels run")
@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_decisions_have_no_gradient(backend):
    x, keys = (t.requires_grad_(True) for t in inputs((3, 8, 6, 5, 2), torch.float32, backend))
    found = vidops.sta_prune(x, keys, 3, 2, backend=backend)
    assert found.x.requires_grad and not any(t.requires_grad for t in found.scores)
    found.x.sum().backward()
    assert keys.grad is None and x.grad.sum() == found.x.numel()
