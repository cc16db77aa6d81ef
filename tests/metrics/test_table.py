import csv
import math
import statistics

import numpy as np
import pytest

from medseg.errors import GeometryError, WorkflowError
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.metrics import METRICS
from medseg.metrics.table import Score, score_case, summarize, write_table

LABELS = Labels({0: "background", 1: "liver", 2: "cancer"}, ignore_label=255)
GRID = Geometry.from_spacing((4, 1, 1), (1, 1, 1))


def volume(*values: int, grid: Geometry = GRID) -> Volume:
    return Volume(np.array(values, np.uint8).reshape(1, -1, 1, 1), grid)


def test_a_case_has_a_row_for_each_organ_and_union():
    scores = score_case("c", volume(1, 2, 0, 255), volume(1, 1, 0, 1), LABELS, unions={"whole": (1, 2)})
    assert [(s.organ, s.values["dice"], s.note) for s in scores] == [
        ("liver", pytest.approx(2 / 3), ""),
        ("cancer", 0, "missed"),
        ("whole", 1, ""),
    ]


def test_regions_are_scored_instead_of_labels():
    labels = Labels(
        {0: "background", 1: "core", 2: "rim"}, regions={"whole": (1, 2), "core": (1,)}, region_order=(2, 1)
    )
    scores = score_case("c", volume(1, 2, 0, 0), volume(2, 2, 0, 0), labels, metrics=["iou"])
    assert [(s.organ, s.values) for s in scores] == [("whole", {"iou": 1.0}), ("core", {"iou": 0.0})]


def test_notes_say_why_a_score_is_nan_or_zero():
    scores = score_case("c", volume(0, 0, 0, 0), volume(2, 0, 0, 0), LABELS)
    assert [s.note for s in scores] == ["absent in both", "false positive: absent in the reference"]
    assert math.isnan(scores[0].values["dice"]) and scores[1].values["dice"] == 0


@pytest.mark.parametrize(
    ("grid", "error_id"),
    [(Geometry.from_spacing((3, 1, 1), (1, 1, 1)), "E-PAIR-SHAPE"), (GRID.oriented("LAS"), "E-PAIR-AFFINE")],
)
def test_label_maps_on_different_grids_are_refused(grid, error_id):
    other = Volume(np.zeros((1, *grid.shape), np.uint8), grid)
    with pytest.raises(GeometryError) as caught:
        score_case("case_7", volume(0, 0, 0, 0), other, LABELS)
    assert caught.value.error_id == error_id
    assert caught.value.where == "case case_7"


def test_an_unknown_metric_is_refused_with_a_suggestion():
    with pytest.raises(WorkflowError, match="did you mean 'dice'"):
        score_case("c", volume(0, 0, 0, 0), volume(0, 0, 0, 0), LABELS, metrics=["dise"])


def test_a_summary_leaves_missing_values_out_and_counts_them():
    values = [0.5, 0.75, 1.0, math.nan]
    found = summarize([Score(f"c{n}", "liver", {"dice": value}) for n, value in enumerate(values)])["liver"]["dice"]
    assert (found["mean"], found["median"], found["n"], found["n_missing"]) == (0.75, 0.75, 3, 1)
    assert found["std"] == pytest.approx(statistics.stdev(values[:3]))


def test_the_interval_of_a_mean_comes_close_to_the_normal_one_and_is_seeded():
    values = np.random.default_rng(0).normal(0.8, 0.05, 400)
    scores = [Score(str(n), "liver", {"dice": float(value)}) for n, value in enumerate(values)]
    low, high = summarize(scores)["liver"]["dice"]["ci95"]
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=half / 10)
    assert high == pytest.approx(values.mean() + half, abs=half / 10)
    assert summarize(scores) == summarize(scores)


def test_one_case_has_a_mean_but_neither_deviation_nor_interval():
    found = summarize([Score("c", "liver", {"dice": 0.5})])["liver"]["dice"]
    assert found["mean"] == 0.5
    assert math.isnan(found["std"]) and all(math.isnan(bound) for bound in found["ci95"])


def test_an_organ_without_any_value_is_nan_without_a_warning():
    found = summarize([Score("c", "liver", {"dice": math.nan})])["liver"]["dice"]
    assert math.isnan(found["mean"]) and math.isnan(found["median"]) and (found["n"], found["n_missing"]) == (0, 1)


def test_the_table_is_a_csv_whose_missing_values_are_empty(tmp_path):
    scores = [
        Score("a, b", "liver", {"dice": 2 / 3, "iou": 0.5}),
        Score("c", "liver", {"dice": math.nan, "iou": math.nan}, "absent in both"),
    ]
    write_table(tmp_path / "table.csv", scores)
    with (tmp_path / "table.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [
            ["case", "organ", "dice", "iou", "note"],
            ["a, b", "liver", "0.666667", "0.500000", ""],
            ["c", "liver", "", "", "absent in both"],
        ]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_perfect_on_equal_masks(name):
    (liver, _) = score_case("c", volume(1, 1, 0, 0), volume(1, 1, 0, 0), LABELS, metrics=[name])
    assert liver.values == {name: 1.0}
