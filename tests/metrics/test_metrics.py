"""What holds for every entry of METRICS: empty masks, symmetry, identity, translation, scaling, permutation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.errors import WorkflowError
from medseg.geometry import Geometry, Volume
from medseg.metrics import METRICS
from medseg.metrics.evidence import CaseEvidence
from medseg.metrics.table import ALL_CLASSES, score_organs

ORGANS = {"liver": (1,), "spleen": (2,), "both": (1, 2)}
OF_LABELS = [name for name, metric in METRICS.items() if not metric.needs_probabilities]
OF_ORGANS = [name for name in OF_LABELS if METRICS[name].scope == "organ"]
OF_IMAGES = [name for name in OF_LABELS if METRICS[name].scope == "image"]
SOME = settings(max_examples=25, derandomize=True, deadline=None)
NAN = math.nan


def scores(reference, prediction, *, metrics=OF_LABELS, organs=ORGANS, spacing_mm=None, **options):
    """Values of all metrics by (organ, metric)."""
    grid = Geometry.from_spacing(
        reference.shape, (1.0, 1.5, 2.0)[: reference.ndim] if spacing_mm is None else spacing_mm
    )
    volumes = (Volume(label[None], grid) for label in (reference, prediction))
    rows = score_organs("c", *volumes, organs, metrics=metrics, **options)
    return {(row.organ, metric): value for row in rows for metric, value in row.values.items()}


def blobs(seed: int, shape=(9, 8, 7)) -> tuple[np.ndarray, np.ndarray]:
    """A reference and a prediction with lumps of 1 and 2, far enough from the border to be shifted."""
    generator = np.random.default_rng(seed)
    result = []
    noise = ndimage.gaussian_filter(generator.normal(size=shape), 1)
    for _ in range(2):
        noise = noise + ndimage.gaussian_filter(generator.normal(size=shape), 1) / 2
        label = np.digitize(noise, np.quantile(noise, [0.7, 0.87])).astype(np.uint8)
        result.append(np.pad(label, 2))
    return result[0], result[1]


# Both masks empty; the organ missed (8 of 125 voxels); spurious (8 of 125 voxels).
EMPTY = {
    "dice": (NAN, 0, 0),
    "iou": (NAN, 0, 0),
    "precision": (NAN, NAN, 0),
    "recall": (NAN, 0, NAN),
    "specificity": (1, 1, 117 / 125),
    "volume_ml": (0, 0, 0.008),
    "reference_volume_ml": (0, 0.008, 0),
    "volume_difference_ml": (NAN, -0.008, 0.008),
    "absolute_volume_difference_ml": (NAN, 0.008, 0.008),
    "relative_volume_difference": (NAN, -1, NAN),
    "hd": (NAN, NAN, NAN),
    "hd95": (NAN, NAN, NAN),
    "assd": (NAN, NAN, NAN),
    "nsd": (NAN, 0, 0),
    "lesion_sensitivity": (NAN, 0, NAN),
    "lesion_precision": (NAN, NAN, 0),
    "lesion_f1": (NAN, 0, 0),
    "pixel_accuracy": (1, 117 / 125, 117 / 125),
    "mean_accuracy_by_recall": (1, (1 + 0) / 2, 117 / 125),
    "mean_accuracy_by_precision": (1, 117 / 125, (1 + 0) / 2),
    "mean_iou": (1, (117 / 125 + 0) / 2, (117 / 125 + 0) / 2),
    "frequency_weighted_iou": (1, (117 / 125) ** 2, 117 / 125),
    "ece": (NAN, 0.25, 0.25),
}


@pytest.mark.parametrize("name", METRICS)
def test_empty_masks_have_the_declared_values(name):
    empty, cube = np.zeros((2, 5, 5, 5), np.uint8)
    cube[1:3, 1:3, 1:3] = 1
    cases = [(empty, empty), (cube, empty), (empty, cube)]
    found = []
    for reference, prediction in cases:
        probability = np.where(reference, 0.75, 0.25)
        options = {"spacing_mm": (1.0, 1.0, 1.0), "probabilities": {"liver": probability}}
        organ = ALL_CLASSES if METRICS[name].scope == "image" else "liver"
        values = scores(reference, prediction, metrics=[name], organs={"liver": (1,)}, **options)
        found.append(values[organ, name])
    assert found == pytest.approx(EMPTY[name], nan_ok=True)


PERFECT = {"specificity": 1, "assd": 0, "hd": 0, "hd95": 0, "volume_difference_ml": 0}
PERFECT |= {"absolute_volume_difference_ml": 0, "relative_volume_difference": 0}


@pytest.mark.parametrize("name", OF_LABELS)
@pytest.mark.parametrize("shape", [(9, 8), (6, 7, 5)])
def test_every_metric_is_perfect_on_equal_masks(name, shape):
    label, _ = blobs(0, shape)
    for value in scores(label, label, metrics=[name]).values():
        if "volume" in name and label.ndim == 2:
            assert math.isnan(value)  # a picture has none
        elif METRICS[name].is_ranked or name in PERFECT:
            assert value == PERFECT.get(name, 1)


def test_one_voxel_against_another_has_the_values_computed_by_hand():
    reference, prediction = np.zeros((2, 6, 7, 4), np.uint8)
    reference[2, 1, 1] = 1
    prediction[2, 4, 1] = 1  # 3 voxels of 1.5 mm further on
    expected = {"hd": 4.5, "hd95": 4.5, "assd": 4.5, "nsd": 0, "nsd:4.5": 1, "volume_ml": 0.003}
    found = scores(reference, prediction, metrics=list(expected))
    assert {metric: found["liver", metric] for metric in expected} == pytest.approx(expected)


def test_volumes_are_those_of_the_voxels():
    reference, prediction = blobs(3)
    found = scores(reference, prediction)
    r, p = ((label == 2).sum() * 1.0 * 1.5 * 2.0 / 1000 for label in (reference, prediction))
    expected = {
        "volume_ml": p,
        "reference_volume_ml": r,
        "volume_difference_ml": p - r,
        "absolute_volume_difference_ml": abs(p - r),
        "relative_volume_difference": (p - r) / r,
    }
    assert {name: found["spleen", name] for name in expected} == pytest.approx(expected)


MIRRORED = {"precision": "recall", "lesion_precision": "lesion_sensitivity", "volume_ml": "reference_volume_ml"}
MIRRORED |= {"mean_accuracy_by_precision": "mean_accuracy_by_recall"}
MIRRORED |= {other: name for name, other in MIRRORED.items()}
ONE_SIDED = {"specificity", "relative_volume_difference", "frequency_weighted_iou"}


@SOME
@given(seed=st.integers(0, 10**6), dims=st.sampled_from([2, 3]))
def test_exchanging_reference_and_prediction_keeps_or_mirrors_every_score(seed, dims):
    reference, prediction = blobs(seed, (9, 8, 7)[:dims])
    found, mirrored = scores(reference, prediction), scores(prediction, reference)
    for (organ, name), value in found.items():
        if name not in ONE_SIDED:
            sign = -1 if name == "volume_difference_ml" else 1
            assert sign * mirrored[organ, MIRRORED.get(name, name)] == pytest.approx(value, nan_ok=True)
        elif name == "relative_volume_difference" and dims == 3:
            assert (1 + mirrored[organ, name]) * (1 + value) == pytest.approx(1)


@SOME
@given(seed=st.integers(0, 10**6), shift=st.tuples(*[st.integers(-1, 1)] * 3))
def test_moving_both_masks_keeps_every_score(seed, shift):
    maps = blobs(seed)
    moved = (np.roll(label, shift, axis=(0, 1, 2)) for label in maps)
    assert scores(*moved) == pytest.approx(scores(*maps), nan_ok=True)


@SOME
@given(seed=st.integers(0, 10**6), factor=st.sampled_from([0.5, 2.0, 3.0]))
def test_larger_voxels_scale_distances_and_volumes_and_nothing_else(seed, factor):
    maps, spacing_mm = blobs(seed), np.array([1.0, 1.5, 2.0])
    metrics = [name for name in OF_LABELS if name != "nsd"]
    found = scores(*maps, metrics=[*metrics, "nsd:2"], spacing_mm=spacing_mm)
    scaled = scores(*maps, metrics=[*metrics, f"nsd:{2 * factor}"], spacing_mm=factor * spacing_mm)
    for (organ, name), value in found.items():
        power = 1 if METRICS[name].is_distance else 3 if name.endswith("_ml") else 0
        other = f"nsd:{2 * factor}" if name == "nsd:2" else name
        assert scaled[organ, other] == pytest.approx(value * factor**power, rel=1e-5, nan_ok=True)


@SOME
@given(seed=st.integers(0, 10**6), values=st.permutations([1, 2, 3, 300]))
def test_label_values_are_names_and_no_numbers(seed, values):
    maps = blobs(seed)
    renamed = ((np.array([0, *values[:2]], np.int16))[label] for label in maps)
    organs = {organ: [values[value - 1] for value in united] for organ, united in ORGANS.items()}
    assert scores(*renamed, organs=organs) == pytest.approx(scores(*maps), nan_ok=True)


@SOME
@given(seed=st.integers(0, 10**6))
def test_ignored_voxels_belong_to_neither_mask_whatever_was_predicted_there(seed):
    reference, prediction = blobs(seed)
    ignored = np.random.default_rng(seed).random(reference.shape) < 0.2
    marked = np.where(ignored, 255, reference).astype(np.uint8)
    found = scores(marked, prediction, ignore_label=255)
    cleared = scores(*(np.where(ignored, 0, label) for label in (reference, prediction)))
    counts_background = {"specificity", *OF_IMAGES}
    for (organ, name), value in found.items():
        if name not in counts_background:
            assert value == pytest.approx(cleared[organ, name], nan_ok=True)
    elsewhere = np.where(ignored, 1, prediction).astype(np.uint8)
    assert scores(marked, elsewhere, ignore_label=255) == pytest.approx(found, nan_ok=True)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", OF_ORGANS)
def test_a_union_scores_as_a_label_map_in_which_its_values_are_one(name, seed):
    maps = blobs(seed)
    united = ((label > 0).astype(np.uint8) for label in maps)
    expected = scores(*united, metrics=[name], organs={"both": (1,)})
    assert scores(*maps, metrics=[name])["both", name] == pytest.approx(expected["both", name])


def test_only_what_is_asked_for_is_computed_and_once(monkeypatch):
    calls = []
    for function in ("confusion", "bounding_boxes", "surface_distances", "match_lesions"):
        real = getattr(__import__("medseg.metrics.evidence", fromlist=[function]), function)

        def counted(*args, _real=real, _name=function, **options):
            calls.append(_name)
            return _real(*args, **options)

        monkeypatch.setattr(f"medseg.metrics.evidence.{function}", counted)
    maps = blobs(0)
    scores(*maps, metrics=["dice", "iou", "mean_iou", "volume_ml"])
    assert calls == ["confusion"]
    calls.clear()
    scores(*maps, metrics=["hd", "hd95", "nsd", "nsd:2"])
    assert sorted(calls) == ["bounding_boxes", "confusion", *["surface_distances"] * len(ORGANS)]
    calls.clear()
    scores(*maps, metrics=["lesion_f1", "lesion_f1:0.1"], organs={"liver": (1,), "absent": (7,)})
    assert sorted(calls) == ["bounding_boxes", "confusion", *["match_lesions"] * 2]


def test_an_organ_in_neither_map_needs_no_box():
    label = np.zeros((4, 4, 4), np.uint8)
    organ = CaseEvidence(label, label, {"liver": (1,)}, spacing_mm=(1, 1, 1), voxel_ml=0.001).organ("liver")
    assert organ.is_in_neither and all(not mask.size for mask in organ.masks)


def test_a_number_after_a_colon_sets_the_parameter():
    assert "nsd:2.5" in METRICS and "hd:95" not in METRICS and "nsd:" not in METRICS and 7 not in METRICS
    assert METRICS["nsd:2.5"].title.endswith("tolerance_mm = 2.5")


@pytest.mark.parametrize("name", ["dice:2", "nsd:two", "nsd:-1", "nsd:nan", "nsd:inf", "nsd:", "lesion_f1:1"])
def test_a_number_that_a_metric_does_not_take_is_refused(name):
    with pytest.raises(WorkflowError) as caught:
        METRICS[name]
    assert caught.value.error_id == "E-METRIC-NUMBER" and repr(name.split(":")[0])[:-1] in str(caught.value)


def test_a_mistyped_metric_is_told_with_a_suggestion_whatever_its_number():
    with pytest.raises(WorkflowError, match="did you mean 'nsd'"):
        METRICS["nsdd:2"]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_where_it_comes_from_and_what_it_is_good_for(name):
    metric = METRICS[name]
    assert metric.title and metric.good_for and any(char.isdigit() for char in metric.paper)
    assert metric.is_distance <= metric.lower_is_better


@SOME
@given(seed=st.integers(0, 10**6), shift=st.tuples(*[st.integers(-1, 1)] * 3), values=st.permutations([1, 2, 300]))
def test_calibration_is_the_same_wherever_the_organ_lies_and_whatever_its_voxels_measure(seed, shift, values):
    maps, probability = blobs(seed), np.random.default_rng(seed).random((13, 12, 11))

    def errors(labels, probability, organs, **options):
        of_all = dict.fromkeys(organs, probability)
        return scores(*labels, metrics=["ece"], organs=organs, probabilities=of_all, **options)

    expected = errors(maps, probability, ORGANS)
    *moved, moved_probability = (np.roll(part, shift, axis=(0, 1, 2)) for part in (*maps, probability))
    renamed = [np.array([0, *values[:2]], np.int16)[label] for label in moved]
    organs = {organ: [values[value - 1] for value in united] for organ, united in ORGANS.items()}
    found = errors(renamed, moved_probability, organs, spacing_mm=(5.0, 0.7, 3.0))
    assert found == pytest.approx(expected)
    certain = errors((maps[0], maps[0]), maps[0] == 1, {"liver": (1,)})
    assert certain == {("liver", "ece"): 0}


def test_calibration_leaves_out_what_is_ignored_and_boxes_what_is_not():
    reference, prediction = np.zeros((2, 8, 6), np.uint8)
    reference[2:4, 2:4] = prediction[2:4, 2:4] = 1
    reference[2, 2] = reference[7, 5] = 255
    prediction[7, 5] = 1  # far off: a box with it would be larger
    probability = np.full((8, 6), 0.25)
    probability[2, 2] = probability[7, 5] = 0.9
    options = {"ignore_label": 255, "probabilities": {"liver": probability}, "organs": {"liver": (1,)}}
    found = scores(reference, prediction, metrics=["ece"], **options)
    assert found["liver", "ece"] == pytest.approx(0.25 - 3 / 15)  # 3 of the 15 voxels that count in a box of 4 x 4


def test_calibration_is_that_of_the_organs_box_and_needs_probabilities():
    reference, prediction = blobs(1)
    probability = np.random.default_rng(0).random(reference.shape)
    found = scores(reference, prediction, metrics=["ece"], probabilities={"liver": probability})
    either = ((reference == 1) | (prediction == 1)).astype(np.uint8)
    box = tuple(slice(s.start - 1, s.stop + 1) for s in ndimage.find_objects(either)[0])
    total, inside = 0.0, probability[box]
    for low in range(15):
        chosen = (inside * 15 >= low) & (inside * 15 < low + 1)
        if chosen.any():
            total += chosen.mean() * abs(inside[chosen].mean() - (reference[box] == 1)[chosen].mean())
    assert found["liver", "ece"] == pytest.approx(total)
    assert math.isnan(found["spleen", "ece"])  # nobody gave its probabilities
    with pytest.raises(WorkflowError) as caught:
        scores(reference, prediction, metrics=["ece"])
    assert caught.value.error_id == "E-METRIC-PROBABILITIES"
