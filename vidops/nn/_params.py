"""From submodules to the weights of the op."""

from __future__ import annotations

from torch import nn

from vidops.ops._slot_params import SlotParams


def mlp(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))


def params_of(
    *,
    norm_input: nn.LayerNorm,
    norm_slots: nn.LayerNorm,
    q: nn.Linear,
    k: nn.Linear,
    v: nn.Linear,
    merge: nn.Linear | None = None,
    gru: nn.GRUCell | None = None,
    mlp: tuple[nn.LayerNorm, nn.Linear, nn.Linear] | None = None,
) -> SlotParams:
    """`mlp` is its norm and its two layers."""
    norm_mlp, first, second = mlp or (None, None, None)
    return SlotParams(
        norm_input_weight=norm_input.weight,
        norm_input_bias=norm_input.bias,
        norm_slots_weight=norm_slots.weight,
        norm_slots_bias=norm_slots.bias,
        q_weight=q.weight,
        q_bias=q.bias,
        k_weight=k.weight,
        k_bias=k.bias,
        v_weight=v.weight,
        v_bias=v.bias,
        merge_weight=None if merge is None else merge.weight,
        merge_bias=None if merge is None else merge.bias,
        gru_weight_ih=None if gru is None else gru.weight_ih,
        gru_weight_hh=None if gru is None else gru.weight_hh,
        gru_bias_ih=None if gru is None else gru.bias_ih,
        gru_bias_hh=None if gru is None else gru.bias_hh,
        norm_mlp_weight=None if norm_mlp is None else norm_mlp.weight,
        norm_mlp_bias=None if norm_mlp is None else norm_mlp.bias,
        mlp_weight1=None if first is None else first.weight,
        mlp_bias1=None if first is None else first.bias,
        mlp_weight2=None if second is None else second.weight,
        mlp_bias2=None if second is None else second.bias,
    )
