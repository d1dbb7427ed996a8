"""``vidops train-slots``: objects of moving pictures, found by slot attention trained from scratch."""

from vidops.train_slots.command import main

__all__ = ["main"]
