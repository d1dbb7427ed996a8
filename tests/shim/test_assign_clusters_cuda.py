"""CUDA assign_clusters on the host shim: the labels that assign_rows gives on the map in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch.utils.dlpack import to_dlpack

import vidops

# Where every schedule would be slow.
FEW = pytest.mark.parametrize("seed", [0, 101, 104], ids=lambda seed: f"seed{seed}")


def heads(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, tolerance: float = 1e-5) -> torch.Tensor:
    p, log_p, lse = vidops.attention_head_mean(
        q.double(), k.double(), return_log=True, return_lse=True, backend="reference"
    )
    distance = vidops.symmetric_kl(p, x.double(), log_p=log_p, log_q=x.double().log(), backend="reference")
    labels = vidops.assign_clusters(q, k, x, backend="cuda")
    given = vidops.assign_clusters(q, k, x, lse=lse.float(), backend="cuda")
    for found in (labels, given):
        excess = distance.gather(1, found[:, None])[:, 0] - distance.amin(1)
        assert float(excess.max()) <= tolerance
    return labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("h", "n", "m", "d", "clusters"), [(1, 1, 1, 1, 1), (3, 33, 65, 5, 4), (2, 40, 130, 48, 9)])
@FEW
def test_sizes(shim: ModuleType, seed: int, h: int, n: int, m: int, d: int, clusters: int, dtype: torch.dtype) -> None:
    shim.set_seed(seed)
    q, k = heads(h, n, d, seed=0, dtype=dtype), heads(h, m, d, seed=1, dtype=dtype)
    x = vidops.attention_head_mean(heads(h, clusters, d, seed=2, dtype=dtype), k, backend="reference")
    check(q, k, x)


def test_own_rows_are_found(seeded: ModuleType) -> None:
    q, k = heads(2, 30, 16, seed=0) * 2, heads(2, 50, 16, seed=1)
    rows = vidops.attention_head_mean(q, k, backend="reference")
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    assert torch.equal(order[check(q, k, rows[order])], torch.arange(30))


def test_strided_queries_and_sums(shim: ModuleType) -> None:
    q = heads(30, 3, 40, seed=0).transpose(0, 1)[..., 4:20]
    k = heads(50, 3, 16, seed=1).transpose(0, 1)
    p, lse = vidops.attention_head_mean(q, k, return_lse=True, backend="reference")
    wide = torch.full((3, 60), torch.nan)
    wide[:, ::2] = lse
    x = p[::7].contiguous()
    want = vidops.assign_rows(p, x, backend="reference")
    assert torch.equal(vidops.assign_clusters(q, k, x, backend="cuda"), want)
    assert torch.equal(vidops.assign_clusters(q, k, x, lse=wide[:, ::2], backend="cuda"), want)


def test_vanishing_weights(shim: ModuleType) -> None:
    """Logits far apart: the logarithm of a weight that is zero in single precision still counts."""
    q, k = heads(2, 20, 8, seed=0) * 12, heads(2, 40, 8, seed=1) * 12
    p = vidops.attention_head_mean(q.double(), k.double(), backend="reference")
    assert float(p.min()) < 1e-45
    x = vidops.attention_head_mean(heads(2, 6, 8, seed=2), k, backend="reference")
    check(q, k, x, tolerance=1e-3)  # distances of hundreds


def test_not_a_number(seeded: ModuleType) -> None:
    q, k = heads(2, 12, 16, seed=0), heads(2, 20, 16, seed=1)
    x = vidops.attention_head_mean(heads(2, 4, 16, seed=2), k, backend="reference")
    want = vidops.assign_clusters(q, k, x[[1, 3]], backend="reference")
    q[1, 5, 3] = torch.nan
    x[0, 2] = x[2] = torch.nan
    expected = torch.tensor([1, 3])[want]
    expected[5] = 0
    assert torch.equal(vidops.assign_clusters(q, k, x, backend="cuda"), expected)


@pytest.mark.parametrize("pass_rows", [1, 7, 1000])
@pytest.mark.parametrize("with_lse", [False, True])
def test_queries_in_several_passes(shim: ModuleType, with_lse: bool, pass_rows: int) -> None:
    q, k = heads(2, 11, 8, seed=0), heads(2, 30, 8, seed=1)
    p, lse = vidops.attention_head_mean(q, k, return_lse=True, backend="reference")
    x = p[[8, 2, 5]].contiguous()
    label = torch.full((11,), -1)
    words = shim.assign_clusters_workspace_cuda(2, 11, 8, 30, 3, True, pass_rows)
    tensors = (q, k, lse if with_lse else lse.new_empty(0), x, x.log(), label, torch.full((words,), -1))
    shim.assign_clusters_forward_cuda(*map(to_dlpack, tensors), 8**-0.5, pass_rows, 0, 0)
    assert torch.equal(label, vidops.assign_rows(p, x, backend="reference"))


def test_no_query(shim: ModuleType) -> None:
    q, k = torch.ones(2, 0, 4), torch.ones(2, 3, 4)
    assert vidops.assign_clusters(q, k, torch.ones(2, 3), backend="cuda").shape == (0,)
