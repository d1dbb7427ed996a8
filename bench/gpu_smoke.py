"""Every op of every GPU backend once, on small odd shapes, against the reference in float64.

Short enough to run under compute-sanitizer, which slows kernels down a hundredfold; the contract suite covers more.
``TRITON_INTERPRET=1 python bench/gpu_smoke.py --device cpu --backends triton`` rehearses it without a card.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import vidops
from vidops._registry import NO_IMPLEMENTATION, OPS, BackendError

# (backend, device, dtype) -> outputs, gradients included.
Case = Callable[[str, torch.device, torch.dtype], list[Any]]

H, N, M, D, K = 3, 37, 83, 20, 5
WIDE = 136  # channels
TAU = 0.9


def _normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _heads(count: int, seed: int, device: torch.device, dtype: torch.dtype, through: torch.dtype) -> torch.Tensor:
    """Values that `through` can hold, as `dtype`: the float64 reference sees what the kernel sees."""
    return _normal(1, H, count, D, seed=seed).to(through).to(device, dtype)


def _map(rows: int, seed: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Rows in three groups, so that the threshold separates some pairs and joins others."""
    group = torch.arange(rows) % 3
    logits = 3 * _normal(3, M, seed=7)[group] + 0.2 * _normal(rows, M, seed=seed)
    return logits.softmax(-1).float().to(device, dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def cases(through: torch.dtype) -> dict[str, Case]:
    """Op -> its case, for inputs rounded to `through`."""

    def adjacency(device: torch.device) -> torch.Tensor:
        near = vidops.symmetric_kl(_map(N, 1, torch.device("cpu"), torch.float64), backend="reference") <= TAU
        return vidops.pack_adjacency(near).to(device)

    def attention_head_mean(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        q, k = (_heads(c, s, device, dtype, through).requires_grad_(True) for c, s in ((N, 1), (M, 2)))
        p, log_p, lse = vidops.attention_head_mean(q, k, return_log=True, return_lse=True, backend=backend)
        weight = _normal(1, N, M, seed=3).to(p)
        ((p * weight).sum() + log_p.sum() / M).backward()
        return [p.detach(), log_p.detach(), lse.detach(), q.grad, k.grad]

    def video_attention(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        q, k, v = (_heads(c, s, device, dtype, through).requires_grad_(True) for c, s in ((N, 1), (M, 2), (M, 3)))
        out, head_mean = vidops.video_attention(q, k, v, dropout_p=0.25, seed=11, need="map", backend=backend)
        ((out * _normal(1, H, N, D, seed=4).to(out)).sum() + (head_mean**2).sum()).backward()
        return [out.detach(), head_mean.detach(), q.grad, k.grad, v.grad]

    def symmetric_kl(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        p, q = _map(N, 1, device, dtype), _map(K, 2, device, dtype)
        return [vidops.symmetric_kl(p, q, backend=backend), vidops.symmetric_kl(p, backend=backend)]

    def symmetric_kl_adjacency(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        p = _map(N, 1, device, dtype)
        return [vidops.symmetric_kl_adjacency(p, TAU, precision=f, backend=backend) for f in ("exact", "filtered")]

    def neighbour_mean(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        return [vidops.neighbour_mean(adjacency(device), _map(N, 1, device, dtype), backend=backend)]

    def greedy_absorb(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        return list(vidops.greedy_absorb(adjacency(device), backend=backend))

    def greedy_absorb_kl(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        return list(vidops.greedy_absorb_kl(_map(N, 1, device, dtype), TAU, backend=backend))

    def segment_mean(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        label = (torch.arange(N) * 7 % K).to(device)
        return [vidops.segment_mean(_map(N, 1, device, dtype), label, K + 1, backend=backend)]

    def assign_clusters(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        q, k = (_heads(c, s, device, dtype, through)[0] for c, s in ((N, 1), (M, 2)))
        # Maps of five of the tokens: those tokens are at distance zero, the others far from a tie.
        wide = (_heads(c, s, torch.device("cpu"), torch.float64, through)[0] for c, s in ((N, 1), (M, 2)))
        centroids = vidops.attention_head_mean(*wide, backend="reference")[::8].to(device, _wide(dtype))
        return [vidops.assign_clusters(q, k, centroids, backend=backend)]

    def assign_rows(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        p = _map(N, 1, device, dtype)
        return [vidops.assign_rows(p, p[:K].contiguous(), backend=backend)]

    def slot_attention(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        results = []
        # Many tokens and one head, whose projections are absorbed, narrow and wide; few tokens with many heads, whose
        # are not.
        for tokens, heads, d in ((M, 1, D), (M, 1, WIDE), (H, 5, D)):
            shapes = {
                "norm_input_weight": (d,), "norm_input_bias": (d,), "q_weight": (d, d), "k_weight": (d, d),
                "k_bias": (d,), "v_weight": (d, d), "v_bias": (d,), "gru_weight_ih": (3 * d, d),
                "gru_weight_hh": (3 * d, d), "gru_bias_ih": (3 * d,), "gru_bias_hh": (3 * d,),
                "mlp_weight1": (d, d), "mlp_weight2": (d, d),
            }  # fmt: skip
            given = {"inputs": (2, tokens, d), "slots": (2, 6, d), **shapes}
            leaves = {
                name: (_normal(*shape, seed=i) * d**-0.5).to(through).to(device, dtype).requires_grad_(True)
                for i, (name, shape) in enumerate(given.items())
            }
            params = vidops.SlotParams(**{name: leaves[name] for name in shapes})
            mask = (torch.arange(2 * 2 * tokens).view(2, 2, tokens) % 4 != 0).to(device)
            out, dots, attn = vidops.slot_attention(
                leaves["inputs"] * d**0.5, leaves["slots"], params, iters=3, heads=heads, groups=2, scale=2.0,
                extra_denominator=1e-8, activation="gelu", token_mask=mask, return_dots=True, return_attn=True,
                backend=backend,
            )  # fmt: skip
            ((out * _normal(2, 6, d, seed=31).to(out)).sum() + (dots**2).mean() + (attn**2).sum()).backward()
            results += [out.detach(), dots.detach(), attn.detach(), *(leaf.grad for leaf in leaves.values())]
        return results

    def label_propagation(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        features = torch.nn.functional.normalize(_normal(4, 36, D, seed=5), dim=-1).to(through).to(device, dtype)
        labels = _normal(3, 36, K, seed=6).softmax(-1).float().to(device, _wide(dtype))
        return [
            vidops.label_propagation(
                features[0], features[1:], labels, (4, 9), top_k=5, radius=2.5, repeats=2, backend=backend
            )
        ]

    def tokens(seed: int, width: int, device: torch.device, dtype: torch.dtype, count: int = 3 * N) -> torch.Tensor:
        return _normal(2, count, width, seed=seed).to(through).to(device, dtype)

    def sta_score(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        x, metric = tokens(8, D, device, dtype), tokens(9, K, device, dtype)
        results = []
        for reverse, pruned in ((False, False), (True, True)):
            results += vidops.sta_score(x, metric, 3, 11, reverse, first_frame_pruned=pruned, backend=backend)
        return results

    def sta_prune(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        x, metric = tokens(15, D, device, dtype).requires_grad_(True), tokens(16, K, device, dtype)
        kept, _, scores = vidops.sta_prune(x, metric, 3, 11, backend=backend)
        (kept * _normal(*kept.shape, seed=17).to(kept)).sum().backward()
        return [kept.detach(), x.grad, *scores]

    def bipartite_match(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        return list(vidops.bipartite_match(tokens(10, K, device, dtype), backend=backend))

    def gather_tokens(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        x = tokens(11, D, device, dtype, N).requires_grad_(True)
        out = vidops.gather_tokens(x, (torch.arange(2 * M).view(2, M) * 5 % (N - 3)).to(device), backend=backend)
        (out * _normal(*out.shape, seed=12).to(out)).sum().backward()
        return [out.detach(), x.grad]

    def scatter_tokens(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        x = tokens(13, D, device, dtype, M).requires_grad_(True)
        out = vidops.scatter_tokens(x, (torch.arange(2 * M).view(2, M) * 5 % N).to(device), N + 3, backend=backend)
        (out * _normal(*out.shape, seed=14).to(out)).sum().backward()
        return [out.detach(), x.grad]

    def nearest_kept(backend: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
        keep = (torch.arange(2 * K).view(2, K) * 7 % 48).to(device)
        return [vidops.nearest_kept(keep, (6, 8), backend=backend)]

    every = (
        attention_head_mean, video_attention, symmetric_kl, symmetric_kl_adjacency, neighbour_mean, greedy_absorb,
        greedy_absorb_kl, segment_mean, assign_clusters, assign_rows, slot_attention, label_propagation,
        sta_score, sta_prune, bipartite_match, gather_tokens, scatter_tokens, nearest_kept,
    )  # fmt: skip
    return {case.__name__: case for case in every}


# Ops on queries, keys and features take halves as they are; maps are widened before a kernel sees them.
HALF_OPS = (
    "attention_head_mean", "video_attention", "assign_clusters", "slot_attention", "label_propagation", "sta_score",
    "sta_prune", "bipartite_match", "gather_tokens", "scatter_tokens",
)  # fmt: skip
# On CUDA the others have no float64.
DOUBLE_OPS = ("label_propagation", "sta_score", "sta_prune", "gather_tokens", "scatter_tokens", "nearest_kept")
LIMITS = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def dtypes(op: str, backend: str) -> list[torch.dtype]:
    found = [torch.float32]
    if op in HALF_OPS:
        found += [torch.float16, torch.bfloat16]
    if backend != "cuda" or op in DOUBLE_OPS:
        found.append(torch.float64)
    return found


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error relative to the largest value, or the number of entries that differ; infinite for NaN."""
    got, want = got.detach().cpu(), want.detach().cpu()
    if got.shape != want.shape or got.is_floating_point() != want.is_floating_point():
        return float("inf")
    if not want.is_floating_point():
        return float((got != want).sum())
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max())
    return error if error == error else float("inf")


def check(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, float, float]:
    """(``ok``, ``wrong`` or the refusal; worst error; its limit)."""
    case = cases(dtype)[op]
    want = case("reference", torch.device("cpu"), torch.float64)
    try:
        got = case(backend, device, dtype)
    except BackendError as error:
        return f"refused: {error.reason}", 0.0, 0.0
    errors = [difference(a, b) for a, b in zip(got, want, strict=True)]
    limits = [LIMITS[dtype] if b.is_floating_point() else 0.0 for b in want]
    wrong = [(e, limit) for e, limit in zip(errors, limits, strict=True) if not e <= limit]
    worst = wrong[0] if wrong else max(zip(errors, limits, strict=True))
    return "wrong" if wrong else "ok", *worst


def run(backends: list[str], device: torch.device) -> Iterator[tuple[str, str, str, str, float, float]]:
    """Rows (op, backend, dtype, outcome, error, limit), one after the other."""
    for backend in backends:
        for op in sorted(cases(torch.float32)):
            if backend not in OPS[op].rows:
                yield op, backend, "-", NO_IMPLEMENTATION, 0.0, 0.0
                continue
            for dtype in dtypes(op, backend):
                yield op, backend, str(dtype).removeprefix("torch."), *check(op, backend, device, dtype)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer, instead of whatever was there.

    That is a property of torch's deterministic mode; with warn_only it changes nothing else.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backends", default="triton,cuda")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_smoke: torch finds no CUDA device", file=sys.stderr)
        return 2
    wrong = right = 0
    with poisoned_memory():
        for op, backend, dtype, outcome, error, limit in run(options.backends.split(","), torch.device(options.device)):
            wrong += outcome == "wrong" or (outcome.startswith("refused") and dtype == "float32")
            right += outcome == "ok"
            print(f"{op:24} {backend:10} {dtype:9} {error:9.1e} {limit:9.1e}  {outcome}", flush=True)
    print(f"{right} right, {wrong} wrong")
    return 1 if wrong or not right else 0


if __name__ == "__main__":
    sys.exit(main())
