"""``vidops segment VIDEO -o OUT``: a video in, masks and pictures out. See docs/segment.md."""

from vidops.segment.command import add_arguments, main, run

__all__ = ["add_arguments", "main", "run"]
