import csv
import math
import statistics

import numpy as np
import pytest

from medseg.errors import DataError, GeometryError, WorkflowError
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.metrics.lesions import Lesion
from medseg.metrics.table import (
    ABSENT,
    ALL_CLASSES,
    MISSED,
    NOTHING_COUNTS,
    SPURIOUS,
    Score,
    read_rows,
    read_table,
    score_case,
    score_organs,
    summarize,
    write_lesions,
    write_table,
)

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


def test_a_summary_counts_organs_that_were_missed_and_that_are_spurious():
    rows = [
        Score("a", "liver", {"hd95": 1.0}),
        Score("b", "liver", {"hd95": math.nan}, MISSED),
        Score("c", "liver", {"hd95": math.nan}, f"{SPURIOUS}; prediction resampled"),
        Score("d", "liver", {"hd95": math.nan}, ABSENT),
    ]
    found = summarize(rows)["liver"]["hd95"]
    assert (found["n"], found["n_missing"], found["n_missed"], found["n_spurious"]) == (1, 3, 1, 1)


def test_a_summary_tells_the_quartiles():
    found = summarize([Score(str(n), "liver", {"dice": n / 8}) for n in range(9)])["liver"]["dice"]
    assert (found["p25"], found["median"], found["p75"]) == (0.25, 0.5, 0.75)


def test_the_interval_is_wider_where_cases_are_of_few_patients():
    values = np.repeat(np.random.default_rng(0).normal(0.8, 0.05, 20), 5)
    rows = [Score(str(n), "liver", {"dice": float(value)}) for n, value in enumerate(values)]
    of_patients = [Score(r.case, r.organ, r.values, patient=str(int(r.case) // 5)) for r in rows]
    (low, high), (patient_low, patient_high) = (
        summarize(scores)["liver"]["dice"]["ci95"] for scores in (rows, of_patients)
    )
    assert patient_high - patient_low > 1.5 * (high - low)


def test_a_row_tells_the_patient_and_the_diagonal_of_the_scan():
    grid = Geometry.from_spacing((4, 1, 1), (1, 2, 2))
    (liver, _) = score_case("c", volume(1, 0, 0, 0, grid=grid), volume(1, 0, 0, 0, grid=grid), LABELS, patient="7")
    assert liver.patient == "7" and liver.diagonal_mm == pytest.approx(math.sqrt(4**2 + 2**2 + 2**2))


def test_scores_of_the_image_stand_in_a_row_of_their_own():
    rows = score_case("c", volume(1, 2, 0, 255), volume(1, 1, 0, 1), LABELS, metrics=["pixel_accuracy", "dice"])
    assert [(row.organ, set(row.values)) for row in rows] == [
        ("liver", {"dice"}),
        ("cancer", {"dice"}),
        (ALL_CLASSES, {"pixel_accuracy"}),
    ]
    assert rows[-1].values["pixel_accuracy"] == pytest.approx(2 / 3) and rows[-1].note == ""
    assert set(summarize(rows)[ALL_CLASSES]) == {"pixel_accuracy"}


def test_a_case_of_which_every_voxel_is_ignored_says_so():
    rows = score_case("c", volume(255, 255, 255, 255), volume(1, 1, 0, 1), LABELS, metrics=["mean_iou"])
    assert [row.note for row in rows] == [NOTHING_COUNTS] * 3


def test_the_table_is_a_csv_whose_missing_values_are_empty(tmp_path):
    scores = [
        Score("a, b", "liver", {"dice": 2 / 3, "iou": 0.5}, patient="4", diagonal_mm=500.0),
        Score("c", "liver", {"dice": math.nan, "iou": math.nan}, "absent in both"),
    ]
    write_table(tmp_path / "table.csv", scores)
    with (tmp_path / "table.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [
            ["case", "organ", "patient", "dice", "iou", "diagonal_mm", "note"],
            ["a, b", "liver", "4", "0.666667", "0.500000", "500.000000", ""],
            ["c", "liver", "", "", "", "", "absent in both"],
        ]


def test_a_table_is_read_as_it_was_written(tmp_path):
    metrics = ["dice", "nsd:2", "mean_iou"]
    scores = score_case("c", volume(1, 2, 0, 255), volume(1, 1, 0, 1), LABELS, metrics=metrics, patient="p")
    write_table(tmp_path / "table.csv", scores)
    for read, written in zip(read_table(tmp_path / "table.csv"), scores, strict=True):
        assert (read.case, read.organ, read.note, read.patient) == (
            written.case, written.organ, written.note, written.patient,
        )  # fmt: skip
        assert read.values == pytest.approx(written.values, abs=1e-6, nan_ok=True)
        assert read.diagonal_mm == pytest.approx(written.diagonal_mm, abs=1e-6)


def test_a_table_from_before_there_were_patients_is_read(tmp_path):
    (tmp_path / "old.csv").write_text("case,organ,dice,note\nc,liver,,missed\n")
    (score,) = read_table(tmp_path / "old.csv")
    assert (score.case, score.organ, score.patient, score.note) == ("c", "liver", "", "missed")
    assert math.isnan(score.values["dice"]) and math.isnan(score.diagonal_mm)


def test_a_csv_with_a_byte_order_mark_is_read_and_one_of_other_letters_or_rows_too_long_is_refused(tmp_path):
    path, text = tmp_path / "t.csv", "case,organ,dice,note\nc,liver\nd,liver,0.5,\n"
    path.write_text(text, encoding="utf-8-sig")
    assert read_rows(path)[0] == {"case": "c", "organ": "liver", "dice": "", "note": ""}
    assert [score.case for score in read_table(path)] == ["c", "d"]
    path.write_text(text, encoding="utf-16")
    with pytest.raises(DataError, match=r"E-TABLE .*t.csv: is no CSV in UTF-8"):
        read_rows(path)
    path.write_text(text + "e,liver,0,5,\n")
    with pytest.raises(DataError, match=r"E-TABLE .*t.csv:4: has more fields"):
        read_rows(path)


def test_infinity_is_no_value(tmp_path):
    (tmp_path / "t.csv").write_text("case,organ,hd95,note\nc,liver,inf,\n")
    with pytest.raises(ValueError, match="inf"):
        read_table(tmp_path / "t.csv")


def test_each_lesion_has_a_row_in_a_table_of_its_own(tmp_path):
    grid = Geometry.from_spacing((7, 1, 1), (10, 10, 10))
    pair = volume(1, 1, 0, 1, 0, 0, 0, grid=grid), volume(1, 0, 0, 0, 0, 1, 1, grid=grid)
    scores = score_organs("c", *pair, {"lesion": (1,)}, patient="4", with_lesions=True)
    assert scores[0].lesions == [
        Lesion(True, 2, pytest.approx(2), True, pytest.approx(2 / 3)),
        Lesion(True, 1, pytest.approx(1), False, 0.0),
        Lesion(False, 2, pytest.approx(2), False, 0.0),
    ]
    write_lesions(tmp_path / "lesions.csv", scores)
    assert (tmp_path / "lesions.csv").read_text().splitlines() == [
        "case,organ,patient,in_reference,num_voxels,volume_ml,is_matched,dice",
        "c,lesion,4,1,2,2.000000,1,0.666667",
        "c,lesion,4,1,1,1.000000,0,0.000000",
        "c,lesion,4,0,2,2.000000,0,0.000000",
    ]
