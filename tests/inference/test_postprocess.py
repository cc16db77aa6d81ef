import numpy as np
import pytest

from medseg.errors import WorkflowError
from medseg.inference.postprocess import POSTPROCESS, check_steps, keep_largest
from medseg.labels import Labels

LABELS = Labels({0: "background", 1: "liver", 2: "spleen"})


def two_pieces() -> np.ndarray:
    label = np.zeros((12, 10, 8), np.uint8)
    label[1:4, 1:4, 1:4] = 1
    label[8:10, 6:8, 5:7] = 1
    label[10, 8, 7] = 2
    return label


def test_the_largest_piece_of_an_organ_stays_and_other_organs_are_untouched():
    label = two_pieces()
    expected = label.copy()
    expected[8:10, 6:8, 5:7] = 0
    np.testing.assert_array_equal(keep_largest(label, (1,)), expected)
    np.testing.assert_array_equal(label, two_pieces())


def test_voxels_that_touch_at_a_corner_are_one_piece():
    label = two_pieces()
    label[4:8, 4:8, 4:8][np.arange(4), np.minimum(np.arange(4), 2), np.minimum(np.arange(4), 1)] = 1
    np.testing.assert_array_equal(keep_largest(label, (1,)), label)


def test_a_region_is_judged_by_all_its_labels_together():
    label = np.zeros((9, 1, 1), np.uint8)
    label[:, 0, 0] = [1, 1, 1, 0, 1, 1, 2, 2, 0]
    kept = keep_largest(label, (1, 2))
    np.testing.assert_array_equal(kept[:, 0, 0], [0, 0, 0, 0, 1, 1, 2, 2, 0])


@pytest.mark.parametrize("name", POSTPROCESS)
def test_every_step_leaves_an_empty_label_map_empty(name):
    empty = np.zeros((4, 5, 6), np.int16)
    result = POSTPROCESS[name](empty, (1,))
    assert result.dtype == np.int16 and not result.any()


def test_steps_are_resolved_to_the_label_values_of_their_organs():
    assert check_steps({"keep_largest": ["spleen", "liver"]}, LABELS) == [(keep_largest, (2,)), (keep_largest, (1,))]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"keep_larges": ["liver"]}, "did you mean 'keep_largest'"),
        ({"keep_largest": ["lever"]}, "did you mean 'liver'"),
        ({"keep_largest": "liver"}, "not a list of organs"),
        ({"keep_largest": True}, "not a list of organs"),
    ],
)
def test_a_mistyped_step_or_organ_is_refused(steps, message):
    with pytest.raises(WorkflowError, match=message):
        check_steps(steps, LABELS)
