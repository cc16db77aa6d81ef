import math

import numpy as np
import pytest
import SimpleITK as sitk

from medseg.metrics.confusion import Counts, count, dice, iou

ORGANS = {"liver": (1,), "spleen": (2,), "both": (1, 2)}


def random_maps(seed: int, shape=(23, 17, 11), num_values: int = 4):
    generator = np.random.default_rng(seed)
    reference = generator.integers(0, num_values, shape).astype(np.uint8)
    prediction = np.where(generator.random(shape) < 0.6, reference, generator.integers(0, num_values, shape))
    return reference, prediction.astype(np.int16)


def test_counts_are_those_of_three_voxels_counted_by_hand():
    reference, prediction = np.array([1, 1, 0, 2]), np.array([1, 0, 1, 1])
    assert count(reference, prediction, ORGANS) == {
        "liver": Counts(1, 2, 1),
        "spleen": Counts(0, 0, 1),
        "both": Counts(2, 1, 1),
    }


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("seed", range(3))
def test_dice_and_iou_agree_with_simpleitk(seed, order):
    reference, prediction = random_maps(seed)
    counts = count(np.asarray(reference, order=order), np.asarray(prediction, order=order), {"a": [1], "b": [3]})
    measures = sitk.LabelOverlapMeasuresImageFilter()
    measures.Execute(sitk.GetImageFromArray(reference), sitk.GetImageFromArray(prediction.astype(np.uint8)))
    for organ, value in (("a", 1), ("b", 3)):
        assert dice(counts[organ]) == pytest.approx(measures.GetDiceCoefficient(value), abs=1e-6)
        assert iou(counts[organ]) == pytest.approx(measures.GetJaccardCoefficient(value), abs=1e-6)


def test_counting_in_chunks_equals_counting_masks(monkeypatch):
    monkeypatch.setattr("medseg.metrics.confusion._CHUNK", 100)
    reference, prediction = random_maps(7)
    for organ, found in count(reference, prediction, ORGANS).items():
        r, p = np.isin(reference, ORGANS[organ]), np.isin(prediction, ORGANS[organ])
        assert found == Counts((r & p).sum(), (~r & p).sum(), (r & ~p).sum())


def test_a_transposed_prediction_is_compared_voxel_by_voxel():
    reference, prediction = random_maps(1, shape=(9, 9, 9))
    transposed = np.ascontiguousarray(prediction.transpose()).transpose()
    assert count(reference, transposed, ORGANS) == count(reference, prediction, ORGANS)


def test_voxels_with_the_ignore_label_do_not_count():
    reference, prediction = random_maps(2)
    counted = reference != 3
    expected = count(reference[counted], prediction[counted], ORGANS)
    assert count(reference, prediction, ORGANS, ignore_label=3) == expected
    far = np.where(counted, reference, 255)
    assert count(far, prediction, ORGANS, ignore_label=255) == expected


def test_values_that_belong_to_no_organ_count_as_background():
    reference, prediction = np.array([1, 30000, -2, 0], np.int16), np.array([1, 0, 1, 30000], np.int16)
    assert count(reference, prediction, {"liver": (1,)}) == {"liver": Counts(1, 1, 0)}


@pytest.mark.parametrize("metric", [dice, iou])
def test_a_score_is_nan_when_both_masks_are_empty(metric):
    assert math.isnan(metric(Counts(0, 0, 0)))


@pytest.mark.parametrize("metric", [dice, iou])
@pytest.mark.parametrize("counts", [Counts(0, 5, 0), Counts(0, 0, 5)])
def test_a_score_is_zero_when_one_mask_is_empty(metric, counts):
    assert metric(counts) == 0
