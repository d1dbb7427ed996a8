"""What holds for every input: small random and degenerate shapes, values and thresholds, the same on every run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from matrix import INTERPRETED, SHIM, device_for, equal, on_backends

import vidops

EXAMPLES = 10 if INTERPRETED else 20 if SHIM else 200
DETERMINISTIC = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow],
)
LARGEST = 40 if INTERPRETED else 90  # rows: beyond one word of bits where that is cheap

seeds = st.integers(0, 2**31)
taus = st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 0.5, 1.0, 2.5, 10.0, 80.0, 1e9])


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def row_maps(draw: st.DrawFn, columns: int | None = None, normalised: bool = False) -> torch.Tensor:
    """Non-negative rows (n, m) in float32: peaked to flat, with duplicates, constants, zeros, tiny and large values."""
    n = draw(st.integers(1, LARGEST))
    m = columns or draw(st.integers(1, 24))
    logits = _normal(draw(seeds), n, m) * draw(st.sampled_from([0.01, 1.0, 4.0, 30.0, 1e4]))
    rows = torch.softmax(logits, -1)
    kinds = ["plain", "duplicates", "constant"] + ([] if normalised else ["tiny", "large", "mixed"])
    kind = draw(st.sampled_from(kinds))
    if kind == "duplicates":
        rows = rows[torch.arange(n) % max(1, n // 3)]
    elif kind == "constant":
        rows[::2] = 1 / m
    elif kind == "tiny":
        rows = rows * 1e-39  # float32 holds these as denormals
    elif kind == "large":
        rows = rows * 1e4
    elif kind == "mixed":
        rows = rows * torch.logspace(-3, 3, n, dtype=torch.float64)[:, None]
    return rows.float()


@st.composite
def relations(draw: st.DrawFn) -> torch.Tensor:
    """Arbitrary boolean relations (n, n): neither symmetric nor reflexive."""
    n = draw(st.integers(0, LARGEST))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]))
    return torch.rand(n, n, generator=torch.Generator().manual_seed(draw(seeds))) < density


@st.composite
def attention_inputs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """q (H, N, D) and k (H, M, D) whose logits reach from nothing to 1e4."""
    h, n, m, d = (draw(st.integers(1, top)) for top in (4, 20, 30, 9))
    q, k = _normal(draw(seeds), h, n, d), _normal(draw(seeds), h, m, d)
    if draw(st.booleans()):
        k[:, ::2] = k[:, :1].clone()  # many equal keys
    size = draw(st.sampled_from([1e-20, 1e-3, 1.0, 30.0, 1e4]))
    largest = (q @ k.transpose(-2, -1)).abs().max().clamp_min(1e-30)
    return (q * (size / largest)).float(), k.float()


def _log(p: torch.Tensor) -> torch.Tensor:
    """As the ops take it, log 0 included."""
    return p.clamp_min(torch.finfo(torch.float32).tiny).log()


def _float64_distance(p: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """D (n, m) of the float32 values in float64, and how far float32 arithmetic on that pair may be from it."""
    log_p, log_x, p, x = _log(p).double(), _log(x).double(), p.double(), x.double()
    distance = ((p[:, None] - x[None]) * (log_p[:, None] - log_x[None])).sum(-1)
    terms = (p.abs()[:, None] + x.abs()[None]) * (log_p.abs()[:, None] + log_x.abs()[None])
    return distance, terms.sum(-1) * 2e-6 + 1e-30


def _sequential(relation: torch.Tensor) -> tuple[list[int], list[int], int]:
    """Sheet 2.6, word by word."""
    n = len(relation)
    owner, label, leaders = [-1] * n, [-1] * n, 0
    for i in range(n):
        if owner[i] != -1:
            continue
        for j in range(n):
            if owner[j] == -1 and (relation[i, j] or j == i):
                owner[j], label[j] = i, leaders
        leaders += 1
    return owner, label, leaders


@given(relation=relations())
@DETERMINISTIC
def test_packing_is_invertible(relation):
    bits = vidops.pack_adjacency(relation)
    assert torch.equal(vidops.unpack_adjacency(bits), relation)
    n = len(relation)
    for i, j in ((0, 0), (n - 1, n - 1), (n // 2, n - 1)) if n else ():
        word = int(bits[i, j // 64]) & (2**64 - 1)
        assert bool(word >> (j % 64) & 1) == bool(relation[i, j])


@on_backends("symmetric_kl")
@given(p=row_maps(columns=9), x=row_maps(columns=9))
@DETERMINISTIC
def test_distance(backend, p, x):
    exact, _ = _float64_distance(p, x)
    # An implementation may take a column's mean out of both sets first: then every row rounds as the largest does.
    largest = (p.sum(-1).max() + x.sum(-1).max()) * max(_log(p).abs().max(), _log(x).abs().max())
    p, x = p.to(device_for(backend)), x.to(device_for(backend))
    got = vidops.symmetric_kl(p, x, backend=backend).cpu().double()
    assert ((got - exact).abs() <= 1e-6 * largest + 1e-30).all()
    square = vidops.symmetric_kl(p, backend=backend)
    assert torch.equal(square, square.T)


@on_backends("symmetric_kl_adjacency")
@given(p=row_maps(), tau=taus, step=taus)
@DETERMINISTIC
def test_adjacency(backend, p, tau, step):
    exact, slack = _float64_distance(p, p)
    p = p.to(device_for(backend))

    def near(limit, precision):
        return vidops.symmetric_kl_adjacency(p, limit, precision=precision, backend=backend)

    bits = near(tau, "exact")
    assert torch.equal(near(tau, "filtered"), bits)
    relation = vidops.unpack_adjacency(bits).cpu()
    assert torch.equal(relation, relation.T) and relation.diagonal().all()
    assert torch.equal(vidops.pack_adjacency(relation), bits.cpu())  # no bit beyond n is set
    clear = (exact - tau).abs() > slack
    clear.fill_diagonal_(False)
    assert torch.equal(relation[clear], (exact <= tau)[clear])
    wider = vidops.unpack_adjacency(near(tau + step, "filtered")).cpu()
    assert not (relation & ~wider).any()


@on_backends("greedy_absorb")
@given(relation=relations())
@DETERMINISTIC
def test_absorption_is_the_sequential_rule(backend, relation):
    found = vidops.greedy_absorb(vidops.pack_adjacency(relation).to(device_for(backend)), backend=backend)
    owner, label, leaders = _sequential(relation)
    assert found.owner.tolist() == owner and found.label.tolist() == label and int(found.count) == leaders


@on_backends("greedy_absorb_kl", "symmetric_kl_adjacency")
@given(p=row_maps(), tau=taus)
@DETERMINISTIC
def test_lazy_absorption_is_absorption_of_the_adjacency(backend, p, tau):
    p = p.to(device_for(backend))
    adjacency = vidops.symmetric_kl_adjacency(p, tau, precision="exact", backend=backend)
    want = vidops.greedy_absorb(adjacency, backend="reference")
    assert equal(vidops.greedy_absorb_kl(p, tau, backend=backend), want)


@on_backends("greedy_absorb_kl", "symmetric_kl_adjacency")
@given(p=row_maps(), pick=seeds)
@DETERMINISTIC
def test_lazy_absorption_at_a_threshold_that_is_a_distance(backend, p, pick):
    """Ties: tau is the float32 distance of one pair, as the backend itself computes it or next to it."""
    p = p.to(device_for(backend))
    n = len(p)
    assume(n > 1)
    i, j = pick % n, pick // n % n
    tau = float(vidops.symmetric_kl(p[[i, j]], backend="reference")[0, 1])
    adjacency = vidops.symmetric_kl_adjacency(p, tau, precision="exact", backend=backend)
    filtered = vidops.symmetric_kl_adjacency(p, tau, precision="filtered", backend=backend)
    assert torch.equal(adjacency, filtered)
    want = vidops.greedy_absorb(adjacency, backend="reference")
    assert equal(vidops.greedy_absorb_kl(p, tau, backend=backend), want)


@on_backends("neighbour_mean")
@given(p=row_maps(), relation=relations())
@DETERMINISTIC
def test_neighbour_means_sum_to_one(backend, p, relation):
    assume(p.sum(-1).min() > 1e-6)  # a row of denormals has too few digits to be normalised
    n = min(len(p), len(relation))
    assume(n > 0)
    p, relation = p[:n].to(device_for(backend)), relation[:n, :n].contiguous()
    relation.fill_diagonal_(True)
    adjacency = vidops.pack_adjacency(relation).to(device_for(backend))
    mean = vidops.neighbour_mean(adjacency, p, backend=backend)
    assert torch.allclose(mean.sum(-1), torch.ones(n, device=mean.device), rtol=1e-5) and (mean >= 0).all()
    own = vidops.neighbour_mean(vidops.pack_adjacency(torch.eye(n, dtype=torch.bool)).to(p.device), p, backend=backend)
    assert torch.allclose(own, p / p.sum(-1, keepdim=True), rtol=1e-5, atol=1e-12)


@on_backends("segment_mean")
@given(x=row_maps(), spare=st.integers(1, 5), seed=seeds)
@DETERMINISTIC
def test_segment_means_keep_the_total(backend, x, spare, seed):
    n = len(x)
    label = torch.randint(0, n, (n,), generator=torch.Generator().manual_seed(seed))
    device = device_for(backend)
    mean = vidops.segment_mean(x.to(device), label.to(device), n + spare, backend=backend).cpu()
    size = torch.bincount(label, minlength=n + spare)
    assert not mean[size == 0].any()
    total = (mean.double() * size[:, None]).sum(0)
    assert torch.allclose(total, x.double().sum(0), rtol=1e-5, atol=1e-37)
    alone = size[label] == 1
    assert torch.equal(mean[label[alone]], x[alone])  # the mean of one row is that row


@on_backends("assign_rows")
@given(p=row_maps(columns=7), x=row_maps(columns=7))
@DETERMINISTIC
def test_rows_take_the_nearest_centroid(backend, p, x):
    exact, slack = _float64_distance(p, x)
    labels = vidops.assign_rows(p.to(device_for(backend)), x.to(device_for(backend)), backend=backend).cpu()
    assert labels.min() >= 0 and labels.max() < len(x)
    every = torch.arange(len(p))
    worst = exact[every, labels] - slack[every, labels]
    assert (worst[:, None] <= exact + slack).all()  # none is nearer by more than rounding


@on_backends("assign_clusters")
@given(inputs=attention_inputs(), x=row_maps(normalised=True))
@DETERMINISTIC
def test_tokens_take_the_nearest_centroid(backend, inputs, x):
    q, k = inputs
    m = k.shape[1]
    x = torch.nn.functional.normalize(x.repeat(1, -(-m // x.shape[1]))[:, :m], p=1)
    p, log_p = vidops.attention_head_mean(q.double(), k.double(), return_log=True, backend="reference")
    log_x = _log(x).double()
    terms = (p[:, None] - x.double()[None]) * (log_p[:, None] - log_x[None])
    sizes = (p[:, None] + x.double()[None]) * (log_p.abs()[:, None] + log_x.abs()[None])
    # An error of a logit is as large as its digits allow, and so is that of a log-probability.
    exact, slack = terms.sum(-1), sizes.sum(-1) * 2e-6 + log_p.abs().max() * 2e-6
    device = device_for(backend)
    labels = vidops.assign_clusters(q.to(device), k.to(device), x.to(device), backend=backend).cpu()
    assert labels.min() >= 0 and labels.max() < len(x)
    every = torch.arange(len(p))
    worst = exact[every, labels] - slack[every, labels]
    assert (worst[:, None] <= exact + slack).all()


@on_backends("attention_head_mean")
@given(inputs=attention_inputs())
@DETERMINISTIC
def test_head_mean_is_a_distribution(backend, inputs):
    q, k = (t.to(device_for(backend)) for t in inputs)
    p, log_p, lse = vidops.attention_head_mean(q, k, scale=1.0, return_log=True, return_lse=True, backend=backend)
    # A log-sum-exp is stored with the digits its size leaves, and scales its row.
    rounding = 1e-5 + 2.5e-7 * float(lse.abs().max())
    assert torch.allclose(p.sum(-1), torch.ones(p.shape[0], device=p.device), rtol=rounding)
    assert log_p.isfinite().all() and lse.isfinite().all() and (log_p <= rounding).all()
    assert torch.allclose(p, log_p.exp(), rtol=1e-5, atol=1e-37)
    alone = vidops.attention_head_mean(q, k, scale=1.0, backend=backend)
    assert torch.allclose(alone, p, rtol=rounding, atol=1e-37)


@on_backends("attention_head_mean")
@given(inputs=attention_inputs(), seed=seeds)
@DETERMINISTIC
def test_head_mean_follows_its_tokens(backend, inputs, seed):
    """Reordering queries, keys and heads reorders the map; adding the same number to all logits changes nothing."""
    q, k = (t.to(device_for(backend)) for t in inputs)
    g = torch.Generator().manual_seed(seed)
    heads, rows, columns = (torch.randperm(s, generator=g).to(q.device) for s in (*q.shape[:2], k.shape[1]))
    p = vidops.attention_head_mean(q, k, scale=1.0, backend=backend)
    moved = vidops.attention_head_mean(
        q[heads][:, rows].contiguous(), k[heads][:, columns].contiguous(), scale=1.0, backend=backend
    )
    size = float((q @ k.transpose(-2, -1)).abs().max())
    assert torch.allclose(moved, p[rows][:, columns], rtol=1e-5 + 1e-6 * size, atol=1e-6)


@on_backends("video_attention")
@given(inputs=attention_inputs(), seed=seeds, dropout_p=st.sampled_from([0.0, 0.3, 0.9]))
@DETERMINISTIC
def test_video_attention_is_a_weighted_mean(backend, inputs, seed, dropout_p):
    q, k = (t[None].to(device_for(backend)) for t in inputs)
    ones = torch.ones_like(k)
    out, weights = vidops.video_attention(
        q, k, ones, scale=1.0, dropout_p=dropout_p, seed=seed, need="map", backend=backend
    )
    # With values of one, the output is the total weight: what the map's rows sum to, averaged over heads.
    # The two sums may round the logits and their log-sum-exp differently, by 2^-24 of their size each.
    size = float((q @ k.transpose(-2, -1)).abs().max())
    assert torch.allclose(out.mean((1, 3)), weights.sum(-1), rtol=1e-4 + 1.2e-7 * size, atol=1e-5)
    p = vidops.attention_head_mean(q, k, scale=1.0, backend="reference")
    if dropout_p == 0.0:
        assert torch.allclose(weights, p, rtol=1e-3, atol=1e-6)
    elif q.shape[1] == 1:  # one head: each weight is dropped, or kept and rescaled
        kept = weights > 0
        assert torch.allclose(weights[kept], (p / (1 - dropout_p))[kept], rtol=1e-2, atol=1e-6)


@on_backends("attention_head_mean", "video_attention", gradient=True)
@given(inputs=attention_inputs(), seed=seeds)
@DETERMINISTIC
def test_gradients_at_any_size_of_the_logits(backend, inputs, seed):
    q, k = inputs
    size = float((q @ k.transpose(-2, -1)).abs().max())
    v, grad = _normal(seed, *k.shape), _normal(seed + 1, 1, q.shape[1], k.shape[1])

    def gradients(name, dtype):
        device = device_for(name)
        leaves = [t[None].to(device, dtype).requires_grad_(True) for t in (q, k, v)]
        p = vidops.attention_head_mean(*leaves[:2], scale=1.0, backend=name)
        out, weights = vidops.video_attention(*leaves, scale=1.0, dropout_p=0.2, seed=seed, need="map", backend=name)
        g = grad.to(device, dtype)
        total = (p * g).sum() + (weights * g).sum() + out.square().sum()
        return torch.autograd.grad(total, leaves)

    got, want = gradients(backend, torch.float32), gradients("reference", torch.float64)
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        # Terms that cancel are as large as keys or queries times the weights.
        largest = max(float(b.abs().max()), float(q.abs().max()), float(k.abs().max()))
        assert (a.cpu() - b.cpu()).abs().max() <= (2e-5 + 1e-6 * size) * largest * k.shape[1]


@st.composite
def slot_calls(draw: st.DrawFn) -> tuple[tuple[torch.Tensor, ...], dict]:
    """Inputs, slots and weights of one width for q, k and v, in float64, and options; no MLP, whose kinks are steps."""
    sizes = {"batch": (1, 3), "tokens": (1, 40), "each": (1, 5), "din": (1, 9), "width": (1, 4)}
    b, n, each, din, width = (draw(st.integers(*limits)) for limits in sizes.values())
    heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    d, seed = heads * width, draw(seeds)
    shapes = ((b, n, din), (b, groups * each, d), (d, d), (d, din), (d, din), (3 * d, d), (3 * d, d))
    tensors = tuple(_normal(seed + i, *shape) for i, shape in enumerate(shapes))
    in_denominator = draw(st.booleans())
    options = {
        "iters": draw(st.integers(1, 3)),
        "heads": heads,
        "groups": groups,
        "joint_heads": groups == 1 and draw(st.booleans()),
        "scale": draw(st.sampled_from([0.0, 0.1, 1.0, 20.0])),
        "eps": draw(st.sampled_from([1e-8, 1e-3, 1.0])),
        "eps_in_denominator": in_denominator,
        "extra_denominator": 0.0 if in_denominator else draw(st.sampled_from([0.0, 1e-2])),
        "ln_eps": draw(st.sampled_from([1e-3, 0.1])),
        "grad_mode": draw(st.sampled_from(["full", "bilevel", "fixed_point"])),
    }
    if draw(st.booleans()) and options["eps"] > 1e-8:
        mask = torch.rand(b, groups, n, generator=torch.Generator().manual_seed(seed))
        mask[:, :, 0] = 1.0  # a group without tokens is 0 / 0
        options["token_mask"] = mask > 0.4
    return tensors, options


@on_backends("slot_attention", gradient=True)
@given(call=slot_calls())
@DETERMINISTIC
def test_slots(backend, call):
    """Values and gradients are the float64 reference's, and weights over slots sum to one for each token."""
    tensors, options = call

    def run(name, dtype):
        device = device_for(name)
        leaves = [t.to(device, dtype).requires_grad_(True) for t in tensors]
        inputs, slots, *weights = leaves
        names = ("q_weight", "k_weight", "v_weight", "gru_weight_ih", "gru_weight_hh")
        params = vidops.SlotParams(**dict(zip(names, weights, strict=True)))
        masks = {k: t.to(device) for k, t in options.items() if k == "token_mask"}
        out, attn = vidops.slot_attention(
            inputs, slots, params, return_attn=True, backend=name, **{**options, **masks}
        )
        found = torch.autograd.grad(out.square().sum() + attn.sum(), leaves, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
        return out.detach().cpu(), attn.detach().cpu(), [g.cpu() for g in grads]

    out, attn, grads = run(backend, torch.float32)
    exact_out, exact_attn, exact_grads = run("reference", torch.float64)
    total = attn.sum(1) * (options["heads"] if options["joint_heads"] else 1)
    assert torch.allclose(total, torch.full_like(total, options["groups"]), rtol=1e-5) and (attn >= 0).all()
    # A dot is as wrong as its digits allow, and each iteration multiplies the error.
    slack = 4e-6 * (1 + options["scale"]) * 5 ** (options["iters"] - 1)
    assert (out - exact_out).abs().max() <= slack * exact_out.abs().max().clamp_min(1.0)
    assert (attn - exact_attn).abs().max() <= slack
    for a, b in zip(grads, exact_grads, strict=True):
        assert a.isfinite().all() and (a - b).abs().max() <= 20 * slack * b.abs().max().clamp_min(1.0)


CLUSTER_OPS = (
    "attention_head_mean",
    "symmetric_kl_adjacency",
    "neighbour_mean",
    "greedy_absorb_kl",
    "segment_mean",
    "assign_clusters",
    "assign_rows",
)


@on_backends(*CLUSTER_OPS)
@given(
    frames=st.integers(1, 5),
    window=st.integers(1, 4),
    tokens=st.integers(1, 12),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    tau=st.sampled_from([0.01, 0.3, 1.0, 5.0]),
    seed=seeds,
)
@settings(DETERMINISTIC, max_examples=EXAMPLES // 2)
def test_clusters(backend, frames, window, tokens, spread, tau, seed):
    dtype = torch.float32 if backend == "cuda" else torch.float64  # in float64 the two forms meet no ties
    q = (_normal(seed, frames, 2, tokens, 4) * spread).to(device_for(backend), dtype)
    k = _normal(seed + 1, 2, 2, 7, 4).to(device_for(backend), dtype)
    found, details = vidops.hierarchical_cluster(q, k, tau, window, backend=backend, return_details=True)
    count = len(found.centroids)
    assert found.labels.shape == (frames, tokens) and found.labels.min() >= 0 and found.labels.max() < count
    sizes = details.level_sizes
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == sizes[-2] == count <= frames * tokens
    assert torch.allclose(found.centroids.sum(-1), torch.ones(count, device=q.device, dtype=dtype), rtol=1e-4)

    # Centroids are farther apart than tau: otherwise a round would have absorbed one more.
    apart = vidops.symmetric_kl(found.centroids, backend="reference")
    apart.fill_diagonal_(torch.inf)
    assert (apart > tau - 1e-4).all()

    keys = k.transpose(0, 1).flatten(1, 2)
    p = vidops.attention_head_mean(q.transpose(0, 1).flatten(1, 2), keys, backend=backend).view(frames, tokens, -1)
    if backend != "cuda":
        whole = vidops.hierarchical_cluster_map(p, tau, window, backend=backend)
        assert torch.equal(whole.labels, found.labels) and torch.allclose(whole.centroids, found.centroids)
    # Every token's own distances choose its label.
    nearest = vidops.symmetric_kl(p.flatten(0, 1), found.centroids, backend="reference")
    chosen = nearest.gather(1, found.labels.view(-1, 1))
    assert (chosen <= nearest.min(1, keepdim=True).values + 1e-4).all()


@on_backends(*CLUSTER_OPS)
@pytest.mark.parametrize("precision", ["filtered", "exact"])
def test_one_colour_is_one_cluster(backend, precision):
    q = torch.ones(3, 2, 5, 4, device=device_for(backend))
    found = vidops.hierarchical_cluster(q, q[:1], precision=precision, backend=backend)
    assert not found.labels.any() and len(found.centroids) == 1
