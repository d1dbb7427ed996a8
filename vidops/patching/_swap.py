"""Classes of live modules exchanged for subclasses, and the taps that hand out keys: all that a patch puts in."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

# What a patch leaves in a module's __dict__; neither is a parameter, buffer or submodule, so no state dict sees them.
PATCH, SITE = "_vidops_patch", "_vidops_site"
# On a tensor of tokens that were merged: how many each stands for. It travels with the tensor rather than in the model,
# so that threads, replicas and checkpointed layers that run again all find their own.
SIZE = "_vidops_size"

if TYPE_CHECKING:
    Mixed = nn.Module
else:
    Mixed = object


def _revive(base: type, mixin: type) -> Any:
    cls: Any = derived(base, mixin)
    return cls.__new__(cls)


class Swapped(Mixed):
    """Marks the classes that `derived` makes. They are copied and pickled by their two parents."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        found = super().__reduce_ex__(max(protocol, 2))
        assert isinstance(found, tuple)
        return _revive, (vars(cls)["_vidops_base"], vars(cls)["_vidops_mixin"]), *found[2:]


@functools.cache
def derived(base: type, mixin: type) -> type:
    """A subclass of `base` with what `mixin` overrides, under the name of `base`.

    The name stays because transformers looks up what it records, and what it saves as the architecture, by it.
    """
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), names | {"_vidops_base": base, "_vidops_mixin": mixin})


def swap(module: nn.Module, mixin: type) -> None:
    module.__class__ = derived(type(module), mixin)


def restore(module: nn.Module) -> None:
    if isinstance(module, Swapped):
        module.__class__ = vars(type(module))["_vidops_base"]
    for name in (PATCH, SITE):
        vars(module).pop(name, None)


class Tap:
    """A forward hook that keeps what its module puts out until it is taken, for each thread its own."""

    def __init__(self) -> None:
        self._found: dict[int, torch.Tensor] = {}

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._found[_thread()] = output

    def take(self) -> torch.Tensor | None:
        return self._found.pop(_thread(), None)

    def taken(self) -> torch.Tensor:
        found = self.take()
        if found is None:
            raise RuntimeError("the projection of keys did not run: its module was replaced; unpatch, then patch again")
        return found


def _thread() -> int:
    # Traced code has no threads: there a put and its take are resolved in the graph.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
