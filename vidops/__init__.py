"""Fused operations for video understanding. Importing this needs torch, and neither a GPU nor triton nor cupy."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

from vidops import _checkout

_checkout.map_sibling_packages(__name__, _Path(__file__).resolve().parent)

from vidops._registry import BACKENDS, BackendError, Explanation, explain, use_backend  # noqa: E402
from vidops._report import backends  # noqa: E402
from vidops.bits import pack_adjacency, unpack_adjacency  # noqa: E402
from vidops.ops._slot_params import SlotParams  # noqa: E402
from vidops.ops.assign_clusters import assign_clusters  # noqa: E402
from vidops.ops.assign_rows import assign_rows  # noqa: E402
from vidops.ops.attention_head_mean import attention_head_mean  # noqa: E402
from vidops.ops.bipartite_match import Matching, bipartite_match  # noqa: E402
from vidops.ops.first_frame_order import FrameOrder, first_frame_order  # noqa: E402
from vidops.ops.gather_tokens import gather_tokens  # noqa: E402
from vidops.ops.greedy_absorb import Absorption, greedy_absorb  # noqa: E402
from vidops.ops.greedy_absorb_kl import greedy_absorb_kl  # noqa: E402
from vidops.ops.hierarchical_cluster import (  # noqa: E402
    Clusters,
    hierarchical_cluster,
    hierarchical_cluster_map,
)
from vidops.ops.label_propagation import Matches, label_propagation, propagate_labels  # noqa: E402
from vidops.ops.nearest_fill import Filled, nearest_fill  # noqa: E402
from vidops.ops.nearest_kept import nearest_kept  # noqa: E402
from vidops.ops.neighbour_mean import neighbour_mean  # noqa: E402
from vidops.ops.scatter_tokens import scatter_tokens  # noqa: E402
from vidops.ops.segment_mean import segment_mean  # noqa: E402
from vidops.ops.slot_attention import slot_attention, slot_step  # noqa: E402
from vidops.ops.sta_prune import Pruned, sta_prune  # noqa: E402
from vidops.ops.sta_score import StaScores, sta_score  # noqa: E402
from vidops.ops.symmetric_kl import symmetric_kl  # noqa: E402
from vidops.ops.symmetric_kl_adjacency import symmetric_kl_adjacency  # noqa: E402
from vidops.ops.token_merge import Merged, proportional_attention, token_merge  # noqa: E402
from vidops.ops.video_attention import video_attention  # noqa: E402

# Last: its modules call the ops by their public names.
from vidops import nn  # noqa: E402  # isort: skip

if TYPE_CHECKING:
    from vidops import patching as patching
    from vidops.patching import PatchError as PatchError
    from vidops.patching import PatchReport as PatchReport
    from vidops.patching import patch as patch
    from vidops.patching import register_attention as register_attention
    from vidops.patching import unpatch as unpatch

__version__ = "0.1.0"

# Loaded when they are first used, and not in `__all__`, which would load them.
_PATCHING = ("PatchError", "PatchReport", "patch", "register_attention", "unpatch")


def __getattr__(name: str) -> _Any:
    if name == "patching" or name in _PATCHING:
        patching = _import_module("vidops.patching")
        return patching if name == "patching" else getattr(patching, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BACKENDS",
    "Absorption",
    "BackendError",
    "Clusters",
    "Explanation",
    "Filled",
    "FrameOrder",
    "Matches",
    "Matching",
    "Merged",
    "Pruned",
    "SlotParams",
    "StaScores",
    "assign_clusters",
    "assign_rows",
    "attention_head_mean",
    "backends",
    "bipartite_match",
    "explain",
    "first_frame_order",
    "gather_tokens",
    "greedy_absorb",
    "greedy_absorb_kl",
    "hierarchical_cluster",
    "hierarchical_cluster_map",
    "label_propagation",
    "nearest_fill",
    "nearest_kept",
    "neighbour_mean",
    "nn",
    "pack_adjacency",
    "propagate_labels",
    "proportional_attention",
    "scatter_tokens",
    "segment_mean",
    "slot_attention",
    "slot_step",
    "sta_prune",
    "sta_score",
    "symmetric_kl",
    "symmetric_kl_adjacency",
    "token_merge",
    "unpack_adjacency",
    "use_backend",
    "video_attention",
]
