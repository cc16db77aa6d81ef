"""Post-processing is chosen where it helps the held-out cases, and nowhere else."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.build.postprocessing import CANDIDATES, Choice, as_steps, choose, pieces_in
from medseg.data.volume_io import read_label
from medseg.inference.postprocess import check_steps, postprocess
from medseg.labels import Labels
from medseg.metrics.table import read_table
from medseg.model import load_spec
from medseg.train import train

from .test_train import home  # noqa: F401  # the data set of six small scans

LABELS = Labels({0: "background", 1: "liver", 2: "tumour"}, ignore_label=3)
REGIONS = Labels({0: "background", 1: "liver", 2: "tumour"}, regions={"whole": (1, 2)}, region_order=(1,))


def dice(prediction: np.ndarray, reference: np.ndarray, values: tuple[int, ...], ignored: int | None) -> float:
    counted = reference != (-1 if ignored is None else ignored)
    found, drawn = np.isin(prediction, values) & counted, np.isin(reference, values)
    total = found.sum() + drawn.sum()
    return 2 * (found & drawn).sum() / total if total else 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.6), st.sampled_from([LABELS, REGIONS]), st.sampled_from([0.001, 0.01]))
def test_a_gain_is_what_taking_the_step_brings(seed, density, labels, voxel_ml):
    random = np.random.default_rng(seed)
    drawn = (random.random((2, 7, 6, 8)) < density) * random.integers(1, 3, (2, 7, 6, 8))
    prediction, reference = drawn.astype(np.uint8)
    if labels.ignore_label:
        reference[:2] = labels.ignore_label
    pieces = pieces_in(prediction, reference, labels.organ_values, voxel_ml=voxel_ml, ignore_label=labels.ignore_label)
    for organ, values in labels.organ_values.items():
        before = dice(prediction, reference, values, labels.ignore_label)
        for step, amount in CANDIDATES:
            after = prediction.copy()
            wanted = {step: {organ: amount} if amount else [organ]}
            postprocess(after, check_steps(wanted, labels), voxel_ml)
            gain = dice(after, reference, values, labels.ignore_label) - before
            assert pieces[organ].gain((step, amount)) == pytest.approx(gain, abs=1e-12)


def cases_with(*specks: int, sizes: int = 3) -> list:
    """Cases of a liver that is found but for an edge, with so many wrong specks beside it, and a tumour in two pieces."""
    cases = []
    for n, number in enumerate(specks):
        reference = np.zeros((30, 20, 20), np.uint8)
        reference[2:14, 2:14, 2:14] = 1
        reference[20:24, 3:7, 3:7] = reference[20:24, 12:16, 12:16] = 2
        prediction = reference.copy()
        prediction[2, 2 : 3 + n, 2:14] = 0
        for speck in range(number):
            prediction[17, 2 * sizes * speck : 2 * sizes * speck + sizes, 17 : 17 + sizes] = 1
        cases.append(pieces_in(prediction, reference, LABELS.organ_values, voxel_ml=0.01))
    return cases


def test_small_wrong_pieces_go_and_organs_of_several_pieces_keep_them():
    """Specks of 9 voxels, 0.09 ml: removed by keep_largest and by any volume from 0.1 ml on; tumours are 0.64 ml each."""
    choices = choose(cases_with(3, 2, 3, 1, 2, 3), [f"patient {n}" for n in range(6)])
    assert [(choice.organ, choice.step) for choice in choices] == [("liver", "keep_largest")]
    assert choices[0].gain > 0.001 and 0 <= choices[0].ci95[0] <= choices[0].gain <= choices[0].ci95[1]


def test_what_helps_some_cases_and_harms_others_is_not_chosen():
    harmed = cases_with(0, 0, 0)
    reference = np.zeros((30, 20, 20), np.uint8)
    reference[2:6, 2:6, 2:6] = reference[10, 2:5, 2:5] = 1  # as small as the specks, and right
    harmed[0] = pieces_in(reference, reference, LABELS.organ_values, voxel_ml=0.01)
    cases = [*harmed, *cases_with(3, 3, 3)]
    assert choose(cases, [str(n) for n in range(6)]) == []


def test_one_patient_decides_nothing():
    assert choose(cases_with(3, 3, 3), ["the same"] * 3) == []


def test_an_organ_that_is_rightly_gone_is_a_gain():
    prediction, nothing = np.zeros((2, 8, 8, 8), np.uint8)
    prediction[1, 1, 1:3] = 2
    cases = [pieces_in(prediction, nothing, LABELS.organ_values, voxel_ml=0.01) for _ in range(4)]
    (choice,) = choose(cases, list("abcd"))
    assert (choice.organ, choice.step, choice.amount, choice.gain) == ("tumour", "min_volume_ml", 0.03, 1.0)


def test_choices_are_steps_of_a_workflow():
    chosen = [Choice("liver", "keep_largest", 0, 0.1, (0, 1)), Choice("tumour", "min_volume_ml", 0.3, 0.1, (0, 1))]
    assert as_steps(chosen) == {"min_volume_ml": {"tumour": 0.3}, "keep_largest": ["liver"]}
    assert as_steps([]) == {}


def test_a_training_chooses_and_scores_what_its_model_does(home: Path, monkeypatch):  # noqa: F811
    """After a few iterations there are specks everywhere; the choice is in the model, its files and its table."""
    auto = train(
        home / "tiny.yaml", overrides=["infer.postprocess=auto", "track.tensorboard=false"], output=home / "auto"
    )
    plain = train(home / "tiny.yaml", output=home / "plain")
    spec = load_spec(home / "auto" / "model")
    assert (
        auto["postprocess"]
        == spec.postprocess
        == json.loads((home / "auto" / "result.json").read_text())["postprocess"]
    )
    assert plain["postprocess"] == {}
    steps = check_steps(spec.postprocess, spec.labels)
    for path in (home / "plain" / "predictions").iterdir():
        expected = read_label(path)
        array = expected.array.copy()
        postprocess(array[0], steps, expected.geometry.voxel_ml)
        np.testing.assert_array_equal(read_label(home / "auto" / "predictions" / path.name).array, array)
    dice = {row.organ: [] for row in read_table(home / "auto" / "per_case.csv")}
    assert auto["best"]["mean_dice"] >= plain["best"]["mean_dice"] and set(dice) == {"bright", "dark"}
