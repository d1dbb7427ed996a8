"""Which tokens go where, against numbers of the papers."""

from __future__ import annotations

import pytest

from vidops.patching._schedule import (
    PatchError,
    Sizes,
    prune_blocks,
    sta_gmacs,
    sta_stages,
    sta_tokens,
    tome_drops,
    tome_gmacs,
    tome_tokens,
)

VIT = Sizes(depth=24, dim=1024, hidden=4096, frames=8, tokens=196, patch=1536)


@pytest.mark.parametrize(
    ("dim", "depth", "published"),
    [
        (384, 12, (57, 42, 35, 29)),
        (768, 12, (180, 136, 116, 96)),
        (1024, 24, (597, 446, 376, 308)),
        (1280, 32, (1192, 890, 748, 611)),
    ],
)
def test_published_costs(dim: int, depth: int, published: tuple[int, ...]) -> None:
    """Table 2 of Ding et al., ICCV 2023."""
    sizes = Sizes(depth=depth, dim=dim, hidden=4 * dim, frames=8, tokens=196, patch=1536)
    for r, want in zip((0, 32, 48, 64), published, strict=True):
        assert abs(sta_gmacs(sizes, sta_stages(sizes, r)) - want) < 1


def test_stages_of_the_paper() -> None:
    stages = sta_stages(VIT, 64)
    assert [tuple(vars(stage).values()) for stage in stages] == [
        (0, 8, 196, 64, False),
        (8, 4, 264, 64, True),
        (16, 2, 400, 64, False),
    ]
    assert sta_tokens(VIT, stages) == (1568, 1056, 800, 672)
    assert prune_blocks(32) == (0, 10, 21)


def test_frames_on_their_own_stay_equally_long() -> None:
    sizes = Sizes(depth=12, dim=192, hidden=768, frames=5, tokens=196, patch=768, prefix=1, joint=False)
    stages = sta_stages(sizes, 50)
    assert [(s.groups, s.tokens, s.drop) for s in stages] == [(5, 196, 50), (5, 146, 25), (5, 121, 12)]
    assert sta_tokens(sizes, stages) == (197, 147, 122, 110)
    with pytest.raises(PatchError, match="stage 1 .* drops 196 .* fewer than the 196"):
        sta_stages(sizes, 196)
    with pytest.raises(PatchError, match="stage 2 .* drops 65 .* fewer than the 65"):
        sta_stages(sizes, 131)


def test_cost_of_images_is_that_of_the_architecture() -> None:
    """DeiT-S at 224, as Touvron et al., ICML 2021, count it; and with r = 13, as Bolya et al., ICLR 2023."""
    sizes = Sizes(depth=12, dim=384, hidden=1536, frames=1, tokens=196, patch=768, prefix=1, joint=False)
    assert abs(tome_gmacs(sizes, [0] * 12) - 4.6) < 0.05
    drops = tome_drops(sizes, 13)
    assert tome_tokens(sizes, drops) == tuple(197 - 13 * block for block in range(13))
    assert abs(tome_gmacs(sizes, drops) - 2.7) < 0.06


def test_linear_schedules() -> None:
    sizes = Sizes(depth=5, dim=8, hidden=8, frames=1, tokens=1000, patch=1, joint=False)
    assert tome_drops(sizes, (10, 0.0)) == (10,) * 5
    assert tome_drops(sizes, (10, 1.0)) == (0, 5, 10, 15, 20)
    assert tome_drops(sizes, (10, -1.0)) == (20, 15, 10, 5, 0)
    assert tome_drops(sizes, (3, 0.5)) == (1, 2, 3, 3, 4)
    assert tome_drops(Sizes(depth=1, dim=8, hidden=8, frames=1, tokens=10, patch=1, joint=False), (3, 1.0)) == (0,)


def test_half_of_the_tokens_at_most() -> None:
    sizes = Sizes(depth=12, dim=8, hidden=8, frames=1, tokens=196, patch=1, prefix=1, joint=False)
    assert tome_tokens(sizes, tome_drops(sizes, 16)) == (*range(197, 20, -16), 11)
    assert tome_tokens(sizes, tome_drops(sizes, 98))[:4] == (197, 99, 50, 26)
    with pytest.raises(PatchError, match="block 0 merges at most half of 196 tokens, got 99"):
        tome_drops(sizes, 99)
