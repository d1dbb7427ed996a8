"""``python -m vidops validate DIR [--slug S] [--backend B] [--strict]``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vidops._registry import BACKENDS, NO_IMPLEMENTATION, OPS, BackendError
from vidops.ops import _backends
from vidops.validation import (
    object_adapter,
    slot_attention,
    smtc_model,
    smtc_ops,
    ssl_uvos_model,
    ssl_uvos_ops,
    sta_model,
    sta_ops,
)
from vidops.validation.case import Case, Check, GoldenError


@dataclass(frozen=True)
class Kind:
    """How files of one kind are checked, and the ops a backend must have for it."""

    check: Callable[[Case, str], list[Check]]
    ops: tuple[str, ...]

    def run(self, case: Case, backend: str) -> list[Check]:
        """All comparisons of a case, PyTorch's own float32 convolutions in full precision."""
        # On a card cuDNN's are in TF32 by default, whose error is hundreds of times what the files allow.
        saved = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            return self.check(case, backend)
        finally:
            torch.backends.cudnn.allow_tf32 = saved


# Ops of the ssl_uvos model: its attention, and the clustering of its maps.
CLUSTER_OPS = (
    "assign_clusters",
    "assign_rows",
    "attention_head_mean",
    "greedy_absorb",
    "greedy_absorb_kl",
    "neighbour_mean",
    "segment_mean",
    "symmetric_kl",
    "symmetric_kl_adjacency",
)
MODEL_OPS = (*CLUSTER_OPS, "video_attention")
SLOT_OPS = ("slot_attention",)
PRUNE_OPS = ("sta_prune", "sta_score")
STA_MODEL_OPS = (*PRUNE_OPS, "video_attention")
ADAPTER_OPS = ("slot_attention", "video_attention")

KINDS: dict[str, dict[str, Kind]] = {
    "object_adapter": {
        "adapter3d": Kind(object_adapter.check_adapter3d, ADAPTER_OPS),
        "losses": Kind(object_adapter.check_losses, ADAPTER_OPS),
        "model_e2e": Kind(object_adapter.check_model_e2e, ADAPTER_OPS),
        "object_state_change": Kind(object_adapter.check_object_state_change, ("video_attention",)),
        "slot_attention": Kind(object_adapter.check_slot_attention, SLOT_OPS),
        "space_time_attention": Kind(object_adapter.check_space_time_attention, ("video_attention",)),
    },
    "slot_attention": {
        "bo_qsa": Kind(slot_attention.check_bo_qsa, SLOT_OPS),
        "dinosaur": Kind(slot_attention.check_dinosaur, SLOT_OPS),
        "learned_query": Kind(slot_attention.check_learned_query, SLOT_OPS),
        "locatello": Kind(slot_attention.check_locatello, SLOT_OPS),
        "lucidrains": Kind(slot_attention.check_lucidrains, SLOT_OPS),
        "lucidrains_adaptive": Kind(slot_attention.check_lucidrains_adaptive, SLOT_OPS),
        "lucidrains_multihead": Kind(slot_attention.check_lucidrains, SLOT_OPS),
        "savi_sequence": Kind(slot_attention.check_savi_sequence, SLOT_OPS),
    },
    "smtc": {
        "e2e_model": Kind(smtc_model.check_e2e_model, ("slot_attention", "video_attention")),
        "label_propagation": Kind(smtc_ops.check_label_propagation, ("label_propagation",)),
        "losses": Kind(smtc_model.check_losses, ()),
        "slot_two_stage": Kind(slot_attention.check_slot_two_stage, SLOT_OPS),
        "transport_fusion": Kind(smtc_model.check_transport_fusion, ()),
    },
    "ssl_uvos": {
        "cluster": Kind(ssl_uvos_ops.check_cluster, CLUSTER_OPS),
        "davis_eval": Kind(ssl_uvos_model.check_davis_eval, MODEL_OPS),
        "e2e_model": Kind(ssl_uvos_model.check_e2e_model, MODEL_OPS),
        "encoder": Kind(ssl_uvos_model.check_encoder, MODEL_OPS),
        "greedy_absorb": Kind(ssl_uvos_ops.check_greedy_absorb, ("greedy_absorb", "segment_mean")),
        "kl_distance": Kind(ssl_uvos_ops.check_kl_distance, ("symmetric_kl",)),
        "losses": Kind(ssl_uvos_model.check_losses, MODEL_OPS),
        "st_block": Kind(ssl_uvos_model.check_st_block, MODEL_OPS),
    },
    "sta": {
        "attention_keymean": Kind(sta_model.check_attention_keymean, ("video_attention",)),
        "block": Kind(sta_model.check_block, ("video_attention",)),
        "chain_three_stages": Kind(sta_ops.check_chain, PRUNE_OPS),
        "first_frame": Kind(sta_ops.check_first_frame, ("bipartite_match", "gather_tokens")),
        "merge_stage": Kind(sta_ops.check_merge, PRUNE_OPS),
        "model_tiny": Kind(sta_model.check_model_tiny, STA_MODEL_OPS),
        "paper_algorithm1": Kind(sta_ops.check_merge, PRUNE_OPS),
        "pos_embed": Kind(sta_model.check_pos_embed, ()),
        "swin_nearest_fill": Kind(sta_ops.check_fill, ("gather_tokens", "nearest_kept")),
        "tome_match": Kind(sta_ops.check_tome_match, ("bipartite_match", "gather_tokens", "scatter_tokens")),
        "tome_prop_attention": Kind(sta_ops.check_tome_attention, ()),
    },
}

# Papers whose goldens exist and whose ops do not, yet: listed, and a failure only with --strict.
LATER = ("dclr internlm_xcomposer motion_inductive songcomposer video_concepts video_streaming").split()


def _accepts(backend: str, op: str) -> bool:
    """Whether `backend` can run `op` on this machine."""
    on_card = torch.cuda.is_available() and backend not in ("reference", "cpu")
    probe = (torch.empty(1, device="cuda" if on_card else "cpu"),)
    return OPS[op].refusal(backend, probe, needs_grad=False) is None


def runnable(ops: tuple[str, ...] = tuple(OPS)) -> list[str]:
    """Backends that run all of `ops` (default: every op) on this machine."""
    return [backend for backend in BACKENDS if all(_accepts(backend, op) for op in ops)]


def partly_runnable() -> list[str]:
    """Backends that run at least one op on this machine."""
    return [backend for backend in BACKENDS if any(_accepts(backend, op) for op in OPS)]


def kind_of(name: str, kinds: dict[str, Kind]) -> str | None:
    """The longest kind the file's name starts with."""
    return max((kind for kind in kinds if name.startswith(kind)), key=len, default=None)


def _folders(root: Path, slug: str | None) -> list[tuple[str, Path]]:
    if any(root.glob("*.npz")):
        return [(slug or root.resolve().name, root)]
    return [
        (folder.name, folder)
        for folder in sorted(root.iterdir())
        if folder.is_dir() and slug in (None, folder.name) and any(folder.glob("*.npz"))
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="vidops validate", description="Run golden files through the backends.")
    parser.add_argument("dir", type=Path, help="a root of slug folders, or one slug's folder")
    parser.add_argument("--slug", help="only this paper; or the paper of DIR when its name does not say")
    parser.add_argument("--backend", choices=BACKENDS, help="only this backend (default: all that can run an op)")
    parser.add_argument("--strict", action="store_true", help="what is not implemented yet is a failure")
    options = parser.parse_args(argv)
    if not options.dir.is_dir():
        print(f"vidops validate: {options.dir}: not a folder", file=sys.stderr)
        return 2
    folders = _folders(options.dir, options.slug)
    if not folders:
        wanted = options.slug or "any slug"
        print(f"vidops validate: {options.dir}: no golden files (.npz) for {wanted}", file=sys.stderr)
        return 2
    backends = [options.backend] if options.backend else partly_runnable()
    failures = passed = later = 0
    print(f"{'case':44} {'backend':22} {'worst check':38} {'error':>10} {'limit':>9}  verdict")
    for slug, folder in folders:
        for path in sorted(folder.glob("*.npz")):
            name = f"{slug}/{path.stem}"
            kinds = KINDS.get(slug)
            if kinds is None and slug in LATER:
                later += 1
                print(f"{name:44} {'-':22} not implemented yet")
                continue
            kind = kind_of(path.stem, kinds or {})
            if kinds is None or kind is None:
                failures += 1
                print(f"{name:44} {'-':22} unknown {'slug' if kinds is None else 'kind'}: FAILED")
                continue
            for backend in backends:
                outcome = _run(kinds[kind], path, name, backend)
                passed += outcome == "passed"
                failures += outcome == "failed"
                later += outcome == "later"
    verdict = f"{passed} passed, {failures} failed, {later} not implemented yet"
    print(verdict)
    return 1 if failures or not (passed or later) or (options.strict and later) else 0


def _run(kind: Kind, path: Path, name: str, backend: str) -> str:
    """``"passed"``, ``"failed"``, or ``"later"`` for a case with an op that the backend has no form of."""
    shown = backend
    if backend == "triton" and _backends.TRITON_INTERPRETED:
        shown = "triton (interpreted)"
    start = time.perf_counter()
    try:
        checks = kind.run(Case.load(path), backend)
    except BackendError as error:
        if error.reason == NO_IMPLEMENTATION:
            op = str(error).partition(":")[0]
            print(f"{name:44} {shown:22} not implemented on {backend}: {op}")
            return "later"
        # Any other refusal is of this very call, on a backend that has the op.
        print(f"{name:44} {shown:22} BackendError: {error}: FAILED")
        return "failed"
    except (GoldenError, KeyError, ValueError, TypeError, RuntimeError) as error:
        # A file that breaks its runner is a failed case, reported with its reason; the others still run.
        print(f"{name:44} {shown:22} {type(error).__name__}: {error}: FAILED")
        return "failed"
    bad = [check for check in checks if not check.ok]
    if not checks:
        print(f"{name:44} {shown:22} nothing was compared: FAILED")
        return "failed"
    worst = bad[0] if bad else max(checks, key=lambda c: c.error / c.limit if c.limit else 0.0)
    seconds = time.perf_counter() - start
    verdict = f"FAILED ({len(bad)} of {len(checks)})" if bad else f"ok ({len(checks)} checks, {seconds:.1f} s)"
    print(f"{name:44} {shown:22} {worst.name:38} {worst.error:10.2e} {worst.limit:9.1e}  {verdict}")
    return "failed" if bad else "passed"
