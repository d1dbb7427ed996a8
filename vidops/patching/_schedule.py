"""How many tokens go where: the schedules of both methods, their checks, and what they save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vidops.ops import _checks

CALLS = 3  # of semantic-aware temporal accumulation


class PatchError(ValueError):
    """A model that cannot be patched, or not so; the text says what was looked for, or which value does not fit."""


@dataclass(frozen=True)
class Sizes:
    """A transformer whose blocks have one width; `frames` sequences of `prefix + tokens`, or one of all frames.

    `tokens` are those of one (token-)frame, `prefix` the class and register tokens before them, `patch` the values of
    one patch. With `joint` all frames attend to each other; without, each frame is a sequence of its own.
    """

    depth: int
    dim: int
    hidden: int
    frames: int
    tokens: int
    patch: int
    prefix: int = 0
    joint: bool = True

    @property
    def length(self) -> int:
        """Tokens of a sequence that enters the first block."""
        return self.prefix + self.tokens * (self.frames if self.joint else 1)

    def gmacs(self, attending: Sequence[int], leaving: Sequence[int]) -> float:
        """Multiply-adds of a clip in units of 10^9: patches, projections, attention, MLPs and norms.

        `attending` are the tokens of a sequence in each block's attention, `leaving` those in its MLP. The count is
        that of Table 2 of Ding et al., ICCV 2023.
        """
        dim, sequences = self.dim, 1 if self.joint else self.frames
        total = self.frames * self.tokens * self.patch * dim
        for n, m in zip(attending, leaving, strict=True):
            block = n * 4 * dim**2 + 2 * n**2 * dim + m * 2 * dim * self.hidden + 5 * (n + m) * dim
            total += sequences * block
        return total / 1e9


@dataclass(frozen=True)
class Stage:
    """One call of pruning: after `block`, each of `groups` groups of `tokens` tokens loses `drop`."""

    block: int
    groups: int
    tokens: int
    drop: int
    reverse: bool


def prune_blocks(depth: int) -> tuple[int, ...]:
    if depth < CALLS:
        raise PatchError(f"method 'sta': expected at least {CALLS} blocks, after which tokens go; got {depth}")
    return tuple(call * depth // CALLS for call in range(CALLS))


def sta_stages(sizes: Sizes, r: Any) -> tuple[Stage, ...]:
    """The published schedule: groups of 1, 2 and 4 frames, each losing `r`, every second call from the last one.

    Where frames do not attend to each other they must stay equally long, so groups remain single frames there and lose
    r, r / 2 and r / 4: the same number of tokens per frame, rounded down.
    """
    r = _checks.integer("r", r, 0)
    if sizes.joint and sizes.frames % 4:
        raise PatchError(
            f"method 'sta': expected a multiple of 4 token-frames, which form groups of 1, 2 and 4; got {sizes.frames}"
        )
    found, tokens = [], sizes.tokens
    for call, block in enumerate(prune_blocks(sizes.depth)):
        groups = sizes.frames >> call if sizes.joint else sizes.frames
        drop = r if sizes.joint else r >> call
        tokens = tokens * 2 if sizes.joint and call else tokens
        if drop >= tokens:
            raise PatchError(
                f"r: stage {call + 1} (after block {block}) drops {drop} of every group's tokens, expected fewer than "
                f"the {tokens} that it has; got r = {r}"
            )
        found.append(Stage(block, groups, tokens, drop, call % 2 == 1))
        tokens -= drop
    return tuple(found)


def sta_tokens(sizes: Sizes, stages: Sequence[Stage]) -> tuple[int, ...]:
    """Tokens of a sequence that enter the first block, and after each stage."""
    groups = [stage.groups if sizes.joint else 1 for stage in stages]
    after = [g * (s.tokens - s.drop) + sizes.prefix for g, s in zip(groups, stages, strict=True)]
    return (sizes.length, *after)


def sta_gmacs(sizes: Sizes, stages: Sequence[Stage]) -> float:
    left = dict(zip([stage.block for stage in stages], sta_tokens(sizes, stages)[1:], strict=True))
    n, lengths = sizes.length, []
    for block in range(sizes.depth):
        lengths.append(n)
        n = left.get(block, n)
    return sizes.gmacs(lengths, lengths)


def tome_drops(sizes: Sizes, r: Any) -> tuple[int, ...]:
    """Tokens to merge in each block. `r` is an integer, a list of one per block, or a pair (r, inflect): linear from
    r (1 - inflect) in the first block to r (1 + inflect) in the last, rounded towards zero.

    A block merges at most half of the tokens that it may; what is asked beyond that is not done, as in the paper. More
    than half of the tokens that enter the model is an error.
    """
    depth = sizes.depth
    if isinstance(r, list):
        if len(r) != depth:
            raise PatchError(f"r: expected {depth} integers, one for each block; got {len(r)}")
        wanted = [_checks.integer(f"r[{block}]", value, 0) for block, value in enumerate(r)]
    elif isinstance(r, tuple):
        if len(r) != 2:
            raise PatchError(f"r: expected an integer, a list of {depth}, or a pair (r, inflect); got {r!r}")
        mean, inflect = _checks.integer("r", r[0], 0), _checks.number("inflect", r[1])
        if not -1 <= inflect <= 1:
            raise PatchError(f"inflect: expected a number from -1 to 1, got {inflect}")
        start, step = mean * (1 - inflect), 2 * mean * inflect / max(depth - 1, 1)
        wanted = [int(start + step * block) for block in range(depth)]
    else:
        wanted = [_checks.integer("r", r, 0)] * depth
    first = n = sizes.length - sizes.prefix
    found = []
    for block, value in enumerate(wanted):
        if value > first // 2:
            raise PatchError(f"r: block {block} merges at most half of {first} tokens, got {value}")
        drop = min(value, n // 2)
        found.append(drop)
        n -= drop
    return tuple(found)


def tome_tokens(sizes: Sizes, drops: Sequence[int]) -> tuple[int, ...]:
    """Tokens of a sequence that enter the first block, and after each."""
    found = [sizes.length]
    for drop in drops:
        found.append(found[-1] - drop)
    return tuple(found)


def tome_gmacs(sizes: Sizes, drops: Sequence[int]) -> float:
    tokens = tome_tokens(sizes, drops)
    return sizes.gmacs(tokens[:-1], tokens[1:])
