import math

import numpy as np
import pytest
import SimpleITK as sitk
from sklearn import metrics as sklearn_metrics

from medseg.metrics.confusion import (
    Counts,
    confusion,
    count,
    dice,
    frequency_weighted_iou,
    iou,
    mean_accuracy_by_precision,
    mean_accuracy_by_recall,
    mean_iou,
    pixel_accuracy,
    precision,
    recall,
    specificity,
)

ORGANS = {"liver": (1,), "spleen": (2,), "both": (1, 2)}
IMAGE_SCORES = [
    pixel_accuracy,
    mean_accuracy_by_recall,
    mean_accuracy_by_precision,
    mean_iou,
    frequency_weighted_iou,
]


def random_maps(seed: int, shape=(23, 17, 11), num_values: int = 4):
    generator = np.random.default_rng(seed)
    reference = generator.integers(0, num_values, shape).astype(np.uint8)
    prediction = np.where(generator.random(shape) < 0.6, reference, generator.integers(0, num_values, shape))
    return reference, prediction.astype(np.int16)


def classes(reference, prediction, organs=ORGANS, **options):
    return confusion(np.asarray(reference), np.asarray(prediction), organs, **options).classes()


def test_counts_are_those_of_four_voxels_counted_by_hand():
    reference, prediction = np.array([1, 1, 0, 2]), np.array([1, 0, 1, 1])
    assert count(reference, prediction, ORGANS) == {
        "liver": Counts(1, 2, 1, 0),
        "spleen": Counts(0, 0, 1, 3),
        "both": Counts(2, 1, 1, 0),
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


@pytest.mark.parametrize("seed", range(3))
def test_ratios_of_one_organ_agree_with_scikit_learn(seed):
    reference, prediction = random_maps(seed)
    for organ, found in count(reference, prediction, ORGANS).items():
        r, p = (np.isin(label, ORGANS[organ]).ravel() for label in (reference, prediction))
        assert dice(found) == pytest.approx(sklearn_metrics.f1_score(r, p))
        assert precision(found) == pytest.approx(sklearn_metrics.precision_score(r, p))
        assert recall(found) == pytest.approx(sklearn_metrics.recall_score(r, p))
        assert specificity(found) == pytest.approx(sklearn_metrics.recall_score(~r, ~p))


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_all_classes_agree_with_scikit_learn(seed):
    reference, prediction = random_maps(seed, num_values=3)
    r, p, found = reference.ravel(), prediction.ravel(), classes(reference, prediction)
    assert np.array_equal(found, sklearn_metrics.confusion_matrix(r, p))
    assert pixel_accuracy(found) == pytest.approx(sklearn_metrics.accuracy_score(r, p))
    assert mean_accuracy_by_recall(found) == pytest.approx(sklearn_metrics.balanced_accuracy_score(r, p))
    assert mean_accuracy_by_precision(found) == pytest.approx(sklearn_metrics.precision_score(r, p, average="macro"))
    assert mean_iou(found) == pytest.approx(sklearn_metrics.jaccard_score(r, p, average="macro"))
    assert frequency_weighted_iou(found) == pytest.approx(sklearn_metrics.jaccard_score(r, p, average="weighted"))


def test_scores_of_all_classes_are_those_of_six_voxels_counted_by_hand():
    found = classes([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0], {"liver": (1,), "spleen": (2,), "kidney": (3,)})
    assert pixel_accuracy(found) == 3 / 6
    assert mean_accuracy_by_recall(found) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert mean_accuracy_by_precision(found) == pytest.approx((2 / 4 + 1 / 2) / 2)  # no spleen was predicted
    assert mean_iou(found) == pytest.approx((2 / 5 + 1 / 3 + 0) / 3)  # the kidney is in neither
    assert frequency_weighted_iou(found) == pytest.approx((3 * 2 / 5 + 2 * 1 / 3 + 0) / 6)


def test_values_of_one_organ_are_one_class_and_a_union_adds_none():
    reference, prediction = [1, 2, 3, 0, 9], [2, 1, 0, 3, 0]
    united = classes(reference, prediction, {"lung": (1, 2), "liver": (3,), "all": (1, 2, 3)})
    assert np.array_equal(united, classes([1, 1, 2, 0, 0], [1, 1, 0, 2, 0], {"lung": (1,), "liver": (2,)}))


def test_regions_within_each_other_make_a_class_of_each_ring():
    reference, prediction = random_maps(4)
    regions = {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert np.array_equal(
        classes(reference, prediction, regions), sklearn_metrics.confusion_matrix(reference.ravel(), prediction.ravel())
    )


def test_counting_in_chunks_equals_counting_masks(monkeypatch):
    monkeypatch.setattr("medseg.metrics.stretches._CHUNK", 100)
    reference, prediction = random_maps(7)
    for organ, found in count(reference, prediction, ORGANS).items():
        r, p = np.isin(reference, ORGANS[organ]), np.isin(prediction, ORGANS[organ])
        assert found == Counts((r & p).sum(), (~r & p).sum(), (r & ~p).sum(), (~r & ~p).sum())


@pytest.mark.parametrize("shift", [0, 252, 300, -2], ids=["bytes", "up to 255", "above 255", "below 0"])
@pytest.mark.parametrize("dtype", [np.int16, np.int64])
def test_label_values_of_any_size_are_counted_alike(shift, dtype):
    maps = random_maps(5)
    moved = [np.where(label > 0, label.astype(dtype) + shift, 0) for label in maps]
    organs = {"a": (1,), "b": (3, 1)}
    kept = [label if shift != -2 else np.where(label == 2, 0, label) for label in maps]  # 2 - 2 is the background
    expected = count(*kept, organs)
    assert count(*moved, {organ: [v + shift for v in values] for organ, values in organs.items()}) == expected


def test_more_organs_than_a_byte_has_values_are_told_apart():
    reference = np.arange(1000).reshape(10, 100)
    prediction = np.where(reference % 2, reference, 0)
    found = count(reference, prediction, {str(value): (value,) for value in range(1, 1000)})
    assert all(
        counts == (Counts(1, 0, 0, 999) if int(organ) % 2 else Counts(0, 0, 1, 999)) for organ, counts in found.items()
    )


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
    wanted = classes(reference[counted], prediction[counted])
    assert np.array_equal(classes(far, prediction, ignore_label=255), wanted)


def test_values_that_belong_to_no_organ_count_as_background():
    reference, prediction = np.array([1, 30000, -2, 0], np.int16), np.array([1, 0, 1, 30000], np.int16)
    assert count(reference, prediction, {"liver": (1,)}) == {"liver": Counts(1, 1, 0, 2)}


@pytest.mark.parametrize("score", [dice, iou, precision, recall])
def test_a_score_is_nan_when_both_masks_are_empty(score):
    assert math.isnan(score(Counts(0, 0, 0, 9)))


@pytest.mark.parametrize("score", [dice, iou])
@pytest.mark.parametrize("counts", [Counts(0, 5, 0, 4), Counts(0, 0, 5, 4)])
def test_a_score_is_zero_when_one_mask_is_empty(score, counts):
    assert score(counts) == 0


@pytest.mark.parametrize("score", IMAGE_SCORES)
def test_a_score_of_all_classes_is_nan_when_every_voxel_is_ignored(score):
    assert math.isnan(score(classes([255, 255], [1, 0], ignore_label=255)))
