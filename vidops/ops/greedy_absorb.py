"""Hub of `vidops.greedy_absorb`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vidops import _native, bits
from vidops._registry import Impl, Op, resolve
from vidops.ops import _backends
from vidops.reference.greedy_absorb import greedy_absorb as reference


class Absorption(NamedTuple):
    """Result of a greedy absorption of n rows.

    `owner` (n,) int64 is the row index of each row's leader, `label` (n,) int64 the leader's rank among the
    leaders, `count` () int64 their number, on the device of the rows: reading it is the only host sync.
    """

    owner: torch.Tensor
    label: torch.Tensor
    count: torch.Tensor  # pyright: ignore[reportIncompatibleMethodOverride] - nobody counts in this tuple


def greedy_absorb(adjacency: torch.Tensor, *, backend: str | None = None) -> Absorption:
    """Greedy absorption: the lexicographically first maximal independent set, and who absorbed whom.

    Rows are visited in index order. A row already absorbed is skipped; otherwise it leads and absorbs every row
    j not yet absorbed with ``A[i, j]``, itself always included (sheet 2.6, Eq. E5; Ding et al., ECCV 2024,
    arXiv 2311.17893). Row i of the relation is read, never column i. Runs on the device without a host sync.

    Args:
        adjacency: bit rows (n, ceil(n/64)) int64 (`symmetric_kl_adjacency`, `pack_adjacency`); bits beyond n must
            be zero. Need be neither symmetric nor reflexive.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; default: the first that can run.

    Returns:
        `Absorption(owner, label, count)`. Leaders are the rows with ``owner == arange(n)``.

    Raises:
        TypeError: not int64 bit rows. ValueError: wrong shape.
        BackendError: no backend, or not the one asked for, can run the call.

    Backends: reference, cpu, triton, cuda.

    >>> import torch, vidops
    >>> chain = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    >>> vidops.greedy_absorb(vidops.pack_adjacency(chain)).owner.tolist()
    [0, 0, 2]
    """
    bits.check_adjacency("adjacency", adjacency)
    return Absorption(*OP.call(adjacency, resolve(OP, backend, adjacency)))


def fake_absorption(rows: Any) -> Any:
    """Uninitialised outputs for an absorption of the rows of `rows`."""
    n = rows.shape[0]
    return tuple(rows.new_empty(shape, dtype=torch.int64) for shape in ((n,), (n,), ()))


def _fake(adjacency: Any, backend: str) -> Any:
    return fake_absorption(adjacency)


def _cpu_forward(adjacency: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = fake_absorption(adjacency)
    _native.C.greedy_absorb_forward_cpu(*(_native.view(t) for t in (adjacency, *out)), _native.threads())
    return out


def _triton_forward(*args: Any) -> Any:
    from vidops.kernels import greedy_absorb as kernel

    return kernel.forward(*args)


def _cuda_forward(adjacency: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = fake_absorption(adjacency)
    workspace = adjacency.new_empty(_native.C.greedy_absorb_workspace_cuda(adjacency.shape[0]))
    views = [_native.view(t) for t in (adjacency, *out, workspace)]
    _native.C.greedy_absorb_forward_cuda(*views, *_native.stream(adjacency))
    return out


OP = Op(
    "greedy_absorb",
    schema="(Tensor adjacency, str backend) -> (Tensor owner, Tensor label, Tensor count)",
    fake=_fake,
    autocast_fp32=False,
    impls=(
        Impl("reference", reference, None, _backends.reference_refuses),
        Impl("cpu", _cpu_forward, None, _backends.cpu_refuses),
        Impl("triton", _triton_forward, None, _backends.triton_refuses),
        Impl("cuda", _cuda_forward, None, _backends.cuda_refuses),
    ),
)
