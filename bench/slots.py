"""Slot attention at published shapes against the public algorithm in eager PyTorch, the same compiled, and the module
of the package `slot-attention` where that is installed and has the variant.

``python bench/slots.py [rounds]``: interleaved medians of one-thread CPU time, the error against float64 and the peak
memory of a call beside them; the forward without gradients, then forward and backward.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peers import SlotForm, eager_slots, lucidrains_slots

import vidops
from vidops import _native

ITERS = 3
LIMIT = 2e-5
ZERO = 1e-12  # of the largest entry: a gradient that float64 leaves no larger than its own rounding


@dataclass(frozen=True)
class Workload:
    name: str
    batch: int
    tokens: int
    width: int
    slots: int
    hidden: int  # of the MLP
    gru: bool = True
    bilevel: bool = False
    seed: int = 0  # one that leaves no unit of the MLP within float32's rounding of ReLU's kink, in any iteration


WORKLOADS = (
    Workload("SMTC, B 8", 8, 256, 384, 16, 384, gru=False, bilevel=True),
    Workload("SMTC, B 32", 32, 256, 384, 16, 384, gru=False, bilevel=True),
    Workload("Locatello, N 4096", 4, 4096, 64, 7, 128),
    Workload("Locatello, N 16384", 2, 16384, 64, 11, 128),
    Workload("DINOSAUR", 8, 784, 256, 24, 1024, seed=3),
    Workload("lucidrains", 2, 1024, 512, 5, 512),
)


@dataclass(frozen=True)
class Case:
    """Leaves, and the gradient that reaches the slots."""

    workload: Workload
    inputs: torch.Tensor
    slots: torch.Tensor
    params: vidops.SlotParams
    grad: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        return [self.inputs, self.slots, *(t for t in vars(self.params).values() if t is not None)]


def case(w: Workload) -> Case:
    """Tokens around as many centres as there are slots, so that the slots come apart; weights of a fresh module."""
    g = torch.Generator().manual_seed(w.seed)
    centres = torch.randn(w.batch, w.slots, w.width, generator=g)
    owner = torch.randint(w.slots, (w.batch, w.tokens, 1), generator=g).expand(-1, -1, w.width)
    inputs = centres.gather(1, owner) + 0.5 * torch.randn(w.batch, w.tokens, w.width, generator=g)
    slots, grad = (torch.randn(w.batch, w.slots, w.width, generator=g) for _ in range(2))
    shapes = {"q": (w.width, w.width), "k": (w.width, w.width), "v": (w.width, w.width)}
    weights = {f"{name}_weight": shape for name, shape in shapes.items()}
    weights |= {"mlp_weight1": (w.hidden, w.width), "mlp_weight2": (w.width, w.hidden)}
    biases = {"q_bias": w.width, "k_bias": w.width, "v_bias": w.width, "mlp_bias1": w.hidden, "mlp_bias2": w.width}
    if w.gru:
        weights |= {"gru_weight_ih": (3 * w.width, w.width), "gru_weight_hh": (3 * w.width, w.width)}
        biases |= {"gru_bias_ih": 3 * w.width, "gru_bias_hh": 3 * w.width}
    made = {name: torch.randn(shape, generator=g) * shape[1] ** -0.5 for name, shape in weights.items()}
    made |= {name: 0.1 * torch.randn(size, generator=g) for name, size in biases.items()}
    for norm in ("norm_input", "norm_slots", "norm_mlp"):
        made[f"{norm}_weight"] = 1 + 0.1 * torch.randn(w.width, generator=g)
        made[f"{norm}_bias"] = 0.1 * torch.randn(w.width, generator=g)
    for leaf in (inputs, slots, *made.values()):
        leaf.requires_grad_(True)
    return Case(w, inputs, slots, vidops.SlotParams(**made), grad)


def in_float64(c: Case) -> Case:
    def wide(t: torch.Tensor) -> torch.Tensor:
        return t.detach().double().requires_grad_(t.requires_grad)

    params = {name: None if t is None else wide(t) for name, t in vars(c.params).items()}
    return Case(c.workload, wide(c.inputs), wide(c.slots), vidops.SlotParams(**params), c.grad.double())


def native(
    inputs: torch.Tensor, slots: torch.Tensor, params: vidops.SlotParams, iters: int, bilevel: bool
) -> torch.Tensor:
    mode = "bilevel" if bilevel else "full"
    return vidops.slot_attention(inputs, slots, params, iters=iters, grad_mode=mode, backend="cpu")


def forms(w: Workload) -> dict[str, SlotForm | str]:
    """What runs a workload, or why it does not."""
    # Else a workload counts against the limit of recompilations of the one before, beyond which code stays eager.
    torch.compiler.reset()
    public = lucidrains_slots(w.hidden) if w.gru and not w.bilevel else "the package has no such variant"
    return {
        "eager": eager_slots,
        "eager+compile": torch.compile(eager_slots, dynamic=False),
        "lucidrains": public,
        "cpu": native,
    }


Results = list[torch.Tensor]


def forward(form: SlotForm, c: Case) -> Results:
    with torch.no_grad():
        return [form(c.inputs, c.slots, c.params, ITERS, c.workload.bilevel)]


def training(form: SlotForm, c: Case) -> Results:
    """The slots, and the gradient of every leaf."""
    out = form(c.inputs, c.slots, c.params, ITERS, c.workload.bilevel)
    return [out.detach(), *torch.autograd.grad(out, c.leaves(), c.grad)]


PASSES = {"forward": forward, "forward+backward": training}


def variants(c: Case, kind: str) -> dict[str, Callable[[], Results]]:
    return {
        name: functools.partial(PASSES[kind], form, c)
        for name, form in forms(c.workload).items()
        if not isinstance(form, str)
    }


def exact(c: Case, kind: str) -> Results:
    return PASSES[kind](eager_slots, in_float64(c))


def error(got: Results, want: Results) -> float:
    """The largest over all results, each relative to its largest entry.

    What moves every slot's query alike (`q_bias`, `norm_slots_bias`) leaves the softmax over slots as it is, so that
    its gradient is zero but for rounding: relative to the largest entry of all results.
    """
    largest = max(float(b.abs().max()) for b in want)
    errors = []
    for a, b in zip(got, want, strict=True):
        scale = float(b.abs().max())
        scale = scale if scale > ZERO * largest else largest
        errors.append((a.double() - b).abs().max() / scale)
    return float(torch.stack(errors).max())


def _memory(name: str) -> float:
    """MiB of this process, from /proc."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024


def added_peak(call: Callable[[], object]) -> float:
    """MiB that a warm call adds, at its peak, to what the process holds; scratch of native code counts too, and is
    given back before, where a thread keeps it for its next call."""
    call()
    gc.collect()
    _native.C.slot_iterations_release_cpu()
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed before, and not given back, would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _memory("VmRSS")
    call()
    return _memory("VmHWM") - before


def main(arguments: list[str]) -> int:
    from ratios import compare

    torch.set_num_threads(1)
    rounds = int(arguments[0]) if arguments else 7
    failures = 0
    print(f"{'slot attention':18} {'pass':16} {'variant':14} {'CPU ms':>9} {'eager/x':>8} {'error':>9} {'peak MiB':>9}")
    for w in WORKLOADS:
        c = case(w)
        for kind in PASSES:
            calls, want = variants(c, kind), exact(c, kind)
            errors = {name: error(call(), want) for name, call in calls.items()}  # warms up and compiles too
            times = compare(calls, rounds)
            for name, call in calls.items():
                ok = errors[name] <= LIMIT
                failures += not ok
                shown = f"{times[name] * 1e3:9.4g} {times['eager'] / times[name]:8.2f}" if ok else f"{'FAILED':>18}"
                shown += f" {errors[name]:9.1e} {added_peak(call):9.1f}"
                print(f"{w.name:18} {kind:16} {name:14} {shown}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
