"""Scores of segmentations against their definitions, written out pixel by pixel."""

from __future__ import annotations

import builtins
import itertools
import math
from typing import Any

import numpy as np
import pytest

from vidops import evaluation


def naive_boundary(mask: np.ndarray) -> np.ndarray:
    height, width = mask.shape
    out = np.zeros_like(mask)
    for i, j in np.ndindex(height, width):
        for di, dj in ((0, 1), (1, 0), (1, 1)):
            neighbour = mask[min(i + di, height - 1), min(j + dj, width - 1)]
            out[i, j] |= mask[i, j] != neighbour
    return out


def naive_dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    out = np.zeros_like(mask)
    points = np.argwhere(mask)
    for i, j in np.ndindex(*mask.shape):
        out[i, j] = any((i - a) ** 2 + (j - b) ** 2 <= radius**2 for a, b in points)
    return out


def naive_scores(ours: np.ndarray, theirs: np.ndarray, void: np.ndarray, radius: int) -> tuple[float, float]:
    ours, theirs = ours & ~void, theirs & ~void
    union = (ours | theirs).sum()
    j = 1.0 if union == 0 else (ours & theirs).sum() / union
    edge, truth = naive_boundary(ours), naive_boundary(theirs)
    if not edge.any() and truth.any():
        precision, recall = 1.0, 0.0
    elif edge.any() and not truth.any():
        precision, recall = 0.0, 1.0
    elif not edge.any():
        precision = recall = 1.0
    else:
        precision = (edge & naive_dilate(truth, radius)).sum() / edge.sum()
        recall = (truth & naive_dilate(edge, radius)).sum() / truth.sum()
    return j, 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("tolerance", [0.008, 0.15, 2])
def test_scores_of_pairs(tolerance: float) -> None:
    chance = np.random.default_rng(0)
    shape = (2, 9, 13)
    blocks = chance.random((5, 2, 3, 5)) < 0.4
    masks = np.stack([evaluation.upsample_nearest(b, shape[1:]) for b in blocks])
    proposals, objects = masks[:3], masks[3:]
    proposals[0] = False
    objects[1, 1] = False
    proposals[1, 0], objects[0, 0] = True, True
    void = chance.random(shape) < 0.1
    found = evaluation.pair_scores(proposals, objects, void, tolerance=tolerance)
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(9, 13))
    for k, n, t in np.ndindex(3, 2, 2):
        j, f = naive_scores(proposals[k, t], objects[n, t], void[t], radius)
        assert found.j[k, n, t] == pytest.approx(j, abs=1e-12)
        assert found.f[k, n, t] == pytest.approx(f, abs=1e-12)


@pytest.mark.parametrize("radius", [0, 1, 3, 8])
def test_dilation(radius: int) -> None:
    masks = np.random.default_rng(1).random((3, 11, 7)) < 0.05
    masks[0] = False
    masks[1, 0, 0] = masks[1, 10, 6] = True
    got = evaluation.dilate(masks, radius)
    for mask, wide in zip(masks, got, strict=True):
        np.testing.assert_array_equal(wide, naive_dilate(mask, radius))


def brute_force(score: np.ndarray) -> float:
    count, number = score.shape
    return max(
        score[list(rows), range(number)].sum() for rows in itertools.permutations(range(count), number)
    )


def test_matchings_are_optimal_and_frame_matching_is_an_upper_bound() -> None:
    chance = np.random.default_rng(2)
    scores = evaluation.PairScores(chance.random((5, 3, 4)), chance.random((5, 3, 4)))
    official, framewise = evaluation.match_per_sequence(scores), evaluation.match_per_frame(scores)
    mean = (scores.j.mean(2) + scores.f.mean(2)) / 2
    assert official.jf_mean * 3 == pytest.approx(brute_force(mean))
    for t in range(4):
        best = brute_force(scores.j[:, :, t] + scores.f[:, :, t])
        assert (framewise.j[:, t] + framewise.f[:, t]).sum() == pytest.approx(best)
    assert framewise.jf_mean > official.jf_mean


def test_perfect_and_swapped_proposals() -> None:
    truth = np.zeros((2, 4, 12, 12), bool)
    truth[0, :, 1:5, 1:5] = truth[1, :, 6:11, 6:11] = True
    found = evaluation.evaluate_video(truth[::-1].copy(), truth)
    assert found.per_sequence.jf_mean == found.per_frame.jf_mean == 1.0
    swapped = truth.copy()
    swapped[:, 2:] = truth[::-1, 2:]
    found = evaluation.evaluate_video(swapped, truth)
    assert found.per_frame.j_mean == 1.0
    assert found.per_sequence.j_mean == 0.5


def test_missing_proposals_count_as_empty_masks() -> None:
    truth = np.zeros((2, 3, 12, 12), bool)
    truth[0, :, 1:5, 1:5] = truth[1, :, 6:11, 6:11] = True
    found = evaluation.evaluate_video(truth[:1], truth)
    assert found.pairs.j.shape == (2, 2, 3)
    assert found.per_sequence.jf_mean == 0.5
    assert evaluation.pair_scores(truth[:0], truth).j.shape == (0, 2, 3)
    found = evaluation.evaluate_video(truth[:0], truth)
    assert found.per_frame.jf_mean == 0.0
    with pytest.raises(ValueError, match="1 for 2 objects"):
        evaluation.match_per_sequence(evaluation.pair_scores(truth[:1], truth))


def test_objects_are_those_of_the_first_frame() -> None:
    annotation = np.zeros((2, 4, 4), np.uint8)
    annotation[0, 0, 0], annotation[0, 1, 1], annotation[1, 0, 0], annotation[1, 3, 3] = 2, 255, 2, 7
    masks, void = evaluation.objects_of(annotation)
    assert masks.shape == (1, 2, 4, 4)
    assert (masks.sum(), void.sum()) == (2, 1)


def test_upsampling_repeats_the_last_frame() -> None:
    labels = np.arange(12).reshape(2, 2, 3)
    out = evaluation.upsample_nearest(labels, (5, 4), frames=4)
    assert out.shape == (4, 5, 4)
    np.testing.assert_array_equal(out[0, :, 0], [0, 0, 0, 3, 3])
    np.testing.assert_array_equal(out[0, 0], [0, 0, 1, 2])
    np.testing.assert_array_equal(out[3], out[1])


def pair_counting_ari(truth: np.ndarray, labels: np.ndarray) -> float:
    pairs = list(itertools.combinations(range(len(truth)), 2))
    same_truth = np.array([truth[a] == truth[b] for a, b in pairs])
    same_label = np.array([labels[a] == labels[b] for a, b in pairs])
    expected = same_truth.sum() * same_label.sum() / len(pairs)
    highest = (same_truth.sum() + same_label.sum()) / 2
    return ((same_truth & same_label).sum() - expected) / (highest - expected)


def test_fg_ari_counts_pairs_of_the_foreground() -> None:
    chance = np.random.default_rng(3)
    truth, labels = chance.integers(0, 4, (2, 4, 5)), chance.integers(0, 3, (2, 4, 5))
    front = truth > 0
    expected = pair_counting_ari(truth[front], labels[front])
    assert evaluation.fg_ari(truth, labels) == pytest.approx(expected, abs=1e-12)
    labels[~front] = 9
    assert evaluation.fg_ari(truth, labels) == pytest.approx(expected, abs=1e-12)
    assert evaluation.fg_ari(truth, truth * 5 + 1) == 1.0
    assert evaluation.fg_ari(np.ones((1, 2, 2), int), np.zeros((1, 2, 2), int)) == 1.0


def test_mean_iou() -> None:
    truth = np.array([[[0, 0, 1, 1, 2, 2, 2, 2]]])
    labels = np.array([[[5, 5, 5, 7, 8, 8, 8, 7]]])
    assert evaluation.mean_iou(truth, labels) == pytest.approx((1 / 3 + 3 / 4) / 2)
    assert evaluation.mean_iou(truth, np.zeros_like(truth)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: evaluation.pair_scores(np.ones((1, 1, 2, 2), bool), np.ones((1, 1, 2, 3), bool)),
            "expected",
        ),
        (lambda: evaluation.pair_scores(*[np.ones((1, 1, 2, 2), bool)] * 2, np.ones((2, 2), bool)), "void"),
        (
            lambda: evaluation.evaluate_video(np.ones((1, 1, 2, 2), bool), np.ones((0, 1, 2, 2), bool)),
            "object",
        ),
        (lambda: evaluation.upsample_nearest(np.zeros((0, 2, 2)), (4, 4)), "labels"),
        (lambda: evaluation.upsample_nearest(np.zeros((1, 2, 2)), (0, 4)), "size"),
        (lambda: evaluation.fg_ari(np.zeros((1, 2, 2), int), np.zeros((1, 2, 2), int)), "foreground"),
        (lambda: evaluation.mean_iou(np.zeros((1, 2, 2), int), np.zeros((1, 2, 2), int)), "no object"),
        (lambda: evaluation.mean_iou(np.ones((1, 2, 2), int), np.zeros((1, 2, 3), int)), "labels"),
        (lambda: evaluation.mean_iou(np.ones((2, 2), int), np.zeros((2, 2), int)), "truth"),
        (lambda: evaluation.fg_ari(np.ones((1, 0, 2), int), np.zeros((1, 0, 2), int)), "truth"),
        (lambda: evaluation.one_hot(np.zeros((0, 2, 2), int)), "labels"),
        (lambda: evaluation.objects_of(np.zeros((2, 2), int)), "annotation"),
        (lambda: evaluation.objects_of(np.zeros((0, 2, 2), int)), "annotation"),
        (lambda: evaluation.pair_scores(*[np.ones((1, 2, 2), bool)] * 2), "proposals"),
        *(
            (lambda t=t: evaluation.evaluate_video(*[np.ones((1, 1, 2, 2), bool)] * 2, tolerance=t), "tolerance")
            for t in (-1, np.nan, np.inf)
        ),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [None, 1, [[[1]]], "x", np.ones((1, 2, 2), complex), np.full((1, 2, 2), None)])
def test_what_is_no_array_of_numbers(bad: Any) -> None:
    labels, masks = np.ones((1, 2, 2), int), np.ones((1, 1, 2, 2), bool)
    for call, name in (
        (lambda: evaluation.upsample_nearest(bad, (2, 2)), "labels"),
        (lambda: evaluation.one_hot(bad), "labels"),
        (lambda: evaluation.objects_of(bad), "annotation"),
        (lambda: evaluation.pair_scores(bad, masks), "proposals"),
        (lambda: evaluation.pair_scores(np.ones((1, 1, 2, 2)), masks), "proposals"),
        (lambda: evaluation.evaluate_video(masks, bad), "objects"),
        (lambda: evaluation.fg_ari(bad, labels), "truth"),
        (lambda: evaluation.fg_ari(labels, bad), "labels"),
        (lambda: evaluation.mean_iou(bad, labels), "truth"),
        (lambda: evaluation.mean_iou(labels, bad), "labels"),
    ):
        with pytest.raises(TypeError, match=f"{name}: "):
            call()


def test_matching_without_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", importing)
    scores = evaluation.PairScores(np.ones((1, 1, 1)), np.ones((1, 1, 1)))
    with pytest.raises(evaluation.MissingDependencyError, match=r"vidops\[eval\]"):
        evaluation.match_per_sequence(scores)
