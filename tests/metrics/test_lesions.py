import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.metrics.lesions import Lesion, by_size, match_lesions


def line(*runs: str) -> np.ndarray:
    """A picture of one row a string: ``#`` is a lesion."""
    return np.array([[sign == "#" for sign in row] for row in runs])


def test_lesions_found_missed_and_invented_are_those_counted_by_hand():
    lesions = match_lesions(line("##..##..##....."), line(".#..##......#.#"))
    assert lesions.sensitivity() == pytest.approx(2 / 3)
    assert lesions.precision() == pytest.approx(2 / 4)
    assert lesions.f1() == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))


def test_two_lesions_match_when_their_iou_is_above_the_threshold():
    lesions = match_lesions(line("####..##"), line("#.....##"))  # IoU 1/4 and 1
    assert [lesions.sensitivity(limit) for limit in (0, 0.2, 0.25, 0.9)] == [1, 1, 0.5, 0.5]
    assert [lesions.precision(limit) for limit in (0, 0.2, 0.25, 0.9)] == [1, 1, 0.5, 0.5]


def test_one_prediction_over_two_lesions_finds_both_and_two_in_one_lesion_are_both_right():
    over = match_lesions(line("##..##"), line("######"))
    assert (over.sensitivity(), over.precision()) == (1, 1)
    within = match_lesions(line("######"), line("##..##"))
    assert (within.sensitivity(), within.precision()) == (1, 1)


def test_voxels_that_touch_at_a_corner_are_one_lesion():
    picture = line("#..", ".#.", "..#")
    assert len(match_lesions(picture, picture).reference_sizes) == 1
    volume = np.zeros((3, 3, 3), dtype=bool)
    volume[[0, 1, 2], [0, 1, 2], [0, 1, 2]] = True
    assert len(match_lesions(volume, volume).reference_sizes) == 1


def test_the_table_tells_of_each_lesion_of_the_reference_then_of_those_invented():
    table = match_lesions(line("##..###..#..."), line(".#..#.#.....#")).table(voxel_ml=0.5)
    assert table == [
        Lesion(True, 2, 1.0, True, pytest.approx(2 * 1 / (2 + 1))),
        Lesion(True, 3, 1.5, True, pytest.approx(2 * 2 / (3 + 2))),  # both fragments together
        Lesion(True, 1, 0.5, False, 0.0),
        Lesion(False, 1, 0.5, False, 0.0),
    ]


def test_a_lesion_whose_iou_is_too_small_is_not_matched_in_the_table():
    (lesion, invented) = match_lesions(line("####"), line("#...")).table(voxel_ml=1, min_iou=0.5)
    assert (lesion.is_matched, lesion.dice, invented.in_reference) == (False, 0.0, False)


def test_sizes_are_told_apart_by_their_edges_and_invented_lesions_left_out():
    lesions = [
        Lesion(True, 1, 0.5, True, 0.8),
        Lesion(True, 1, 0.9, False, 0.0),
        Lesion(True, 1, 1.0, True, 0.9),  # from an edge on
        Lesion(False, 1, 0.5, False, 0.0),
    ]
    small, medium, large = by_size(lesions, edges_ml=(1, 10))
    assert (small.low_ml, small.high_ml, small.n, small.n_matched) == (0, 1, 2, 1)
    assert small.dice == pytest.approx(0.4)
    assert (medium.n, medium.n_matched, medium.dice) == (1, 1, 0.9)
    assert (large.high_ml, large.n, math.isnan(large.dice)) == (math.inf, 0, True)


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ("...", "...", (math.nan, math.nan, math.nan)),
        ("#..", "...", (0, math.nan, 0)),
        ("...", "#.#", (math.nan, 0, 0)),
        ("#..", "..#", (0, 0, 0)),
    ],
)
def test_what_is_not_defined_for_empty_masks_is_nan(reference, prediction, expected):
    lesions = match_lesions(line(reference), line(prediction))
    assert (lesions.sensitivity(), lesions.precision(), lesions.f1()) == pytest.approx(expected, nan_ok=True)


def test_masks_without_voxels_have_no_lesions():
    nothing = np.zeros((0, 0, 0), dtype=bool)
    lesions = match_lesions(nothing, nothing)
    assert math.isnan(lesions.f1()) and lesions.table(1.0) == []


@settings(max_examples=40, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from([(9, 11), (5, 6, 7)]), min_iou=st.sampled_from([0, 0.1, 0.4]))
def test_matches_are_those_of_comparing_every_lesion_with_every_other(seed, shape, min_iou):
    generator = np.random.default_rng(seed)
    r, p = generator.random((2, *shape)) < 0.15
    lesions = match_lesions(r, p)
    sides = []
    for mask in (r, p):
        numbered, n = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
        sides.append([numbered == number for number in range(1, n + 1)])
    ious = np.array([[(a & b).sum() / (a | b).sum() for b in sides[1]] for a in sides[0]]).reshape(
        len(sides[0]), len(sides[1])
    )
    expected = [(ious.max(axis=axis, initial=0) > min_iou) for axis in (1, 0)]
    for found, wanted in zip((lesions.sensitivity(min_iou), lesions.precision(min_iou)), expected, strict=True):
        assert found == pytest.approx(wanted.mean() if len(wanted) else math.nan, nan_ok=True)
    for lesion, mask, row in zip(lesions.table(1.0, min_iou=min_iou), sides[0], ious, strict=False):
        partners = np.any(
            [b for b, overlap in zip(sides[1], row, strict=True) if overlap > min_iou] or [mask & ~mask], 0
        )
        touching = sum(b.sum() for b, overlap in zip(sides[1], row, strict=True) if overlap > min_iou)
        assert lesion.dice == pytest.approx(2 * (mask & partners).sum() / (mask.sum() + touching) if touching else 0)
