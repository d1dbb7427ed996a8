"""Every Triton kernel compiles for sm_80 and sm_90, fits and does not spill: no GPU needed.

Kernels are compiled in subprocesses without TRITON_INTERPRET, over the launches that the library really
makes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parent / "compile_report.py"
REPOSITORY = SCRIPT.parents[2]
# Dynamic shared memory that one block may use, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
REGISTERS = 65536
# The paper's shapes (8 heads of 48 channels) in the dtypes it is run in; all other variants are slow.
ATTENTION = (
    *("head_mean", "head_mean_backward", "attention", "attention_backward", "assign_clusters"),
    *("attention_plain", "attention_plain_backward"),
)
SLOTS = ("locatello", "smtc_semantics", "smtc_instances", "dinosaur_heads_projected")
FAST = [
    *(f"{op}-bfloat16-48" for op in ATTENTION),
    *(f"{op}-float32-48" for op in ATTENTION),
    *(f"{op}-float32-128" for op in ("attention", "attention_backward")),
    *(f"{op}-float32" for op in ("kl", "adjacency", "absorb_kl", "mean", "segment", "assign_rows")),
    *(f"{op}-{dtype}-{w}" for op in ("slots", "slots_backward") for dtype in ("bfloat16", "float32") for w in SLOTS),
    *(f"{case}-{dtype}" for case in ("propagation", "propagation_fine") for dtype in ("bfloat16", "float32")),
    *(f"prune-{dtype}-{stage}" for dtype in ("float16", "float32") for stage in ("vit_l_stage1", "swin_b_stage1")),
    *("prune-float64-odd", "prune-bfloat16-vit_h_stage3", "scatter_sizes-float32", "nearest-28", "nearest-1000"),
    "filtered_adjacency-float32",
    "absorb",
    "single",
]


def compile_cases(capability: str, cases: list[str]) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(REPOSITORY), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(SCRIPT), capability, *cases]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_limits(reports: list[dict[str, Any]]) -> None:
    assert reports
    for r in reports:
        what = f"{r['kernel']} ({r['case']}, sm_{r['arch']}): {r}"
        # Of the all-ones shapes only the compilation is of interest.
        assert r["case"] == "single" or r["stack"] == r["spills"] == 0, f"spills registers: {what}"
        assert r["shared"] <= SHARED_LIMIT[r["arch"]], f"too much shared memory: {what}"
        # A block that needs more registers than a multiprocessor has cannot be launched at all.
        assert -(-r["registers"] // 8) * 8 * 32 * r["warps"] <= REGISTERS, f"too many registers: {what}"


def matrix_instructions(reports: list[dict[str, Any]], kernel: str, case: str) -> set[str]:
    found = [set(r["matrix"]) for r in reports if r["kernel"] == kernel and r["case"].startswith(case)]
    assert found, f"{kernel} was not compiled for {case}"
    return set.union(*found)


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_paper_shapes_fit_and_use_the_matrix_unit(capability: str) -> None:
    reports = compile_cases(capability, FAST)
    check_limits(reports)
    unit = "HGMMA" if capability == "9.0" else "HMMA"
    for kernel, case in (
        ("_symmetric_kl_adjacency_filter_kernel", "filtered_adjacency"),
        ("_neighbour_mean_fwd_kernel", "mean-float32"),
        ("_video_attention_fwd_kernel", "attention-bfloat16"),
        ("_attention_head_mean_map_kernel", "head_mean-bfloat16"),
        ("_attention_head_mean_map_kernel", "head_mean-float32-48"),
        ("_attention_head_mean_lse_kernel", "head_mean-float32-48"),
        ("_video_attention_fwd_kernel", "attention-float32-48"),
        ("_video_attention_bwd_dq_kernel", "attention_backward-float32-48"),
        ("_video_attention_bwd_dkv_kernel", "attention_backward-float32-48"),
        ("_assign_clusters_fwd_kernel", "assign_clusters-float32-48"),
    ):
        found = matrix_instructions(reports, kernel, case)
        assert found == {unit}, f"{kernel} ({case}) uses {found or 'no matrix unit'}, not {unit} alone"
    # Beside bfloat16 tokens the float32 of slot attention goes to the matrix unit in parts, and none of it is rounded.
    slots = [r for r in reports if r["case"].startswith(("slots-bfloat16", "slots_backward-bfloat16"))]
    products = [r for r in slots if r["kernel"] != "_slot_attend_sum_kernel"]
    assert {r["kernel"] for r in products} == {f"_slot_attend_{part}_kernel" for part in ("fwd", "bwd", "softmax")}
    for r in products:
        assert r["matrix"] and not r["rounds"], f"{r['kernel']} ({r['case']}) rounds what it multiplies: {r}"
    # Wide float32 heads are not split, and whole float32 operands would be multiplied as TF32.
    for kernel, case in (
        ("_video_attention_fwd_kernel", "attention-float32-128"),
        ("_video_attention_bwd_dkv_kernel", "attention_backward-float32-128"),
    ):
        assert not matrix_instructions(reports, kernel, case)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_every_variant_fits(capability: str) -> None:
    check_limits(compile_cases(capability, []))
