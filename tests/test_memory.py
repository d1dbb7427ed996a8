"""Peak memory of the clustering against the formula of its docstring, which then speaks for the full size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_child import video

import vidops
from vidops._registry import COMPOSITIONS, OPS
from vidops.ops.hierarchical_cluster import Details, peak_bytes

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled_run = pytest.mark.skipif(INTERPRETED, reason="the interpreted run measures Triton's form")

# 99 frames of 320 x 480 pixels, every eleventh a key frame, patches of 8 pixels.
LONG_VIDEO = (99, 8, 40 * 60, 48), (9, 8, 40 * 60, 48)
ROWS, KEYS = 3 * 2400, 9 * 2400


def _measure(
    form: str, frames: int, key_frames: int, tokens: int, *, window: int = 3, objects: int = 12, threads: int = 1
) -> dict:
    sizes = {"frames": frames, "key_frames": key_frames, "tokens": tokens, "window": window, "objects": objects}
    options = [f"--{name}={value}" for name, value in (*sizes.items(), ("threads", threads))]
    # Scaled-down blocks are small enough for malloc to keep them when freed; at full size it maps every one of
    # them and gives it back. A fixed threshold makes the small run behave like the large one.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memory_child.py")), form, *options],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _check_native(frames: int, key_frames: int, tokens: int) -> dict:
    found = _measure("vidops", frames, key_frames, tokens)
    shapes = (frames, 8, tokens, 48), (key_frames, 8, tokens, 48)
    predicted = peak_bytes(*shapes, leaders=found["leaders"], clusters=found["clusters"], threads=1)
    assert found["leaders"] > found["clusters"] > 1  # the formula's terms for the list of leaders are in use
    assert 0.5 * predicted <= found["peak"] <= predicted
    return found


def _check_eager(frames: int, key_frames: int, tokens: int, native: dict) -> None:
    found = _measure("eager", frames, key_frames, tokens)
    maps = 2 * 8 * (3 * tokens) * (key_frames * tokens) * 4
    assert maps <= found["peak"] <= 1.6 * maps
    assert found["peak"] >= 2.5 * native["peak"]


@compiled_run
def test_native_peak_is_what_the_formula_says():
    _check_native(6, 2, 600)


@compiled_run
def test_native_and_eager_peaks_with_more_keys():
    _check_eager(6, 6, 600, _check_native(6, 6, 600))


@compiled_run
def test_more_windows_cost_their_leaders_only():
    short, long = _measure("vidops", 6, 4, 400), _measure("vidops", 24, 4, 400)
    inputs = 18 * 8 * 400 * 48 * 4
    assert long["leaders"] == 4 * short["leaders"]
    # One map of this size is 7.7 MB; a copy of the query that grew with the video would show as well.
    assert long["peak"] - short["peak"] <= 2 * (long["leaders"] * 1600 * 4) + (4 << 20) < inputs


@compiled_run
def test_many_clusters_cost_their_lists():
    """Windows of one frame with hardly any neighbours: the lists of the whole video are what is large."""
    found = _measure("vidops", 8, 4, 200, window=1, objects=5000)
    shapes = (8, 8, 200, 48), (4, 8, 200, 48)
    assert found["leaders"] > found["clusters"] > 1000
    predicted = peak_bytes(*shapes, 1, leaders=found["leaders"], clusters=found["clusters"], threads=1)
    assert peak_bytes(*shapes, 1, leaders=8, clusters=8, threads=1) < found["peak"] <= predicted
    assert 0.5 * predicted <= found["peak"]


@pytest.mark.slow
@compiled_run
@pytest.mark.parametrize("frames,key_frames,tokens", [(6, 6, 1000), (9, 9, 1200)])
def test_native_and_eager_peaks_at_larger_sizes(frames, key_frames, tokens):
    _check_eager(frames, key_frames, tokens, _check_native(frames, key_frames, tokens))


@pytest.mark.slow
@compiled_run
def test_native_peak_with_two_threads():
    found = _measure("vidops", 6, 6, 1000, threads=2)
    counts = {"leaders": found["leaders"], "clusters": found["clusters"]}
    assert found["peak"] <= peak_bytes((6, 8, 1000, 48), (6, 8, 1000, 48), **counts, threads=2)


def test_long_video_fits():
    """With 7200 leaders (218 per window of 7200 rows), 1000 clusters, and the inputs."""
    inputs = (99 + 9) * 8 * 2400 * 48 * 4

    def total(**options) -> int:
        return inputs + peak_bytes(*LONG_VIDEO, leaders=7200, clusters=1000, **options)

    assert total(backend="cpu", threads=64) <= 3e9
    assert total(backend="triton") <= 6e9
    assert max(total(backend="cuda"), total(backend="cuda", precision="exact")) <= 6e9
    assert 2 * 8 * ROWS * KEYS * 4 > 6e9  # two per-head maps, which the eager form holds


def _host_peak(q: torch.Tensor, k: torch.Tensor, backend: str) -> tuple[int, Details]:
    """Bytes of host tensors that a call holds at most: for GPU forms run on the host, whose scratch is tensors too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _, details = vidops.hierarchical_cluster(q, k, 1.0, 2, backend=backend, return_details=True)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, details


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, where Triton's tensors are host tensors")
@pytest.mark.parametrize("frames,key_frames,tokens", [(4, 2, 48), (4, 2, 64)])
def test_triton_peak_is_what_the_formula_says(frames, key_frames, tokens):
    q, k = video(frames, key_frames, 8, tokens, 16, 3)
    peak, details = _host_peak(q, k, "triton")
    first, *_, last = details.level_sizes
    predicted = peak_bytes(q.shape, k.shape, 2, backend="triton", leaders=first, clusters=last)
    assert 0.75 * predicted <= peak <= predicted


@compiled_run
@pytest.mark.parametrize("frames,key_frames,tokens", [(4, 2, 48), (4, 3, 64)])
def test_cuda_peak_is_what_the_formula_says(frames, key_frames, tokens):
    """On the host shim, at sizes where padding to tiles is as large as the data."""
    cuda_shim = pytest.importorskip("cuda_shim")
    lacking = [name for name in COMPOSITIONS[vidops.hierarchical_cluster] if "cuda" not in OPS[name].rows]
    if lacking or cuda_shim.GXX is None:
        pytest.skip(f"no cuda row yet: {', '.join(lacking)}" if lacking else "needs g++")
    q, k = video(frames, key_frames, 8, tokens, 16, 3)
    with cuda_shim.installed(cuda_shim.load(cuda_shim.build())):
        peak, details = _host_peak(q, k, "cuda")
    first, *_, last = details.level_sizes
    predicted = peak_bytes(q.shape, k.shape, 2, backend="cuda", leaders=first, clusters=last)
    assert 0.4 * predicted <= peak <= predicted
