"""VideoViT and VideoSwin of `vidops.models`, which prune by themselves: a patch sets their `r`, and resets it."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vidops.patching._patch import Family, Options, Patch, PatchError
from vidops.patching._swap import PATCH, restore

Counts = tuple[tuple[int, ...], float]  # tokens and GMAC, as in a report


def _video_vit(config: Any, r: int) -> Counts:
    from vidops.models.sta import gflops, tokens_after

    return (config.tokens, *tokens_after(config, r)), gflops(config, r)


def _video_swin(config: Any, r: int) -> Counts:
    from vidops.models.video_swin import gflops

    grids = [config.grid(stage) for stage in range(len(config.depths))]
    tokens = (math.prod(grid) - grid[0] * drop for grid, drop in zip(grids, config.drops(r), strict=True))
    return tuple(tokens), gflops(config, r)


COUNTS = {"VideoViT": _video_vit, "VideoSwin": _video_swin}


class ModelPatch(Patch):
    def __init__(self, kind: str, r: Any, layers: tuple[str, ...], target: nn.Module, options: Options) -> None:
        super().__init__(target, f"vidops {kind}", options, (), "clip")
        self.layers = layers
        self._counts = COUNTS[kind]
        self._target: Any = target
        self._wanted = r
        self._original = 0
        try:
            self._counts(self._target.config, r)
        except ValueError as error:
            raise PatchError(str(error)) from error

    @property
    def r(self) -> Any:
        return self._target.r

    def set_r(self, value: Any) -> None:
        self._target.r = value

    def tokens(self) -> tuple[int, ...]:
        return self._counts(self._target.config, self.r)[0]

    def gmacs(self, unpatched: bool) -> float:
        return self._counts(self._target.config, 0 if unpatched else self.r)[1]

    def apply(self, root: nn.Module) -> None:
        self._original, self._target.r = self._target.r, self._wanted
        if root is self._target:
            vars(root)[PATCH] = self
        else:
            super().apply(root)

    def remove(self, root: nn.Module) -> None:
        self._target.r = self._original
        restore(root)


def _kind(module: nn.Module) -> str | None:
    for cls in type(module).__mro__:
        if cls.__name__ in COUNTS and cls.__module__.startswith("vidops.models."):
            return cls.__name__
    return None


def _matches(module: nn.Module) -> bool:
    return _kind(module) is not None


def _build(root: nn.Module, target: Any, r: Any, options: Options) -> Patch:
    kind = _kind(target)
    assert kind is not None
    if options.method == "tome":
        raise PatchError(f"{kind} prunes by itself, and by method 'sta' only")
    reason = "the model has its own"
    options.refuse(kind, proportional="nothing is merged", num_frames=reason, clip_size=reason, backend=reason)
    place = next(name for name, module in root.named_modules() if module is target)
    inner = (
        [f"blocks.{block}" for block in target.config.prune_blocks]
        if kind == "VideoViT"
        else [f"backbone.layers.{stage}" for stage in range(1, len(target.config.depths))]
    )
    layers = tuple(f"{place}.{name}" if place else name for name in inner)
    return ModelPatch(kind, r, layers, target, options)


STA_MODEL = Family("VideoViT, VideoSwin (vidops.models)", _matches, _build)
