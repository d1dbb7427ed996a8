"""What the command lines do with whatever goes wrong: one line on stderr, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

import vidops
from vidops import assets
from vidops._options import UsageError
from vidops._output import OutputError
from vidops.checkpoints import CheckpointError
from vidops.evaluation import MissingDependencyError
from vidops.video import VideoError

R = TypeVar("R")


def failed(command: str, message: str) -> int:
    print(f"vidops {command}: {message}", file=sys.stderr)
    return 2


def guarded(command: str, output: str, advice: str, work: Callable[[], R]) -> R | int:
    """What `work` returns, or 2 after one line when an input or an option of `command` cannot be used.

    Args:
        command: as typed after "vidops".
        output: the folder that is written, named when a disk is full.
        advice: what needs less memory, should it run out.
    """
    try:
        return work()
    except (
        UsageError,
        VideoError,
        OutputError,
        assets.AssetError,
        MissingDependencyError,
        vidops.BackendError,
        CheckpointError,
    ) as error:
        return failed(command, str(error).splitlines()[0])
    except (torch.OutOfMemoryError, MemoryError):
        return failed(command, f"out of memory; {advice}")
    except OSError as error:
        # Reading is covered above: what is left is a full or vanished disk while writing.
        return failed(command, f"{output}: {error.strerror or error}")
