"""CUDA segment_mean on the host shim: bit for bit the sums in index order."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import vidops


@pytest.mark.parametrize(("rows", "cols", "segments"), [(1, 1, 1), (33, 70, 5), (65, 200, 70), (130, 129, 3)])
def test_segment_mean(seeded: ModuleType, rows: int, cols: int, segments: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, cols + 3, generator=generator)[:, :cols]
    label = torch.randint(0, segments, (rows,), generator=generator)
    expected = torch.zeros(segments, cols)
    for row, k in zip(x, label, strict=True):  # in index order, in single precision
        expected[k] += row
    expected /= label.bincount(minlength=segments).clamp_min(1)[:, None].float()
    assert torch.equal(vidops.segment_mean(x, label, segments, backend="cuda"), expected)
