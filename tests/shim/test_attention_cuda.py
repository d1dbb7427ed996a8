"""CUDA attention_head_mean and video_attention on the host shim, against the reference in float64.

Limits are those of the contract suite: twice the error of the plain PyTorch form in the same dtype, plus a floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch

import vidops
from vidops.reference.dropout import dropout_factor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRADIENT_FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # one rounding of what is stored
# Around the edges of 64- and 128-wide tiles and of 16-, 48- and 64-wide heads; 80 channels are streamed in two parts.
# From 49 channels on the map has tiles of 128 by 256, several for each block of the shim, and rows of four or of single
# floats.
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 3, 33, 65, 5),
    (2, 2, 64, 63, 16),
    (1, 8, 17, 130, 48),
    (1, 1, 129, 127, 32),
    (1, 1, 70, 200, 64),
    (1, 2, 20, 70, 80),
    (2, 3, 129, 300, 64),
    (1, 2, 260, 385, 50),
    (1, 2, 130, 259, 130),
]
# Rows of the map's gradient that vector copies can take, in several tiles each way; more heads than a block sums up.
VIDEO_SHAPES = [SHAPES[1], SHAPES[4], SHAPES[6], (1, 2, 130, 140, 64), (2, 10, 5, 24, 8)]
FEW_SEEDS = (1, 4, 103)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(dtype)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def close(found: torch.Tensor, same: torch.Tensor, exact: torch.Tensor, floor: float = 1e-6) -> None:
    assert torch.isfinite(exact).all() and exact.abs().max() > 0
    assert error(found, exact) <= 2 * error(same, exact) + floor, (error(found, exact), error(same, exact))


def compare(run, dtype: torch.dtype, floors: Sequence[float]) -> None:
    """`run(backend, dtype)` in the kernel's dtype, in the reference's and in float64."""
    results = run("cuda", dtype), run("reference", dtype), run("reference", torch.float64)
    for found, same, exact, floor in zip(*results, floors, strict=True):
        close(found, same, exact, floor)


def head_mean(q: torch.Tensor, k: torch.Tensor, grad: torch.Tensor):
    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_(True) for t in (q, k)]
        p, log_p, lse = vidops.attention_head_mean(*leaves, return_log=True, return_lse=True, backend=backend)
        ((p * grad.to(p.dtype)).sum() + log_p.sum() / k.shape[-2]).backward()
        gradients = [leaf.grad for leaf in leaves] if k.shape[-2] > 1 else []  # zero with a single key
        return [p.detach(), log_p.detach().exp(), lse, *gradients]

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_head_mean(shim: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, n, m, d = shape
    q, k = tensor(batch, heads, n, d, dtype=dtype), tensor(batch, heads, m, d, dtype=dtype, seed=1)
    floors = [1e-6] * 3 + [GRADIENT_FLOOR[dtype]] * (2 if m > 1 else 0)
    shim.set_seed(FEW_SEEDS[sum(shape) % 3])
    compare(head_mean(q, k, tensor(batch, n, m, seed=2)), dtype, floors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [24, 64, 80])
def test_head_mean_schedules(seeded: ModuleType, channels: int, dtype: torch.dtype) -> None:
    q, k = tensor(1, 2, 20, channels, dtype=dtype), tensor(1, 2, 135, channels, dtype=dtype, seed=1)
    compare(head_mean(q, k, tensor(1, 20, 135, seed=2)), dtype, [1e-6] * 3 + [GRADIENT_FLOOR[dtype]] * 2)


@pytest.mark.parametrize("channels", [64, 80])
def test_many_steps(seeded: ModuleType, channels: int) -> None:
    """Warpgroups that run half a step apart go around their stages many times, over several tiles of the map."""
    q, k = tensor(1, 3, 257, channels), tensor(1, 3, 900, channels, seed=1)
    p, log_p, lse = vidops.attention_head_mean(q, k, return_log=True, return_lse=True, backend="cuda")
    same = vidops.attention_head_mean(q, k, return_log=True, return_lse=True, backend="reference")
    exact = vidops.attention_head_mean(q.double(), k.double(), return_log=True, return_lse=True, backend="reference")
    for found, own, right in zip((p, log_p, lse), same, exact, strict=True):
        close(found, own, right)


def test_wide_heads(shim: ModuleType) -> None:
    shim.set_seed(4)
    q, k = tensor(1, 1, 5, 256), tensor(1, 1, 70, 256, seed=1)
    compare(head_mean(q, k, tensor(1, 5, 70, seed=2)), torch.float32, [1e-6] * 3 + [2e-6] * 2)


@pytest.mark.parametrize("channels", [8, 64, 128])
def test_split_keys(shim: ModuleType, channels: int) -> None:
    """With few query tiles every block sees a part of the keys only; one part has one key."""
    shim.set_seed(2)
    q, k = tensor(1, 1, 3, channels), tensor(1, 1, 385, channels, seed=1)
    k[0, 0, 384] *= 9
    compare(head_mean(q, k, tensor(1, 3, 385, seed=2)), torch.float32, [1e-6] * 3 + [2e-6] * 2)


@pytest.mark.parametrize("size_q,size_k", [(1e-20, 1e20), (1e4, 1e-3), (1e-30, 1.0)])
def test_range_of_float32(shim: ModuleType, size_q: float, size_k: float) -> None:
    """Far outside float16, and a row a thousand times smaller than its head's largest."""
    shim.set_seed(3)
    q, k = tensor(1, 2, 10, 16, size=size_q), tensor(1, 2, 40, 16, seed=1, size=size_k)
    k[:, 0, ::2] *= 1e-3
    p, own, exact = (
        vidops.attention_head_mean(*t, backend=b)
        for t, b in (((q, k), "cuda"), ((q, k), "reference"), ((q.double(), k.double()), "reference"))
    )
    close(p, own, exact)


def test_strides(shim: ModuleType) -> None:
    """Halves at addresses that no vector load could take, a broadcast head, a negative scale."""
    shim.set_seed(4)
    for dtype in DTYPES:
        base = tensor(2, 30, 3, 41, dtype=dtype)
        q, k = base.transpose(1, 2)[..., 1:22], tensor(2, 1, 50, 21, dtype=dtype, seed=1).expand(2, 3, 50, 21)
        strided = vidops.attention_head_mean(q, k, scale=-0.3, backend="cuda")
        assert torch.equal(
            strided, vidops.attention_head_mean(q.contiguous(), k.contiguous(), scale=-0.3, backend="cuda")
        )
        exact = vidops.attention_head_mean(q.double(), k.double(), scale=-0.3, backend="reference")
        assert error(strided, exact) <= 2e-6


def test_empty(shim: ModuleType) -> None:
    for n, batch in ((0, 2), (5, 0)):
        q, k = torch.ones(batch, 2, n, 4, requires_grad=True), torch.ones(batch, 2, 3, 4, requires_grad=True)
        p = vidops.attention_head_mean(q, k, backend="cuda")
        out, weights = vidops.video_attention(q, k, k, need="map", backend="cuda")
        assert p.shape == weights.shape == (batch, n, 3) and out.shape == q.shape
        (p.sum() + out.sum() + weights.sum()).backward()
        assert k.grad is not None and torch.equal(k.grad, torch.zeros_like(k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 64])
def test_no_log_of_zero(shim: ModuleType, channels: int, dtype: torch.dtype) -> None:
    """Some sums of the tile underflow, some do not; the head that matters changes from key to key."""
    shim.set_seed(1)
    q, k = torch.zeros(2, 2, 140, channels)
    q[:, :40, 0] = 200.0
    k[..., :1] = tensor(2, 140, 1, seed=3)
    k[:, 0, 0] = 2.0
    q = q[:, :40]
    q, k = q.to(dtype), k.to(dtype)
    p, log_p = vidops.attention_head_mean(q, k, scale=1.0, return_log=True, backend="cuda")
    exact = vidops.attention_head_mean(q.double(), k.double(), scale=1.0, return_log=True, backend="reference")
    assert exact[1].min() < -400 and (exact[0] > 1e-30).any() and (p == 0).any()
    assert torch.isfinite(log_p).all()
    assert torch.allclose(log_p.double(), exact[1], rtol=1e-6, atol=1e-4)
    assert torch.allclose(p.double(), exact[0], rtol=1e-4, atol=1e-37)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [8, 64])
def test_non_finite(shim: ModuleType, channels: int, dtype: torch.dtype, bad: float) -> None:
    shim.set_seed(1)
    q, k = tensor(2, 2, 20, channels, dtype=dtype), tensor(2, 2, 30, channels, dtype=dtype, seed=1)
    clean = vidops.attention_head_mean(q, k, backend="cuda")
    spoiled = q.clone()
    spoiled[0, 1, 3, 5] = bad
    p = vidops.attention_head_mean(spoiled, k, backend="cuda")
    assert p[0, 3].isnan().all()
    p[0, 3] = clean[0, 3]
    assert torch.equal(p, clean)
    spoiled = k.clone()
    spoiled[0, 1, 3, 5] = bad
    p, log_p = vidops.attention_head_mean(q, spoiled, return_log=True, backend="cuda")
    assert p[0].isnan().all() and log_p[0].isnan().all() and torch.equal(p[1], clean[1])


def video(operands: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], dropout_p: float, need: str):
    def run(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_(True) for t in operands]
        found = vidops.video_attention(*leaves, dropout_p=dropout_p, seed=2**40 + 7, need=need, backend=backend)
        out, *weights = found if isinstance(found, tuple) else (found,)
        total = (out * grads[0].to(out.dtype)).to(torch.float64).sum()
        for w in weights:
            total = total + (w * grads[1].to(w.dtype)).sum()
        total.backward()
        return [out.detach(), *(w.detach() for w in weights), *(leaf.grad for leaf in leaves)]

    return run


@pytest.mark.parametrize("dropout_p,need", [(0.0, "map"), (0.4, "none"), (0.4, "map")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", VIDEO_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_video(shim: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, dropout_p: float, need: str) -> None:
    shim.set_seed(FEW_SEEDS[sum(shape) % 3])
    batch, heads, n, m, d = shape
    operands = [tensor(batch, heads, rows, d, dtype=dtype, seed=i) for i, rows in enumerate((n, m, m))]
    grads = tensor(batch, heads, n, d, seed=4), tensor(batch, n, m, seed=5)
    floor = GRADIENT_FLOOR[dtype]
    compare(video(operands, grads, dropout_p, need), dtype, [floor, *[1e-6] * (need == "map"), floor, floor, floor])


@pytest.mark.parametrize("dtype", DTYPES)
def test_video_schedules(seeded: ModuleType, dtype: torch.dtype) -> None:
    operands = [tensor(1, 2, rows, 24, dtype=dtype, seed=i) for i, rows in enumerate((20, 70, 70))]
    grads = tensor(1, 2, 20, 24, seed=4), tensor(1, 20, 70, seed=5)
    floor = GRADIENT_FLOOR[dtype]
    compare(video(operands, grads, 0.4, "map"), dtype, [floor, 1e-6, floor, floor, floor])


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_gradients_of_any_size(shim: ModuleType, size: float) -> None:
    """The weights' gradients are scaled into float16's range by what a row, or a head, really holds."""
    shim.set_seed(4)
    for dtype in (torch.float32, torch.bfloat16):
        operands = [tensor(1, 2, rows, 16, dtype=dtype, seed=i) for i, rows in enumerate((20, 70, 70))]
        grads = tensor(1, 2, 20, 16, seed=4, size=size), tensor(1, 20, 70, seed=5, size=size)
        floor = GRADIENT_FLOOR[dtype]
        compare(video(operands, grads, 0.0, "map"), dtype, [floor, 1e-6, floor, floor, floor])


@pytest.mark.parametrize("seed", [0, 2**40 + 7, 2**63 - 1])
@pytest.mark.parametrize("dropout_p", [0.1, 0.4, 0.99])
def test_dropout_mask(shim: ModuleType, dropout_p: float, seed: int) -> None:
    """Bit for bit the reference's mask: the map of one head is zero exactly where it is."""
    shim.set_seed(1)
    q, k = tensor(3, 1, 30, 8), tensor(3, 1, 150, 8, seed=1)
    _, weights = vidops.video_attention(q, k, k, dropout_p=dropout_p, seed=seed, need="map", backend="cuda")
    mask = dropout_factor((3, 1, 30, 150), dropout_p, seed, torch.float32, q.device)[:, 0]
    assert torch.equal(weights != 0, mask != 0)
    plain = vidops.attention_head_mean(q, k, backend="cuda")
    assert torch.allclose(weights, plain * mask, rtol=1e-6, atol=0)


def test_mask_feeds_output_and_map(shim: ModuleType) -> None:
    """With the identity as values the output of a head is its weights."""
    shim.set_seed(2)
    q, k = tensor(1, 1, 20, 64), tensor(1, 1, 64, 64, seed=1)
    out, weights = vidops.video_attention(
        q, k, torch.eye(64)[None, None], dropout_p=0.4, seed=9, need="map", backend="cuda"
    )
    assert torch.allclose(out[:, 0], weights, rtol=2e-6, atol=1e-9) and torch.equal(out[:, 0] == 0, weights == 0)


def test_dropout_has_no_logarithm(shim: ModuleType) -> None:
    q = tensor(1, 1, 4, 8)
    with pytest.raises(shim.ArgumentError, match="no logarithm"):
        torch.ops.vidops.attention_head_mean(q, q, 0.3, 0.4, 1, True, "cuda")
    p, log_p, _ = torch.ops.vidops.attention_head_mean(q, q, 0.3, 0.4, 1, False, "cuda")
    expected = torch.ops.vidops.attention_head_mean(q, q, 0.3, 0.4, 1, False, "reference")[0]
    assert torch.allclose(p, expected, atol=1e-6) and log_p.numel() == 0


def test_repeatable(shim: ModuleType) -> None:
    q, k = tensor(1, 3, 70, 16), tensor(1, 3, 140, 16, seed=1)
    runs = []
    for seed in (0, 3, 102):
        shim.set_seed(seed)
        leaves = [q.clone().requires_grad_(True), k.clone().requires_grad_(True)]
        out, weights = vidops.video_attention(*leaves, leaves[1], need="map", backend="cuda")
        (out.square().sum() + weights.square().sum()).backward()
        runs.append((out.detach(), weights.detach(), *(leaf.grad for leaf in leaves)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_float64_is_refused(shim: ModuleType) -> None:
    with pytest.raises(vidops.BackendError, match="float64 is not implemented in CUDA"):
        vidops.attention_head_mean(torch.ones(1, 2, 3).double(), torch.ones(1, 2, 3).double(), backend="cuda")
