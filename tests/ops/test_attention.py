"""Forward and gradients of the attention ops against float64, on every backend this process covers."""

import pytest
import torch
from matrix import BACKENDS, close, device_for, heads, on_backends, skip_dtype

import vidops

SIZES = [(1, 1, 1, 1, 1), (1, 3, 33, 65, 5), (2, 2, 64, 63, 16), (1, 8, 17, 130, 48)]
# One rounding of a gradient that is stored in half precision.
STORED = {torch.bfloat16: 1e-2, torch.float16: 1e-3}


@on_backends("attention_head_mean")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b,h,n,m,d", SIZES)
def test_head_mean_forward(backend, dtype, b, h, n, m, d):
    skip_dtype(backend, dtype)
    q, k = heads(b, h, n, d, dtype=dtype, on=backend), heads(b, h, m, d, dtype=dtype, seed=1, on=backend)

    def run(name, cast):
        return vidops.attention_head_mean(q.to(cast), k.to(cast), return_log=True, return_lse=True, backend=name)

    exact, same = run("reference", torch.float64), run("reference", dtype)
    got = run(backend, dtype)
    close(got[0], same[0], exact[0])
    for index in (1, 2):  # logarithms, whose absolute error is the relative error of what they stand for
        own = (same[index].double() - exact[index]).abs().max()
        assert (got[index].double() - exact[index]).abs().max() <= 1e-5 + 2 * own
    assert {t.dtype for t in got} == {torch.float64 if dtype == torch.float64 else torch.float32}


@on_backends("attention_head_mean", gradient=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b,h,n,m,d", SIZES)
def test_head_mean_gradient(backend, dtype, b, h, n, m, d):
    skip_dtype(backend, dtype)
    q, k = heads(b, h, n, d, dtype=dtype, on=backend), heads(b, h, m, d, dtype=dtype, seed=1, on=backend)
    grad = heads(b, n, m, seed=2, dtype=torch.float64, on=backend)

    def run(name, cast):
        leaf_q, leaf_k = (t.to(cast).requires_grad_(True) for t in (q, k))
        p, log_p = vidops.attention_head_mean(leaf_q, leaf_k, return_log=True, backend=name)
        ((p * grad.to(p.dtype)).sum() + log_p.sum() / m).backward()
        return leaf_q.grad, leaf_k.grad

    exact, same, got = run("reference", torch.float64), run("reference", dtype), run(backend, dtype)
    if m > 1:  # with one key the gradients are mathematically zero
        for index in (0, 1):
            close(got[index], same[index], exact[index], STORED.get(dtype, 1e-5))
    assert got[0].dtype == got[1].dtype == dtype


@on_backends("video_attention", gradient=True)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("need", ["none", "map", "keys"])
def test_video_attention(backend, dropout_p, need):
    q, k, v = (heads(1, 3, n, 16, seed=i, on=backend) for i, n in enumerate((33, 40, 40)))
    weight = heads(1, 3, 33, 16, seed=5, on=backend)

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
        close(got, own, want, 2e-6)


@on_backends("attention_head_mean")
def test_empty_sizes(backend):
    def ones(*shape):
        return torch.ones(*shape, device=device_for(backend))

    assert vidops.attention_head_mean(ones(2, 0, 4), ones(2, 3, 4), backend=backend).shape == (0, 3)
    assert vidops.attention_head_mean(ones(0, 2, 5, 4), ones(0, 2, 3, 4), backend=backend).shape == (0, 5, 3)


@on_backends("attention_head_mean")
def test_two_leading_axes(backend):
    q, k = heads(2, 3, 2, 5, 8, on=backend), heads(2, 3, 2, 7, 8, seed=1, on=backend)
    p = vidops.attention_head_mean(q, k, backend=backend)
    assert p.shape == (2, 3, 5, 7)
    one = vidops.attention_head_mean(q[1, 2], k[1, 2], backend=backend)
    assert torch.allclose(p[1, 2], one)  # a BLAS may split its sums otherwise


@on_backends("attention_head_mean")
def test_no_log_of_zero(backend):
    q = torch.tensor([[[200.0]], [[200.0]]], device=device_for(backend))
    k = torch.tensor([[[1.0], [-1.0]], [[1.0], [-1.0]]], device=device_for(backend))
    p, log_p = vidops.attention_head_mean(q, k, scale=1.0, return_log=True, backend=backend)
    assert p[0, 1] == 0 and torch.allclose(log_p[0, 1].cpu(), torch.tensor(-400.0))


@on_backends("attention_head_mean")
def test_a_nan_query_spoils_its_row_and_a_nan_key_every_row(backend):
    q, k = heads(2, 6, 4, on=backend), heads(2, 9, 4, seed=1, on=backend)
    q[1, 3, 0] = torch.nan
    p = vidops.attention_head_mean(q, k, backend=backend)
    assert p.isnan().all(1).nonzero().flatten().tolist() == [3] and not p[[0, 1, 2, 4, 5]].isnan().any()
    k[0, 2, 1] = torch.nan
    assert vidops.attention_head_mean(heads(2, 6, 4, on=backend), k, backend=backend).isnan().all()


@pytest.mark.skipif("cuda" not in BACKENDS, reason="the cuda backend does not run in this process")
def test_cuda_refuses_float64():
    q = heads(2, 3, 4, dtype=torch.float64, on="cuda")
    with pytest.raises(vidops.BackendError, match="float64"):
        vidops.attention_head_mean(q, q, backend="cuda")
