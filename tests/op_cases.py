"""One small call of every op, forward and backward, in the form of its torch op: what generic checks run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matrix import INTERPRETED, device_for, heads, maps, skip_missing

import vidops
from vidops._registry import OPS

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class OpCase:
    """Arguments of ``torch.ops.vidops.<name>``: tensors first, as every schema has them, then the scalars."""

    op: str
    gradient: bool
    tensors: Tensors
    scalars: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.op + "_backward" if self.gradient else self.op

    def repeats_bits(self, backend: str) -> bool:
        """Whether strides, alignment and the number of threads leave every bit of the result alone.

        Not where a BLAS is called, which may split its sums by any of them: in the reference, in the backward of
        `symmetric_kl` and on the slot side of `slot_attention`, which are PyTorch on every backend.
        """
        return backend != "reference" and self.name != "symmetric_kl_backward" and self.op != "slot_attention"

    def repeats_layouts(self, backend: str) -> bool:
        """Whether strides and alignment alone leave every bit alone: compiled Triton makes a kernel for each kind of
        them, and each may add in an order of its own."""
        return self.repeats_bits(backend) and (backend != "triton" or INTERPRETED)

    def through_torch(self, backend: str, tensors: Sequence[torch.Tensor] | None = None) -> Tensors:
        """The result of the torch op, with other tensors in place of the case's if given."""
        call = getattr(torch.ops.vidops, self.name).default
        return _tuple(call(*(self.tensors if tensors is None else tensors), *self.scalars, backend))

    def implementation(self, backend: str) -> Callable[..., Any]:
        row = OPS[self.op].rows[backend]
        found = row.backward if self.gradient else row.forward
        assert found is not None
        return found

    def direct(self, backend: str, tensors: Sequence[torch.Tensor]) -> Tensors:
        """The result of the backend's own function, without torch's dispatcher in between."""
        return _tuple(self.implementation(backend)(*tensors, *self.scalars))


def _tuple(result: Any) -> Tensors:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


# The torch ops, and once more those whose kernels read and write half precision: alignment and strides decide how a
# compiled kernel moves them, which is nothing to the interpreter.
READS_HALVES = ("assign_clusters", "bipartite_match", "label_propagation", "sta_prune", "sta_score")
HALVES = () if INTERPRETED else ("bfloat16", "float16")
NAMES = [
    *sorted(OPS),
    *sorted(name + "_backward" for name, op in OPS.items() if op.backward is not None),
]
NAMES += [
    f"{name} {dtype}"
    for name in NAMES
    if "attention" in name or "tokens" in name or name in READS_HALVES
    for dtype in HALVES
]


def case(name: str, backend: str) -> OpCase:
    """The case of one of `NAMES`, its tensors on the device of `backend`; skipped where the backend lacks it."""
    name, _, dtype_name = name.partition(" ")
    op, gradient = name.removesuffix("_backward"), name.endswith("_backward")
    skip_missing(backend, op, gradient)
    dtype = getattr(torch, dtype_name or "float32")
    h, n, m = (2, 21, 37) if INTERPRETED else (3, 67, 131)
    q, k, v = (heads(2, h, size, 13, dtype=dtype, seed=i, on=backend) for i, size in enumerate((n, m, m)))
    with torch.no_grad():
        p_head, log_p_head, lse = torch.ops.vidops.attention_head_mean(q, k, 0.3, 0.0, 0, True, "reference")
        out, _, lse_v = torch.ops.vidops.video_attention(q, k, v, 0.3, 0.4, 3, True, "reference")
    p, x = maps(n, m, seed=3, on=backend), maps(5, m, seed=4, on=backend)
    adjacency = vidops.symmetric_kl_adjacency(p, 2.0, backend="reference")
    label = torch.arange(n, device=device_for(backend)) * 7 % 5
    grad_map, grad_out = heads(2, n, m, seed=5, on=backend), heads(2, h, n, 13, dtype=dtype, seed=6, on=backend)
    rows, others = torch.stack([p, p.flip(0)]), torch.stack([x, x.flip(1)])
    grad_distance = heads(2, n, 5, seed=7, on=backend)
    if op == "slot_attention":
        return OpCase(op, gradient, *_slot_attention(gradient, n, dtype, backend))
    # A grid of one row under the interpreter, of seven otherwise; the first context frame counts twice where near.
    rows_of, across = (1, n) if INTERPRETED else (7, 10)
    frame, *context = heads(4, rows_of * across, 13, dtype=dtype, seed=8, on=backend)
    soft = maps(3 * rows_of * across, 5, seed=9, on=backend).view(3, -1, 5)
    # Three groups of tokens, whose indices repeat.
    tokens, keys = heads(2, 39, 13, dtype=dtype, seed=10, on=backend), heads(2, 39, 8, dtype=dtype, seed=11, on=backend)
    index = torch.arange(2 * 17, device=tokens.device).view(2, 17) * 5 % 39
    taken = heads(2, 17, 13, dtype=dtype, seed=12, on=backend)
    keep = torch.arange(2 * 11, device=tokens.device).view(2, 11) * 3 % 35
    calls: dict[str, tuple[Tensors, tuple[Any, ...]]] = {
        "attention_head_mean": ((q, k), (0.3, 0.0, 0, True)),
        "attention_head_mean_backward": ((grad_map, q, k, lse), (0.3, 0.0, 0)),
        "video_attention": ((q, k, v), (0.3, 0.4, 3, True)),
        "video_attention_backward": ((grad_out, grad_map, q, k, v, out, lse_v), (0.3, 0.4, 3, True)),
        "symmetric_kl": ((rows, rows.log(), others, others.log()), (False,)),
        "symmetric_kl_backward": ((grad_distance, rows, rows.log(), others, others.log()), (False,)),
        "symmetric_kl_adjacency": ((p, p.log()), (2.0, True)),
        "neighbour_mean": ((adjacency, p), ()),
        "greedy_absorb": ((adjacency,), ()),
        "greedy_absorb_kl": ((p, p.log()), (2.0,)),
        "segment_mean": ((p, label), (6,)),
        "assign_clusters": ((q[1], k[1], lse[1], p_head[1, ::7], log_p_head[1, ::7]), (0.3,)),
        "assign_rows": ((p, p.log(), x, x.log()), ()),
        "label_propagation": ((frame, torch.stack(context), soft), (rows_of, across, 2.5, 4, 0.2, 1, 1)),
        "sta_score": ((tokens, keys), (3, 4, True, False)),
        "sta_prune": ((tokens, keys), (3, 4, True, False)),
        "sta_prune_backward": ((taken[:, :15].contiguous(), index[:, :15].reshape(2, 3, 5) % 13), (13,)),
        "bipartite_match": ((keys,), (True, False)),
        "gather_tokens": ((tokens, index), ()),
        "gather_tokens_backward": ((taken, index), (39,)),
        "scatter_tokens": ((taken, index), (39,)),
        "scatter_tokens_backward": ((tokens, index), ()),
        "nearest_kept": ((keep,), (5, 7)),
    }
    tensors, scalars = calls[name]
    return OpCase(op, gradient, tensors, scalars)


def slot_weights(
    din: int, d: int, hq: int, hv: int, *, dtype: torch.dtype, backend: str, seed: int = 10
) -> vidops.SlotParams:
    """Every weight there is, the update as wide as a slot."""
    shapes = {
        "norm_input_weight": (din,), "norm_input_bias": (din,), "norm_slots_weight": (d,), "norm_slots_bias": (d,),
        "q_weight": (hq, d), "q_bias": (hq,), "k_weight": (hq, din), "k_bias": (hq,), "v_weight": (hv, din),
        "v_bias": (hv,), "merge_weight": (d, hv), "merge_bias": (d,), "gru_weight_ih": (3 * d, d),
        "gru_weight_hh": (3 * d, d), "gru_bias_ih": (3 * d,), "gru_bias_hh": (3 * d,), "norm_mlp_weight": (d,),
        "norm_mlp_bias": (d,), "mlp_weight1": (2 * d, d), "mlp_bias1": (2 * d,), "mlp_weight2": (d, 2 * d),
        "mlp_bias2": (d,),
    }  # fmt: skip
    return vidops.SlotParams(
        **{
            name: heads(*shape, seed=seed + index, on=backend).mul(0.4).to(dtype)
            for index, (name, shape) in enumerate(shapes.items())
        }
    )


def _slot_attention(gradient: bool, tokens: int, dtype: torch.dtype, backend: str) -> tuple[Tensors, tuple[Any, ...]]:
    """Two heads, two groups of two slots, a soft mask of tokens and one of slots, and every weight; the LayerNorms'
    constant is so large that the rounding of a row of equal values stays small."""
    batch, slots, din, d = 2, 4, 13, 10
    options = (2, 2, 0.5, False, 2, 1e-3, False, 1e-2, 0.1, "gelu", "full", True, True)
    inputs, start = heads(batch, tokens, din, dtype=dtype, on=backend), heads(batch, slots, d, dtype=dtype, on=backend)
    token_mask = (torch.arange(batch * 2 * tokens, device=inputs.device).view(batch, 2, tokens) % 3 / 2).to(dtype)
    slot_mask = torch.tensor([[False, False, False, True]] * batch, device=inputs.device)
    weights = vars(slot_weights(din, d, 12, 8, dtype=dtype, backend=backend)).values()
    tensors, scalars = (inputs, start, *weights, token_mask, slot_mask), (*options, gradient, gradient)
    if not gradient:
        return tensors, scalars
    with torch.no_grad():
        _, dots, attn, states, record = torch.ops.vidops.slot_attention(*tensors, *scalars, "reference")
    grads = (heads(*start.shape, dtype=dtype, seed=5, on=backend), *(torch.full_like(t, 0.5) for t in (dots, attn)))
    return (*grads, states, record, *tensors), scalars


def agree(got: Tensors, want: Tensors) -> bool:
    """Equal up to the rounding that a BLAS may change with strides and threads: of sums of terms as large as the
    largest result."""
    return all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.allclose(a, b, rtol=max(1e-4, 2 * _step(a.dtype)), atol=1e-5 * _largest(b), equal_nan=True)
        for a, b in zip(got, want, strict=True)
    )


def _largest(t: torch.Tensor) -> float:
    finite = t.detach().abs().double().nan_to_num(0.0, 0.0, 0.0)
    return max(1.0, float(finite.max())) if t.numel() else 1.0


def _step(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
