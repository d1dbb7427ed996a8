"""What PyTorch sees: opcheck, full-graph compile, export, autocast."""

from __future__ import annotations

import pytest
import torch
from matrix import BACKENDS, DEVICE, EMULATED, device_for, equal, heads, on_backends
from op_cases import agree, case, slot_weights
from torch.library import opcheck

import vidops
from vidops._registry import OPS

pytestmark = pytest.mark.skipif(EMULATED, reason="torch's registration does not depend on how kernels run")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(OPS))
def test_opcheck(name, backend):
    sample = case(name, backend)
    tensors = list(sample.tensors)
    row = OPS[name].rows[backend]
    if row.backward is not None:
        tensors = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    if name == "symmetric_kl":  # logarithms come in as constants here
        tensors[1], tensors[3] = tensors[1].detach(), tensors[3].detach()
    opcheck(OPS[name].call, (*tensors, *sample.scalars, backend))


@on_backends("slot_attention", gradient=True)
@pytest.mark.parametrize("with_maps", [False, True])
def test_opcheck_of_the_least_slot_attention(backend, with_maps):
    """No optional weight, no mask."""
    weights = slot_weights(6, 8, 4, 8, dtype=torch.float32, backend=backend)
    required = ("q_weight", "k_weight", "v_weight")
    given = {name: weight if name in required else None for name, weight in vars(weights).items()}
    x, slots = heads(2, 7, 6, on=backend), heads(2, 3, 8, seed=1, on=backend)
    tensors = [t if t is None else t.clone().requires_grad_(True) for t in (x, slots, *given.values())]
    options = (2, 1, 0.5, True, 1, 1.0, True, 0.0, 1e-5, "relu", "bilevel", with_maps, with_maps, False, True)
    opcheck(OPS["slot_attention"].call, (*tensors, None, None, *options, backend))


@on_backends("slot_attention", gradient=True)
def test_opcheck_of_a_mask_with_a_gradient(backend):
    sample = case("slot_attention", backend)
    mask = sample.tensors[-2].clone().requires_grad_(True)
    tensors = (*sample.tensors[:-2], mask, sample.tensors[-1])
    opcheck(OPS["slot_attention"].call, (*tensors, *sample.scalars[:-2], True, False, backend))


class Window(torch.nn.Module):
    """One window of the first hierarchy: four ops, with data-independent shapes."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p, log_p = vidops.attention_head_mean(q, k, return_log=True, backend=self.backend)
        adjacency = vidops.symmetric_kl_adjacency(p.detach(), 1.0, log_p=log_p.detach(), backend=self.backend)
        mean = vidops.neighbour_mean(adjacency, p.detach(), backend=self.backend)
        absorbed = vidops.greedy_absorb_kl(mean, 1.0, backend=self.backend)
        labels = vidops.assign_clusters(q.detach(), k.detach(), mean[:2], backend=self.backend)
        return p, mean, absorbed.owner, absorbed.label, absorbed.count, labels


WINDOW_OPS = (
    "attention_head_mean",
    "symmetric_kl_adjacency",
    "neighbour_mean",
    "greedy_absorb_kl",
    "assign_clusters",
)


@on_backends(*WINDOW_OPS)
def test_fullgraph_dynamic(backend):
    step = Window(backend)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (30, 41, 70, 150):
        q, k = heads(2, n, 8, on=backend), heads(2, n + 3, 8, seed=1, on=backend)
        assert equal(compiled(q, k), step(q, k))


def _names_of(program: torch.export.ExportedProgram) -> dict[str, str]:
    """vidops op -> the backend its node names."""
    return {
        node.target.name().removeprefix("vidops::"): node.args[-1]
        for node in program.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("vidops.")
    }


@on_backends(*WINDOW_OPS)
@pytest.mark.parametrize("saved", [False, True])
def test_export_of_a_window(backend, saved, tmp_path):
    module = Window(backend)
    q, k = heads(2, 80, 8, on=backend), heads(2, 33, 8, seed=1, on=backend)
    # PyTorch makes a special case of every size 1, and bit rows of up to 64 columns are one word wide.
    queries, keys = torch.export.Dim("queries", min=65, max=4096), torch.export.Dim("keys", min=2, max=4096)
    program = torch.export.export(module, (q, k), dynamic_shapes={"q": {1: queries}, "k": {1: keys}})
    assert _names_of(program) == dict.fromkeys(WINDOW_OPS, backend)
    if saved:
        torch.export.save(program, tmp_path / "window.pt2")
        program = torch.export.load(tmp_path / "window.pt2")
    for n, m in ((80, 33), (65, 17), (131, 40)):
        q, k = heads(2, n, 8, seed=n, on=backend), heads(2, m, 8, seed=m, on=backend)
        assert equal(program.module()(q, k), module(q, k))


class Attention(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, weights = vidops.video_attention(q, k, v, dropout_p=0.25, seed=5, need="map", backend=self.backend)
        distance = vidops.symmetric_kl(weights + 1e-3, backend=self.backend)
        label = torch.arange(weights.shape[1], device=weights.device) % 3
        mean = vidops.segment_mean(weights[0], label, 3, backend=self.backend)
        rows = vidops.assign_rows(weights[0] + 1e-3, mean + 1e-3, backend=self.backend)
        return out, weights, distance, mean, rows


ATTENTION_OPS = ("video_attention", "symmetric_kl", "segment_mean", "assign_rows")


@on_backends(*ATTENTION_OPS)
def test_export_of_attention(backend):
    module = Attention(backend)

    def inputs(batch, n):
        return tuple(heads(batch, 2, n, 8, seed=i, on=backend) for i in range(3))

    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=4, max=4096)
    shapes = {name: {0: batch, 2: tokens} for name in "qkv"}
    with torch.no_grad():
        program = torch.export.export(module, inputs(2, 12), dynamic_shapes=shapes)
        assert _names_of(program) == dict.fromkeys(ATTENTION_OPS, backend)
        for size in ((2, 12), (3, 19)):
            same = agree if backend == "reference" else equal  # there a BLAS sums
            assert same(program.module()(*inputs(*size)), module(*inputs(*size)))


@on_backends("greedy_absorb")
def test_export_of_greedy_absorb(backend):
    class Leaders(torch.nn.Module):
        def forward(self, adjacency):
            return tuple(vidops.greedy_absorb(adjacency, backend=backend))

    bits = torch.ones(70, 2, dtype=torch.int64, device=device_for(backend))
    program = torch.export.export(Leaders(), (bits,))
    assert _names_of(program) == {"greedy_absorb": backend}
    assert equal(program.module()(bits), Leaders()(bits))


class Slots(torch.nn.Module):
    """Every weight and mask, gradients through the last iteration; a module of its own builds the parameters."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.attention = vidops.nn.MultiHeadSlotAttention(num_slots=4, dim=8, heads=2, dim_head=6, iters=2)
        self.attention.to(device_for(backend))

    def forward(self, x: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        slots = self.attention(x, noise=noise, backend=self.backend)
        return vidops.slot_attention(
            x, slots, self.attention._params(), iters=3, heads=2, groups=2, grad_mode="bilevel",
            token_mask=mask, extra_denominator=1e-8, return_dots=True, return_attn=True, backend=self.backend,
        )  # fmt: skip


def _slot_inputs(batch: int, tokens: int, backend: str) -> tuple[torch.Tensor, ...]:
    x, noise = heads(batch, tokens, 8, on=backend), heads(batch, 4, 8, seed=1, on=backend)
    return x, noise, heads(batch, 2, tokens, seed=2, on=backend) > 0


@on_backends("slot_attention", gradient=True)
def test_fullgraph_dynamic_slots(backend):
    step = Slots(backend)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in ((2, 9), (3, 33), (2, 150)):
        gradients = []
        for module in (compiled, step):
            step.zero_grad()
            out = module(*_slot_inputs(batch, tokens, backend))
            (out[0].sum() + out[1].square().sum() + out[2].square().sum()).backward()
            gradients.append((*(t.detach() for t in out), *(p.grad.clone() for p in step.parameters())))
        assert agree(*gradients)


@on_backends("slot_attention")
def test_export_of_slots(backend):
    module = Slots(backend)
    batch, tokens = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("tokens", min=4, max=4096)
    shapes = {"x": {0: batch, 1: tokens}, "noise": {0: batch}, "mask": {0: batch, 2: tokens}}
    with torch.no_grad():
        program = torch.export.export(module, _slot_inputs(2, 12, backend), dynamic_shapes=shapes)
        assert _names_of(program) == {"slot_attention": backend}
        for size in ((2, 12), (3, 19)):
            assert agree(program.module()(*_slot_inputs(*size, backend)), module(*_slot_inputs(*size, backend)))


@on_backends("slot_attention", gradient=True)
def test_autocast_of_slots(backend):
    """Half inputs are read as they are; slots and their weights are float32, where 1e-8 is not lost."""
    device = device_for(backend).type
    module = Slots(backend).attention
    x, noise, _ = _slot_inputs(2, 9, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        half = torch.nn.functional.linear(x, torch.eye(8, device=x.device))
        assert half.dtype == torch.bfloat16
        slots = module(half, noise=noise, backend=backend)
        assert slots.dtype == torch.float32
        inside = torch.autograd.grad(slots.sum(), list(module.parameters()))
    exact = module(half.float(), noise=noise, backend=backend)
    outside = torch.autograd.grad(exact.sum(), list(module.parameters()))
    for a, b in zip((slots, *inside), (exact, *outside), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.detach().abs().max())))


def test_autocast():
    q, k = (heads(2, n, 8, dtype=torch.bfloat16).to(DEVICE) for n in (6, 7))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert vidops.attention_head_mean(q, k).dtype == torch.float32
        assert vidops.video_attention(q[None].float(), k[None].float(), k[None].float()).dtype == torch.bfloat16


@on_backends("gather_tokens", "scatter_tokens", "nearest_kept", "sta_prune")
def test_fake_tensors_have_no_values_to_check(backend):
    with torch._subclasses.FakeTensorMode(), torch.device(device_for(backend)):
        x, index = torch.empty(2, 9, 4), torch.empty(2, 5, dtype=torch.int64)
        assert vidops.gather_tokens(x, index, backend=backend).shape == (2, 5, 4)
        assert vidops.scatter_tokens(x, index.new_empty(2, 9), 12, backend=backend).shape == (2, 12, 4)
        assert vidops.nearest_kept(index, (3, 4), backend=backend).shape == (2, 12)
        assert vidops.sta_prune(x, x, 3, 1, backend=backend).x.shape == (2, 6, 4)
