"""What the layers of a patched model share, and the report of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import vidops
from vidops.patching import _schedule
from vidops.patching._schedule import PatchError, Sizes, Stage
from vidops.patching._swap import PATCH, SITE, SIZE, Swapped, Tap, restore, swap

METHODS = ("sta", "tome")


@dataclass(frozen=True)
class PatchReport:
    """What a patch changed, and what it is expected to save.

    `model` and `family` name the class and the kind of model; `layers` are the modules that run differently, by name.
    `tokens` are those of one sequence (a `unit`: clip or image), first of the unpatched model, then after every
    stage ("sta") or block ("tome"). `gmacs` and `gmacs_unpatched` are multiply-adds of a clip (an image, for "tome" in
    a model of images) in units of 10^9.
    """

    model: str
    family: str
    method: str
    r: int | list[int] | tuple[int, float]
    layers: tuple[str, ...]
    tokens: tuple[int, ...]
    unit: str
    gmacs: float
    gmacs_unpatched: float

    @property
    def gmacs_saved(self) -> float:
        return self.gmacs_unpatched - self.gmacs

    def __str__(self) -> str:
        tokens = " -> ".join(map(str, dict.fromkeys(self.tokens)))
        share = self.gmacs_saved / self.gmacs_unpatched
        return (
            f"{self.model} ({self.family}): {self.method}, r = {self.r}, {len(self.layers)} layers; tokens per "
            f"{self.unit} {tokens}; {self.gmacs:.3g} of {self.gmacs_unpatched:.3g} GMAC ({share:.0%} less)"
        )


class Options(NamedTuple):
    """The arguments of `patch` beside model and r; None where they were not given."""

    method: str
    proportional: bool | None
    num_frames: int | None
    clip_size: tuple[int, int, int] | None
    backend: str | None

    def refuse(self, family: str, **reasons: str) -> None:
        """An error for each option named that was given."""
        for name, reason in reasons.items():
            if getattr(self, name) is not None:
                raise PatchError(f"{name}: not an option of {family} with method {self.method!r}: {reason}")


class Change(NamedTuple):
    """One module to change: its name in the target, the class mixed in, and the module whose output holds its keys."""

    name: str
    module: nn.Module
    mixin: type
    number: int
    keys: nn.Module | None = None
    counted: bool = True  # among the layers of the report


class Site(NamedTuple):
    """What a changed module finds of the patch; `number` is that of its block or stage."""

    patch: Any
    number: int
    tap: Tap


class Root(Swapped):
    """The model that was given to `patch`."""

    @property
    def r(self) -> Any:
        return vars(self)[PATCH].r

    @r.setter
    def r(self, value: Any) -> None:
        vars(self)[PATCH].set_r(value)


class Patch:
    """A patch of one model. Making one checks everything and touches nothing, so that `apply` cannot fail."""

    r: Any

    def __init__(self, target: nn.Module, family: str, options: Options, changes: Iterable[Change], unit: str) -> None:
        self.model = type(target).__name__
        self.family = family
        self.method = options.method
        self.backend = options.backend
        self.unit = unit
        self._changes = list(changes)
        if len({change.module for change in self._changes}) < len(self._changes):
            raise PatchError(f"{self.model}: blocks share modules, which then cannot differ in what they do")
        self._handles: list[RemovableHandle] = []
        self.layers = tuple(change.name for change in self._changes if change.counted)

    def set_r(self, value: Any) -> None:
        raise NotImplementedError

    def tokens(self) -> tuple[int, ...]:
        raise NotImplementedError

    def gmacs(self, unpatched: bool) -> float:
        raise NotImplementedError

    def report(self) -> PatchReport:
        return PatchReport(
            model=self.model,
            family=self.family,
            method=self.method,
            r=list(self.r) if isinstance(self.r, list) else self.r,
            layers=self.layers,
            tokens=self.tokens(),
            unit=self.unit,
            gmacs=self.gmacs(False),
            gmacs_unpatched=self.gmacs(True),
        )

    def apply(self, root: nn.Module) -> None:
        for change in self._changes:
            tap = Tap()
            if change.keys is not None:
                self._handles.append(change.keys.register_forward_hook(tap))
            swap(change.module, change.mixin)
            vars(change.module)[SITE] = Site(self, change.number, tap)
        self._changes = []
        swap(root, Root)
        vars(root)[PATCH] = self

    def remove(self, root: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        for module in root.modules():
            restore(module)


class StaPatch(Patch):
    """Semantic-aware temporal accumulation after three blocks."""

    stages: tuple[Stage, ...]

    def __init__(self, sizes: Sizes, r: Any, *args: Any) -> None:
        super().__init__(*args)
        self.sizes = sizes
        self.set_r(r)

    def set_r(self, value: Any) -> None:
        self.stages = _schedule.sta_stages(self.sizes, value)
        self.r = value

    def tokens(self) -> tuple[int, ...]:
        return _schedule.sta_tokens(self.sizes, self.stages)

    def gmacs(self, unpatched: bool) -> float:
        return _schedule.sta_gmacs(self.sizes, _schedule.sta_stages(self.sizes, 0) if unpatched else self.stages)

    def prune(self, x: torch.Tensor, metric: torch.Tensor, stage: Stage) -> torch.Tensor:
        """Tokens (B, T N, D) and their keys, averaged over heads -> (B, T K, D)."""
        # Under autocast the keys are halves and the tokens are not.
        pruned = vidops.sta_prune(
            x, metric.to(x.dtype), stage.groups, stage.drop, stage.reverse, backend=self.backend
        )
        return pruned.x


class TomePatch(Patch):
    """Token merging between attention and MLP of every block."""

    drops: tuple[int, ...]

    def __init__(self, sizes: Sizes, r: Any, proportional: bool, *args: Any) -> None:
        super().__init__(*args)
        self.sizes = sizes
        self.proportional = proportional
        self.set_r(r)

    def set_r(self, value: Any) -> None:
        self.drops = _schedule.tome_drops(self.sizes, value)
        self.r = list(value) if isinstance(value, list) else value

    def tokens(self) -> tuple[int, ...]:
        return _schedule.tome_tokens(self.sizes, self.drops)

    def gmacs(self, unpatched: bool) -> float:
        return _schedule.tome_gmacs(self.sizes, [0] * self.sizes.depth if unpatched else self.drops)

    def active(self) -> bool:
        return any(self.drops)

    def sizes_of(self, x: torch.Tensor, block: int) -> torch.Tensor | None:
        """How many tokens each that enters a block stands for (B, N, 1); None before the first merge."""
        found = getattr(x, SIZE, None)
        if found is None and any(self.drops[:block]):
            raise RuntimeError(
                f"block {block}: tokens were merged before it, but how many each stands for was lost on the way. "
                "Something between the blocks made a new tensor: a hook, or checkpointing with use_reentrant=True "
                "(use_reentrant=False keeps it)"
            )
        return found

    def merge(
        self, x: torch.Tensor, metric: torch.Tensor, size: torch.Tensor | None, block: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens (B, N, D), their keys, averaged over heads, and sizes -> those left and theirs."""
        r = self.drops[block]
        if r == 0:
            return x, size
        metric = metric.to(x.dtype)
        prefix = self.sizes.prefix
        if prefix <= 2:
            merged = vidops.token_merge(
                x, metric, r, size, class_token=prefix > 0, distill_token=prefix > 1, backend=self.backend
            )
            return merged.x, merged.size
        # The op protects two tokens; where there are registers as well, it sees none of them.
        if size is None:
            size = x.new_ones(*x.shape[:2], 1)
        merged = vidops.token_merge(x[:, prefix:], metric[:, prefix:], r, size[:, prefix:], backend=self.backend)
        return torch.cat([x[:, :prefix], merged.x], 1), torch.cat([size[:, :prefix], merged.size], 1)

    def carry(self, x: torch.Tensor, size: torch.Tensor | None, block: int) -> torch.Tensor:
        """The tokens that leave a block, with their sizes for the next."""
        if size is not None and block + 1 < self.sizes.depth:
            setattr(x, SIZE, size)
        return x


def site_of(module: nn.Module) -> Site:
    return vars(module)[SITE]


def mro_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def lookup(module: nn.Module, path: str) -> Any:
    """A nested attribute; PatchError, naming class and path, where there is none."""
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            raise PatchError(f"{type(module).__name__}: looked for {path}, but {type(found).__name__} has no {name}")
        found = getattr(found, name)
    return found


Build = Callable[[nn.Module, nn.Module, Any, Options], Patch]


class Family(NamedTuple):
    """A kind of model: class and origin, for messages; is a module one; its patch (of root, target, r, options)."""

    looked_for: str
    matches: Callable[[nn.Module], bool]
    build: Build
