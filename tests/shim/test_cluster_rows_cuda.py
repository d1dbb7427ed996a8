"""The clustering of the shipped goldens with its row operators on the host shim, the others on the CPU."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vidops
from vidops.validation.case import Case

GOLDEN = Path(__file__).parents[1] / "golden" / "ssl_uvos"
ROW_OPS = ("assign_clusters", "assign_rows", "greedy_absorb", "neighbour_mean", "segment_mean")


@pytest.mark.parametrize("name", ["cluster_multilevel", "cluster_tau05", "cluster_wide_margin"])
def test_golden(shim: ModuleType, name: str) -> None:
    case = Case.load(GOLDEN / f"{name}.npz")
    q, k = (case.tensor(f"in.{axis}", torch.float32) for axis in "qk")
    tau, window = float(case.cfg("tau", 1.0)), int(case.cfg("window", 3))
    scale = case.cfg("scale", None)
    with ExitStack() as stack:
        stack.enter_context(vidops.use_backend("cpu"))
        for op in ROW_OPS:
            stack.enter_context(vidops.use_backend("cuda", op=op))
        clusters = vidops.hierarchical_cluster(q, k, tau, window, scale=scale)
        rows = vidops.attention_head_mean(q.transpose(0, 1).flatten(1, 2), k.transpose(0, 1).flatten(1, 2), scale=scale)
        whole = vidops.hierarchical_cluster_map(rows.view(*q.shape[:1], q.shape[2], -1), tau, window)
    expected = torch.from_numpy(case.arrays["out.labels"]).flatten()
    assert torch.equal(clusters.labels.flatten(), expected)
    assert torch.equal(whole.labels.flatten(), expected)
