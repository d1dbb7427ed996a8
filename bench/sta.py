"""Token pruning at the shapes of the paper against the public algorithm in eager PyTorch, the same without its waste,
both compiled, and token merging of as many tokens as a peer, eager and native.

``python bench/sta.py [rounds]``: interleaved medians of one-thread CPU time. Beside them how many tokens are kept that
the eager form does not keep in that place (more than one in a thousand is wrong). Token merging keeps others: there it
is how many merged tokens are others than those of eager merging.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

import vidops


@dataclass(frozen=True)
class Workload:
    name: str
    batch: int
    frames: int
    tokens: int
    width: int
    keys: int
    r: int
    reverse: bool = False


WORKLOADS = (
    Workload("ViT-S, call 1", 1, 8, 196, 384, 64, 64),
    Workload("ViT-L, call 1", 1, 8, 196, 1024, 64, 64),
    Workload("ViT-L, call 2", 1, 4, 264, 1024, 64, 64, True),
    Workload("ViT-L, call 3", 1, 2, 400, 1024, 64, 64),
    Workload("ViT-B r 48 B 8, call 1", 8, 8, 196, 768, 64, 48),
    Workload("ViT-B r 48 B 8, call 2", 8, 4, 296, 768, 64, 48, True),
    Workload("ViT-B r 48 B 8, call 3", 8, 2, 496, 768, 64, 48),
    Workload("VideoSwin-B, call 1", 1, 16, 784, 256, 32, 256),
    Workload("VideoSwin-B, call 2", 1, 16, 196, 512, 32, 96, True),
)


def clip(w: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and keys of a scene that stays, with what changes from frame to frame on top."""
    g = torch.Generator().manual_seed(0)
    made = []
    for width in (w.width, w.keys):
        scene = torch.randn(w.batch, 1, w.tokens, width, generator=g)
        made.append((scene + 0.5 * torch.randn(w.batch, w.frames, w.tokens, width, generator=g)).flatten(1, 2))
    return made[0], made[1]


def _activation(x: torch.Tensor) -> torch.Tensor:
    total = x.abs().sum(-1)
    low, high = total.min(-1, keepdim=True).values, total.max(-1, keepdim=True).values
    return (total - low) / (high - low)


def _first_order(m: torch.Tensor) -> torch.Tensor:
    similarity = (m[:, ::2] @ m[:, 1::2].mT).max(-1).values
    odd = torch.arange(1, m.shape[1], 2, device=m.device).expand(len(m), -1)
    return torch.cat([odd, 2 * similarity.argsort(1)], 1)


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def public(x: torch.Tensor, metric: torch.Tensor, w: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """The published algorithm as it is published: tokens and keys joined for every gather, and the result grown frame
    by frame."""
    x, m = (t.view(w.batch, w.frames, w.tokens, -1) for t in (x, metric / metric.norm(dim=-1, keepdim=True)))
    activation = _activation(x)
    kept, keep = w.tokens - w.r, {}
    order = range(w.frames - 1, -1, -1) if w.reverse else range(w.frames)
    index = _first_order(m[:, order[0]])
    joined = _take(torch.cat([x[:, order[0]], m[:, order[0]]], -1), index)
    memory, weight = joined[..., w.width :], x.new_ones(w.batch, w.tokens)
    result, keep[order[0]] = joined[:, :kept, : w.width], index[:, :kept]
    for t in order[1:]:
        joined = torch.cat([x[:, t], m[:, t]], -1)
        acc = ((m[:, t] @ memory.mT).softmax(1) @ weight.unsqueeze(-1)).squeeze(-1)
        keep[t] = index = (acc * (1 - activation[:, t])).topk(kept, dim=1, largest=False, sorted=True).indices
        joined, weight = _take(joined, index), acc.gather(1, index)
        memory, weight = joined[..., w.width :], weight / weight.sum(1, keepdim=True)
        parts = [joined[..., : w.width], result]
        result = torch.cat(parts if w.reverse else parts[::-1], 1)
    return result, torch.stack([keep[t] for t in range(w.frames)], 1)


def lean(x: torch.Tensor, metric: torch.Tensor, w: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """The same decisions, each token read and written once: the least that eager PyTorch can do."""
    x, m = (t.view(w.batch, w.frames, w.tokens, -1) for t in (x, metric / metric.norm(dim=-1, keepdim=True)))
    factor = 1 - _activation(x)
    kept, keep = w.tokens - w.r, {}
    order = range(w.frames - 1, -1, -1) if w.reverse else range(w.frames)
    index = _first_order(m[:, order[0]])
    keep[order[0]] = index[:, :kept]
    memory, weight = m[:, order[0]], x.new_ones(w.batch, w.tokens)
    for t in order[1:]:
        acc = ((m[:, t] @ memory.mT).softmax(1) @ weight.unsqueeze(-1)).squeeze(-1)
        keep[t] = index = (acc * factor[:, t]).topk(kept, dim=1, largest=False, sorted=True).indices
        memory, weight = _take(m[:, t], index), acc.gather(1, index)
        weight = weight / weight.sum(1, keepdim=True)
    index = torch.stack([keep[t] for t in range(w.frames)], 1)
    return x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, w.width)).flatten(1, 2), index


def eager_merging(x: torch.Tensor, metric: torch.Tensor, w: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """Token merging of as many tokens, all frames as one set, as it runs inside a joint video transformer."""
    m = metric / metric.norm(dim=-1, keepdim=True)
    similarity, partner = (m[:, ::2] @ m[:, 1::2].mT).max(-1)
    order = similarity.argsort(dim=1, descending=True)
    merged, left = order[:, : w.r * w.frames], order[:, w.r * w.frames :]
    place = partner.gather(1, merged).unsqueeze(-1)
    odd, size = x[:, 1::2], x.new_ones(w.batch, x.shape[1] // 2, 1)
    size = size.scatter_add(1, place, x.new_ones(place.shape))
    mean = odd.scatter_add(1, place.expand(-1, -1, w.width), _take(x[:, ::2], merged)) / size
    return torch.cat([_take(x[:, ::2], left), mean], 1), torch.cat([merged, left], 1)


def merging(x: torch.Tensor, metric: torch.Tensor, w: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    merged = vidops.token_merge(x, metric, w.r * w.frames, backend="cpu")
    return merged.x, merged.source


def native(x: torch.Tensor, metric: torch.Tensor, w: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    pruned = vidops.sta_prune(x, metric, w.frames, w.r, w.reverse, backend="cpu")
    return pruned.x, pruned.keep


Form = Callable[[torch.Tensor, torch.Tensor, Workload], tuple[torch.Tensor, torch.Tensor]]


def forms() -> dict[str, Form]:
    # Else a workload counts against the limit of recompilations of the one before.
    torch.compiler.reset()
    return {
        "eager": public,
        "eager, lean": lean,
        "eager+compile": torch.compile(public, dynamic=False),
        "lean+compile": torch.compile(lean, dynamic=False),
        "merging, eager": eager_merging,
        "merging, cpu": merging,
        "cpu": native,
    }


def variants(w: Workload) -> dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    x, metric = clip(w)

    def bound(form: Form) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        return lambda: form(x, metric, w)

    return {name: bound(form) for name, form in forms().items()}


def differing(name: str, calls: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]) -> int:
    """Places that hold another token than eager's. Two whose scores float32 cannot tell apart may change places."""
    if name.startswith("merging"):
        got, want = calls[name]()[0], calls["merging, eager"]()[0]
        return int(((got - want).abs() > 1e-5 * want.abs().max()).any(-1).sum())
    return int((calls[name]()[1] != calls["eager"]()[1]).sum())


def main(arguments: list[str]) -> int:
    from ratios import compare

    torch.set_num_threads(1)
    rounds = int(arguments[0]) if arguments else 9
    failures = 0
    print(f"{'token pruning':24} {'variant':14} {'CPU ms':>9} {'eager/x':>8}  tokens that differ")
    with torch.inference_mode():
        for w in WORKLOADS:
            calls = variants(w)
            wrong = {name: differing(name, calls) for name in calls}  # warms up and compiles too
            times = compare(calls, rounds)
            for name in calls:
                failures += 1000 * wrong[name] > w.batch * w.frames * (w.tokens - w.r)
                ratio = times["eager"] / times[name]
                print(f"{w.name:24} {name:14} {times[name] * 1e3:9.4g} {ratio:8.2f}  {wrong[name]}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
