"""Gathering, filling and merging of tokens: against loops over them, on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from matrix import EMULATED, INTERPRETED, device_for, equal, heads, on_backends

import vidops

DTYPES = [torch.float32, torch.bfloat16]
DTYPES += ([] if INTERPRETED else [torch.float64]) + ([] if EMULATED else [torch.float16])


@on_backends("gather_tokens", gradient=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_and_scatter_are_adjoint(dtype, backend):
    lead, tokens, taken, width = (2, 3), 11, 17, 5
    x = heads(*lead, tokens, width, dtype=dtype, seed=8, on=backend).requires_grad_()
    grad = heads(*lead, taken, width, dtype=dtype, seed=9, on=backend)
    index = torch.randint(tokens - 2, (*lead, taken), generator=torch.Generator().manual_seed(1)).to(x.device)
    out = vidops.gather_tokens(x, index, backend=backend)
    assert out.dtype == dtype
    want = x.detach().gather(2, index[..., None].expand(*lead, taken, width))
    assert torch.equal(out.detach(), want)
    out.backward(grad)
    total = torch.zeros(*lead, tokens, width, dtype=torch.float64)
    for b, t, k in itertools.product(range(2), range(3), range(taken)):
        total[b, t, index[b, t, k]] += grad[b, t, k].double().cpu()
    assert x.grad is not None
    tolerance = 2 * torch.finfo(dtype).eps
    assert torch.allclose(x.grad.double().cpu(), total, rtol=tolerance, atol=4 * tolerance)
    assert not x.grad[:, :, -2:].any()
    summed = vidops.scatter_tokens(grad, index, tokens, backend=backend)
    assert torch.equal(summed, x.grad)


@pytest.mark.skipif(EMULATED, reason="of tens of megabytes")
@on_backends("gather_tokens")
@pytest.mark.parametrize("width,dtype", [(1024, torch.float32), (1000, torch.float32), (1056, torch.bfloat16)], ids=str)
def test_gathers_larger_than_a_cache(width, dtype, backend):
    """Above 16 MiB rows may be written past the caches, if their width allows it."""
    tokens = 2**24 // (width * dtype.itemsize) + 37
    wide = torch.arange(2 * tokens * (width + 3), device=device_for(backend)).remainder(251).to(dtype)
    wide = wide.view(2, tokens, width + 3)
    index = torch.randint(tokens, (2, tokens), generator=torch.Generator().manual_seed(2)).to(wide.device)
    for x in (wide[..., :width].contiguous(), wide[..., 1:-2]):
        want = x.gather(1, index[..., None].expand(-1, -1, width))
        assert torch.equal(vidops.gather_tokens(x, index, backend=backend), want)


@on_backends("gather_tokens", "scatter_tokens", gradient=True)
def test_empty_gathers(backend):
    device = device_for(backend)
    none = torch.zeros(2, 0, dtype=torch.int64, device=device)
    x = torch.ones(2, 3, 4, device=device, requires_grad=True)
    out = vidops.gather_tokens(x, none, backend=backend)
    assert out.shape == (2, 0, 4)
    out.sum().backward()
    assert x.grad is not None and not x.grad.any()
    assert not vidops.scatter_tokens(x[:, :0], none, 3, backend=backend).any()
    assert vidops.scatter_tokens(x[:, :0], none, 0, backend=backend).shape == (2, 0, 4)


@on_backends("nearest_kept")
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (4, 5), (7, 7)])
def test_nearest_kept(grid, backend):
    height, width = grid
    places = height * width
    for count in sorted({1, (places + 2) // 3, places}):
        generator = torch.Generator().manual_seed(count)
        keep = torch.stack([torch.randperm(places, generator=generator)[:count] for _ in range(2)])
        source = vidops.nearest_kept(keep.to(device_for(backend)), grid, backend=backend).cpu()
        for b, n in itertools.product(range(2), range(places)):
            def far(slot, b=b, n=n, keep=keep):
                place = int(keep[b, slot])
                return (place // width - n // width) ** 2 + (place % width - n % width) ** 2, place

            assert source[b, n] == min(range(count), key=far)


@on_backends("gather_tokens", gradient=True)
def test_fill_keeps_what_is_there(backend):
    keep = torch.tensor([[3, 0, 7], [1, 5, 8]], device=device_for(backend))
    x = heads(2, 3, 4, seed=10, on=backend).requires_grad_()
    dense, source = vidops.nearest_fill(x, keep, (3, 3), backend=backend)
    assert torch.equal(vidops.gather_tokens(dense, keep, backend=backend), x)
    dense.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[..., 0].cpu(), torch.nn.functional.one_hot(source.cpu(), 3).sum(1).float())


def merged_by_hand(x, size, found, r, class_token, distill_token):
    """Mean of the members, token by token, in the order that the sheet gives."""
    order, _, partner = (t.cpu() for t in found)
    even = len(order)
    gone = order[even - r :].tolist()
    left = [i for i in order.tolist() if i not in gone][::-1]
    left = sorted(left) if class_token else left
    groups = [[2 * i] for i in left]
    odd = [[2 * j + 1, *(2 * i for i in gone if partner[i] == j)] for j in range(len(x) // 2)]
    groups = [groups[0], odd[0], *groups[1:], *odd[1:]] if distill_token else groups + odd
    sizes = torch.tensor([float(size[g].sum()) for g in groups])
    return torch.stack([(x[g] * size[g]).sum(0) / size[g].sum() for g in groups]), sizes, groups


@on_backends("scatter_tokens", "gather_tokens", gradient=True)
@pytest.mark.parametrize("special", [{}, {"class_token": True}, {"class_token": True, "distill_token": True}], ids=str)
@pytest.mark.parametrize("tokens,r", [(13, 0), (13, 4), (12, 6), (12, 50), (3, 1)])
def test_token_merge(tokens, r, special, backend):
    x, keys = (heads(2, tokens, width, seed=width, on=backend) for width in (5, 4))
    size = heads(2, tokens, 1, seed=11, on=backend).exp()
    x.requires_grad_()
    merged = vidops.token_merge(x, keys, r, size, backend=backend, **special)
    merging = min(r, (tokens - len(special)) // 2)
    assert merged.x.shape == (2, tokens - merging, 5) and merged.size.shape == (2, tokens - merging, 1)
    found = vidops.bipartite_match(keys, backend=backend, **special)
    for b in range(2):
        own = tuple(t[b] for t in found)
        flags = special.get("class_token", False), special.get("distill_token", False)
        want, sizes, groups = merged_by_hand(x[b].detach().cpu(), size[b].cpu(), own, merging, *flags)
        assert torch.allclose(merged.x[b].detach().cpu(), want, atol=1e-6)
        assert torch.allclose(merged.size[b, :, 0].cpu(), sizes, rtol=1e-6)
        assert [[n for n in range(tokens) if merged.source[b, n] == row] for row in range(len(groups))] == [
            sorted(g) for g in groups
        ]
    merged.x.sum().backward()
    assert x.grad is not None and torch.allclose(
        x.grad.sum(1).cpu(), torch.full((2, 5), float(tokens - merging)), rtol=1e-5
    )


@on_backends("scatter_tokens", gradient=True)
def test_sizes_default_to_one(backend):
    x, keys = (heads(2, 11, width, seed=width, on=backend) for width in (5, 4))
    plain = vidops.token_merge(x, keys, 4, backend=backend)
    assert equal(tuple(plain), tuple(vidops.token_merge(x, keys, 4, torch.ones_like(x[..., :1]), backend=backend)))
    assert torch.equal(plain.size.sum(1).cpu(), torch.full((2, 1), 11.0))
    # Merging what is merged: sizes add up, and the mean stays that of the original tokens.
    again = vidops.token_merge(plain.x, plain.x, 3, plain.size, backend=backend)
    place = again.source.gather(1, plain.source)
    for b, row in itertools.product(range(2), range(again.x.shape[1])):
        members = x[b, place[b] == row]
        assert again.size[b, row].item() == len(members)
        assert torch.allclose(again.x[b, row], members.mean(0), atol=1e-6)


@pytest.mark.skipif(EMULATED, reason="plain PyTorch")
def test_sizes_weigh_the_attention():
    q, k, v = (heads(1, 2, n, 4, seed=n, dtype=torch.float64) for n in (3, 5, 5))
    size = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0], dtype=torch.float64).view(1, 5, 1)
    # A token of size 3 counts as three equal tokens.
    copies = size.flatten().long()
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2)
    )
    assert torch.allclose(vidops.proportional_attention(q, k, v, size), want)
