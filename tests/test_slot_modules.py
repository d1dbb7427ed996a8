"""The modules of `vidops.nn`: state dicts, signatures, random draws, and what each adds to the op."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vidops


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


GRU = {"gru.weight_ih": (48, 16), "gru.weight_hh": (48, 16), "gru.bias_ih": (48,), "gru.bias_hh": (48,)}


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norms(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (16,) for name in names for part in ("weight", "bias")}


PACKAGE = {
    "slots_mu": (1, 1, 16), "slots_logsigma": (1, 1, 16), **GRU, **_linear("mlp.0", 128, 16),
    **_linear("mlp.2", 16, 128), **_norms("norm_input", "norm_slots", "norm_pre_ff"),
}  # fmt: skip
MULTI_HEAD = {
    **PACKAGE, **_linear("to_q", 256, 16), **_linear("to_k", 256, 16), **_linear("to_v", 256, 16),
    **_linear("combine_heads", 16, 256),
}  # fmt: skip


class TestStateDicts:
    def test_of_the_package(self):
        single = {**PACKAGE, **_linear("to_q", 16, 16), **_linear("to_k", 16, 16), **_linear("to_v", 16, 16)}
        assert _shapes(vidops.nn.SlotAttention(5, 16)) == single
        assert _shapes(vidops.nn.MultiHeadSlotAttention(5, 16)) == MULTI_HEAD
        wrapped = {f"slot_attn.{name}": shape for name, shape in MULTI_HEAD.items()}
        wrapped["pred_keep_slot.weight"] = (2, 16)
        assert _shapes(vidops.nn.AdaptiveSlotWrapper(vidops.nn.MultiHeadSlotAttention(5, 16))) == wrapped
        assert _shapes(vidops.nn.AdaptiveSlotAttention(5, 16)) == wrapped

    def test_the_hidden_width_is_at_least_the_slots(self):
        assert vidops.nn.SlotAttention(5, 16, hidden_dim=4).mlp[0].out_features == 16
        assert vidops.nn.TwoStageSlotAttention(3, 2, 16, hidden_dim=4).mlp[0].out_features == 16

    def test_of_two_stages(self):
        assert _shapes(vidops.nn.TwoStageSlotAttention(6, 4, 16, hidden_dim=16)) == {
            "slots_mu": (1, 6, 1, 16), "slots_sigma": (1, 6, 1, 16),
            **_norms("norm_input", "norm_slots", "norm_pre_ff"), **_linear("project_q", 16, 16),
            **_linear("project_k", 16, 16), **_linear("project_v", 16, 16), **_linear("mlp.0", 16, 16),
            **_linear("mlp.2", 16, 16),
        }  # fmt: skip

    def test_of_object_tokens(self):
        assert _shapes(vidops.nn.LearnedQuerySlotAttention(8, 16, hidden_dim=6)) == {
            **_norms("norm_input", "norm_slots", "norm_pre_ff"), "slots_embedding.weight": (8, 16),
            **_linear("project_q", 6, 16), **_linear("project_k", 6, 16), **_linear("project_v", 16, 16), **GRU,
            **_linear("mlp.0", 6, 16), **_linear("mlp.2", 16, 6),
        }  # fmt: skip

    def test_sizes_at_the_scale_of_the_papers(self):
        def count(module):
            return sum(p.numel() for p in module.parameters())

        # Counts stated for the published configurations.
        assert count(vidops.nn.TwoStageSlotAttention(16, 4, 384)) == 753_792
        assert round(count(vidops.nn.LearnedQuerySlotAttention(8, 384)) / 1e6, 2) == 1.09


class TestSignatures:
    @pytest.mark.parametrize(
        "name,leading",
        [
            ("SlotAttention", {"iters": 3, "eps": 1e-8, "hidden_dim": 128}),
            ("MultiHeadSlotAttention", {"heads": 4, "dim_head": 64, "iters": 3, "eps": 1e-8, "hidden_dim": 128}),
        ],
    )
    def test_of_the_package(self, name, leading):
        module = getattr(vidops.nn, name)
        found = [p for p in inspect.signature(module).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in found] == ["num_slots", "dim", *leading]
        assert {p.name: p.default for p in found[2:]} == leading
        call = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in call] == ["self", "inputs", "num_slots"] and call[2].default is None

    def test_of_the_wrapper(self):
        found = inspect.signature(vidops.nn.AdaptiveSlotWrapper).parameters
        assert list(found) == ["slot_attn", "temperature"] and found["temperature"].default == 1.0

    def test_attributes(self):
        module = vidops.nn.SlotAttention(5, 16, iters=2, eps=1e-6)
        assert (module.num_slots, module.dim, module.iters, module.eps) == (5, 16, 2, 1e-6)
        assert module.scale == vidops.nn.MultiHeadSlotAttention(5, 16).scale == 16**-0.5


class TestDraws:
    @pytest.mark.parametrize("module", [vidops.nn.SlotAttention(5, 16), vidops.nn.MultiHeadSlotAttention(5, 16)])
    def test_one_draw_per_slot(self, module):
        """The package's: one standard normal of (batch, slots, dim), first thing in the call."""
        inputs = _normal(2, 9, 16)
        torch.manual_seed(3)
        got = module(inputs, num_slots=7, backend="reference")
        torch.manual_seed(3)
        noise = torch.randn(2, 7, 16)
        assert torch.equal(got, module(inputs, num_slots=7, noise=noise, backend="reference"))
        assert not torch.equal(got, module(inputs, num_slots=7, backend="reference"))

    def test_noise_reaches_mean_and_deviation(self):
        module = vidops.nn.SlotAttention(5, 16)
        module(_normal(2, 9, 16), backend="reference").sum().backward()
        assert module.slots_mu.grad.any() and module.slots_logsigma.grad.any()

    def test_keep(self):
        module = vidops.nn.AdaptiveSlotAttention(5, 16, heads=2, dim_head=4)
        torch.manual_seed(1)
        slots, keep = module(_normal(3, 9, 16), num_slots=6, backend="reference")
        assert slots.shape == (3, 6, 16) and keep.shape == (3, 6)
        # Straight through: 0 or 1 up to the rounding of adding and taking away a probability.
        assert ((keep.detach() - keep.detach().round()).abs() < 1e-6).all()
        keep.sum().backward()
        assert module.pred_keep_slot.weight.grad.any()

    def test_keep_at_the_ends_of_the_uniform_draw(self):
        module = vidops.nn.AdaptiveSlotAttention(5, 16, heads=2, dim_head=4)
        for u in (0.0, 1.0):
            _, keep = module(_normal(2, 9, 16), uniform=torch.full((2, 5, 2), u), backend="reference")
            assert keep.isfinite().all()

    def test_sample_of_instances(self):
        module = vidops.nn.TwoStageSlotAttention(3, 2, 16)
        with torch.no_grad():
            module.slots_sigma.fill_(-30.0)
        sample = module.sample_instances(4)
        assert sample.shape == (4, 3, 2, 16)
        found = torch.autograd.grad(sample.sum(), [module.slots_mu, module.slots_sigma])
        assert not any(gradient.any() for gradient in found)
        assert torch.allclose(sample, module.slots_mu.detach().expand(4, 3, 2, 16))
        semantics, dots, instances, instance_dots = module(_normal(4, 9, 16), backend="reference")
        assert semantics.shape == (4, 3, 16) and dots.shape == (4, 3, 9)
        assert instances.shape == (4, 3, 2, 16) and instance_dots.shape == (4, 3, 2, 9)


class TestImplicit:
    def test_is_one_step_from_a_detached_fixed_point(self):
        module = vidops.nn.ImplicitSlotAttention(4, 16, iters=3)
        inputs, noise = _normal(2, 9, 16), _normal(2, 4, 16, seed=1)
        out = module(inputs, noise=noise, backend="reference")
        plain = vidops.nn.SlotAttention(4, 16, iters=3, bias=False)
        plain.load_state_dict(module.state_dict())
        with torch.no_grad():
            fixed = plain(inputs, noise=noise, backend="reference")
        again = vidops.slot_step(inputs, fixed, module._params(), backend="reference")
        assert torch.allclose(out, again, rtol=1e-5, atol=1e-6)
        weights = [p for n, p in module.named_parameters() if not n.startswith("slots_")]
        got = torch.autograd.grad(out.sum(), weights, retain_graph=True)
        for a, b in zip(got, torch.autograd.grad(again.sum(), weights), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
        initial = torch.autograd.grad(out.sum(), [module.slots_mu, module.slots_logsigma], allow_unused=True)
        assert not any(g is not None and g.any() for g in initial)


class TestTwoStages:
    """Against the sheet's equations word by word."""

    def plain_stage(self, module, z, slots, mask, axis):
        """slots (b, S, P, D), softmax over `axis`, mask (b, S, 1, N) or None."""
        keys, values = module.project_k(module.norm_input(z)), module.project_v(module.norm_input(z))
        initial = slots
        for r in range(module.iters):
            q = module.project_q(module.norm_slots(slots))
            dots = module.scale * torch.einsum("bspd,bnd->bspn", q, keys)
            weights = dots.softmax(axis) + module.eps
            if mask is None:
                weights = weights / weights.sum(-1, keepdim=True)
            else:
                weights = weights * mask
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-8)
            slots = slots + torch.einsum("bspn,bnd->bspd", weights, values)
            slots = slots + module.mlp(module.norm_pre_ff(slots))
            if r == module.iters - 2:
                slots = slots.detach() - initial.detach() + initial
        return slots, dots

    @pytest.mark.parametrize("iters", [1, 2, 4])
    def test_is_the_sheet(self, iters):
        torch.manual_seed(0)
        module = vidops.nn.TwoStageSlotAttention(3, 2, 16, iters=iters, threshold=0.1).double()
        z, init = _normal(2, 9, 16).double().requires_grad_(True), _normal(2, 3, 2, 16, seed=1).double()
        init.requires_grad_(True)
        semantics, dots = self.plain_stage(module, z, module.slots_mu.expand(2, -1, -1, -1), None, 1)
        mask = (dots.detach() > 0.1).double()
        assert 0 < mask.mean() < 1
        instances, instance_dots = self.plain_stage(module, z, init, mask, 2)
        want = semantics.squeeze(2), dots.squeeze(2), instances, instance_dots
        got = module(z, init, backend="reference")
        leaves = [z, init, *(p for n, p in module.named_parameters() if n != "slots_sigma")]
        grads = [_normal(*t.shape, seed=5).double() for t in want]
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)
        expected = torch.autograd.grad(want, leaves, grads)
        for a, b in zip(torch.autograd.grad(got, leaves, grads), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)


class TestLearnedQueries:
    def test_noise_is_in_units_of_the_query(self):
        module = vidops.nn.QueryOptimizedSlotAttention(4, 16, iters=1)
        inputs, noise = _normal(2, 9, 16), _normal(2, 4, 16, seed=1)
        plain = module(inputs, noise=noise, backend="reference")[0]
        assert torch.equal(plain, module(inputs, backend="reference")[0])  # no noise at sigma 0
        spread = module(inputs, 0.5, noise=noise, backend="reference")[0]
        with torch.no_grad():
            queries = module.slots_init.weight + 0.5 * noise * module.slots_init.weight
            params = vidops.nn.QueryOptimizedSlotAttention(4, 16, iters=1)
            params.load_state_dict(module.state_dict())
            params.slots_init = nn.Embedding.from_pretrained(queries[0])
        assert torch.allclose(spread[0], params(inputs, backend="reference")[0][0])

    @pytest.mark.parametrize("truncate,reached", [("none", True), ("bilevel", True), ("fixed_point", False)])
    def test_gradient_of_the_queries(self, truncate, reached):
        module = vidops.nn.QueryOptimizedSlotAttention(4, 16, truncate=truncate)
        module(_normal(2, 9, 16), backend="reference")[0].sum().backward()
        assert bool(module.slots_init.weight.grad.any()) is reached

    @pytest.mark.parametrize("truncate", ["full", "bi-level", None, 1])
    def test_wrong_truncation(self, truncate):
        with pytest.raises(ValueError, match="truncate"):
            vidops.nn.QueryOptimizedSlotAttention(4, 16, truncate=truncate)

    def test_given_queries(self):
        module = vidops.nn.LearnedQuerySlotAttention(4, 16)
        inputs = _normal(2, 9, 16)
        slots, dots = module(inputs, backend="reference")
        given = module.slots_embedding.weight.detach().expand(2, -1, -1)
        again = module(inputs, given, backend="reference")
        assert torch.equal(slots, again[0]) and torch.equal(dots, again[1]) and dots.shape == (2, 4, 9)


class TestSavi:
    def test_corrector_is_the_sheet(self):
        module = vidops.nn.SlotCorrector(16, input_dim=12, qkv_size=20)
        slots, x = _normal(2, 5, 16), _normal(2, 9, 12, seed=1)
        q, k, v = module.q(module.norm_slots(slots)), module.k(module.norm_inputs(x)), module.v(module.norm_inputs(x))
        attn = (q * 20**-0.5 @ k.transpose(1, 2)).softmax(1)
        update = attn / (attn.sum(-1, keepdim=True) + 1e-8) @ v
        want = module.gru(update.flatten(0, 1), slots.flatten(0, 1)).view(2, 5, 16)
        got, got_attn = module(slots, x, backend="reference")
        assert torch.allclose(got, want, atol=1e-6) and torch.allclose(got_attn, attn, atol=1e-6)

    def test_predictor_is_the_sheet(self):
        module = vidops.nn.SlotPredictor(16, heads=2, qkv_size=8, mlp_size=24)
        slots = _normal(2, 5, 16)
        q, k, v = (part(slots).unflatten(-1, (2, 4)).transpose(1, 2) for part in (module.q, module.k, module.v))
        mixed = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        y = module.norm1(module.out(mixed.transpose(1, 2).flatten(2)) + slots)
        hidden = F.relu(F.linear(y, module.mlp[0].weight, module.mlp[0].bias))
        want = module.norm2(F.linear(hidden, module.mlp[2].weight, module.mlp[2].bias) + y)
        assert torch.allclose(module(slots), want, atol=1e-6)

    @pytest.mark.parametrize("heads", [0, 3])
    def test_heads_that_do_not_fit(self, heads):
        with pytest.raises(ValueError, match="heads"):
            vidops.nn.SlotPredictor(16, heads=heads)


@pytest.mark.parametrize("name", ["SlotAttention", "MultiHeadSlotAttention", "ImplicitSlotAttention"])
def test_half_precision_modules(name):
    module = getattr(vidops.nn, name)(4, 16).bfloat16()
    out = module(_normal(2, 9, 16).bfloat16(), backend="reference")
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in module.parameters())


def test_inputs_of_another_width():
    with pytest.raises(ValueError, match=r"params\."):
        vidops.nn.SlotAttention(4, 16)(_normal(2, 9, 12), backend="reference")
