"""Gradients: gradcheck, unusual incoming gradients, what is refused, and vmap."""

from __future__ import annotations

import pytest
import torch
from matrix import EMULATED, device_for, heads, maps, on_backends, skip_dtype
from op_cases import slot_weights

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

    @on_backends("slot_attention", gradient=True)
    @pytest.mark.parametrize("options", [
        {"iters": 2},
        {"iters": 1, "joint_heads": True, "eps": 0.5, "eps_in_denominator": True},
        {"iters": 2, "groups": 2, "extra_denominator": 0.1},
    ])  # fmt: skip
    def test_slot_attention(self, backend, options):
        skip_dtype(backend, torch.float64)
        weights = slot_weights(3, 4, 4, 4, backend=backend, **DOUBLE)
        x, slots = heads(1, 5, 3, on=backend, **DOUBLE), heads(1, 4, 4, seed=1, on=backend, **DOUBLE)
        names = list(vars(weights))

        def call(x, slots, *found):
            params = vidops.SlotParams(**dict(zip(names, found, strict=True)))
            return vidops.slot_attention(
                x, slots, params, heads=2, activation="gelu", return_dots=True, return_attn=True, backend=backend,
                **options,
            )  # fmt: skip

        leaves = [t.clone().requires_grad_(True) for t in (x, slots, *vars(weights).values())]
        assert check(call, leaves)

    @on_backends("gather_tokens", "scatter_tokens", gradient=True)
    def test_gather_and_scatter(self, backend):
        x, index = _tokens(backend, **DOUBLE)
        assert check(lambda t: vidops.gather_tokens(t, index, backend=backend), x)
        taken = x.detach()[:, : index.shape[1]].clone().requires_grad_(True)
        assert check(lambda t: vidops.scatter_tokens(t, index, 9, backend=backend), taken)

    @on_backends("gather_tokens", gradient=True)
    def test_pruning_and_filling(self, backend):
        skip_dtype(backend, torch.float64)
        x, keys = heads(1, 10, 2, on=backend, **DOUBLE).requires_grad_(True), heads(1, 10, 3, on=backend, **DOUBLE)
        assert check(lambda t: vidops.sta_prune(t, keys, 2, 2, backend=backend).x, x)
        keep = torch.tensor([[3, 0, 7, 5, 1, 2, 8, 10, 9, 11]], device=x.device)
        assert check(lambda t: vidops.nearest_fill(t, keep, (3, 5), backend=backend).dense, x)

    @on_backends("scatter_tokens", gradient=True)
    def test_token_merge(self, backend):
        skip_dtype(backend, torch.float64)
        x, keys = heads(1, 9, 2, on=backend, **DOUBLE).requires_grad_(True), heads(1, 9, 3, on=backend, **DOUBLE)
        size = heads(1, 9, 1, seed=1, on=backend, **DOUBLE).exp().requires_grad_(True)
        assert check(lambda t, n: vidops.token_merge(t, keys, 3, n, backend=backend)[:2], (x, size))


def _attention(backend, **options):
    return lambda q, k, v: vidops.video_attention(q, k, v, need="map", backend=backend, **options)


def _inputs(backend):
    return [heads(1, 2, n, 8, seed=i, on=backend) for i, n in enumerate((6, 9, 9))]


def _slots(backend, **options):
    """Leaves (inputs, slots, all weights) and the results of one call."""
    weights = slot_weights(6, 8, 4, 6, dtype=torch.float32, backend=backend)
    leaves = [t.requires_grad_(True) for t in (heads(2, 9, 6, on=backend), heads(2, 4, 8, seed=1, on=backend))]
    weights = vidops.SlotParams(**{name: t.requires_grad_(True) for name, t in vars(weights).items()})
    options = {"iters": 2, "heads": 2, "activation": "gelu", "return_dots": True, "return_attn": True, **options}
    outputs = vidops.slot_attention(*leaves, weights, backend=backend, **options)
    return outputs, [*leaves, *vars(weights).values()]


def _tokens(backend, **options):
    """A leaf of seven tokens, of which six are taken: one three times, one twice, some not at all."""
    index = torch.tensor([[2, 0, 2, 6, 0, 2], [5, 5, 1, 5, 3, 1]], device=device_for(backend))
    return heads(2, 7, 5, on=backend, **options).requires_grad_(True), index


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

    @on_backends("slot_attention", gradient=True)
    def test_slot_attention(self, backend, how):
        self.compare(*_slots(backend), how)

    @on_backends("gather_tokens", "scatter_tokens", gradient=True)
    def test_gather_and_scatter(self, backend, how):
        x, index = _tokens(backend)
        self.compare([vidops.gather_tokens(x, index, backend=backend)], [x], how)
        taken = x.detach()[:, :6].clone().requires_grad_(True)
        self.compare([vidops.scatter_tokens(taken, index, 9, backend=backend)], [taken], how)


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

    @on_backends("slot_attention", gradient=True)
    def test_unused_outputs_of_slot_attention(self, backend):
        """The gradient of all outputs is the sum of the gradients of each."""
        outputs, leaves = _slots(backend)
        grads = [heads(*t.shape, seed=3 + i, on=backend) for i, t in enumerate(outputs)]
        together = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        totals = [torch.zeros_like(t) for t in leaves]
        for output, grad in zip(outputs, grads, strict=True):
            found = torch.autograd.grad(output, leaves, grad, retain_graph=True, allow_unused=True)
            totals = [t if g is None else t + g for t, g in zip(totals, found, strict=True)]
        for a, b in zip(together, totals, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5) and a.any()

    @on_backends("slot_attention", gradient=True)
    @pytest.mark.parametrize("wanted", ["inputs", "slots", "weights"])
    def test_part_of_the_leaves_of_slot_attention(self, backend, wanted):
        outputs, leaves = _slots(backend)
        together = torch.autograd.grad(outputs[0].square().sum(), leaves)
        kept = {"inputs": [0], "slots": [1], "weights": list(range(2, len(leaves)))}[wanted]
        alone = [t.detach().requires_grad_(i in kept) for i, t in enumerate(leaves)]
        names = list(vars(slot_weights(6, 8, 4, 6, dtype=torch.float32, backend=backend)))
        params = vidops.SlotParams(**dict(zip(names, alone[2:], strict=True)))
        out = vidops.slot_attention(*alone[:2], params, iters=2, heads=2, activation="gelu", backend=backend)
        for index, got in zip(kept, torch.autograd.grad(out.square().sum(), [alone[i] for i in kept]), strict=True):
            assert torch.allclose(got, together[index], rtol=1e-4, atol=1e-5) and got.any()

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

    @on_backends("slot_attention", gradient=True)
    def test_double_backward_of_slot_attention(self, backend):
        outputs, leaves = _slots(backend)
        self.twice(outputs, leaves[0])

    @on_backends("gather_tokens", "scatter_tokens", gradient=True)
    def test_double_backward_of_gather_and_scatter(self, backend):
        x, index = _tokens(backend)
        self.twice([vidops.gather_tokens(x, index, backend=backend)], x)
        taken = x.detach()[:, :6].clone().requires_grad_(True)
        self.twice([vidops.scatter_tokens(taken, index, 9, backend=backend)], taken)

    @on_backends("sta_score", "bipartite_match")
    def test_decisions_on_tokens_are_not_differentiable(self, backend):
        x = heads(1, 8, 3, on=backend)
        leaf = x.clone().requires_grad_(True)
        for call in (
            lambda: vidops.sta_score(leaf, x, 2, 1, backend=backend),
            lambda: vidops.sta_score(x, leaf, 2, 1, backend=backend),
            lambda: vidops.bipartite_match(leaf, backend=backend),
            lambda: vidops.first_frame_order(leaf, backend=backend),
        ):
            with pytest.raises(vidops.BackendError, match="not differentiable"):
                call()

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

    @on_backends("slot_attention")
    def test_slot_attention(self, backend):
        weights = slot_weights(6, 8, 4, 6, dtype=torch.float32, backend=backend)
        x, slots = heads(3, 2, 9, 6, on=backend), heads(3, 2, 4, 8, seed=1, on=backend)

        def call(a, b):
            return vidops.slot_attention(a, b, weights, iters=2, heads=2, return_attn=True, backend=backend)

        for got, want in zip(torch.func.vmap(call)(x, slots), zip(*map(call, x, slots), strict=True), strict=True):
            assert torch.allclose(got, torch.stack(want), rtol=1e-4, atol=1e-5)

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
