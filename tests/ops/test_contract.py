"""What every op promises, on every backend this process can run."""

import math
import os

import pytest
import torch
from torch.library import opcheck

import vidops
from vidops._registry import OPS
from vidops.validation.command import runnable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else runnable()
NATIVE = [b for b in BACKENDS if b != "reference"]


def _maps(n, m, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(n, m, generator=g, dtype=torch.float64) * 2, -1).to(dtype)


def _heads(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def _close(got, kernel_dtype_reference, exact, floor=1e-6):
    """error(kernel) <= 2 error(reference in the same dtype) + floor, both against float64, relative to the largest."""
    size = exact.abs().max().clamp_min(1e-30)
    error = (got.double() - exact).abs().max() / size
    own = (kernel_dtype_reference.double() - exact).abs().max() / size
    assert error <= 2 * own + floor, (float(error), float(own))
    assert exact.abs().max() > 0 and not torch.isnan(exact).any()


SIZES = [(1, 1, 1, 1, 1), (1, 3, 33, 65, 5), (2, 2, 64, 63, 16), (1, 8, 17, 130, 48)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b,h,n,m,d", SIZES)
def test_head_mean_forward_and_gradient(backend, dtype, b, h, n, m, d):
    q, k = _heads(b, h, n, d, dtype=dtype), _heads(b, h, m, d, dtype=dtype, seed=1)
    grad = _heads(b, n, m, seed=2, dtype=torch.float64)

    def run(name, cast):
        leaf_q, leaf_k = (t.to(cast).requires_grad_(True) for t in (q, k))
        p, log_p = vidops.attention_head_mean(leaf_q, leaf_k, return_log=True, backend=name)
        ((p * grad.to(p.dtype)).sum() + log_p.sum() / m).backward()
        return p.detach(), log_p.detach(), leaf_q.grad, leaf_k.grad

    exact, same = run("reference", torch.float64), run("reference", dtype)
    got = run(backend, dtype)
    _close(got[0], same[0], exact[0])
    assert (got[1].double() - exact[1]).abs().max() <= 1e-5 + 2 * (same[1].double() - exact[1]).abs().max()
    if m > 1:  # with one key the gradients are mathematically zero
        floor = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5)  # one rounding of the stored result
        _close(got[2], same[2], exact[2], floor)
        _close(got[3], same[3], exact[3], floor)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got[2].dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("need", ["none", "map", "keys"])
def test_video_attention(backend, dropout_p, need):
    q, k, v = (_heads(1, 3, n, 16, seed=i) for i, n in enumerate((33, 40, 40)))
    weight = _heads(1, 3, 33, 16, seed=5)

    def run(name, dtype):
        leaves = [t.to(dtype).requires_grad_(True) for t in (q, k, v)]
        found = vidops.video_attention(*leaves, dropout_p=dropout_p, seed=2**40 + 7, need=need, backend=name)
        out = found if need == "none" else found[0]
        total = (out * weight.to(dtype)).sum()
        if need != "none":
            total = total + (found[1] ** 2).sum()
        total.backward()
        return [out.detach(), *([] if need == "none" else [found[1].detach()]), *(t.grad for t in leaves)]

    exact, same = run("reference", torch.float64), run("reference", torch.float32)
    for got, own, want in zip(run(backend, torch.float32), same, exact, strict=True):
        _close(got, own, want, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n,m", [(1, 1), (63, 70), (64, 5), (130, 33)])
def test_distance_family(backend, dtype, n, m):
    p, x = _maps(n, m, dtype), _maps(7, m, dtype, seed=3)
    exact = vidops.symmetric_kl(p.double(), x.double(), backend="reference")
    own = vidops.symmetric_kl(p, x, backend="reference")
    got = vidops.symmetric_kl(p, x, backend=backend)
    size = (p * p.log()).sum(-1).abs().max().double()  # the terms that cancel are as large as an entropy
    assert (got.double() - exact).abs().max() <= 2 * (own.double() - exact).abs().max() + 1e-6 * size + 1e-12
    square = vidops.symmetric_kl(p, backend=backend)
    assert torch.equal(square, square.T)

    near = vidops.symmetric_kl(p.double(), backend="reference")
    tau = float(near.flatten().sort().values[near.numel() // 3]) + 1e-3
    expected = near <= tau
    safe = ((near - tau).abs() > 1e-4) | torch.eye(n, dtype=torch.bool)
    expected.fill_diagonal_(True)
    bits = {f: vidops.symmetric_kl_adjacency(p, tau, precision=f, backend=backend) for f in ("filtered", "exact")}
    relation = vidops.unpack_adjacency(bits["exact"])
    assert torch.equal(bits["filtered"], bits["exact"])
    assert torch.equal(relation[safe], expected[safe]) and torch.equal(relation, relation.T)

    adjacency = bits["exact"]
    _close(
        vidops.neighbour_mean(adjacency, p, backend=backend),
        vidops.neighbour_mean(adjacency, p, backend="reference"),
        vidops.neighbour_mean(adjacency, p.double(), backend="reference"),
        2e-6,
    )
    want = vidops.greedy_absorb(adjacency, backend="reference")
    for found in (
        vidops.greedy_absorb(adjacency, backend=backend),
        vidops.greedy_absorb_kl(p, tau, backend=backend),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    count = int(want.count)
    _close(
        vidops.segment_mean(p, want.label, count + 1, backend=backend),
        vidops.segment_mean(p, want.label, count + 1, backend="reference"),
        vidops.segment_mean(p.double(), want.label, count + 1, backend="reference"),
    )
    labels = vidops.assign_rows(p, x, backend=backend)
    gaps = exact.sort(1).values
    clear = gaps[:, 1] - gaps[:, 0] > 1e-5
    assert torch.equal(labels[clear], exact.argmin(1)[clear])


@pytest.mark.parametrize("backend", BACKENDS)
def test_assign_clusters_equals_assign_rows(backend):
    q, k = _heads(3, 50, 16), _heads(3, 70, 16, seed=1)
    p, log_p, lse = vidops.attention_head_mean(q, k, return_log=True, return_lse=True, backend="reference")
    x = p[::9].contiguous()
    want = vidops.assign_rows(p, x, log_p=log_p, backend="reference")
    assert torch.equal(vidops.assign_clusters(q, k, x, backend=backend), want)
    assert torch.equal(vidops.assign_clusters(q, k, x, lse=lse, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sizes(backend):
    assert vidops.attention_head_mean(torch.ones(2, 0, 4), torch.ones(2, 3, 4), backend=backend).shape == (0, 3)
    no_batch = torch.ones(0, 2, 5, 4), torch.ones(0, 2, 3, 4)
    assert vidops.attention_head_mean(*no_batch, backend=backend).shape == (0, 5, 3)
    none = torch.ones(0, 3)
    adjacency = vidops.symmetric_kl_adjacency(none, 1.0, backend=backend)
    assert adjacency.shape == (0, 0)
    assert vidops.neighbour_mean(adjacency, none, backend=backend).shape == (0, 3)
    absorbed = vidops.greedy_absorb(adjacency, backend=backend), vidops.greedy_absorb_kl(none, 1.0, backend=backend)
    for found in absorbed:
        assert found.owner.shape == (0,) and int(found.count) == 0
    label = torch.zeros(0, dtype=torch.int64)
    assert vidops.segment_mean(none, label, 2, backend=backend).tolist() == [[0.0] * 3] * 2
    assert vidops.segment_mean(none, label, 0, backend=backend).shape == (0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_untouched_inputs(backend):
    base_q, base_k = _heads(2, 40, 3, 32), _heads(2, 50, 3, 32, seed=1)
    q, k = base_q.transpose(1, 2)[..., ::2], base_k.transpose(1, 2)[..., ::2]
    kept = base_q.clone(), base_k.clone()
    strided = vidops.attention_head_mean(q, k, backend=backend)
    assert torch.equal(strided, vidops.attention_head_mean(q.contiguous(), k.contiguous(), backend=backend))
    assert torch.equal(base_q, kept[0]) and torch.equal(base_k, kept[1])
    wide = _maps(40, 66)
    part = wide[::2, 1:66:2]
    assert torch.equal(
        vidops.symmetric_kl(part, backend=backend), vidops.symmetric_kl(part.contiguous(), backend=backend)
    )
    expanded = wide[:1].expand(40, 66)
    assert vidops.greedy_absorb_kl(expanded, 1.0, backend=backend).owner.unique().tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_log_of_zero(backend):
    q = torch.tensor([[[200.0]], [[200.0]]])
    k = torch.tensor([[[1.0], [-1.0]], [[1.0], [-1.0]]])
    p, log_p = vidops.attention_head_mean(q, k, scale=1.0, return_log=True, backend=backend)
    assert p[0, 1] == 0 and torch.allclose(log_p[0, 1], torch.tensor(-400.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_rows_stand_alone(backend):
    p = _maps(40, 20)
    p[3] = math.nan
    relation = vidops.unpack_adjacency(vidops.symmetric_kl_adjacency(p, 1e9, backend=backend))
    assert relation[3].nonzero().flatten().tolist() == [3] and relation[:, 3].nonzero().flatten().tolist() == [3]
    assert vidops.greedy_absorb_kl(p, 1e9, backend=backend).owner.unique().tolist() == [0, 3]
    x = p[:2].clone()
    x[0] = math.nan
    assert vidops.assign_rows(p, x, backend=backend).tolist() == [0 if i == 3 else 1 for i in range(40)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable(backend):
    q, k = _heads(1, 3, 70, 16), _heads(1, 3, 90, 16, seed=1)
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        leaf = q.clone().requires_grad_(True)
        p = vidops.attention_head_mean(leaf, k, backend=backend)
        p.square().sum().backward()
        runs.append((p.detach(), leaf.grad))
    if backend != "reference":  # a BLAS may split its sums by threads
        assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert torch.equal(runs[1][0], runs[2][0]) and torch.equal(runs[1][1], runs[2][1])


@pytest.mark.skipif(INTERPRETED, reason="torch's registration does not depend on how Triton runs")
class TestRegistration:
    @staticmethod
    def samples(backend):
        q, k, v = (_heads(1, 2, n, 8, seed=i).requires_grad_(True) for i, n in enumerate((5, 7, 7)))
        p = _maps(20, 9)
        adjacency = vidops.symmetric_kl_adjacency(p, 1.0, backend="reference")
        lse = vidops.attention_head_mean(q.detach()[0], k.detach()[0], return_lse=True, backend="reference")[1]
        x, x9 = _maps(3, 7), _maps(4, 9, seed=2)[None]
        return {
            "attention_head_mean": (q, k, 0.3, 0.0, 0, True, backend),
            "video_attention": (q, k, v, 0.3, 0.4, 3, True, backend),
            "symmetric_kl": (p[None].clone().requires_grad_(True), p[None].log(), x9, x9.log(), False, backend),
            "symmetric_kl_adjacency": (p, p.log(), 1.0, True, backend),
            "neighbour_mean": (adjacency, p, backend),
            "greedy_absorb": (adjacency, backend),
            "greedy_absorb_kl": (p, p.log(), 1.0, backend),
            "segment_mean": (p, torch.arange(20) % 3, 3, backend),
            "assign_clusters": (q.detach()[0], k.detach()[0], lse, x, x.log(), 0.3, backend),
            "assign_rows": (_maps(6, 7), _maps(6, 7).log(), x, x.log(), backend),
        }

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", sorted(OPS))
    def test_opcheck(self, name, backend):
        opcheck(OPS[name].call, self.samples(backend)[name])

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_gradcheck(self, backend):
        double = {"dtype": torch.float64}
        q, k, v = (_heads(1, 2, n, 4, seed=i, **double).requires_grad_(True) for i, n in enumerate((3, 5, 5)))
        check = torch.autograd.gradcheck
        assert check(lambda a, b: vidops.attention_head_mean(a, b, return_log=True, backend=backend), (q, k))
        for p in (0.0, 0.5):
            assert check(
                lambda *t, p=p: vidops.video_attention(*t, dropout_p=p, seed=5, need="map", backend=backend), (q, k, v)
            )
        maps = _maps(3, 4, torch.float64).requires_grad_(True), _maps(2, 4, torch.float64, 1).requires_grad_(True)
        assert check(lambda a, b: vidops.symmetric_kl(a, b, backend=backend), maps)
        assert check(lambda a: vidops.symmetric_kl(a, backend=backend), maps[:1])

    def test_no_silent_double_backward(self):
        q = _heads(1, 3, 4).requires_grad_(True)
        p = vidops.attention_head_mean(q, q)
        (grad,) = torch.autograd.grad(p.square().sum(), q, create_graph=True)
        with pytest.raises((RuntimeError, NotImplementedError)):
            grad.sum().backward()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_fullgraph_dynamic(self, backend):
        def step(q, k):
            p, log_p = vidops.attention_head_mean(q, k, return_log=True, backend=backend)
            adjacency = vidops.symmetric_kl_adjacency(p.detach(), 1.0, log_p=log_p.detach(), backend=backend)
            mean = vidops.neighbour_mean(adjacency, p.detach(), backend=backend)
            return p, vidops.greedy_absorb_kl(mean, 1.0, backend=backend).owner

        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (30, 41, 52):
            q, k = _heads(2, n, 8), _heads(2, n + 3, 8, seed=1)
            for got, want in zip(compiled(q, k), step(q, k), strict=True):
                assert torch.equal(got, want)

    def test_autocast(self):
        q, k = _heads(2, 6, 8, dtype=torch.bfloat16), _heads(2, 7, 8, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert vidops.attention_head_mean(q, k).dtype == torch.float32
            assert vidops.video_attention(q[None].float(), k[None].float(), k[None].float()).dtype == torch.bfloat16


class TestSelection:
    def test_refusal_lists_every_reason(self):
        if INTERPRETED:
            pytest.skip("triton takes CPU tensors when interpreted")
        with pytest.raises(vidops.BackendError) as caught:
            vidops.attention_head_mean(torch.ones(1, 2, 3), torch.ones(1, 2, 3), backend="triton")
        text = str(caught.value)
        assert all(f"  {name}:" in text for name in vidops.BACKENDS)

    def test_gradient_needed_is_refused(self):
        p = _maps(4, 3).requires_grad_(True)
        with pytest.raises(vidops.BackendError, match="not differentiable"):
            vidops.greedy_absorb_kl(p, 1.0)
        with torch.no_grad():
            vidops.greedy_absorb_kl(p, 1.0)

    def test_authority(self):
        adjacency = torch.ones(1, 1, dtype=torch.int64)
        with vidops.use_backend("reference"):
            assert vidops.explain("greedy_absorb", adjacency).backend == "reference"
            assert vidops.explain("greedy_absorb", adjacency, backend="cpu").backend == "cpu"
            with vidops.use_backend("cpu", op="greedy_absorb"):
                assert vidops.explain("greedy_absorb", adjacency).backend == "cpu"
        assert vidops.explain("greedy_absorb", adjacency).backend == "cpu"
        with pytest.raises(ValueError, match="unknown backend"):
            vidops.greedy_absorb(adjacency, backend="gpu")
