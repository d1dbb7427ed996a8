"""Gradients: gradcheck, unusual incoming gradients, what is refused, and vmap."""

from __future__ import annotations

import pytest
import torch
from matrix import EMULATED, heads, maps, on_backends, skip_dtype

import vidops

DOUBLE = {"dtype": torch.float64}
check = torch.autograd.gradcheck


@pytest.mark.skipif(EMULATED, reason="finite differences need hundreds of calls")
class TestGradcheck:
    @on_backends("attention_head_mean", gradient=True)
    def test_head_mean(self, backend):
        skip_dtype(backend, torch.float64)
        q, k = (heads(1, 2, n, 4, seed=n, on=backend, **DOUBLE).requires_grad_(True) for n in (3, 5))
        assert check(lambda a, b: vidops.attention_head_mean(a, b, return_log=True, backend=backend), (q, k))

    @on_backends("video_attention", gradient=True)
    @pytest.mark.parametrize("dropout_p", [0.0, 0.5])
    def test_video_attention(self, backend, dropout_p):
        skip_dtype(backend, torch.float64)
        inputs = [
            heads(1, 2, n, 4, seed=i, on=backend, **DOUBLE).requires_grad_(True) for i, n in enumerate((3, 5, 5))
        ]
        assert check(
            lambda *t: vidops.video_attention(*t, dropout_p=dropout_p, seed=5, need="map", backend=backend), inputs
        )

    @on_backends("symmetric_kl", gradient=True)
    def test_symmetric_kl(self, backend):
        skip_dtype(backend, torch.float64)
        p, x = (maps(n, 4, torch.float64, n, on=backend).requires_grad_(True) for n in (3, 2))
        assert check(lambda a, b: vidops.symmetric_kl(a, b, backend=backend), (p, x))
        assert check(lambda a: vidops.symmetric_kl(a, backend=backend), (p,))
        log_p, log_x = (t.detach().log().requires_grad_(True) for t in (p, x))
        assert check(
            lambda a, b, la, lb: vidops.symmetric_kl(a, b, log_p=la, log_q=lb, backend=backend), (p, x, log_p, log_x)
        )


def _attention(backend, **options):
    return lambda q, k, v: vidops.video_attention(q, k, v, need="map", backend=backend, **options)


def _inputs(backend):
    return [heads(1, 2, n, 8, seed=i, on=backend) for i, n in enumerate((6, 9, 9))]


def _gradients(outputs, grads, leaves):
    kept = [g.clone() for g in grads]
    found = torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))  # an incoming gradient is not ours
    return found


def _at_strides(g, how):
    """An incoming gradient equal to `g` with other strides; for "expanded", constant along its last axis."""
    if how == "transposed":
        return torch.empty_like(g.transpose(-2, -1).contiguous()).transpose(-2, -1).copy_(g)
    if how == "sliced":
        wide = g.new_full((*g.shape[:-1], g.shape[-1] * 2 + 1), torch.nan)
        return wide[..., 1::2].copy_(g)
    return g[..., :1].expand(g.shape)


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
class TestIncomingGradients:
    """Equal to what the same values give when contiguous."""

    def compare(self, outputs, leaves, how):
        grads = [heads(*o.shape, seed=i).to(o) for i, o in enumerate(outputs)]
        strided = [_at_strides(g, how) for g in grads]
        want = _gradients(outputs, [g.contiguous() for g in strided], leaves)
        for got, expected in zip(_gradients(outputs, strided, leaves), want, strict=True):
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
            assert expected.any()

    @on_backends("attention_head_mean", gradient=True)
    def test_head_mean(self, backend, how):
        q, k, _ = (t.requires_grad_(True) for t in _inputs(backend))
        self.compare(vidops.attention_head_mean(q, k, return_log=True, backend=backend), (q, k), how)

    @on_backends("video_attention", gradient=True)
    def test_video_attention(self, backend, how):
        leaves = [t.requires_grad_(True) for t in _inputs(backend)]
        self.compare(_attention(backend, dropout_p=0.3, seed=1)(*leaves), leaves, how)

    @on_backends("symmetric_kl", gradient=True)
    def test_symmetric_kl(self, backend, how):
        leaves = [maps(n, 9, seed=n, on=backend).requires_grad_(True) for n in (6, 4)]
        self.compare([vidops.symmetric_kl(*leaves, backend=backend)], leaves, how)


class TestPartsOfTheGraph:
    @on_backends("attention_head_mean", gradient=True)
    def test_unused_outputs_of_head_mean(self, backend):
        q, k, _ = (t.requires_grad_(True) for t in _inputs(backend))
        p, log_p = vidops.attention_head_mean(q, k, return_log=True, backend=backend)
        g = heads(*p.shape, seed=3, on=backend)
        through_p = torch.autograd.grad(p, (q, k), g, retain_graph=True)
        through_log = torch.autograd.grad(log_p, (q, k), g * p.detach(), retain_graph=True)
        for a, b in zip(through_p, through_log, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6) and a.any()

    @on_backends("video_attention", gradient=True)
    def test_unused_outputs_of_video_attention(self, backend):
        """The gradient of both outputs is the sum of the gradients of each."""
        leaves = [t.requires_grad_(True) for t in _inputs(backend)]
        out, weights = _attention(backend)(*leaves)
        g_out, g_map = heads(*out.shape, seed=3, on=backend), heads(*weights.shape, seed=4, on=backend)
        both = torch.autograd.grad((out, weights), leaves, (g_out, g_map), retain_graph=True)
        of_out = torch.autograd.grad(out, leaves, g_out, retain_graph=True)
        of_map = torch.autograd.grad(weights, leaves, g_map, retain_graph=True, allow_unused=True)
        for a, b, c in zip(both, of_out, of_map, strict=True):
            total = b if c is None else b + c
            assert torch.allclose(a, total, rtol=1e-4, atol=1e-5) and a.any()

    @on_backends("attention_head_mean", "video_attention", "symmetric_kl", gradient=True)
    def test_one_input_alone(self, backend):
        """The gradient of one input does not depend on whether the others want theirs."""

        def attention_head_mean(q, k, v):
            return vidops.attention_head_mean(q, k, backend=backend).square().sum()

        def video_attention(q, k, v):
            return sum(t.square().sum() for t in _attention(backend)(q, k, v))

        def symmetric_kl(p, x, _):
            return vidops.symmetric_kl(p.softmax(-1)[0], x.softmax(-1)[0], backend=backend).square().sum()

        for function, count in ((attention_head_mean, 2), (video_attention, 3), (symmetric_kl, 2)):
            leaves = [t.requires_grad_(True) for t in _inputs(backend)]
            together = torch.autograd.grad(function(*leaves), leaves[:count])
            for index in range(count):
                alone = [t.detach().requires_grad_(i == index) for i, t in enumerate(leaves)]
                (got,) = torch.autograd.grad(function(*alone), alone[index : index + 1])
                assert torch.allclose(got, together[index], rtol=1e-5, atol=1e-6) and got.any(), function.__name__

    @on_backends("attention_head_mean", gradient=True)
    def test_lse_has_no_gradient(self, backend):
        q, k, _ = (t.requires_grad_(True) for t in _inputs(backend))
        _, lse = vidops.attention_head_mean(q, k, return_lse=True, backend=backend)
        assert not lse.requires_grad


class TestRefused:
    """A gradient that is not implemented is an error, never a zero."""

    def twice(self, outputs, leaf):
        total = sum(o.square().sum() for o in outputs)
        (grad,) = torch.autograd.grad(total, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="has no double backward"):
            grad.square().sum().backward()

    @on_backends("attention_head_mean", gradient=True)
    def test_double_backward_of_head_mean(self, backend):
        q = heads(1, 3, 4, on=backend).requires_grad_(True)
        self.twice(vidops.attention_head_mean(q, q, return_log=True, backend=backend), q)

    @on_backends("video_attention", gradient=True)
    def test_double_backward_of_video_attention(self, backend):
        q = heads(1, 1, 3, 4, on=backend).requires_grad_(True)
        self.twice(_attention(backend)(q, q, q), q)

    @on_backends("symmetric_kl", gradient=True)
    def test_double_backward_of_symmetric_kl(self, backend):
        p = maps(3, 4, on=backend).requires_grad_(True)
        self.twice([vidops.symmetric_kl(p, backend=backend)], p)

    @on_backends("greedy_absorb_kl")
    def test_not_differentiable(self, backend):
        p = maps(4, 3, on=backend).requires_grad_(True)
        with pytest.raises(vidops.BackendError, match="not differentiable"):
            vidops.greedy_absorb_kl(p, 1.0, backend=backend)


class TestVmap:
    """A leading axis by `torch.func.vmap` is the same as a loop over it."""

    @on_backends("attention_head_mean")
    def test_head_mean(self, backend):
        q, k = heads(3, 2, 5, 8, on=backend), heads(3, 2, 7, 8, seed=1, on=backend)
        got = torch.func.vmap(lambda a, b: vidops.attention_head_mean(a, b, backend=backend))(q, k)
        want = torch.stack([vidops.attention_head_mean(a, b, backend=backend) for a, b in zip(q, k, strict=True)])
        assert torch.allclose(got, want)

    @on_backends("greedy_absorb_kl")
    def test_greedy_absorb_kl(self, backend):
        p = torch.stack([maps(9, 6, seed=i, on=backend) for i in range(3)])
        got = torch.func.vmap(lambda rows: tuple(vidops.greedy_absorb_kl(rows, 1.0, backend=backend)))(p)
        want = [vidops.greedy_absorb_kl(rows, 1.0, backend=backend) for rows in p]
        for index, found in enumerate(got):
            assert torch.equal(found, torch.stack([w[index] for w in want]))

    @on_backends("attention_head_mean", gradient=True)
    def test_torch_func_grad_is_refused(self, backend):
        """PyTorch has no function transforms of the gradients of registered operators: an error, not a zero."""
        q, k = heads(2, 5, 8, on=backend), heads(2, 7, 8, seed=1, on=backend)
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.grad(lambda a: vidops.attention_head_mean(a, k, backend=backend).square().sum())(q)
