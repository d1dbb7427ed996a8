"""What the command lines share: a parser whose errors are one line, and options that are checked as they are read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

import torch


class UsageError(ValueError):
    """Options that make no sense, alone or together; the text is one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def number(text: str) -> float:
    """A reader of finite numbers of at least 0, for `type=`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def whole(low: int, high: int) -> Callable[[str], int]:
    """A reader of whole numbers in that range, for `type=`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return value

    return read


def device_of(name: str | None) -> torch.device:
    """The device of that name, default a card if there is one; UsageError when it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
