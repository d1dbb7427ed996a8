"""What every implementation reads and writes: all of its outputs, nothing beside them, inputs at any stride."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from matrix import BACKENDS, INTERPRETED, device_for, equal, maps
from op_cases import NAMES, OpCase, agree, case
from torch.utils._python_dispatch import TorchDispatchMode

import vidops

GUARD = 256  # elements on each side: keeps the alignment an implementation may expect of its own allocations
ALLOCATORS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


def _fill(t: torch.Tensor, pattern: int) -> None:
    """Every byte of a contiguous `t` takes `pattern`: 0xFF is NaN and -1, 0x7B large numbers. Bytes but 0 and 1 are no
    truth values, and a copy may change them."""
    t.view(torch.uint8).fill_(1 if t.dtype == torch.bool else pattern)


class Guarded(TorchDispatchMode):
    """Places every uninitialised allocation inside a larger one; `pattern` fills it, guards included."""

    def __init__(self, pattern: int) -> None:
        super().__init__()
        self.pattern = pattern
        self.buffers: list[tuple[torch.Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in ALLOCATORS or result.device.type == "meta" or not result.is_contiguous():
            return result
        size = result.numel()
        buffer = torch.empty(size + 2 * GUARD, dtype=result.dtype, device=result.device)
        _fill(buffer, self.pattern)
        self.buffers.append((buffer, size))
        return buffer[GUARD :][:size].view(result.shape)

    def intact(self) -> bool:
        return all(
            bool((side.view(torch.uint8) == self.pattern).all())
            for buffer, size in self.buffers
            for side in (buffer[: GUARD], buffer[GUARD + size :])
        )


def _same(sample: OpCase, backend: str, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> bool:
    return equal(got, want) if sample.repeats_layouts(backend) else agree(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", [0xFF, 0x7B])
def test_every_element_is_written_and_nothing_beside_it(name, backend, pattern):
    sample = case(name, backend)
    want = sample.direct(backend, sample.tensors)
    with Guarded(pattern) as guarded:
        got = sample.direct(backend, sample.tensors)
    assert guarded.intact()
    assert _same(sample, backend, got, want)
    assert guarded.buffers or not sample.repeats_bits(backend)  # plain PyTorch allocates inside its own operators


def test_guards_find_planted_faults():
    def unwritten(x):
        out = x.new_empty(x.shape)
        out[:-1] = x[:-1]
        return out

    def overrun(x):
        out = torch.empty_like(x)
        out.as_strided((len(x) + 1,), (1,)).fill_(0)
        return out

    x = torch.ones(5)
    with Guarded(0xFF) as guarded:
        assert unwritten(x).isnan().tolist() == [False] * 4 + [True]
        assert guarded.intact()
        overrun(x)
        assert not guarded.intact()


def _inside(t: torch.Tensor, before: int, pattern: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of `t` after `before` elements of a filled buffer, and the buffer."""
    buffer = torch.empty(before + t.numel() + GUARD, dtype=t.dtype, device=t.device)
    _fill(buffer, pattern)
    view = buffer[before:][: t.numel()].view(t.shape)
    view.copy_(t)
    return view, buffer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [1] if INTERPRETED else [GUARD, 1, 3])
def test_inputs_inside_larger_tensors(name, backend, before):
    """Canaries around the inputs are neither read (a NaN would show) nor written, nor are the inputs; an odd
    number of elements before them also breaks every alignment above the element's own."""
    sample = case(name, backend)
    want = sample.through_torch(backend)
    placed = [_inside(t, before, 0xFF) for t in sample.tensors]
    kept = [buffer.clone() for _, buffer in placed]
    got = sample.through_torch(backend, [view for view, _ in placed])
    assert equal(tuple(buffer for _, buffer in placed), tuple(kept))
    assert _same(sample, backend, got, want)


def _restrided(t: torch.Tensor, how: str) -> torch.Tensor:
    """Equal values at other strides; the elements in between are poison."""
    if how == "row stride" and t.dim() > 1:
        wide = torch.empty(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype, device=t.device)
        _fill(wide, 0xFF)
        view = wide[..., 1:-2]
    elif how == "every second":
        wide = torch.empty(*t.shape[:-1], t.shape[-1] * 2, dtype=t.dtype, device=t.device)
        _fill(wide, 0xFF)
        view = wide[..., ::2]
    elif how == "outer axes swapped" and t.dim() > 2:
        view = torch.empty_like(t.transpose(-3, -2).contiguous()).transpose(-3, -2)
    elif how == "transposed" and t.dim() > 1:
        view = torch.empty_like(t.transpose(-2, -1).contiguous()).transpose(-2, -1)
    else:
        return t
    view.copy_(t)
    return view


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["row stride", "every second", "outer axes swapped", "transposed"])
def test_inputs_at_other_strides(name, backend, how):
    sample = case(name, backend)
    tensors = [_restrided(t, how) for t in sample.tensors]
    if all(a.stride() == b.stride() for a, b in zip(tensors, sample.tensors, strict=True)):
        pytest.skip("no input has the axes for it")
    assert _same(sample, backend, sample.through_torch(backend, tensors), sample.through_torch(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [-4, -3, -2, -1])
def test_expanded_inputs(name, backend, axis):
    """Zero strides: each input in turn constant along one axis, against the same values in memory."""
    sample = case(name, backend)
    for index, t in enumerate(sample.tensors):
        if t.dim() < -axis or t.numel() == 0:
            continue
        expanded = t.narrow(axis, 0, 1).expand(t.shape)
        given = [*sample.tensors[:index], expanded, *sample.tensors[index + 1 :]]
        stored = [*sample.tensors[:index], expanded.contiguous(), *sample.tensors[index + 1 :]]
        got, want = sample.through_torch(backend, given), sample.through_torch(backend, stored)
        assert _same(sample, backend, got, want), f"input {index}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_results_alias_nothing(name, backend):
    sample = case(name, backend)
    out = [t for t in sample.through_torch(backend) if t.numel()]
    pointers = [t.untyped_storage().data_ptr() for t in (*out, *sample.tensors)]
    assert len(set(pointers[: len(out)])) == len(out) and not set(pointers[: len(out)]) & set(pointers[len(out) :])


def _far_rows(backend: str, rows: int, columns: int, stride: int) -> torch.Tensor:
    """Rows `stride` elements apart. Memory is reserved on the CPU but, rows aside, never touched."""
    try:
        base = torch.empty((rows - 1) * stride + columns, device=device_for(backend))
    except RuntimeError as error:
        pytest.skip(f"this machine does not reserve the address space: {error}")
    return base.as_strided((rows, columns), (stride, 1))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="reserves gigabytes without touching them, as only a CPU can")
@pytest.mark.parametrize("backend", ["cpu"])
class TestFar:
    """Offsets beyond 2^31 elements, and more than 2^31 elements counted."""

    stride = 2**30 + 5  # the third row starts beyond 2^31 elements

    def test_offsets_of_maps(self, backend):
        p = maps(3, 9, on=backend)
        far = _far_rows(backend, 3, 9, self.stride)
        far.copy_(p)
        assert torch.equal(vidops.symmetric_kl(far, backend=backend), vidops.symmetric_kl(p, backend=backend))
        label = torch.tensor([0, 1, 1])
        assert torch.equal(
            vidops.segment_mean(far, label, 2, backend=backend), vidops.segment_mean(p, label, 2, backend=backend)
        )
        bits = vidops.symmetric_kl_adjacency(p, 1.0, backend=backend)
        assert torch.equal(vidops.symmetric_kl_adjacency(far, 1.0, backend=backend), bits)
        assert torch.equal(
            vidops.neighbour_mean(bits, far, backend=backend), vidops.neighbour_mean(bits, p, backend=backend)
        )
        near = vidops.greedy_absorb_kl(p, 1.0, backend=backend)
        assert equal(vidops.greedy_absorb_kl(far, 1.0, backend=backend), near)
        labels = vidops.assign_rows(p, p[1:], backend=backend)
        assert torch.equal(vidops.assign_rows(far, p[1:], backend=backend), labels)

    def test_offsets_of_tokens(self, backend):
        x = maps(3, 9, on=backend)
        far = _far_rows(backend, 3, 9, self.stride)
        far.copy_(x)
        x, far = x[None], far[None]
        index = torch.tensor([[2, 0, 2]])
        assert torch.equal(
            vidops.gather_tokens(far, index, backend=backend), vidops.gather_tokens(x, index, backend=backend)
        )
        summed = vidops.scatter_tokens(x, index, 4, backend=backend)
        assert torch.equal(vidops.scatter_tokens(far, index, 4, backend=backend), summed)
        assert equal(vidops.bipartite_match(far, backend=backend), vidops.bipartite_match(x, backend=backend))
        for frames in (1, 3):
            want = vidops.sta_score(x, x, frames, 0, backend=backend)
            assert equal(vidops.sta_score(far, x, frames, 0, backend=backend), want)
            assert equal(vidops.sta_score(x, far, frames, 0, backend=backend), want)

    def test_offsets_of_attention(self, backend):
        q = maps(3, 8, on=backend)
        far = _far_rows(backend, 3, 8, self.stride)
        far.copy_(q)
        for left, right in ((far, q), (q, far)):
            got = vidops.attention_head_mean(left[None], right[None], backend=backend)
            assert torch.equal(got, vidops.attention_head_mean(q[None], q[None], backend=backend))
        want = vidops.video_attention(*([q[None, None]] * 3), need="map", backend=backend)
        assert equal(vidops.video_attention(*([far[None, None]] * 3), need="map", backend=backend), want)
        assert torch.equal(
            vidops.assign_clusters(far[None], far[None], maps(2, 3), backend=backend),
            vidops.assign_clusters(q[None], q[None], maps(2, 3), backend=backend),
        )

    def test_offsets_of_features(self, backend):
        rows = maps(3, 8, on=backend)
        far = _far_rows(backend, 3, 8, self.stride)
        far.copy_(rows)
        want = vidops.label_propagation(rows, rows[None], rows[None], (1, 3), backend=backend)
        assert torch.equal(vidops.label_propagation(far, far[None], far[None], (1, 3), backend=backend), want)

    @pytest.mark.slow
    def test_more_than_two_to_the_31_elements(self, backend):
        n, m = 2**20, 2**11 + 3
        row = maps(1, m)
        p, log_p = row.expand(n, m), row.log().expand(n, m)
        assert p.numel() > 2**31
        small = (torch.arange(m) % 16).float()  # whose sums over half the rows are exact
        mean = vidops.segment_mean(small.expand(n, m), torch.arange(n) % 2, 2, backend=backend)
        assert torch.equal(mean, small.expand(2, m))
        x = torch.cat([maps(1, m, seed=1), row])
        assert vidops.assign_rows(p, x, log_p=log_p, backend=backend).eq(1).all()
        distance = vidops.symmetric_kl(p, x, log_p=log_p, backend=backend)
        assert distance[:, 1].abs().max() < 1e-4 and math.isclose(distance[0, 0], distance[-1, 0], rel_tol=1e-6)
        found = vidops.greedy_absorb_kl(p, 1.0, log_p=log_p, backend=backend)
        assert not found.owner.any() and int(found.count) == 1

    @pytest.mark.slow
    def test_bit_rows_of_more_than_two_to_the_31_words(self, backend):
        n = 400_000
        every = torch.full((1, n // 64), -1, dtype=torch.int64).expand(n, n // 64)
        assert every.numel() > 2**31
        found = vidops.greedy_absorb(every, backend=backend)
        assert not found.owner.any() and int(found.count) == 1
        none = torch.zeros(1, n // 64, dtype=torch.int64).expand(n, n // 64)
        found = vidops.greedy_absorb(none, backend=backend)
        assert int(found.count) == n and torch.equal(found.owner, torch.arange(n))
