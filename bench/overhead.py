"""What calling an op costs beyond bare torch ops of the same schema.

Two of them: one runs the same backend function, so that what remains are the checks, the choice of a backend and the
registry; the other only allocates its outputs, so that crossing into native code and computing count as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.library import Library

import vidops
from vidops._registry import OPS

_BARE = Library("vidops_bare", "DEF")
Call = Callable[..., object]


class Calls(NamedTuple):
    """The public call, and the two bare ops with the arguments that it hands to its own torch op."""

    ours: Call
    same_work: Call
    empty: Call


def _bare(name: str, kind: str, kernel: Call) -> Call:
    if not hasattr(torch.ops.vidops_bare, f"{name}_{kind}"):
        _BARE.define(f"{name}_{kind}{OPS[name].schema}")
        _BARE.impl(f"{name}_{kind}", kernel, "CPU")
    return getattr(torch.ops.vidops_bare, f"{name}_{kind}").default


def _calls(name: str, ours: Call, arguments: Callable[[], tuple[object, ...]]) -> Calls:
    op = OPS[name]
    forward = op.rows["cpu"].forward
    same_work = _bare(name, "same_work", lambda *given: forward(*given[:-1]))
    empty = _bare(name, "empty", op.fake)
    return Calls(ours, lambda: same_work(*arguments(), "cpu"), lambda: empty(*arguments(), "cpu"))


def calls() -> dict[str, Calls]:
    """By op, on inputs so small that computing is next to nothing; to be timed under `torch.inference_mode`.

    `assign_clusters` and `assign_rows` also take the logarithm of the centroids: work, so the bare ops get it too.
    """
    q = torch.rand(1, 4, 8)
    p = torch.full((4, 4), 0.25)
    log_p = p.log()
    adjacency = vidops.pack_adjacency(torch.eye(4, dtype=torch.bool))
    label = torch.zeros(4, dtype=torch.int64)
    frame, context, soft = torch.rand(4, 8), torch.rand(1, 4, 8), torch.rand(1, 4, 2)
    many, lse, maps, log_maps = q[None], torch.zeros(1, 4), p[None], log_p[None]
    tiny = torch.finfo(p.dtype).tiny
    f = vidops
    table: dict[str, tuple[Call, Callable[[], tuple[object, ...]]]] = {
        "attention_head_mean": (
            lambda: f.attention_head_mean(many, many, scale=1.0),
            lambda: (many, many, 1.0, 0.0, 0, False),
        ),
        "video_attention": (
            lambda: f.video_attention(many, many, many, scale=1.0, need="map"),
            lambda: (many, many, many, 1.0, 0.0, 0, True),
        ),
        "symmetric_kl": (
            lambda: f.symmetric_kl(maps, log_p=log_maps),
            lambda: (maps, log_maps, maps, log_maps, True),
        ),
        "symmetric_kl_adjacency": (
            lambda: f.symmetric_kl_adjacency(p, 1.0, log_p=log_p),
            lambda: (p, log_p, 1.0, True),
        ),
        "neighbour_mean": (lambda: f.neighbour_mean(adjacency, p), lambda: (adjacency, p)),
        "greedy_absorb": (lambda: f.greedy_absorb(adjacency), lambda: (adjacency,)),
        "greedy_absorb_kl": (lambda: f.greedy_absorb_kl(p, 1.0, log_p=log_p), lambda: (p, log_p, 1.0)),
        "segment_mean": (lambda: f.segment_mean(p, label, 1), lambda: (p, label, 1)),
        "assign_clusters": (
            lambda: f.assign_clusters(q, q, p, scale=1.0, lse=lse),
            lambda: (q, q, lse, p, p.clamp_min(tiny).log(), 1.0),
        ),
        "assign_rows": (
            lambda: f.assign_rows(p, p, log_p=log_p),
            lambda: (p, log_p, p, p.clamp_min(tiny).log()),
        ),
        "label_propagation": (
            lambda: f.label_propagation(frame, context, soft, (2, 2), top_k=1),
            lambda: (frame, context, soft, 2, 2, 7.0, 1, 0.2, 1, 0),
        ),
    }
    return {name: _calls(name, ours, arguments) for name, (ours, arguments) in table.items()}
