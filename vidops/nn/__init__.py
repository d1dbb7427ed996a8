"""Slot attention modules over `vidops.slot_attention`, with the parameter names of their public checkpoints."""

from vidops.nn.adaptive import AdaptiveSlotAttention, AdaptiveSlotWrapper
from vidops.nn.learned_queries import LearnedQuerySlotAttention, QueryOptimizedSlotAttention, TwoStageSlotAttention
from vidops.nn.savi import SlotCorrector, SlotPredictor
from vidops.nn.slot_attention import ImplicitSlotAttention, MultiHeadSlotAttention, SlotAttention

__all__ = [
    "AdaptiveSlotAttention",
    "AdaptiveSlotWrapper",
    "ImplicitSlotAttention",
    "LearnedQuerySlotAttention",
    "MultiHeadSlotAttention",
    "QueryOptimizedSlotAttention",
    "SlotAttention",
    "SlotCorrector",
    "SlotPredictor",
    "TwoStageSlotAttention",
]
