"""`vidops.slot_attention` on every backend: accuracy in every published form, masks, gradient modes and edges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from matrix import EMULATED, INTERPRETED, close, device_for, heads, on_backends, skip_dtype
from op_cases import slot_weights

import vidops
from vidops.ops import _slot_iterations

N, S, DIN, D = (19, 4, 6, 8) if INTERPRETED else (133, 6, 20, 24)
NO_GRU = dict.fromkeys(("gru_weight_ih", "gru_weight_hh", "gru_bias_ih", "gru_bias_hh"))
NO_MERGE = {"merge_weight": None, "merge_bias": None}
NO_BIAS = dict.fromkeys(("q_bias", "k_bias", "v_bias"))
NO_MLP = dict.fromkeys(f"{part}" for part in (
    "norm_mlp_weight", "norm_mlp_bias", "mlp_weight1", "mlp_bias1", "mlp_weight2", "mlp_bias2"))  # fmt: skip

# Name -> (query width, value width, weights left out, options).
FORMS: dict[str, tuple[int, int, dict[str, None], dict[str, Any]]] = {
    "locatello": (D, D, NO_MERGE | NO_BIAS, {"iters": 3, "ln_eps": 1e-3}),
    "multi-head": (12, 20, {}, {"iters": 2, "heads": 2, "scale": D**-0.5}),
    "joint heads": (12, D, NO_MERGE | NO_BIAS, {"iters": 2, "heads": 2, "joint_heads": True}),
    "semantics": (D, D, NO_MERGE | NO_GRU, {"iters": 3, "grad_mode": "bilevel"}),
    "instances": (
        D, D, NO_MERGE | NO_GRU,
        {"iters": 2, "groups": 2, "extra_denominator": 1e-8, "grad_mode": "bilevel"},
    ),
    "queries": (
        D, D, NO_MERGE | NO_BIAS,
        {"iters": 3, "eps": 1.0, "eps_in_denominator": True, "grad_mode": "fixed_point"},
    ),
    "bottleneck": (3, D, NO_MERGE, {"iters": 2, "scale": D**-0.5, "activation": "gelu"}),
    "corrector": (D, 16, NO_MERGE | NO_BIAS | NO_MLP, {"iters": 1, "eps_in_denominator": True}),
}  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _call(name: str, backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Any, dict[str, Any]]:
    hq, hv, absent, options = FORMS[name]
    params = slot_weights(DIN, D, hq, hv, dtype=dtype, backend=backend)
    if absent.get("merge_weight", 0) is None and "gru_weight_ih" not in absent:
        params = replace(params, gru_weight_ih=heads(3 * D, hv, seed=50, on=backend).mul(0.4).to(dtype))
    options = {**options, "return_dots": True, "return_attn": True}
    if name == "instances":
        mask = torch.arange(2 * 2 * N).view(2, 2, N) % 3 != 0
        options["token_mask"] = mask.to(device_for(backend))
    inputs, slots = heads(2, N, DIN, dtype=dtype, on=backend), heads(2, S, D, dtype=dtype, seed=1, on=backend)
    return inputs, slots, replace(params, **absent), options


def _as(params: vidops.SlotParams, dtype: torch.dtype, grad: bool = False) -> vidops.SlotParams:
    return vidops.SlotParams(
        **{name: None if t is None else t.detach().to(dtype).requires_grad_(grad) for name, t in vars(params).items()}
    )


def _present(params: vidops.SlotParams) -> list[torch.Tensor]:
    return [t for t in vars(params).values() if t is not None]


def _with_gradients(name: str, backend: str, dtype: torch.dtype, wide: torch.dtype) -> list[torch.Tensor]:
    """Outputs and gradients on `backend` of values that `dtype` can hold, computed in `wide`."""
    inputs, slots, params, options = _call(name, backend, dtype)
    inputs, slots = (t.to(wide).requires_grad_(True) for t in (inputs, slots))
    params = _as(params, wide, grad=True)
    outputs = vidops.slot_attention(inputs, slots, params, backend=backend, **options)
    weights = [heads(*t.shape, seed=9 + i, on=backend).to(t.dtype) for i, t in enumerate(outputs)]
    leaves = [inputs, slots, *_present(params)]
    found = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
    return [*(t.detach() for t in outputs), *gradients]


def _compare(name: str, backend: str, dtype: torch.dtype) -> None:
    exact = _with_gradients(name, "reference", dtype, torch.float64)
    own = _with_gradients(name, "reference", dtype, dtype)
    got = _with_gradients(name, backend, dtype, dtype)
    for a, b, c in zip(got, own, exact, strict=True):
        assert a.dtype == b.dtype
        if c.any():
            close(a.cpu(), b.cpu(), c.cpu(), floor=1e-12 if dtype == torch.float64 else 2e-6)
        else:
            assert a.abs().max() <= 1e-6


@on_backends("slot_attention", gradient=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_against_float64(backend, name, dtype):
    skip_dtype(backend, dtype)
    _compare(name, backend, dtype)


@on_backends("slot_attention", gradient=True)
@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("name", ["multi-head", "joint heads", "instances"])
def test_both_forms(backend, name, absorbed, monkeypatch):
    monkeypatch.setattr(_slot_iterations, "absorbs", lambda *sizes: absorbed)
    _compare(name, backend, torch.float32)


@on_backends("slot_attention", gradient=True)
@pytest.mark.parametrize("tokens,slots", [(1, 1), (1, 3), (5, 1), (2, 2), (65, 17)])
def test_small_and_odd_sizes(backend, tokens, slots):
    params = replace(slot_weights(3, 5, 5, 5, dtype=torch.float32, backend=backend), **NO_MERGE)

    def run(name, dtype):
        device = device_for(name)
        x, s = (heads(1, n, w, seed=n).to(device, dtype).requires_grad_(True) for n, w in ((tokens, 3), (slots, 5)))
        out, dots = vidops.slot_attention(x, s, _as(params, dtype), iters=2, return_dots=True, backend=name)
        return out.detach(), dots.detach(), *torch.autograd.grad((out.sum() + dots.square().sum()), (x, s))

    for a, b, c in zip(*(run(b, t) for b, t in (
        (backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64)
    )), strict=True):  # fmt: skip
        scale = c.abs().max().clamp_min(1.0)
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 2e-6 * scale


@on_backends("slot_attention", gradient=True)
def test_no_items(backend):
    inputs, slots, params, options = _call("multi-head", backend, torch.float32)
    inputs, slots = inputs[:0].requires_grad_(True), slots[:0].requires_grad_(True)
    params = _as(params, torch.float32, grad=True)
    out, dots, attn = vidops.slot_attention(inputs, slots, params, backend=backend, **options)
    assert out.shape == slots.shape and dots.shape == (0, 2, S, N) and attn.shape == (0, S, N)
    (out.sum() + dots.sum() + attn.sum()).backward()
    assert inputs.grad.shape == inputs.shape and not any(p.grad.any() for p in _present(params) if p.grad is not None)


class TestMasks:
    @on_backends("slot_attention", gradient=True)
    def test_masked_tokens_have_no_influence(self, backend):
        inputs, slots, params, options = _call("instances", backend, torch.float32)
        options["token_mask"] = options["token_mask"].clone()
        options["token_mask"][:, :, 3] = False
        leaf = inputs.clone().requires_grad_(True)
        out = vidops.slot_attention(leaf, slots, params, backend=backend, **options)[0]
        out.sum().backward()
        assert not leaf.grad[:, 3].any() and leaf.grad[:, 4].any()
        changed = inputs.clone()
        changed[:, 3] = heads(2, DIN, seed=77, on=backend)
        assert torch.equal(vidops.slot_attention(changed, slots, params, backend=backend, **options)[0], out.detach())

    @on_backends("slot_attention", gradient=True)
    @pytest.mark.parametrize("extra", [0.0, 1e-8])
    def test_a_group_without_tokens(self, backend, extra):
        """With a constant in the denominator its slots see nothing; without, 0 / 0 stays in that group's slots."""
        inputs, slots, params, options = _call("instances", backend, torch.float32)
        mask = options["token_mask"].clone()
        mask[0, 1] = False
        options |= {"token_mask": mask, "extra_denominator": extra}
        leaf = inputs.clone().requires_grad_(True)
        out = vidops.slot_attention(leaf, slots, params, backend=backend, **options)[0]
        if extra == 0:
            assert out[0, S // 2 :].isnan().all() and out[0, : S // 2].isfinite().all() and out[1].isfinite().all()
            return
        # An update of zero before the MLP: what no weight on values gives.
        blind = replace(params, v_weight=torch.zeros_like(params.v_weight), v_bias=torch.zeros_like(params.v_bias))
        alone = vidops.slot_attention(inputs, slots, blind, backend=backend, **options)[0]
        assert torch.allclose(out[0, S // 2 :], alone[0, S // 2 :], rtol=1e-5, atol=1e-6)
        out.sum().backward()
        assert leaf.grad.isfinite().all()

    @on_backends("slot_attention", gradient=True)
    @pytest.mark.parametrize("absorbed", [True, False])
    @pytest.mark.parametrize("name", ["multi-head", "joint heads", "instances", "corrector"])
    def test_gradient_of_a_soft_mask(self, backend, name, absorbed, monkeypatch):
        monkeypatch.setattr(_slot_iterations, "absorbs", lambda *sizes: absorbed)

        def gradients(on: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
            inputs, slots, params, options = _call(name, on, torch.float32)
            inputs, slots = inputs.to(dtype).requires_grad_(True), slots.to(dtype)
            mask = heads(2, options.get("groups", 1), N, seed=5, on=on).abs().to(dtype).requires_grad_(True)
            outputs = vidops.slot_attention(
                inputs, slots, _as(params, dtype), backend=on, **{**options, "token_mask": mask}
            )
            return torch.autograd.grad(sum(t.square().sum() for t in outputs), (inputs, mask))

        exact, own = (gradients("reference", t) for t in (torch.float64, torch.float32))
        for a, b, c in zip(gradients(backend, torch.float32), own, exact, strict=True):
            close(a.cpu(), b.cpu(), c.cpu(), floor=2e-6)

    @on_backends("slot_attention", gradient=True)
    def test_a_soft_mask_needs_no_gradient(self, backend):
        inputs, slots, params, options = _call("instances", backend, torch.float32)
        options["token_mask"] = heads(2, 2, N, seed=5, on=backend).abs()
        leaf = inputs.clone().requires_grad_(True)
        out = vidops.slot_attention(leaf, slots, params, backend=backend, **options)[0]
        (plain,) = torch.autograd.grad(out.sum(), leaf)
        options["token_mask"] = options["token_mask"].clone().requires_grad_(True)
        with torch.no_grad():
            assert not vidops.slot_attention(leaf, slots, params, backend=backend, **options)[0].requires_grad
        out = vidops.slot_attention(leaf, slots, params, backend=backend, **options)[0]
        out.sum().backward()
        assert torch.allclose(leaf.grad, plain, rtol=1e-4, atol=1e-5) and options["token_mask"].grad.shape == (2, 2, N)

    @on_backends("slot_attention", gradient=True)
    @pytest.mark.parametrize("name", ["locatello", "multi-head", "joint heads"])
    def test_masked_slots(self, backend, name):
        inputs, slots, params, options = _call(name, backend, torch.float32)
        mask = torch.zeros(2, S, dtype=torch.bool, device=inputs.device)
        mask[:, 1] = True
        _, dots, attn = vidops.slot_attention(inputs, slots, params, slot_mask=mask, backend=backend, **options)
        masked = dots[:, 1] if dots.dim() == 3 else dots[:, :, 1]
        assert (masked == -torch.inf).all() and not attn[:, 1].any() and int(dots.isinf().sum()) == masked.numel()
        kept = [i for i in range(S) if i != 1]
        rest = vidops.slot_attention(inputs, slots[:, kept], params, backend=backend, **options)
        out = vidops.slot_attention(inputs, slots, params, slot_mask=mask, backend=backend, **options)[0]
        assert torch.allclose(out[:, kept], rest[0], rtol=1e-4, atol=1e-5)  # a masked slot takes no token from others

    @on_backends("slot_attention", gradient=True)
    def test_gradient_of_a_masked_slot_s_dots_is_dropped(self, backend):
        inputs, slots, params, options = _call("multi-head", backend, torch.float32)
        mask = torch.zeros(2, S, dtype=torch.bool, device=inputs.device)
        mask[:, 1] = True
        options |= {"slot_mask": mask, "iters": 1}
        leaf = slots.clone().requires_grad_(True)
        _, dots, _ = vidops.slot_attention(inputs, leaf, params, backend=backend, **options)
        (grad,) = torch.autograd.grad(dots, leaf, torch.ones_like(dots))
        assert grad.isfinite().all() and not grad[:, 1].any() and grad[:, 0].any()

    @on_backends("slot_attention", gradient=True)
    def test_every_slot_of_an_item_masked(self, backend):
        inputs, slots, params, options = _call("locatello", backend, torch.float32)
        mask = torch.zeros(2, S, dtype=torch.bool, device=inputs.device)
        mask[0] = True
        leaf = inputs.clone().requires_grad_(True)
        out, _, attn = vidops.slot_attention(leaf, slots, params, slot_mask=mask, backend=backend, **options)
        assert out[0].isnan().all() and attn[0].isnan().all() and out[1].isfinite().all() and attn[1].isfinite().all()
        out[1].sum().backward()
        assert leaf.grad[1].isfinite().all()

    @on_backends("slot_attention")
    def test_factors_between_zero_and_one(self, backend):
        inputs, slots, params, options = _call("instances", backend, torch.float32)
        options["token_mask"] = torch.rand(2, 2, N, generator=torch.Generator().manual_seed(0)).to(inputs.device)
        got = vidops.slot_attention(inputs, slots, params, backend=backend, **options)
        want = vidops.slot_attention(
            inputs.double(), slots.double(), _as(params, torch.float64), backend="reference", **options
        )
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5)


class TestExtremes:
    @on_backends("slot_attention", gradient=True)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_stays_in_its_item(self, backend, value):
        inputs, slots, params, options = _call("multi-head", backend, torch.float32)
        want = vidops.slot_attention(inputs, slots, params, backend=backend, **options)
        spoiled = inputs.clone()
        spoiled[0, 2, 1] = value
        got = vidops.slot_attention(spoiled, slots, params, backend=backend, **options)
        assert got[0][0].isnan().all()
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a[1], b[1], rtol=1e-5, atol=1e-6)

    @on_backends("slot_attention", gradient=True)
    @pytest.mark.parametrize("where", ["inputs", "slots"])
    @pytest.mark.parametrize("size", [1e-30, 1e6, 1e15, 1e30])
    def test_size_of_the_inputs(self, backend, where, size):
        """What a LayerNorm sees has any size. A token whose variance overflows float32 counts as zeros; a slot's row
        is what PyTorch's own LayerNorm makes of it, NaN or not."""
        inputs, slots, params, options = _call("semantics", backend, torch.float32)
        inputs, slots = (inputs * size, slots) if where == "inputs" else (inputs, slots * size)

        def run(name):
            leaf = inputs.clone().requires_grad_(True)
            outputs = vidops.slot_attention(leaf, slots, params, backend=name, **options)
            return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs[0].sum(), leaf)]

        for a, b in zip(run(backend), run("reference"), strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert not a.isnan().any() or (where, size) == ("slots", 1e30)
            a, b = a.nan_to_num(), b.nan_to_num()
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()

    @on_backends("slot_attention", gradient=True)
    def test_large_dots(self, backend):
        """A softmax that is one or zero: starved slots take the mean of all tokens, and gradients are finite."""
        inputs, slots, params, options = _call("locatello", backend, torch.float32)
        options |= {"scale": 1e4}
        leaves = [inputs.clone().requires_grad_(True), slots.clone().requires_grad_(True)]
        out, _, attn = vidops.slot_attention(*leaves, params, backend=backend, **options)
        assert torch.allclose(attn.sum(1), torch.ones_like(attn[:, 0])) and out.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


class TestGradientModes:
    def gradients(self, backend, **changed):
        inputs, slots, params, options = _call("locatello", backend, torch.float32)
        options |= changed
        inputs, slots = inputs.requires_grad_(True), options.pop("slots", slots).detach().requires_grad_(True)
        params = _as(params, torch.float32, grad=True)
        out, dots, attn = vidops.slot_attention(inputs, slots, params, backend=backend, **options)
        scalar = (out * heads(*out.shape, seed=3, on=backend)).sum() + dots.square().mean() + attn.square().sum()
        return out.detach(), torch.autograd.grad(scalar, [inputs, slots, *_present(params)])

    def entering_last(self, backend):
        inputs, slots, params, options = _call("locatello", backend, torch.float32)
        return vidops.slot_attention(inputs, slots, params, backend=backend, **options | {"iters": 2})[0]

    @on_backends("slot_attention", gradient=True)
    @pytest.mark.parametrize("which", range(3))
    def test_a_result_that_is_not_used_has_no_gradient(self, backend, which):
        inputs, slots, params, options = _call("locatello", backend, torch.float32)
        leaves = [inputs.requires_grad_(True), slots.requires_grad_(True)]
        results = vidops.slot_attention(inputs, slots, params, backend=backend, **options)
        grads = [heads(*t.shape, seed=index, on=backend) if index == which else None for index, t in enumerate(results)]
        found = torch.autograd.grad(results[which], leaves, grads[which], retain_graph=True)
        zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(results, grads, strict=True)]
        want = torch.autograd.grad(results, leaves, zeros)
        assert all(torch.equal(a, b) and a.any() for a, b in zip(found, want, strict=True))

    @on_backends("slot_attention", gradient=True)
    def test_bilevel_is_the_last_iteration(self, backend):
        out, grads = self.gradients(backend, iters=3, grad_mode="bilevel")
        alone, want = self.gradients(backend, iters=1, slots=self.entering_last(backend))
        assert torch.allclose(out, alone, rtol=1e-4, atol=1e-5)
        for a, b in zip(grads, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())) and b.any()

    @on_backends("slot_attention", gradient=True)
    @pytest.mark.parametrize("iters", [1, 3])
    def test_fixed_point_gives_the_initial_slots_none(self, backend, iters):
        _, (of_inputs, of_slots, *of_weights) = self.gradients(backend, iters=iters, grad_mode="fixed_point")
        _, (want_inputs, _, *want_weights) = self.gradients(backend, iters=iters, grad_mode="bilevel")
        assert not of_slots.any() and torch.equal(of_inputs, want_inputs)
        assert all(torch.equal(a, b) for a, b in zip(of_weights, want_weights, strict=True))

    @on_backends("slot_attention", gradient=True)
    def test_one_iteration_is_plain(self, backend):
        _, plain = self.gradients(backend, iters=1)
        _, bilevel = self.gradients(backend, iters=1, grad_mode="bilevel")
        assert all(torch.equal(a, b) for a, b in zip(plain, bilevel, strict=True))

    @on_backends("slot_attention", gradient=True)
    @pytest.mark.parametrize("mode,states", [("full", 3), ("bilevel", 1)])
    def test_no_map_is_saved(self, backend, mode, states):
        inputs, slots, params, options = _call("locatello", backend, torch.float32)
        options |= {"iters": 3, "grad_mode": mode}
        params = _as(params, torch.float32, grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            vidops.slot_attention(inputs, slots, params, backend=backend, **options)
        given = {t.data_ptr() for t in (inputs, slots, *_present(params))}
        kept, record = (t for t in saved if t.data_ptr() not in given)
        assert kept.shape == (states, *slots.shape)
        (batch, tokens, din), d = inputs.shape, slots.shape[2]
        row = 3 + 2 * din + len(params.q_weight) + len(params.v_weight) + 6 * d  # of a slot, whatever the tokens
        rows = states * batch * slots.shape[1] * row + 2 * batch * tokens
        assert record.shape == (rows if backend == "cpu" else 0,)


@on_backends("slot_attention", gradient=True)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_halves_beside_float32_weights(backend, half):
    """Only the inputs are rounded: the result is that of the widened inputs."""
    inputs, slots, params, options = _call("multi-head", backend, torch.float32)
    leaf, wide = (inputs.to(half).requires_grad_(True) for _ in range(2))
    got = vidops.slot_attention(leaf, slots, params, backend=backend, **options)
    want = vidops.slot_attention(wide.float(), slots, params, backend=backend, **options)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    got[0].sum().backward()
    want[0].sum().backward()
    assert leaf.grad.dtype == half
    assert (leaf.grad - wide.grad).abs().max() <= 2 * torch.finfo(half).eps * wide.grad.abs().max()


@on_backends("slot_attention")
def test_step_is_one_iteration(backend):
    inputs, slots, params, options = _call("multi-head", backend, torch.float32)
    options |= {"return_dots": False, "return_attn": False}
    del options["iters"]
    stepped = slots
    for _ in range(3):
        stepped = vidops.slot_step(inputs, stepped, params, backend=backend, **options)
    want = vidops.slot_attention(inputs, slots, params, iters=3, backend=backend, **options)
    assert torch.allclose(stepped, want, rtol=1e-4, atol=1e-5)


@on_backends("slot_attention")
@pytest.mark.parametrize("name", ["locatello", "multi-head", "joint heads"])
def test_follows_its_tokens_and_slots(backend, name):
    """The order of tokens is nothing to the slots, and reordered slots are the same slots."""
    inputs, slots, params, options = _call(name, backend, torch.float32)
    out, _, attn = vidops.slot_attention(inputs, slots, params, backend=backend, **options)
    tokens, order = torch.randperm(N), torch.randperm(S)
    moved, _, moved_attn = vidops.slot_attention(
        inputs[:, tokens].contiguous(), slots[:, order].contiguous(), params, backend=backend, **options
    )
    assert torch.allclose(moved, out[:, order], rtol=1e-3, atol=1e-4)
    assert torch.allclose(moved_attn, attn[:, order][:, :, tokens], rtol=1e-3, atol=1e-4)


@on_backends("slot_attention", gradient=True)
@pytest.mark.parametrize("name", ["multi-head", "instances"])
def test_a_hundred_runs_give_the_same_bits(backend, name):
    """Forward and backward, with memory that other tensors have used in between."""
    first = _with_gradients(name, backend, torch.float32, torch.float32)
    for run in range(3 if EMULATED else 100):
        scratch = torch.full((run + 1, 1009), torch.nan, device=device_for(backend))
        del scratch
        again = _with_gradients(name, backend, torch.float32, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), run
