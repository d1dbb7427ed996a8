"""Compile every Triton kernel of the library over its real launches for a GPU that need not be there.

Run as a script, without TRITON_INTERPRET: ``python compile_report.py 9.0 [name ...]`` prints one JSON line
per kernel variant. The launches are those that the library's own launchers make for tensors on the meta
device, so what is compiled here and what runs on a card cannot drift apart.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vidops.kernels import (
    _common,
    assign_clusters,
    assign_rows,
    attention_head_mean,
    bipartite_match,
    gather_tokens,
    greedy_absorb,
    greedy_absorb_kl,
    label_propagation,
    nearest_kept,
    neighbour_mean,
    segment_mean,
    slot_attention,
    sta_score,
    symmetric_kl,
    symmetric_kl_adjacency,
    video_attention,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def empty(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def heads_of(head_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of one 3-frame window, keys and values of sparse key frames (paper-scale token counts)."""
    return tuple(empty(1, 8, tokens, head_size, dtype=dtype) for tokens in (3456, 8064, 8064))  # type: ignore[return-value]


def map_forward(head_size: int, dtype: torch.dtype, dropout: float = 0.0) -> None:
    q, k, _ = heads_of(head_size, dtype)
    attention_head_mean.forward(q, k, 0.1, dropout, 7, True)


def map_backward(head_size: int, dtype: torch.dtype) -> None:
    q, k, _ = heads_of(head_size, dtype)
    acc = _common.accumulator(dtype)
    grad, lse = empty(1, 3456, 8064, dtype=acc), empty(1, 8, 3456, dtype=acc)
    attention_head_mean.backward(grad, q, k, lse, 0.1, 0.0, 0)


def attention_forward(head_size: int, dtype: torch.dtype, dropout: float = 0.4) -> None:
    video_attention.forward(*heads_of(head_size, dtype), 0.1, dropout, 7, True)


def attention_backward(head_size: int, dtype: torch.dtype, dropout: float = 0.4) -> None:
    q, k, v = heads_of(head_size, dtype)
    acc = _common.accumulator(dtype)
    maps, lse = empty(1, 3456, 8064, dtype=acc), empty(1, 8, 3456, dtype=acc)
    video_attention.backward(q, maps, q, k, v, q, lse, 0.1, dropout, 7, True)


def clusters(head_size: int, dtype: torch.dtype) -> None:
    q, k, _ = heads_of(head_size, dtype)
    centroids = empty(100, 8064, dtype=_common.accumulator(dtype))
    assign_clusters.forward(q[0], k[0], empty(0, dtype=centroids.dtype), centroids, centroids, 0.1)


def propagation(height: int, width: int, limit: int, top_k: int, dtype: torch.dtype) -> None:
    """ViT-S features of a frame and its 21 context frames."""
    n = height * width
    query, context = empty(n, 384, dtype=dtype), empty(21, n, 384, dtype=dtype)
    label_propagation.forward(query, context, empty(21, n, 5), height, width, limit, top_k, 0.2, 1, 2)


def rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return empty(3456, 8064, dtype=dtype), empty(3456, 8064, dtype=dtype)


@dataclass(frozen=True)
class Slots:
    """A published workload of slot attention: rows are raw inputs, or keys and values of every head."""

    items: int
    tokens: int
    width: int
    slots: int
    heads: int = 1
    groups: int = 1
    projected: int | None = None  # width of the keys
    joint: bool = False
    slot_mask: bool = False


SLOTS = {
    "locatello": Slots(64, 16384, 64, 7),
    "smtc_semantics": Slots(128, 256, 384, 16),
    "smtc_instances": Slots(128, 256, 384, 64, groups=16),
    "smtc_projected": Slots(128, 256, 384, 64, groups=16, projected=384),
    "smtc_action": Slots(8, 1568, 384, 8, projected=32),
    "lucidrains": Slots(2, 1024, 512, 5),
    "lucidrains_heads": Slots(2, 1024, 64, 5, heads=4, projected=64),
    "savi": Slots(64, 4096, 128, 24),
    "dinosaur": Slots(64, 196, 256, 7),
    "dinosaur_movi": Slots(64, 784, 128, 24, slot_mask=True),
    "dinosaur_heads": Slots(64, 196, 256, 7, heads=4, joint=True, slot_mask=True),
    "dinosaur_heads_projected": Slots(64, 196, 64, 7, heads=4, projected=64, joint=True),
    "clip": Slots(256, 196, 768, 8),
    "many": Slots(8, 65536, 256, 64),
    "widest": Slots(8, 1024, 1024, 64),
}


def attend_slots(case: Slots, dtype: torch.dtype, backward: bool) -> None:
    """The training call: maps and their gradients where a slot mask is given, as published for that variant."""
    acc = _common.accumulator(dtype)
    b, h, s, n = case.items, case.heads, case.slots, case.tokens
    own = case.projected is not None
    width = case.projected if case.projected is not None else case.width
    keys = empty(b, h if own else 1, n, width, dtype=dtype)
    values = empty(b, h, n, case.width, dtype=dtype) if own else keys
    mean = None if own else empty(b, n, dtype=acc)
    token_mask = empty(b, case.groups, n, dtype=torch.uint8) if case.groups > 1 else None
    slot_mask = empty(b, s, dtype=torch.uint8) if case.slot_mask else None
    q, c = empty(b, h, s, width, dtype=acc), empty(b, h, s, dtype=acc)
    shared = (keys, values, mean, mean, q, c, token_mask, slot_mask, case.groups, case.joint, 1e-8)
    if not backward:
        slot_attention.attend_forward(*shared, case.slot_mask, case.slot_mask)
        return
    maps = empty(b, h, s, n, dtype=acc) if case.slot_mask else None
    grad_keys = empty(*keys.shape, dtype=acc)
    grad_values = empty(*values.shape, dtype=acc) if own else grad_keys
    grad_num = empty(b, h, s, case.width, dtype=acc)
    slot_attention.attend_backward(grad_num, c, maps, maps, *shared, grad_keys, grad_values)


@dataclass(frozen=True)
class Pruning:
    """A published stage of token pruning (sheet sta, section 10), or the largest that is taken."""

    items: int
    groups: int
    tokens: int
    width: int
    key_width: int
    dropped: int
    reverse: bool = False


PRUNINGS = {
    "vit_l_stage1": Pruning(32, 8, 196, 1024, 64, 64),
    "vit_l_stage2": Pruning(32, 4, 264, 1024, 64, 64, True),
    "vit_h_stage3": Pruning(16, 2, 400, 1280, 80, 64),
    "swin_b_stage1": Pruning(8, 16, 784, 256, 32, 256),
    "odd": Pruning(1, 3, 49, 100, 33, 7),
    "most": Pruning(1, 3, 4096, 1024, 512, 1024),
}


def prune(case: Pruning, dtype: torch.dtype) -> None:
    rows, kept = case.groups * case.tokens, case.tokens - case.dropped
    x, metric = (empty(case.items, rows, d, dtype=dtype) for d in (case.width, case.key_width))
    sta_score.forward(x, metric, case.groups, case.dropped, case.reverse, False)
    bipartite_match.forward(metric, False, False)
    index = empty(case.items * case.groups, kept, dtype=torch.int64)
    tokens = x.view(case.items * case.groups, case.tokens, case.width)
    gather_tokens.gather(tokens, index)
    gather_tokens.scatter(tokens[:, :kept], index, case.tokens)


# name -> a call whose launches are compiled. Head sizes: the paper's, a power of two, the largest.
CASES: dict[str, Callable[[], Any]] = {}
for _dtype in (F16, BF16, F32, F64):
    _name = str(_dtype).removeprefix("torch.")
    for _size in (32, 48, 64, 128, 256, 512):
        CASES[f"head_mean-{_name}-{_size}"] = lambda s=_size, d=_dtype: map_forward(s, d)
        CASES[f"head_mean_backward-{_name}-{_size}"] = lambda s=_size, d=_dtype: map_backward(s, d)
        CASES[f"attention-{_name}-{_size}"] = lambda s=_size, d=_dtype: attention_forward(s, d)
        CASES[f"attention_backward-{_name}-{_size}"] = lambda s=_size, d=_dtype: attention_backward(s, d)
        CASES[f"attention_plain-{_name}-{_size}"] = lambda s=_size, d=_dtype: attention_forward(s, d, 0.0)
        CASES[f"attention_plain_backward-{_name}-{_size}"] = lambda s=_size, d=_dtype: attention_backward(s, d, 0.0)
        CASES[f"assign_clusters-{_name}-{_size}"] = lambda s=_size, d=_dtype: clusters(s, d)
    for _workload, _slots in SLOTS.items():
        for _backward in (False, True):
            _op = "slots_backward" if _backward else "slots"
            CASES[f"{_op}-{_name}-{_workload}"] = lambda c=_slots, d=_dtype, b=_backward: attend_slots(c, d, b)
    for _stage, _pruning in PRUNINGS.items():
        CASES[f"prune-{_name}-{_stage}"] = lambda c=_pruning, d=_dtype: prune(c, d)
    CASES[f"scatter_sizes-{_name}"] = lambda d=_dtype: gather_tokens.scatter(
        empty(32, 1568, 1, dtype=d), empty(32, 1568, dtype=torch.int64), 1470
    )
for _dtype in (F16, BF16, F32):
    _name = str(_dtype).removeprefix("torch.")
    CASES[f"propagation-{_name}"] = lambda d=_dtype: propagation(30, 53, 49, 7, d)
    CASES[f"propagation_fine-{_name}"] = lambda d=_dtype: propagation(60, 106, 35**2, 28, d)
    CASES[f"propagation_most-{_name}"] = lambda d=_dtype: propagation(60, 106, 35**2, 128, d)
for _dtype in (F32, F64):
    _name = str(_dtype).removeprefix("torch.")
    CASES[f"kl-{_name}"] = lambda d=_dtype: symmetric_kl.forward(
        *(empty(1, 3456, 8064, dtype=d) for _ in range(4)), False
    )
    CASES[f"kl_same-{_name}"] = lambda d=_dtype: symmetric_kl.forward(
        *(empty(1, 3456, 8064, dtype=d) for _ in range(4)), True
    )
    CASES[f"adjacency-{_name}"] = lambda d=_dtype: symmetric_kl_adjacency.forward(*rows(d), 1.0, False)
    CASES[f"absorb_kl-{_name}"] = lambda d=_dtype: greedy_absorb_kl.forward(*rows(d), 1.0)
    CASES[f"mean-{_name}"] = lambda d=_dtype: neighbour_mean.forward(
        empty(3456, 54, dtype=torch.int64), rows(d)[0]
    )
    CASES[f"segment-{_name}"] = lambda d=_dtype: segment_mean.forward(
        rows(d)[0], empty(3456, dtype=torch.int64), 100
    )
    CASES[f"assign_rows-{_name}"] = lambda d=_dtype: assign_rows.forward(
        *rows(d), empty(100, 8064, dtype=d), empty(100, 8064, dtype=d)
    )
for _side in (28, 1000):
    CASES[f"nearest-{_side}"] = lambda s=_side: nearest_kept.forward(empty(128, 528, dtype=torch.int64), s, s)
CASES["filtered_adjacency-float32"] = lambda: symmetric_kl_adjacency.forward(*rows(F32), 1.0, True)


def single() -> None:
    """Every size is one: the launcher makes constants of sizes and strides then; kernels must survive it."""
    one, two, many = empty(1, 1), empty(1, 1, 1), empty(1, 1, 1, 1)
    bits, label = empty(1, 1, dtype=torch.int64), empty(1, dtype=torch.int64)
    attention_head_mean.forward(many, many, 1.0, 0.5, 1, False)
    attention_head_mean.forward(many, many, 1.0, 0.0, 0, True)
    attention_head_mean.backward(two, many, many, two, 1.0, 0.5, 1)
    video_attention.forward(many, many, many, 1.0, 0.5, 1, True)
    video_attention.backward(many, two, many, many, many, many, two, 1.0, 0.5, 1, True)
    symmetric_kl.forward(two, two, two, two, True)
    for filtered in (False, True):
        symmetric_kl_adjacency.forward(one, one, 1.0, filtered)
    neighbour_mean.forward(bits, one)
    greedy_absorb.forward(bits)
    greedy_absorb_kl.forward(one, one, 1.0)
    segment_mean.forward(one, label, 1)
    assign_rows.forward(one, one, one, one)
    assign_clusters.forward(two, two, empty(0), one, one, 1.0)
    label_propagation.forward(one, two, two, 1, 1, 1, 1, 1.0, 1, 1)
    bipartite_match.forward(two, True, True)
    for reverse in (False, True):
        sta_score.forward(two, two, 1, 0, reverse, True)
    gather_tokens.gather(two, bits)
    gather_tokens.scatter(two, bits, 1)
    nearest_kept.forward(bits, 1, 1)


CASES["single"] = single
CASES["absorb"] = lambda: greedy_absorb.forward(empty(7200, 113, dtype=torch.int64))


def source_of(launch: _common.Launch) -> tuple[ASTSource, Any]:
    """The source the just-in-time launcher would build: unit integers constant, multiples of 16 marked."""
    names, hints = launch.kernel.arg_names, launch.kernel.params
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif hints[i].annotation_type:
            signature[name] = hints[i].annotation_type
        elif value == 1 and not hints[i].do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    for name, value in launch.constants.items():
        signature[name], constants[name] = "constexpr", value
    return ASTSource(launch.kernel, signature, constants, attributes), signature


def report(case: str, launch: _common.Launch, arch: int) -> dict[str, Any]:
    source, _ = source_of(launch)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, "maxnreg": launch.registers},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage = run_tool("--dump-resource-usage", binary.name)
        code = run_tool("--dump-sass", binary.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {
        "case": case,
        "kernel": launch.kernel.__name__,
        "arch": arch,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared": compiled.metadata.shared,
        "warps": launch.num_warps,
        "rounds": len(re.findall(r"\bcvt\.[\w.]*bf16(?:x2)?\.f32\b", compiled.asm["ptx"])),
        "matrix": sorted(set(re.findall(r"\b(HGMMA|HMMA|DMMA)\b", code))),
    }


def run_tool(*arguments: str) -> str:
    command = [TOOLS / "cuobjdump", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    major, minor = (int(part) for part in sys.argv[1].split("."))
    seen = set()
    for case in sys.argv[2:] or CASES:
        with _common.recording((major, minor)) as launches:
            CASES[case]()
        for launch in launches:
            source, signature = source_of(launch)
            key = (launch.kernel.__name__, str(signature), str(source.attrs), str(launch.constants))
            if key not in seen:
                seen.add(key)
                print(json.dumps(report(case, launch, major * 10 + minor)), flush=True)


if __name__ == "__main__":
    main()
