"""What the ops are compared with: the public algorithm in eager PyTorch, and libraries that compute the same thing.

The public algorithms are written from their descriptions (clustering: Ding et al., ECCV 2024, arXiv 2311.17893), not
sped up and not slowed down. Libraries take part only where their result is comparable entry by entry: scipy's entropies
and a scikit-learn metric for the distance, scipy's sparse product for the neighbour mean. Linkage clustering (scipy,
fastcluster, scikit-learn) and Jensen-Shannon `cdist` answer other questions and are left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

import vidops


def eager_map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1).mean(0)


def eager_distance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Two entropies and two products, as the public code of the paper forms it."""
    own = (p * p.log()).sum(-1)[:, None] + (q * q.log()).sum(-1)[None]
    return own - p @ q.log().T - (q @ p.log().T).T


def public_walk(distance: torch.Tensor, tau: float) -> torch.Tensor:
    """The public loop, owners only.

    Every row costs a Python iteration that reads its flag back to the host. A leader thresholds its row of the
    distance, takes away who is absorbed, marks the rest, and writes their owner through a boolean index, whose
    size is a second read.
    """
    absorbed = torch.zeros(len(distance), dtype=torch.bool, device=distance.device)
    owner = torch.zeros(len(distance), dtype=torch.int64, device=distance.device)
    for i in range(len(distance)):
        if absorbed[i]:
            continue
        members = (distance[i] <= tau) & ~absorbed
        absorbed = absorbed | members
        owner[members] = i
    return owner


def lean_walk(near: torch.Tensor) -> torch.Tensor:
    """The same with the relation thresholded beforehand and flags updated in place: the least a loop can do."""
    free = torch.ones(len(near), dtype=torch.bool)
    owner = torch.zeros(len(near), dtype=torch.int64)
    for i in range(len(near)):
        if free[i]:
            members = near[i] & free
            owner[members] = i
            free &= ~members
    return owner


def eager_greedy(x: torch.Tensor, distance: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The public loop with what it is for: each leader also takes the mean of its members' rows."""
    absorbed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    owner = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    means = []
    for i in range(len(x)):
        if absorbed[i]:
            continue
        members = (distance[i] <= tau) & ~absorbed
        absorbed = absorbed | members
        owner[members] = i
        means.append(x[members].mean(0))
    return owner, torch.stack(means)


def eager_mean(p: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    total = near.float() @ p
    return total / total.sum(-1, keepdim=True)


def eager_window(q: torch.Tensor, k: torch.Tensor, tau: float) -> torch.Tensor:
    p = eager_map(q, k)
    mean = eager_mean(p, eager_distance(p, p) <= tau)
    return eager_greedy(mean, eager_distance(mean, mean), tau)[0]


Peer = Callable[[], torch.Tensor] | str
"""A call, or why there is none."""


def _missing(*modules: str) -> str | None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            return f"{module.split('.')[0]} is not installed"
    return None


def scipy_distance(p: torch.Tensor) -> Peer:
    """sum rel_entr(p_i, p_j) + rel_entr(p_j, p_i), a row against all at a time."""
    if why := _missing("scipy.special"):
        return why
    import numpy as np
    from scipy.special import rel_entr

    rows = p.numpy()

    def call() -> torch.Tensor:
        return torch.from_numpy(np.stack([(rel_entr(x, rows) + rel_entr(rows, x)).sum(-1) for x in rows]))

    return call


def sklearn_distance(p: torch.Tensor) -> Peer:
    """`pairwise_distances` with the measure as a callable: there is no built-in one that agrees."""
    if why := _missing("sklearn.metrics"):
        return why
    import numpy as np
    from sklearn.metrics import pairwise_distances

    both = np.concatenate([p.numpy(), p.log().numpy()], 1)
    half = p.shape[1]

    def measure(x: np.ndarray, y: np.ndarray) -> float:
        return (x[:half] - y[:half]) @ (x[half:] - y[half:])

    return lambda: torch.from_numpy(pairwise_distances(both, metric=measure))


def scipy_mean(p: torch.Tensor, near: torch.Tensor) -> Peer:
    if why := _missing("scipy.sparse"):
        return why
    from scipy.sparse import csr_array

    relation, rows = csr_array(near.numpy()).astype(p.numpy().dtype), p.numpy()

    def call() -> torch.Tensor:
        total = relation @ rows
        return torch.from_numpy(total / total.sum(-1, keepdims=True))

    return call


SlotForm = Callable[[torch.Tensor, torch.Tensor, vidops.SlotParams, int, bool], torch.Tensor]


def eager_slots(
    inputs: torch.Tensor, slots: torch.Tensor, p: vidops.SlotParams, iters: int, bilevel: bool
) -> torch.Tensor:
    """Slot attention as its public modules form it (Locatello et al., NeurIPS 2020, arXiv 2006.15055): tokens
    projected once, a map of slots x tokens an iteration, all of it kept by autograd.

    `bilevel` runs all iterations but the last without gradients; that of the last one's slots passes to `slots`.
    """
    x = F.layer_norm(inputs, inputs.shape[-1:], p.norm_input_weight, p.norm_input_bias)
    keys, values = F.linear(x, p.k_weight, p.k_bias), F.linear(x, p.v_weight, p.v_bias)
    if not bilevel:
        for _ in range(iters):
            slots = _eager_slot_step(keys, values, slots, p)
        return slots
    moved = slots.detach()
    with torch.no_grad():
        for _ in range(iters - 1):
            moved = _eager_slot_step(keys, values, moved, p)
    return _eager_slot_step(keys, values, moved + slots - slots.detach(), p)


def lucidrains_slots(hidden: int) -> SlotForm | str:
    """The module of the package `slot-attention`, its parameters replaced by those of the call and its noise by zero;
    or why it does not take part."""
    if why := _missing("slot_attention"):
        return why
    from slot_attention import SlotAttention

    def call(
        inputs: torch.Tensor, slots: torch.Tensor, p: vidops.SlotParams, iters: int, bilevel: bool
    ) -> torch.Tensor:
        with torch.device("meta"):
            module = SlotAttention(slots.shape[1], slots.shape[2], iters, hidden_dim=hidden)
        state: dict[str, torch.Tensor] = {"slots_mu": slots, "slots_logsigma": torch.full_like(slots, -torch.inf)}
        for name, short in _PACKAGE_NAMES.items():
            for part in ("weight", "bias"):
                state[f"{name}.{part}"] = getattr(p, f"{short}_{part}")
        for name, short in (("mlp.0", "1"), ("mlp.2", "2")):
            for part in ("weight", "bias"):
                state[f"{name}.{part}"] = getattr(p, f"mlp_{part}{short}")
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            state[f"gru.{part}"] = getattr(p, f"gru_{part}")
        return torch.func.functional_call(module, state, (inputs,))

    return call


_PACKAGE_NAMES = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "norm_input": "norm_input",
    "norm_slots": "norm_slots",
    "norm_pre_ff": "norm_mlp",
}


def _eager_slot_step(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, p: vidops.SlotParams
) -> torch.Tensor:
    width = slots.shape[-1]
    normed = F.layer_norm(slots, (width,), p.norm_slots_weight, p.norm_slots_bias)
    q = F.linear(normed, p.q_weight, p.q_bias)
    attn = (torch.einsum("bid,bjd->bij", q, keys) * q.shape[-1] ** -0.5).softmax(1) + 1e-8
    update = torch.einsum("bjd,bij->bid", values, attn / attn.sum(-1, keepdim=True))
    if p.gru_weight_ih is None:
        slots = slots + update
    else:
        gates = p.gru_weight_ih, p.gru_weight_hh, p.gru_bias_ih, p.gru_bias_hh
        slots = torch.gru_cell(update.flatten(0, 1), slots.flatten(0, 1), *gates).view_as(slots)
    normed = F.layer_norm(slots, (width,), p.norm_mlp_weight, p.norm_mlp_bias)
    return slots + F.linear(F.relu(F.linear(normed, p.mlp_weight1, p.mlp_bias1)), p.mlp_weight2, p.mlp_bias2)
