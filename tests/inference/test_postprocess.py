from collections import deque
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from medseg.errors import WorkflowError
from medseg.inference.postprocess import POSTPROCESS, Organ, check_steps, crf_of, organs_of, postprocess
from medseg.labels import Labels
from medseg.nets.crf import CRF

LABELS = Labels({0: "background", 1: "liver", 2: "spleen"})
NESTED = Labels(
    {0: "background", 1: "edema", 2: "core", 3: "enhancing"},
    regions={"whole": (1, 2, 3), "tumour": (2, 3), "active": (3,)},
    region_order=(1, 2, 3),
)
SOME = settings(max_examples=150, deadline=None)

maps = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=3, max_side=6), elements=st.integers(0, 3))


def taken(steps: Any, label: np.ndarray, labels: Labels = LABELS, voxel_ml: float = 1.0) -> np.ndarray:
    result = label.copy()
    postprocess(result, check_steps(steps, labels), voxel_ml)
    return result


def components(mask: np.ndarray, *, corners: bool) -> list[list[tuple[int, ...]]]:
    """Flood fill from voxel to voxel, the first in memory first."""
    steps = [s for s in product((-1, 0, 1), repeat=mask.ndim) if any(s) and (corners or sum(map(abs, s)) == 1)]
    seen, found = set(), []
    for start in map(tuple, np.argwhere(mask).tolist()):
        if start in seen:
            continue
        seen.add(start)
        piece, waiting = [], deque([start])
        while waiting:
            voxel = waiting.popleft()
            piece.append(voxel)
            for step in steps:
                at = tuple(a + b for a, b in zip(voxel, step, strict=True))
                if at not in seen and all(0 <= a < n for a, n in zip(at, mask.shape, strict=True)) and mask[at]:
                    seen.add(at)
                    waiting.append(at)
        found.append(piece)
    return found


def plain(step: str, label: np.ndarray, organ: Organ, amount: float) -> np.ndarray:
    """A step on the whole label map, voxel by voxel."""
    result = label.copy()
    mask = np.isin(label, organ.values)
    if step == "fill_holes":
        for hole in components(~mask, corners=False):
            if not any(a in (0, n - 1) for voxel in hole for a, n in zip(voxel, label.shape, strict=True)):
                for voxel in hole:
                    result[voxel] = result[voxel] or organ.own
        return result
    pieces = components(mask, corners=True)
    largest = max(map(len, pieces), default=0)
    first = next((n for n, piece in enumerate(pieces) if len(piece) == largest), None)
    for n, piece in enumerate(pieces):
        if n != first if step == "keep_largest" else len(piece) < amount:
            for voxel in piece:
                result[voxel] = organ.below
    return result


@SOME
@given(
    maps,
    st.sampled_from([LABELS, NESTED]),
    st.lists(st.sampled_from(list(POSTPROCESS)), max_size=3, unique=True),
    st.data(),
)
def test_steps_do_what_a_program_does_that_goes_from_voxel_to_voxel(label, labels, names, data):
    if not labels.regions:
        label[label == 3] = 0
    steps, expected = {}, label
    for name in names:
        organs = data.draw(st.lists(st.sampled_from(labels.organs), unique=True))
        amount = data.draw(st.integers(1, 8))
        steps[name] = dict.fromkeys(organs, amount) if name == "min_volume_ml" else organs
        for organ in organs:
            expected = plain(name, expected, organs_of(labels)[organ], amount)
    np.testing.assert_array_equal(taken(steps, label, labels), expected)


def two_pieces() -> np.ndarray:
    label = np.zeros((12, 10, 8), np.uint8)
    label[1:4, 1:4, 1:4] = 1
    label[8:10, 6:8, 5:7] = 1
    label[10, 8, 7] = 2
    return label


def test_the_largest_piece_of_an_organ_stays_and_other_organs_are_untouched():
    expected = two_pieces()
    expected[8:10, 6:8, 5:7] = 0
    np.testing.assert_array_equal(taken({"keep_largest": ["liver"]}, two_pieces()), expected)


def test_voxels_that_touch_at_a_corner_are_one_piece():
    label = two_pieces()
    label[4:8, 4:8, 4:8][np.arange(4), np.minimum(np.arange(4), 2), np.minimum(np.arange(4), 1)] = 1
    np.testing.assert_array_equal(taken({"keep_largest": ["liver"]}, label), label)


@pytest.mark.parametrize(("voxel_ml", "kept"), [(0.001, 0), (0.0126, 27), (0.3 / 27, 27), (0.04, 35)])
def test_pieces_below_a_volume_go(voxel_ml, kept):
    """27 and 8 voxels; 0.3 ml is exactly the larger one's volume where a voxel has 0.3 / 27 ml."""
    label = taken({"min_volume_ml": {"liver": 0.3}}, two_pieces(), voxel_ml=voxel_ml)
    assert (label == 1).sum() == kept and (label == 2).sum() == 1


def test_pieces_of_a_picture_have_no_volume_and_stay():
    label = two_pieces()[:, :, 2]
    np.testing.assert_array_equal(taken({"min_volume_ml": {"liver": 50}}, label, voxel_ml=np.nan), label)


def test_holes_become_the_organ_but_what_else_lies_in_them_stays():
    label = np.zeros((9, 9, 9), np.uint8)
    label[1:8, 1:8, 1:8] = 1
    label[3:6, 3:6, 3:6] = 0
    label[4, 4, 4] = 2
    label[1, 1, 2:5] = 0  # open to the outside
    expected = label.copy()
    expected[3:6, 3:6, 3:6] = 1
    expected[4, 4, 4] = 2
    np.testing.assert_array_equal(taken({"fill_holes": ["liver"]}, label), expected)


def test_a_hole_at_the_edge_of_the_scan_is_open():
    label = np.ones((5, 5, 5), np.uint8)
    label[2, 2, :2] = 0
    np.testing.assert_array_equal(taken({"fill_holes": ["liver"]}, label), label)


def test_steps_are_taken_in_the_order_written():
    label = np.zeros((7, 1, 1), np.uint8)
    label[:, 0, 0] = [1, 0, 2, 1, 0, 1, 1]
    large_first = taken({"min_volume_ml": {"liver": 2}, "keep_largest": ["liver"]}, label)
    assert large_first.ravel().tolist() == [0, 0, 2, 0, 0, 1, 1]
    solid = np.ones((3, 3, 3), np.uint8)
    solid[1, 1, 1] = 2
    assert (taken({"min_volume_ml": {"spleen": 2}, "fill_holes": ["liver"]}, solid) == 1).all()
    assert taken({"fill_holes": ["liver"], "min_volume_ml": {"spleen": 2}}, solid)[1, 1, 1] == 0


def test_a_region_is_judged_by_all_its_labels_together():
    label = np.zeros((9, 1, 1), np.uint8)
    label[:, 0, 0] = [1, 1, 1, 0, 1, 1, 2, 3, 0]
    kept = taken({"keep_largest": ["whole"]}, label, NESTED)
    np.testing.assert_array_equal(kept[:, 0, 0], [0, 0, 0, 0, 1, 1, 2, 3, 0])


def test_what_is_removed_from_a_region_is_still_the_region_around_it():
    label = np.zeros((9, 1, 1), np.uint8)
    label[:, 0, 0] = [1, 2, 1, 3, 3, 2, 1, 3, 1]
    kept = taken({"keep_largest": ["tumour"]}, label, NESTED)
    np.testing.assert_array_equal(kept[:, 0, 0], [1, 1, 1, 3, 3, 2, 1, 1, 1])
    assert organs_of(NESTED)["active"].below == 2 and organs_of(NESTED)["whole"].below == 0


@pytest.mark.parametrize("name", POSTPROCESS)
def test_every_step_leaves_an_empty_label_map_empty(name):
    organs = {"liver": 1.0} if POSTPROCESS[name].takes else ["liver"]
    result = taken({name: organs}, np.zeros((4, 5, 6), np.int16))
    assert result.dtype == np.int16 and not result.any()


def test_steps_are_resolved_to_the_label_values_of_their_organs():
    found = check_steps({"keep_largest": ["spleen", "liver"], "min_volume_ml": {"liver": 2}}, LABELS)
    assert [(step.name, step.organ.values, step.amount) for step in found] == [
        ("keep_largest", (2,), 0.0),
        ("keep_largest", (1,), 0.0),
        ("min_volume_ml", (1,), 2.0),
    ]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"keep_larges": ["liver"]}, "did you mean 'keep_largest'"),
        ({"keep_largest": ["lever"]}, "did you mean 'liver'"),
        ({"keep_largest": "liver"}, "not a list of organs"),
        ({"keep_largest": True}, "not a list of organs"),
        ({"fill_holes": {"liver": 1}}, "not a list of organs"),
        (
            {"min_volume_ml": ["liver"]},
            r"does not give ml for each organ; write min_volume_ml: \{liver: 1, spleen: 1\}",
        ),
        ({"min_volume_ml": {"lever": 1}}, "did you mean 'liver'"),
        ({"min_volume_ml": {"liver": 0}}, "must be a number of ml above 0"),
        ({"min_volume_ml": {"liver": "50"}}, "must be a number of ml above 0"),
        ({"min_volume_ml": {"liver": True}}, "must be a number of ml above 0"),
        ({"min_volume_ml": {"liver": float("nan")}}, "must be a number of ml above 0"),
    ],
)
def test_a_mistyped_step_organ_or_amount_is_refused(steps, message):
    with pytest.raises(WorkflowError, match=message):
        check_steps(steps, LABELS)


def test_a_crf_stands_beside_the_steps_and_is_none_of_them():
    crf = {"theta_beta": 0.3, "iterations": 3}
    steps = {"keep_largest": ["liver"], "crf": crf}
    assert check_steps(steps, LABELS) == check_steps({"keep_largest": ["liver"]}, LABELS)
    assert crf_of(steps, LABELS) == CRF(theta_beta=0.3, iterations=3)
    assert crf_of({"crf": {}}, NESTED) == CRF()
    assert crf_of({"keep_largest": ["liver"]}, LABELS) is None
    costs = [[0, 1, 1], [1, 0, 2], [1, 2, 0]]
    assert crf_of({"crf": {"compatibility": costs}}, LABELS).compatibility == costs


@pytest.mark.parametrize(
    ("crf", "labels", "message"),
    [
        (None, LABELS, r"E-POSTPROCESS crf: None does not say its arguments; write crf: \{\}"),
        (["liver"], LABELS, "E-POSTPROCESS"),
        ({"theta_betta": 0.3}, LABELS, "E-ARGUMENT .*did you mean 'theta_beta'"),
        ({"theta_beta": "0.3"}, LABELS, "E-ARGUMENT .*theta_beta is '0.3'"),
        ({"iterations": 2.5}, LABELS, "E-ARGUMENT .*iterations is 2.5; it must be a whole number"),
        ({"connections": "exact"}, LABELS, "E-ARGUMENT .*connections"),
        ({"theta_alpha_mm": -1}, LABELS, "E-POSTPROCESS crf: theta_alpha_mm is -1; it must be a finite number above 0"),
        ({"theta_beta": [0.1, 0.2]}, LABELS, "E-POSTPROCESS crf: theta_beta has 2 entries; the image has 1 channels"),
        ({"compatibility": [[0, 1], [1, 0]]}, LABELS, "E-POSTPROCESS crf: compatibility must have 3 rows"),
        ({"compatibility": [[0, 1, 1]] * 3}, NESTED, "E-POSTPROCESS crf: .*regions are decided each for itself"),
    ],
)
def test_a_crf_that_makes_no_sense_is_refused(crf, labels, message):
    with pytest.raises(WorkflowError, match=message):
        check_steps({"crf": crf}, labels, num_channels=1)


def test_crf_is_among_the_names_that_are_known():
    with pytest.raises(WorkflowError, match="did you mean 'crf'"):
        check_steps({"crff": {}}, LABELS)
