"""Fused operations for video understanding. Importing this needs torch, and neither a GPU nor triton nor cupy."""

from pathlib import Path as _Path

from vidops import _checkout

_checkout.map_sibling_packages(__name__, _Path(__file__).resolve().parent)

from vidops._registry import BACKENDS, BackendError, Explanation, explain, use_backend  # noqa: E402
from vidops._report import backends  # noqa: E402
from vidops.bits import pack_adjacency, unpack_adjacency  # noqa: E402
from vidops.ops._slot_params import SlotParams  # noqa: E402
from vidops.ops.assign_clusters import assign_clusters  # noqa: E402
from vidops.ops.assign_rows import assign_rows  # noqa: E402
from vidops.ops.attention_head_mean import attention_head_mean  # noqa: E402
from vidops.ops.greedy_absorb import Absorption, greedy_absorb  # noqa: E402
from vidops.ops.greedy_absorb_kl import greedy_absorb_kl  # noqa: E402
from vidops.ops.hierarchical_cluster import (  # noqa: E402
    Clusters,
    hierarchical_cluster,
    hierarchical_cluster_map,
)
from vidops.ops.label_propagation import Matches, label_propagation, propagate_labels  # noqa: E402
from vidops.ops.neighbour_mean import neighbour_mean  # noqa: E402
from vidops.ops.segment_mean import segment_mean  # noqa: E402
from vidops.ops.slot_attention import slot_attention, slot_step  # noqa: E402
from vidops.ops.symmetric_kl import symmetric_kl  # noqa: E402
from vidops.ops.symmetric_kl_adjacency import symmetric_kl_adjacency  # noqa: E402
from vidops.ops.video_attention import video_attention  # noqa: E402

# Last: its modules call the ops by their public names.
from vidops import nn  # noqa: E402  # isort: skip

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "Absorption",
    "BackendError",
    "Clusters",
    "Explanation",
    "Matches",
    "SlotParams",
    "assign_clusters",
    "assign_rows",
    "attention_head_mean",
    "backends",
    "explain",
    "greedy_absorb",
    "greedy_absorb_kl",
    "hierarchical_cluster",
    "hierarchical_cluster_map",
    "label_propagation",
    "neighbour_mean",
    "nn",
    "pack_adjacency",
    "propagate_labels",
    "segment_mean",
    "slot_attention",
    "slot_step",
    "symmetric_kl",
    "symmetric_kl_adjacency",
    "unpack_adjacency",
    "use_backend",
    "video_attention",
]
