"""Label propagation against float64, on exact ties, and over clips."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from matrix import EMULATED, INTERPRETED, device_for, on_backends

import vidops
from vidops.ops.label_propagation import Matches, squared_limit

# (height, width), frames, channels, k
SIZES = [((1, 1), 1, 1, 1), ((3, 11), 2, 33, 3), ((12, 1), 2, 8, 20)]
SIZES += [] if INTERPRETED else [((1, 40), 2, 8, 3), ((3, 70), 3, 20, 7), ((9, 8), 4, 130, 128)]
DTYPES = [torch.float32, torch.bfloat16] + ([] if INTERPRETED else [torch.float64, torch.float16])


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(grid, frames, channels, dtype, backend):
    """Normalised features and soft labels, as `dtype` and what the op makes of its labels."""
    tokens = grid[0] * grid[1]
    features = torch.nn.functional.normalize(_normal(1, frames + 1, tokens, channels), dim=-1)
    if channels == 1:
        features = _normal(1, frames + 1, tokens, 1)
    labels = _normal(2, frames, tokens, 3).softmax(-1)
    wide = torch.promote_types(dtype, torch.float32)
    features = features.to(device_for(backend), dtype)
    return features[0], features[1:], labels.to(device_for(backend), wide)


def _skip(backend, dtype):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("triton refuses float64: its keys hold a float32 affinity and an index in 64 bits")


def _literal(query, context, labels, grid, top_k, radius, temperature, unrestricted, repeats):
    """The sheet's words, query by query in float64: labels, and how far the k-th affinity is above the next one."""
    query, context, labels = query.double().cpu(), context.double().cpu(), labels.double().cpu()
    width, out, gaps = grid[1], [], []
    for n, q in enumerate(query):
        candidates = []
        for f, m in itertools.product(range(len(context)), range(len(query))):
            far = math.dist(divmod(n, width), divmod(m, width)) >= radius
            copies = (f < unrestricted or not far) + (repeats if f == 0 and not far else 0)
            candidates += [(float(q @ context[f, m]), f, m)] * copies
        candidates.sort(key=lambda c: -c[0])
        best, rest = candidates[:top_k], candidates[top_k:]
        weight = torch.tensor([c[0] for c in best], dtype=torch.float64).div(temperature).softmax(0)
        out.append(sum(w * labels[f, m] for w, (_, f, m) in zip(weight, best, strict=True)))
        gaps.append(best[-1][0] - rest[0][0] if rest else math.inf)
    return torch.stack(out), torch.tensor(gaps, dtype=torch.float64)


@on_backends("label_propagation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid,frames,channels,top_k", SIZES)
@pytest.mark.parametrize("radius,unrestricted,repeats", [(2.5, 1, 2), (1.0, 0, 1), (100.0, 0, 0)])
def test_against_float64(backend, dtype, grid, frames, channels, top_k, radius, unrestricted, repeats):
    _skip(backend, dtype)
    query, context, labels = _inputs(grid, frames, channels, dtype, backend)
    options = {"top_k": top_k, "radius": radius, "unrestricted": unrestricted, "repeats": repeats}
    want, gap = _literal(query, context, labels, grid, temperature=0.2, **options)
    got, matches = vidops.label_propagation(
        query, context, labels, grid, return_matches=True, backend=backend, **options
    )
    double = dtype == torch.float64
    # A copy of the k-th is not another choice, and gaps of that kind are zero.
    clear = (gap > (1e-12 if double else 1e-5)) | (gap == 0)
    assert clear.double().mean() > 0.9
    assert (got.cpu().double() - want)[clear].abs().max() <= (1e-12 if double else 5e-6)
    assert got.dtype == labels.dtype and isinstance(matches, Matches)
    # The matches tell the labels, and their weights are a distribution.
    taken = matches.positions >= 0
    chosen = labels.flatten(0, 1)[matches.positions.clamp_min(0)] * matches.weights[..., None]
    assert torch.allclose(chosen.sum(1), got, atol=1e-6)
    assert torch.allclose(matches.weights.sum(1), torch.ones_like(matches.weights[:, 0]), atol=1e-6)
    assert not matches.weights[~taken].any() and (matches.weights[taken] > 0).all()


def _integers(grid, frames, backend, dtype=torch.float32):
    """Features whose affinities are small integers, exact in every dtype and full of ties."""
    tokens = grid[0] * grid[1]
    g = torch.Generator().manual_seed(3)
    features = torch.randint(-1, 2, (frames + 1, tokens, 5), generator=g).to(device_for(backend), dtype)
    labels = _normal(4, frames, tokens, 2).to(device_for(backend), torch.promote_types(dtype, torch.float32))
    return features[0], features[1:], labels


@on_backends("label_propagation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("repeats", [0, 2])
def test_ties_go_to_the_smaller_index(backend, dtype, repeats):
    _skip(backend, dtype)
    grid, frames = (5, 9), 2
    query, context, labels = _integers(grid, frames, backend, dtype)
    _, matches = vidops.label_propagation(
        query, context, labels, grid, top_k=6, radius=2.9, repeats=repeats, return_matches=True, backend=backend
    )
    affinity = torch.einsum("nc,fmc->nfm", query.double(), context.double()).tolist()
    for n, row in enumerate(affinity):
        order = []
        for f, m in itertools.product(range(frames), range(len(query))):
            near = math.dist(divmod(n, 9), divmod(m, 9)) < 2.9
            copies = (near or f == 0) + (repeats if near and f == 0 else 0)
            order += [(-row[f][m], f * len(query) + m)] * copies
        want = list(dict.fromkeys(index for _, index in sorted(order)[:6]))
        assert matches.positions[n].tolist() == want + [-1] * (6 - len(want))


@on_backends("label_propagation")
def test_equal_vectors_tie_wherever_they_are(backend):
    """Of features that no dtype holds exactly: a context of equal frames is chosen from in the order of the frames."""
    if backend == "reference":
        pytest.skip("a BLAS may round by the place in the matrix")
    grid, frames = ((2, 9), 4) if INTERPRETED else ((6, 37), 5)
    query, context, labels = _inputs(grid, 1, 50, torch.float32, backend)
    _, matches = vidops.label_propagation(
        query, context.expand(frames, -1, -1), labels.expand(frames, -1, -1), grid,
        top_k=frames, radius=100.0, unrestricted=2, return_matches=True, backend=backend,
    )  # fmt: skip
    tokens = len(query)
    best = (query.double() @ context[0].double().T).argmax(1)
    want = best[:, None] + torch.arange(frames, device=best.device) * tokens
    assert torch.equal(matches.positions, want)
    assert torch.equal(matches.weights, torch.full_like(matches.weights, 1 / frames))


@on_backends("label_propagation")
def test_repeats_are_the_same_as_copies(backend):
    grid = (3, 5)
    query, context, labels = _inputs(grid, 2, 12, torch.float32, backend)
    order = [0, 0, 0, 1]
    for top_k in (2, 5) if INTERPRETED else (1, 2, 3, 5, 40):
        want = vidops.label_propagation(
            query, context[order], labels[order], grid, top_k=top_k, radius=2.0, backend=backend
        )
        got = vidops.label_propagation(
            query, context, labels, grid, top_k=top_k, radius=2.0, repeats=2, backend=backend
        )
        assert torch.allclose(got, want, atol=1e-6)


@on_backends("label_propagation")
def test_what_is_not_a_number_is_never_chosen(backend):
    grid = (1, 6)
    query, context, labels = _inputs(grid, 2, 4, torch.float32, backend)
    want = vidops.label_propagation(query, context[1:], labels[1:], grid, top_k=3, unrestricted=0, backend=backend)
    context = context.clone()
    context[0] = torch.nan
    got, matches = vidops.label_propagation(
        query, context, labels, grid, top_k=3, return_matches=True, backend=backend
    )
    assert torch.allclose(got, want, atol=1e-6) and (matches.positions >= 6).all()
    query = query.clone()
    query[2] = torch.nan
    got, matches = vidops.label_propagation(query, context, labels, grid, top_k=3, return_matches=True, backend=backend)
    assert got[2].isnan().all() and not got[[0, 1, 3, 4, 5]].isnan().any()
    assert matches.positions[2].eq(-1).all() and matches.weights[2].isnan().all()
    # Labels that nobody chooses are not read into anybody's.
    labels = labels.clone()
    labels[0] = torch.nan
    got = vidops.label_propagation(query[:2].repeat(3, 1), context, labels, grid, top_k=9, backend=backend)
    assert not got.isnan().any()


@on_backends("label_propagation")
def test_infinite_and_zero_affinities(backend):
    device = device_for(backend)
    query, labels = torch.ones(3, 1, device=device), torch.arange(3.0, device=device).view(1, 3, 1)
    context = torch.tensor([-math.inf, 2.0, 1.0], device=device).view(1, 3, 1)
    got = vidops.label_propagation(query, context, labels, (1, 3), top_k=3, temperature=1.0, backend=backend)
    weight = torch.softmax(torch.tensor([2.0, 1.0]), 0)
    assert torch.allclose(got.cpu(), (weight[0] * 1 + weight[1] * 2).expand(3, 1))
    got = vidops.label_propagation(query, -context, labels, (1, 3), top_k=3, backend=backend)
    assert got.isnan().all()
    context = torch.tensor([-0.0, 0.0, -0.0], device=device).view(1, 3, 1)
    _, matches = vidops.label_propagation(
        query, context, labels, (1, 3), top_k=3, return_matches=True, backend=backend
    )
    assert matches.positions.tolist() == [[0, 1, 2]] * 3  # zeros of both signs are equal


@pytest.mark.parametrize("radius", [1e-200, 1e-3, 1.0, math.sqrt(2), 2.0, 2.5, math.sqrt(5), 7.0, 35.0, 1e9, 1e300])
def test_squared_limit_is_the_radius(radius):
    limit = squared_limit(radius, 40, 60)
    squares = {y * y + x * x for y in range(40) for x in range(60)}
    assert {s for s in squares if s < limit} == {s for s in squares if math.sqrt(s) < radius}


def _padded_clip(features, first, n_context, backend, **options):
    """The sheet's form: the first frame repeated in front, and every context frame computed."""
    frames, height, width, channels = features.shape
    rows = torch.cat([features[:1].expand(n_context, -1, -1, -1), features]).flatten(1, 2)
    soft = [first.flatten(0, 1)] * (n_context + 1)
    for t in range(1, frames):
        keys = [0, *range(t, t + n_context)]
        labels = torch.stack([soft[key] for key in keys])
        soft.append(
            vidops.label_propagation(
                rows[n_context + t], rows[keys], labels, (height, width), backend=backend, **options
            )
        )
    return torch.stack(soft[n_context:]).view(frames, height, width, -1)


@on_backends("label_propagation")
@pytest.mark.parametrize("n_context", [0, 2, 20] if INTERPRETED else [0, 1, 2, 4, 20])
def test_clip_is_the_padded_sequence(backend, n_context):
    frames, height, width = (4, 2, 5) if EMULATED else (8, 4, 6)
    features = torch.nn.functional.normalize(_normal(7, frames, height, width, 9), dim=-1)
    features = features.to(device_for(backend), torch.float32)
    first = _normal(8, height, width, 3).softmax(-1).to(features)
    kept = features.clone(), first.clone()
    options = {"top_k": 5, "radius": 2.5, "temperature": 0.1}
    got = vidops.propagate_labels(features, first, n_context=n_context, backend=backend, **options)
    want = _padded_clip(features, first, n_context, backend, **options)
    assert torch.equal(got[0], first) and torch.allclose(got, want, atol=1e-5)
    assert torch.equal(features, kept[0]) and torch.equal(first, kept[1])
    other = features.permute(3, 0, 1, 2).contiguous().movedim(0, -1)
    again = vidops.propagate_labels(other, first, n_context=n_context, backend=backend, **options)
    assert torch.allclose(again, got, atol=1e-6)


@on_backends("label_propagation")
def test_a_clip_of_one_frame_keeps_its_labels(backend):
    first = torch.rand(2, 3, 4, device=device_for(backend))
    clip = torch.ones(1, 2, 3, 5, device=device_for(backend))
    assert torch.equal(vidops.propagate_labels(clip, first, backend=backend), first[None])


@on_backends("label_propagation")
def test_halves_of_labels_are_widened(backend):
    query, context, labels = _inputs((3, 4), 2, 8, torch.float32, backend)
    for dtype in (torch.bfloat16, torch.float16):
        got = vidops.label_propagation(query, context, labels.to(dtype), (3, 4), backend=backend)
        want = vidops.label_propagation(query, context, labels.to(dtype).float(), (3, 4), backend=backend)
        assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.skipif(EMULATED, reason="does not depend on how kernels run")
class TestOnce:
    def test_a_gradient_is_refused(self):
        query, context, labels = _inputs((3, 4), 2, 8, torch.float32, "cpu")
        for tensor in (query, context, labels):
            leaf = tensor.clone().requires_grad_(True)
            inputs = [leaf if t is tensor else t for t in (query, context, labels)]
            with pytest.raises(vidops.BackendError, match="not differentiable"):
                vidops.label_propagation(*inputs, (3, 4))

    def test_explaining_a_clip(self):
        plan = vidops.explain("propagate_labels", torch.ones(2, 1, 2, 3), torch.ones(1, 2, 1))
        assert plan.backend == "cpu" and [part.op for part in plan.parts] == ["label_propagation"]

    @on_backends("label_propagation")
    def test_fullgraph_and_export(self, backend):
        class Step(torch.nn.Module):
            def forward(self, query, context, labels):
                grid = (query.shape[0] // 4, 4)
                return vidops.label_propagation(query, context, labels, grid, top_k=3, radius=2.0, backend=backend)

        step = Step()
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for height in (3, 5):
            inputs = _inputs((height, 4), 2, 8, torch.float32, backend)
            assert torch.equal(compiled(*inputs), step(*inputs))
        inputs = _inputs((3, 4), 2, 8, torch.float32, backend)
        program = torch.export.export(step, inputs)
        assert torch.equal(program.module()(*inputs), step(*inputs))
