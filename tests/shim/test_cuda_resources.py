"""Every CUDA kernel file compiles without host headers, spills nothing and stays within its register limit."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
KERNEL_FILES = sorted(path for path in CUDA.glob("*.cu") if not path.stem.endswith("_launch"))
LAUNCH_FILES = sorted(CUDA.glob("*_launch.cu"))
DEVICE_HEADERS = sorted(path for path in CUDA.glob("*.cuh") if "launch" not in path.stem)
ATTENTION_LIMIT = {
    "delta": 128,  # one block of 512 threads per multiprocessor
    "dkv": 255,  # two sums of 32 rows by 64 channels per warp
    "dq": 255,
    "lse": 128,
    "lse_groups": 128,  # 512 threads
    "lse_wide": 128,
    "map": 128,
    "map_dropout": 128,
    "map_groups": 255,
    "map_wide": 255,
    "out": 255,
    "statistics": 64,
    "tiny": 128,
}
REGISTER_LIMIT = {
    **{f"attention_{name}_{kind}": n for name, n in ATTENTION_LIMIT.items() for kind in ("f32", "f16", "bf16")},
    "assign_clusters_log_sums": 40,
    "assign_rows_centre": 40,
    "assign_rows_decide": 64,
    "assign_rows_pack": 40,
    "assign_rows_scores": 255,
    "assign_rows_scores_narrow": 255,
    "attention_lse_combine": 40,
    "attention_pack_16bit": 40,
    "attention_pack_f32": 40,
    "attention_range": 40,
    **{f"gather_tokens_{size}": 40 for size in (2, 4, 8, 16)},
    "greedy_absorb_kl_centre": 40,
    "greedy_absorb_kl_columns": 40,
    "greedy_absorb_kl_pack": 64,
    "greedy_absorb_kl_round": 128,  # two blocks of 256 threads per multiprocessor
    "greedy_absorb_owner": 40,
    "greedy_absorb_walk": 64,
    "label_propagation_merge_f32": 64,
    "label_propagation_merge_f64": 64,
    **{f"label_propagation_scan_{kind}": 128 for kind in ("f32", "f16", "bf16", "f64")},  # two blocks of 256 threads
    "match_sort": 64,  # 512 threads
    **{f"match_tokens_{kind}": 64 for kind in ("f32", "f16", "bf16")},
    "nearest_kept": 40,
    "neighbour_mean_compact": 40,
    "neighbour_mean_copy": 40,
    "neighbour_mean_first": 64,
    "neighbour_mean_norms": 40,
    "neighbour_mean_tiles": 170,  # three blocks of 128 threads
    "neighbour_mean_totals": 40,
    "neighbour_mean_words": 64,
    **{f"scatter_tokens_{kind}": 40 for kind in ("lists", "f32", "f64", "f16", "bf16")},
    "segment_mean_members": 40,
    "segment_mean_rows": 40,
    **{f"slot_attend_{name}_{kind}": 168 for name in ("forward", "backward") for kind in ("f32", "f16", "bf16")},
    "slot_attend_sum": 40,
    "slot_convert": 40,
    "slot_dots": 40,
    "slot_fold": 40,
    "slot_gates": 40,
    "slot_gates_grad": 40,
    "slot_gather_grad": 40,
    **{f"slot_iterations_8_{kind}": 168 for kind in ("f32", "f16", "bf16")},  # 384 threads
    **{f"slot_iterations_16_{kind}": 168 for kind in ("f16", "bf16")},
    "slot_iterations_16_f32": 255,  # 256 threads
    **{f"slot_iterations_32_{kind}": 255 for kind in ("f32", "f16", "bf16")},
    "slot_mean": 40,
    "slot_norm": 64,
    "slot_norm_grad": 64,  # four blocks of 256 threads per multiprocessor
    "slot_parts": 40,
    **{f"slot_product_{form}_32": 168 for form in ("nt", "nn", "tn")},  # three blocks of 128 threads
    **{f"slot_product_{form}_64": 255 for form in ("nt", "nn", "tn")},  # two
    **{f"slot_token_grad_{kind}": 64 for kind in ("f32", "f16", "bf16")},
    "slot_unfold": 40,
    **{f"sta_look_{kind}": 64 for kind in ("f32", "f16", "bf16", "f64")},
    **{f"sta_scan_{kind}": 128 for kind in ("f32", "f64")},  # 512 threads
    "sta_spread_f32": 96,  # five blocks of 128 threads per multiprocessor
    "sta_spread_f64": 168,  # three
    "symmetric_kl_adjacency_centre": 40,
    "symmetric_kl_adjacency_columns": 40,
    "symmetric_kl_adjacency_filter": 255,
    "symmetric_kl_adjacency_filter_lean": 255,
    "symmetric_kl_adjacency_pack": 64,
    "symmetric_kl_adjacency_recheck": 80,
    "symmetric_kl_centre": 40,
    "symmetric_kl_columns": 40,
    "symmetric_kl_pack": 64,
    "symmetric_kl_product": 255,
    "symmetric_kl_product_lean": 255,
    **{f"unit_keys_{kind}": 48 for kind in ("f32", "f16", "bf16")},
    **{f"token_statistics_{kind}": 40 for kind in ("f32", "f16", "bf16")},
}
STATIC_SHARED_LIMIT = 0  # kernels take dynamic shared memory only
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for.*?(?P<store>\d+) bytes spill stores, (?P<load>\d+) bytes spill"
    r" loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", [pytest.param("80", marks=pytest.mark.slow), "90a"])
@pytest.mark.parametrize("source", KERNEL_FILES, ids=lambda path: path.stem)
def test_resources(source: Path, arch: str, tmp_path: Path) -> None:
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    options = ["-std=c++17", target, "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "k.cubin")]
    report = subprocess.run([str(NVCC), *options, str(source)], capture_output=True, text=True, check=True).stderr
    kernels = list(ENTRY.finditer(report))
    declared = re.findall(r"VIDOPS_KERNEL\([\w, ]+\) (\w+)\(", source.read_text())
    assert len(kernels) == len(declared) > 0
    for kernel in kernels:
        (name,) = [d for d in declared if f"{len(d)}{d}" in kernel["name"]]
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        print(f"{name} sm_{arch}: {kernel['registers']} registers, {shared.group(1) if shared else 0} bytes smem")
        assert kernel["store"] == kernel["load"] == "0", name
        assert int(kernel["registers"]) <= REGISTER_LIMIT[name], name
        assert (int(shared.group(1)) if shared else 0) <= STATIC_SHARED_LIMIT, name


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or shutil.which("nm") is None, reason="nvcc or nm is not installed")
@pytest.mark.parametrize("source", LAUNCH_FILES, ids=lambda path: path.stem)
def test_launchers_call_no_device_function(source: Path, tmp_path: Path) -> None:
    """nvcc lets a template of the host call one, and compiles it as a call of exit(1): the process ends in silence."""
    target = "-gencode=arch=compute_90a,code=sm_90a"
    options = ["-std=c++17", target, f"-I{CUDA}", f"-I{CUDA.parent / 'include'}", "-Xptxas", "-O0", "-c"]
    subprocess.run([str(NVCC), *options, str(source), "-o", str(tmp_path / "l.o")], check=True, capture_output=True)
    symbols = subprocess.run(["nm", str(tmp_path / "l.o")], check=True, capture_output=True, text=True).stdout
    assert "cudaLaunchKernel" in symbols
    assert not re.search(r"^\s+U exit$", symbols, re.MULTILINE)


@pytest.mark.parametrize("source", [*KERNEL_FILES, *DEVICE_HEADERS], ids=lambda path: path.name)
def test_no_host_headers(source: Path) -> None:
    assert not re.search(r"^\s*#\s*include\s*<", source.read_text(), re.MULTILINE)
