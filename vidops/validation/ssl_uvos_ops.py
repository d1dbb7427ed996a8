"""Golden kinds of ssl_uvos that check ops: kl_distance, greedy_absorb, cluster."""

from __future__ import annotations

import numpy as np
import torch

import vidops
from vidops.validation.case import Case, Check, device_of, dtypes, mismatches, relative_error, tag_of

LIMIT = {torch.float32: 1e-4, torch.float64: 1e-9}


def _relative(got: torch.Tensor, expected: np.ndarray) -> float:
    return relative_error(got, torch.from_numpy(expected))


def _differs(got: torch.Tensor, expected: np.ndarray) -> float:
    return mismatches(got.cpu().numpy(), expected)


def check_kl_distance(case: Case, backend: str) -> list[Check]:
    pairs = {"PQ": ("P", "Q"), "PP": ("P", None), "UQ": ("P_unnormalised", "Q")}
    checks = []
    for dtype in dtypes(backend):
        for out, (p, q) in pairs.items():
            if f"out.{out}" not in case.arrays:
                continue
            rows = case.tensor(f"in.{p}", dtype).to(device_of(backend))
            columns = None if q is None else case.tensor(f"in.{q}", dtype).to(device_of(backend))
            distance = vidops.symmetric_kl(rows, columns, backend=backend)
            checks.append(Check(f"{out} {tag_of(dtype)}", _relative(distance, case.arrays[f"out.{out}"]), LIMIT[dtype]))
    return checks


def check_greedy_absorb(case: Case, backend: str) -> list[Check]:
    device = device_of(backend)
    tau = float(case.cfg("tau", 1.0))
    graphs = [name.split(".")[1] for name in case.arrays if name.startswith("in.") and name.endswith(".D")]
    checks = []
    for graph in graphs:
        distance = torch.from_numpy(case.arrays[f"in.{graph}.D"])
        adjacency = vidops.pack_adjacency(distance <= tau).to(device)
        found = vidops.greedy_absorb(adjacency, backend=backend)
        leaders = torch.unique(found.owner.cpu())
        checks.append(Check(f"{graph} owner", _differs(found.owner, case.arrays[f"out.{graph}.owner"]), 0.0))
        checks.append(Check(f"{graph} leaders", _differs(leaders, case.arrays[f"out.{graph}.leaders"]), 0.0))
        for dtype in dtypes(backend):
            x = case.tensor(f"in.{graph}.X", dtype).to(device)
            means = vidops.segment_mean(x, found.label, int(found.count), backend=backend)
            error = _relative(means, case.arrays[f"out.{graph}.means"])
            checks.append(Check(f"{graph} means {tag_of(dtype)}", error, LIMIT[dtype]))
    return checks


def check_cluster(case: Case, backend: str) -> list[Check]:
    checks = []
    for dtype in dtypes(backend):
        for precision in ("filtered", "exact"):
            checks += _check_cluster(case, backend, dtype, precision)
    return checks


def _check_cluster(case: Case, backend: str, dtype: torch.dtype, precision: str) -> list[Check]:
    arrays, device, limit = case.arrays, device_of(backend), LIMIT[dtype]
    q, k = (case.tensor(name, dtype).to(device) for name in ("in.q", "in.k"))
    tau, window = float(case.cfg("tau", 1.0)), int(case.cfg("window", 3))
    scale = case.cfg("scale", None)
    tag = f"{tag_of(dtype)} {precision}"
    checks = []

    def value(name: str, got: torch.Tensor) -> None:
        # Files keep either the float64 result or, to stay small, the float32 one.
        if f"out.{name}" in arrays:
            checks.append(Check(f"{name} {tag}", _relative(got, arrays[f"out.{name}"]), limit))
        elif f"out.{name}_f32" in arrays:
            checks.append(Check(f"{name} {tag}", _relative(got, arrays[f"out.{name}_f32"]), LIMIT[torch.float32]))

    def exact(name: str, got: torch.Tensor) -> None:
        if f"out.{name}" in arrays:
            checks.append(Check(f"{name} {tag}", _differs(got, arrays[f"out.{name}"]), 0.0))

    keys = k.transpose(0, 1).flatten(1, 2)
    p, log_p = vidops.attention_head_mean(
        q.transpose(0, 1).flatten(1, 2), keys, scale=scale, return_log=True, backend=backend
    )
    value("attn", p)
    rows = window * q.shape[2]
    means = []
    for start in range(0, p.shape[0], rows):
        part, log_part = p[start : start + rows], log_p[start : start + rows]
        adjacency = vidops.symmetric_kl_adjacency(part, tau, log_p=log_part, precision=precision, backend=backend)
        means.append(vidops.neighbour_mean(adjacency, part, backend=backend))
        if start == 0:
            value("window0_distance", vidops.symmetric_kl(part, log_p=log_part, backend=backend))
            value("window0_distance2", vidops.symmetric_kl(means[0], backend=backend))
            bits = np.packbits(vidops.unpack_adjacency(adjacency.cpu()).numpy(), axis=1)
            exact("window0_adjacency", torch.from_numpy(bits))
    value("neighbour_mean", torch.cat(means))

    clusters, details = vidops.hierarchical_cluster(
        q, k, tau, window, scale=scale, precision=precision, backend=backend, return_details=True
    )
    exact("labels", clusters.labels.flatten())
    exact("first_hierarchy_owner", details.first_owner)
    exact("level_sizes", torch.tensor(details.level_sizes))
    exact("num_clusters", torch.tensor(clusters.centroids.shape[0]))
    value("centroids", clusters.centroids)
    value("first_hierarchy_sets", details.levels[0])
    for number, level in enumerate(details.levels, start=1):
        value(f"level{number}", level)
    value("distance_final", vidops.symmetric_kl(clusters.centroids, p, log_q=log_p, backend=backend))
    whole = vidops.hierarchical_cluster_map(
        p.view(q.shape[0], q.shape[2], -1), tau, window, precision=precision, backend=backend
    )
    exact("labels", whole.labels.flatten())
    return checks
