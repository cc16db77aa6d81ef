import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from rich.console import Console

from medseg.data.volume_io import write_volume
from medseg.errors import MedsegError, Problems, WorkflowError
from medseg.evaluate import evaluate
from medseg.geometry import Geometry, Volume
from medseg.metrics import METRICS
from medseg.metrics.table import read_table
from medseg.reporting.evaluation import evaluation_table

GRID = Geometry.from_spacing((14, 12, 10), (1, 1.5, 2)).oriented("LPS")
LABELS = {"0": "background", "1": "liver", "2": "cancer"}


def write_label(path, array, grid: Geometry = GRID) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, Volume(np.asarray(array, np.uint8)[None], grid))


def drawn_and_predicted(seed: int):
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, 3, GRID.shape)
    return drawn, np.where(generator.random(GRID.shape) < 0.7, drawn, generator.integers(0, 3, GRID.shape))


@pytest.fixture
def folders(tmp_path):
    """Four cases in predictions/ and labels/, and a manifest of the latter with folds."""
    for n in range(4):
        drawn, predicted = drawn_and_predicted(n)
        write_label(tmp_path / "labels" / f"case_{n}.nii.gz", drawn)
        write_label(tmp_path / "predictions" / f"case_{n}.nii.gz", predicted)
    entry = "labels/case_{}.nii.gz"
    training = [{"image": entry.format(n), "label": entry.format(n), "fold": n % 2} for n in range(4)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABELS, "training": training}))
    return tmp_path


def test_scores_agree_with_simpleitk(folders):
    result = evaluate(folders / "predictions", folders / "dataset.json")
    expected = {"liver": [], "cancer": []}
    for n in range(4):
        measures = sitk.LabelOverlapMeasuresImageFilter()
        files = (folders / kind / f"case_{n}.nii.gz" for kind in ("labels", "predictions"))
        measures.Execute(*(sitk.ReadImage(str(file)) for file in files))
        for value, organ in ((1, "liver"), (2, "cancer")):
            expected[organ].append((measures.GetDiceCoefficient(value), measures.GetJaccardCoefficient(value)))
    assert result["cases"] == 4
    for organ, values in expected.items():
        for metric, column in zip(("dice", "iou"), np.transpose(values), strict=True):
            found = result["per_organ"][organ][metric]
            assert set(found) == {
                *("mean", "std", "median", "p25", "p75", "ci95"),
                *("n", "n_missing", "n_missed", "n_spurious"),
            }
            assert found["mean"] == pytest.approx(column.mean(), abs=1e-6)
            assert found["median"] == pytest.approx(np.median(column), abs=1e-6)
            assert found["ci95"][0] <= found["mean"] <= found["ci95"][1]
            assert (found["n"], found["n_missing"]) == (4, 0)
    assert result["mean"]["dice"] == pytest.approx(np.mean([v[0] for vs in expected.values() for v in vs]), abs=1e-6)


def test_the_table_has_a_row_for_each_case_and_organ(folders, tmp_path):
    result = evaluate(folders / "predictions", folders / "dataset.json", output=tmp_path / "out")
    lines = (tmp_path / "out" / "per_case.csv").read_text().splitlines()
    assert result["table"] == str(tmp_path / "out" / "per_case.csv")
    assert lines[0] == "case,organ,patient,dice,iou,diagonal_mm,note"
    assert [line.split(",")[:2] for line in lines[1:3]] == [["case_0", "liver"], ["case_0", "cancer"]]
    assert len(lines) == 1 + 4 * 2


def test_a_split_of_the_manifest_is_what_must_have_been_predicted(folders):
    (folders / "predictions" / "case_3.nii.gz").unlink()
    result = evaluate(folders / "predictions", folders / "dataset.json", split="fold_1")
    assert result["cases"] == 1
    assert result["unmatched"] == {"predictions": ["case_0", "case_2"], "references": ["case_3"]}


def test_without_a_split_whatever_is_predicted_is_scored(folders):
    (folders / "predictions" / "case_3.nii.gz").unlink()
    result = evaluate(folders / "predictions", folders / "dataset.json")
    assert result["cases"] == 3
    assert result["unmatched"] == {"predictions": [], "references": []}


def test_folders_need_no_manifest_and_say_what_is_unmatched(folders, caplog):
    (folders / "predictions" / "case_3.nii.gz").rename(folders / "predictions" / "other.nii.gz")
    result = evaluate(folders / "predictions", folders / "labels")
    assert list(result["per_organ"]) == ["label 1", "label 2"]
    assert result["unmatched"] == {"predictions": ["other"], "references": ["case_3"]}
    assert "W-UNMATCHED 1 prediction without reference, not scored: other\n" in caplog.text
    assert "W-UNMATCHED 1 reference without prediction, not scored: case_3; --missing-as-empty" in caplog.text


def test_of_many_unmatched_files_the_first_are_named_and_the_others_counted(folders, caplog):
    for n in range(4, 12):
        write_label(folders / "predictions" / f"case_{n:02}.nii.gz", drawn_and_predicted(0)[1])
    evaluate(folders / "predictions", folders / "labels")
    assert "8 predictions without reference, not scored: case_04, case_05, case_06, case_07, case_08 and 3 more" in (
        caplog.text
    )


def test_labels_give_the_organs_of_a_folder_their_names(folders):
    result = evaluate(folders / "predictions", folders / "labels", labels=folders / "dataset.json")
    assert list(result["per_organ"]) == ["liver", "cancer"]


def test_two_files_need_no_common_name(folders):
    result = evaluate(folders / "predictions" / "case_0.nii.gz", folders / "labels" / "case_1.nii.gz")
    assert result["cases"] == 1 and 0 < result["mean"]["dice"] < 1


def test_probabilities_and_entropies_beside_the_predictions_are_left_alone(folders):
    array = np.zeros((3, *GRID.shape), np.float32)
    write_volume(folders / "predictions" / "case_0_probabilities.nii.gz", Volume(array, GRID))
    write_volume(folders / "predictions" / "case_0_entropy.nii.gz", Volume(array[:1], GRID))
    assert evaluate(folders / "predictions", folders / "labels")["unmatched"] == {"predictions": [], "references": []}


def test_an_organ_absent_in_both_is_missing_and_one_that_was_missed_scores_zero(tmp_path):
    drawn = np.zeros(GRID.shape)
    drawn[:4] = 1
    write_label(tmp_path / "a" / "x.nii.gz", drawn)
    write_label(tmp_path / "b" / "x.nii.gz", np.zeros(GRID.shape))
    (tmp_path / "m.json").write_text(json.dumps({"labels": LABELS, "training": []}))
    result = evaluate(tmp_path / "b", tmp_path / "a", labels=tmp_path / "m.json")
    assert result["per_organ"]["liver"]["dice"]["mean"] == 0
    cancer = result["per_organ"]["cancer"]["dice"]
    assert math.isnan(cancer["mean"]) and (cancer["n"], cancer["n_missing"]) == (0, 1)
    assert result["mean"]["dice"] == 0


def test_predictions_on_another_grid_are_refused_all_at_once(folders):
    affine = GRID.affine.copy()
    affine[0, 3] += 5
    for n in (1, 2):
        write_label(
            folders / "predictions" / f"case_{n}.nii.gz", drawn_and_predicted(n)[1], Geometry(GRID.shape, affine)
        )
    with pytest.raises(Problems, match="--resample") as caught:
        evaluate(folders / "predictions", folders / "labels")
    assert [error.error_id for error in caught.value.errors] == ["E-PAIR-AFFINE"] * 2
    assert [error.where for error in caught.value.errors] == ["case case_1", "case case_2"]


def test_resample_brings_predictions_to_the_references_grid_and_says_so(tmp_path):
    drawn = np.zeros(GRID.shape)
    drawn[3:11, 2:9, 4:8] = 1
    write_label(tmp_path / "labels" / "x.nii.gz", drawn)
    turned = Volume(drawn[None].astype(np.uint8), GRID).oriented("SAR")
    fine = turned.geometry.resampled([s / 2 for s in turned.geometry.spacing_mm])
    doubled = turned.array[0].repeat(2, 0).repeat(2, 1).repeat(2, 2)
    write_label(tmp_path / "predictions" / "x.nii.gz", doubled, fine)
    result = evaluate(tmp_path / "predictions", tmp_path / "labels", resample=True, output=tmp_path / "out")
    assert result["mean"] == {"dice": 1.0, "iou": 1.0}
    assert "prediction resampled" in (tmp_path / "out" / "per_case.csv").read_text()


def test_values_that_the_labels_do_not_declare_are_refused(folders):
    write_label(folders / "predictions" / "case_0.nii.gz", np.full(GRID.shape, 7))
    with pytest.raises(Problems, match=r"E-LABEL-UNDECLARED .*predictions/case_0.nii.gz: holds label 7, .*--map"):
        evaluate(folders / "predictions", folders / "dataset.json")
    write_label(folders / "labels" / "case_0.nii.gz", np.full(GRID.shape, 7))
    with pytest.raises(
        Problems, match=r"E-LABEL-UNDECLARED .*labels/case_0.nii.gz: .*add them to the manifest's labels"
    ):
        evaluate(folders / "predictions", folders / "dataset.json")


def test_values_of_another_program_in_every_case_are_one_line(folders):
    for n in range(4):
        write_label(folders / "predictions" / f"case_{n}.nii.gz", np.full(GRID.shape, 7))
    with pytest.raises(Problems) as caught:
        evaluate(folders / "predictions", folders / "dataset.json")
    (line,) = str(caught.value).splitlines()
    assert "case_2.nii.gz and 1 more: holds label 7, but declared are 0, 1, 2; say with --map" in line
    assert len(caught.value.errors) == 4


def test_nothing_in_common_is_an_error_that_shows_names(folders):
    (folders / "other").mkdir()
    (folders / "predictions" / "case_0.nii.gz").rename(folders / "other" / "scan.nii.gz")
    with pytest.raises(
        MedsegError, match=r"E-NO-PAIRS .*\(scan\).*\(case_0, case_1, case_2 and 1 more\).*nnU-Net.*--map"
    ):
        evaluate(folders / "other", folders / "labels")


def test_an_unknown_metric_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(WorkflowError, match="did you mean 'dice'"):
        evaluate(tmp_path / "absent", tmp_path / "absent", metrics=["dic"])


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def dice_of(reference: np.ndarray, prediction: np.ndarray) -> float:
    return 2 * np.logical_and(reference, prediction).sum() / (reference.sum() + prediction.sum())


def mapping(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_json_holds_the_rows_of_the_table_and_the_summary(folders, tmp_path):
    result = evaluate(folders / "predictions", folders / "dataset.json", output=tmp_path / "out")
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    rows = read_table(tmp_path / "out" / "per_case.csv")
    assert [(row["case"], row["organ"]) for row in told["per_case"]] == [(row.case, row.organ) for row in rows]
    assert [row["dice"] for row in told["per_case"]] == pytest.approx([row.values["dice"] for row in rows], abs=1e-6)
    assert told["per_organ"]["liver"]["dice"]["mean"] == result["per_organ"]["liver"]["dice"]["mean"]
    assert told["per_case"][0]["diagonal_mm"] == pytest.approx(math.hypot(14, 12 * 1.5, 10 * 2))


def test_volumes_agree_as_bland_and_altman_have_it(folders):
    found = evaluate(folders / "predictions", folders / "dataset.json", metrics=["dice"])["volumes"]["cancer"]
    pairs = [
        [(read(folders / kind / f"case_{n}.nii.gz") == 2).sum() * 3e-3 for kind in ("labels", "predictions")]
        for n in range(4)
    ]
    differences = np.array([prediction - reference for reference, prediction in pairs])
    bias, spread = differences.mean(), 1.96 * differences.std(ddof=1)
    assert found["bias_ml"] == pytest.approx(bias, abs=1e-9)
    assert found["limits_ml"] == pytest.approx([bias - spread, bias + spread], abs=1e-9)
    assert found["mean_reference_ml"] == pytest.approx(np.mean([reference for reference, _ in pairs]))
    assert found["n"] == 4


def test_files_without_any_label_have_no_organs(tmp_path):
    for kind in ("a", "b"):
        write_label(tmp_path / kind / "x.nii.gz", np.zeros(GRID.shape))
    result = evaluate(tmp_path / "a", tmp_path / "b", output=tmp_path / "out")
    assert (result["cases"], result["per_organ"], result["volumes"]) == (1, {}, {})
    assert math.isnan(result["mean"]["dice"])


def test_an_organ_in_neither_is_no_pair_of_volumes(tmp_path):
    for kind in ("a", "b"):
        write_label(tmp_path / kind / "x.nii.gz", np.zeros(GRID.shape))
    labels = mapping(tmp_path / "labels.json", json.dumps({"labels": {"background": 0, "liver": 1}}))
    assert evaluate(tmp_path / "a", tmp_path / "b", labels=labels)["volumes"] == {}


def test_patients_of_the_manifest_are_in_the_table_and_their_cases_are_drawn_together(folders, tmp_path):
    manifest = json.loads((folders / "dataset.json").read_text())
    for n, entry in enumerate(manifest["training"]):
        entry |= {"patient": f"P{n // 2}", "fold": n // 2}
    (folders / "dataset.json").write_text(json.dumps(manifest))
    evaluate(folders / "predictions", folders / "dataset.json", output=tmp_path / "out")
    assert [row.patient for row in read_table(tmp_path / "out" / "per_case.csv")][::2] == ["P0", "P0", "P1", "P1"]


def test_a_manifest_without_patients_leaves_them_empty(folders, tmp_path):
    evaluate(folders / "predictions", folders / "dataset.json", output=tmp_path / "out")
    assert {row.patient for row in read_table(tmp_path / "out" / "per_case.csv")} == {""}


def test_groups_are_among_the_names_that_a_mistyped_one_may_mean(folders):
    with pytest.raises(WorkflowError, match="did you mean 'surface'"):
        evaluate(folders / "predictions", folders / "labels", metrics=["surfac"])
    with pytest.raises(WorkflowError, match="E-METRIC-NUMBER"):
        evaluate(folders / "predictions", folders / "labels", metrics=["dice:2"])
    with pytest.raises(WorkflowError, match="E-METRICS"):
        evaluate(folders / "predictions", folders / "labels", metrics=[])


def test_groups_stand_for_metrics(folders):
    result = evaluate(folders / "predictions", folders / "dataset.json", metrics=["dice", "surface", "image"])
    assert list(result["mean"]) == [
        *("dice", "hd", "hd95", "assd", "nsd", "pixel_accuracy"),
        *("mean_accuracy_by_recall", "mean_accuracy_by_precision", "mean_iou", "frequency_weighted_iou"),
    ]
    assert list(result["per_organ"]) == ["liver", "cancer", "all classes"]


def test_processes_score_as_one_alone(folders, tmp_path):
    for n, workers in enumerate((0, 2)):
        evaluate(folders / "predictions", folders / "labels", output=tmp_path / str(n), workers=workers)
    one, two = ((tmp_path / str(n) / "per_case.csv").read_bytes() for n in range(2))
    assert one == two


def test_processes_do_not_load_torch():
    script = "import sys, medseg.evaluate; sys.exit(bool({'torch', 'monai', 'mlflow'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_processes_warn_of_is_logged_here(folders, caplog):
    manifest = json.loads((folders / "dataset.json").read_text())
    manifest["labels"] = {"0": "background", "1": "liver"}
    (folders / "dataset.json").write_text(json.dumps(manifest))
    labels = mapping(folders / "map.yaml", "liver: 1\n")
    for n in range(4):
        drawn = read(folders / "labels" / f"case_{n}.nii.gz")
        write_label(folders / "labels" / f"case_{n}.nii.gz", drawn == 1)
    result = evaluate(folders / "predictions", folders / "dataset.json", label_map=labels, workers=2)
    assert result["cases"] == 4
    assert caplog.text.count("W-MAP-VALUES") == 1 and "does not name them: 2\n" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_one_broken_file_among_ten_is_named_and_refuses_all_or_is_left_out(tmp_path, workers):
    for n in range(10):
        for kind in ("labels", "predictions"):
            write_label(tmp_path / kind / f"case_{n}.nii.gz", drawn_and_predicted(n)[0])
    broken = tmp_path / "predictions" / "case_4.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    labels = mapping(tmp_path / "labels.json", json.dumps({"labels": LABELS}))
    options = {"workers": workers, "metrics": ["dice"], "labels": labels}
    with pytest.raises(Problems) as caught:
        evaluate(tmp_path / "predictions", tmp_path / "labels", **options)
    assert len(caught.value.errors) == 1 and caught.value.where == str(broken)
    result = evaluate(tmp_path / "predictions", tmp_path / "labels", skip_failed=True, **options)
    assert result["cases"] == 9 and result["mean"] == {"dice": 1.0}
    assert [(entry["case"], entry["error_id"]) for entry in result["failed"]] == [
        ("case_4", caught.value.errors[0].error_id)
    ]


def test_values_that_are_no_integers_and_other_shapes_are_told_together(folders):
    array = np.full((1, *GRID.shape), 0.5, np.float32)
    write_volume(folders / "predictions" / "case_1.nii.gz", Volume(array, GRID))
    small = Geometry.from_spacing((5, 5, 5), (1, 1, 1))
    write_label(folders / "predictions" / "case_2.nii.gz", np.ones(small.shape), small)
    with pytest.raises(Problems) as caught:
        evaluate(folders / "predictions", folders / "dataset.json")
    assert [error.error_id for error in caught.value.errors] == ["E-LABEL-VALUES", "E-PAIR-SHAPE"]


def test_all_cases_failing_is_refused_even_if_failures_may_be_skipped(folders):
    for path in (folders / "predictions").iterdir():
        path.write_bytes(b"no scan")
    with pytest.raises(Problems) as caught:
        evaluate(folders / "predictions", folders / "dataset.json", skip_failed=True)
    assert len(caught.value.errors) == 4


def test_a_picture_is_not_resampled_to_a_volume(folders):
    for path in (folders / "predictions").iterdir():
        path.unlink()
    flat = Geometry.from_spacing((14, 12), (1, 1))
    write_label(folders / "predictions" / "case_0.nii.gz", np.ones(flat.shape), flat)
    with pytest.raises(Problems, match="E-PAIR-SHAPE"):
        evaluate(folders / "predictions", folders / "dataset.json", resample=True)


def test_an_empty_folder_is_refused(folders, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(MedsegError, match="E-NO-INPUT"):
        evaluate(tmp_path / "nothing", folders / "labels")


def test_a_missing_prediction_counts_as_empty_on_request(folders, tmp_path):
    (folders / "predictions" / "case_3.nii.gz").unlink()
    given = evaluate(folders / "predictions", folders / "dataset.json")["per_organ"]["liver"]["dice"]
    result = evaluate(
        folders / "predictions", folders / "dataset.json",
        missing_as_empty=True, metrics=["dice", "hd95"], output=tmp_path / "out",
    )  # fmt: skip
    liver = result["per_organ"]["liver"]
    assert result["no_prediction"] == ["case_3"] and result["unmatched"]["references"] == []
    assert liver["dice"]["mean"] == pytest.approx(given["mean"] * 3 / 4)
    assert liver["hd95"]["n"] == 3 and liver["hd95"]["n_missed"] == 1
    (row, _) = (row for row in read_table(tmp_path / "out" / "per_case.csv") if row.case == "case_3")
    assert row.note == "missed; no prediction" and row.is_missed


def test_what_nnunet_leaves_beside_its_predictions_is_no_case(folders):
    """Its dataset.json, which lists no cases, names the labels."""
    for name in ("summary.json", "plans.json", "postprocessing.json"):
        (folders / "predictions" / name).write_text("{}")
    for name in ("postprocessing.pkl", "case_0.npz", "case_0.pkl"):
        (folders / "predictions" / name).write_bytes(b"\x80\x04")
    named = {
        "labels": {"background": 0, "liver": 1, "cancer": 2},
        "channel_names": {"0": "CT"},
        "file_ending": ".nii.gz",
    }
    labels = mapping(folders / "predictions" / "dataset.json", json.dumps(named | {"numTraining": 4}))
    result = evaluate(folders / "predictions", folders / "labels", labels=labels)
    assert result["cases"] == 4 and result["unmatched"] == {"predictions": [], "references": []}
    assert list(result["per_organ"]) == ["liver", "cancer"]


def test_other_numbers_are_brought_to_those_of_the_references(folders, caplog):
    theirs = np.array([0, 5, 90], np.uint8)
    for n in range(4):
        predicted = theirs[drawn_and_predicted(n)[1]]
        predicted[0, 0, 0] = 77
        write_label(folders / "predictions" / f"case_{n}.nii.gz", predicted)
    labels = mapping(folders / "map.yaml", "liver: 5  # as TotalSegmentator numbers it\ncancer: [90, 91]\n")
    result = evaluate(folders / "predictions", folders / "dataset.json", label_map=labels)
    for organ, ours, value in (("liver", 1, 5), ("cancer", 2, 90)):
        expected = [
            dice_of(
                read(folders / "labels" / f"case_{n}.nii.gz") == ours,
                read(folders / "predictions" / f"case_{n}.nii.gz") == value,
            )
            for n in range(4)
        ]
        assert result["per_organ"][organ]["dice"]["mean"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert "W-MAP-VALUES taken for background, as the map does not name them: 77\n" in caplog.text
    labels.write_text("liver: 5\ncancer: 90\nbackground: [77]\n")
    caplog.clear()
    evaluate(folders / "predictions", folders / "dataset.json", label_map=labels)
    assert not caplog.records


def test_organs_that_the_map_does_not_name_are_not_scored_and_that_is_told(folders, caplog):
    labels = mapping(folders / "map.json", '{"liver": 1}')
    result = evaluate(folders / "predictions", folders / "dataset.json", label_map=labels)
    assert list(result["per_organ"]) == ["liver"]
    assert "W-MAP-ORGANS the map does not name cancer" in caplog.text


@pytest.mark.parametrize("below", ["", "segmentations"])
def test_a_file_for_each_organ_is_what_the_map_says(folders, below):
    """TotalSegmentator's layout: a folder for each case, also as its data set has it."""
    for n in range(4):
        (folders / "predictions" / f"case_{n}.nii.gz").unlink()
        predicted = drawn_and_predicted(n)[1]
        for value, organ in ((1, "liver"), (2, "liver_tumor"), (0, "spleen")):
            write_label(folders / "predictions" / f"case_{n}" / below / f"{organ}.nii.gz", predicted == value)
    labels = mapping(folders / "map.yaml", "liver: liver\ncancer: liver_tumor\n")
    result = evaluate(folders / "predictions", folders / "labels", labels=folders / "dataset.json", label_map=labels)
    expected = [
        dice_of(read(folders / "labels" / f"case_{n}.nii.gz") == 1, drawn_and_predicted(n)[1] == 1) for n in range(4)
    ]
    assert result["cases"] == 4
    assert result["per_organ"]["liver"]["dice"]["mean"] == pytest.approx(np.mean(expected), abs=1e-9)


def test_where_files_overlap_the_later_of_the_map_lies_on_top(tmp_path):
    drawn = np.zeros(GRID.shape)
    drawn[2:9] = 1
    drawn[4:6] = 2
    write_label(tmp_path / "x.nii.gz", drawn)
    write_label(tmp_path / "x" / "whole.nii.gz", drawn > 0)
    write_label(tmp_path / "x" / "core.nii.gz", drawn == 2)
    labels = mapping(tmp_path / "m.json", json.dumps({"labels": LABELS}))
    nested = mapping(tmp_path / "map.yaml", "liver: whole\ncancer: core\n")
    result = evaluate(tmp_path / "x", tmp_path / "x.nii.gz", labels=labels, label_map=nested)
    assert result["mean"]["dice"] == 1


def test_a_case_that_lacks_the_file_of_an_organ_is_refused(folders):
    shutil.rmtree(folders / "predictions")
    for n in range(4):
        write_label(folders / "predictions" / f"case_{n}" / "liver.nii.gz", drawn_and_predicted(n)[1] == 1)
        if n:
            write_label(folders / "predictions" / f"case_{n}" / "tumor.nii.gz", drawn_and_predicted(n)[1] == 2)
    labels = mapping(folders / "map.yaml", "liver: liver\ncancer: tumor\n")
    with pytest.raises(Problems, match=r"E-MAP-FILE .*case_0: lacks tumor") as caught:
        evaluate(folders / "predictions", folders / "dataset.json", label_map=labels)
    assert len(caught.value.errors) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("livr: 5", r"E-MAP-LABEL .*map.yaml:1:1: no label is called 'livr'; did you mean 'liver'"),
        ("5: liver", r"E-MAP-LABEL .*it is the other way round: liver: 5"),
        ("liver: 5\ncancer: 5", r"E-MAP-VALUE .*map.yaml:2:1: 5 stands for 'liver' and for 'cancer'"),
        ("liver: 5\ncancer: tumor", "E-MAP .*values only or file names only"),
        ("liver: 1.5", r"E-MAP .*found 1.5"),
        ("liver:", r"E-MAP .*found nothing"),
        ("liver: 0", r"E-MAP .*0 is the background"),
        ("liver: -3", r"E-MAP .*-3 is no label value"),
        ("liver: liver.nii.gz", r"E-MAP .*without folder and suffix"),
        ("- liver", r"E-MAP .*must hold lines such as"),
        ("liver: [1", "E-YAML"),
        ("{}", "E-MAP"),
        ("background: 5", r"E-MAP --map: names no organ whole"),
    ],
)
def test_a_map_that_cannot_be_meant_is_refused_with_its_line(folders, text, message):
    labels = mapping(folders / "map.yaml", text)
    with pytest.raises(MedsegError, match=message):
        evaluate(folders / "predictions", folders / "dataset.json", label_map=labels)


def test_a_map_needs_labels_with_names(folders):
    labels = mapping(folders / "map.yaml", "liver: 5")
    with pytest.raises(WorkflowError, match="E-MAP-LABELS"):
        evaluate(folders / "predictions", folders / "labels", label_map=labels)


def test_regions_are_scored_where_the_map_names_what_they_unite(folders):
    described = json.loads((folders / "dataset.json").read_text()) | {"regions": {"whole": [1, 2], "core": [2]}}
    (folders / "dataset.json").write_text(json.dumps(described))
    for n in range(4):
        write_label(folders / "predictions" / f"case_{n}.nii.gz", 3 * drawn_and_predicted(n)[0])
    labels = mapping(folders / "map.yaml", "liver: 3\ncancer: 6\n")
    result = evaluate(folders / "predictions", folders / "dataset.json", label_map=labels)
    assert list(result["per_organ"]) == ["whole", "core"] and result["mean"]["dice"] == 1
    labels.write_text("whole: 3\n")
    with pytest.raises(MedsegError, match="'whole' is a region"):
        evaluate(folders / "predictions", folders / "dataset.json", label_map=labels)


def test_calibration_looks_at_the_probabilities_beside_the_predictions(folders):
    with pytest.raises(WorkflowError, match=r"E-METRIC-PROBABILITIES .*none beside case_0, case_1, case_2 and 1 more"):
        evaluate(folders / "predictions", folders / "dataset.json", metrics=["ece"])
    for n in range(4):
        drawn = drawn_and_predicted(n)[0]
        sure = np.stack([drawn == value for value in range(3)]).astype(np.float32)
        unsure = 0.75 * sure + 0.25 * (1 - sure)
        write_volume(folders / "predictions" / f"case_{n}_probabilities.nii.gz", Volume(unsure, GRID))
    for asked in ("ece", "all"):
        mean = evaluate(folders / "predictions", folders / "dataset.json", metrics=[asked])["mean"]
        assert mean["ece"] == pytest.approx(0.25)


def test_all_metrics_but_those_without_probabilities_are_told_and_that_is_said(folders, caplog):
    result = evaluate(folders / "predictions", folders / "dataset.json", metrics=["all"])
    assert set(result["mean"]) == {*METRICS} - {"ece"}
    assert caplog.text.count("W-METRIC-PROBABILITIES left out: ece needs probabilities: none beside case_0") == 1
    with pytest.raises(WorkflowError, match="E-METRIC-PROBABILITIES"):
        evaluate(folders / "predictions", folders / "dataset.json", metrics=["all", "ece"])


def test_lesions_are_told_by_size_and_one_by_one(tmp_path):
    drawn, predicted = np.zeros(GRID.shape), np.zeros(GRID.shape)
    drawn[1:3, 1:3, 1:3] = 1  # 8 voxels of 3 mm³: found
    drawn[6:12, 5:10, 4:8] = 1  # 120: missed
    predicted[1:3, 1:3, 1:3] = 1
    predicted[13, 11, 9] = 1
    write_label(tmp_path / "a" / "x.nii.gz", predicted)
    write_label(tmp_path / "b" / "x.nii.gz", drawn)
    result = evaluate(tmp_path / "a", tmp_path / "b", metrics=["lesion_f1"], output=tmp_path / "out")
    small, large, *_ = result["lesions"]["label 1"]
    assert (small["n"], small["n_matched"], large["n"], large["n_matched"]) == (1, 1, 1, 0)
    assert result["mean"]["lesion_f1"] == 0.5
    assert Path(result["lesion_table"]).read_text().count("\n") == 1 + 3


def printed(result, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(evaluation_table(result))
    return [line.rstrip() for line in console.export_text().splitlines()]


def cells(score) -> list[str]:
    mean, std, low, high, median = (
        f"{value:.3f}" for value in (score["mean"], score["std"], *score["ci95"], score["median"])
    )
    return [mean, "±", std, f"{low}–{high}", median, str(score["n"])]


def test_the_printed_table_has_a_row_per_organ_and_metric_where_it_fits(folders):
    result = evaluate(folders / "predictions", folders / "dataset.json", metrics=["dice", "surface"])
    rows = [line.split() for line in printed(result, 80)]
    assert ["liver", "dice", *cells(result["per_organ"]["liver"]["dice"]), "0", "0"] in rows
    assert len([row for row in rows if row[:1] == ["mean"]]) == 5
    assert ["4", "cases"] in rows


def test_where_the_metrics_are_too_many_for_the_width_each_organ_is_a_block(tmp_path):
    drawn = np.zeros(GRID.shape)
    drawn[2:9, 2:9, 2:9] = 1
    for case, predicted in (("x", drawn), ("y", np.zeros(GRID.shape))):
        write_label(tmp_path / "labels" / f"{case}.nii.gz", drawn)
        write_label(tmp_path / "predictions" / f"{case}.nii.gz", predicted)
    labels = mapping(tmp_path / "m.json", json.dumps({"labels": {"background": 0, "a_lobe_of_the_left_lung": 1}}))
    result = evaluate(tmp_path / "predictions", tmp_path / "labels", labels=labels, metrics=["all"])
    lines = printed(result, 80)
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    start = lines.index("a_lobe_of_the_left_lung, missed in 1 case")
    block = [line.split() for line in lines[start + 1 : lines.index("", start)]]
    scores = result["per_organ"]["a_lobe_of_the_left_lung"]
    assert [row[0] for row in block] == ["metric", *scores]
    assert block[1] == ["dice", *cells(scores["dice"])]
    wide = [line.split() for line in printed(result, 160)]
    assert ["a_lobe_of_the_left_lung", "dice", *cells(scores["dice"]), "1", "0"] in wide


@pytest.mark.parametrize("width", [80, 160])
def test_one_case_is_no_cases_and_who_is_drawn_for_the_intervals_is_told(folders, width):
    result = evaluate(folders / "predictions" / "case_0.nii.gz", folders / "labels" / "case_0.nii.gz")
    lines = printed(result, width)
    assert "1 case" in lines and result["patients"] is None
    assert any(line.startswith("intervals: bootstrap over cases, each taken for a patient") for line in lines)
    described = json.loads((folders / "dataset.json").read_text())
    for n, entry in enumerate(described["training"]):
        entry |= {"patient": f"P{min(n, 2)}", "fold": 0}
    (folders / "dataset.json").write_text(json.dumps(described))
    result = evaluate(folders / "predictions", folders / "dataset.json")
    assert result["patients"] == 3 and "intervals: bootstrap over 3 patients" in printed(result, width)


def test_references_without_prediction_stand_in_the_title_and_one_case_has_no_interval(folders):
    for n in (1, 2, 3):
        (folders / "predictions" / f"case_{n}.nii.gz").unlink()
    lines = printed(evaluate(folders / "predictions", folders / "labels", metrics=["dice"]), 80)
    assert "1 of 4 cases, without prediction: case_1, case_2, case_3" in lines
    (row,) = [line.split() for line in lines if line.startswith("label 1 ") and " dice " in line]
    assert row[2:] == ["dice", row[3], "±", "–", "–", row[7], "1", "0", "0"]


def test_a_dataset_json_that_lists_no_cases_says_what_to_give_instead(folders, caplog):
    labels = mapping(folders / "predictions" / "dataset.json", json.dumps({"labels": {"background": 0, "liver": 1}}))
    with pytest.raises(MedsegError, match=f"E-NO-CASES .*: lists no cases: .*labelsTr.*--labels {labels}"):
        evaluate(folders / "predictions", labels)
    evaluate(folders / "predictions", folders / "labels")
    assert f"W-LABELS the labels are called after their numbers; --labels {labels} gives them names" in caplog.text
    caplog.clear()
    evaluate(folders / "predictions", folders / "labels", labels=folders / "dataset.json")
    assert "W-LABELS" not in caplog.text


def test_the_json_says_what_files_and_values_each_case_was_scored_by(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    (folders / "predictions" / "case_3.nii.gz").unlink()
    options = {"missing_as_empty": True, "label_map": mapping(folders / "map.yaml", "liver: 1\ncancer: 2\n")}
    evaluate(Path("predictions"), Path("dataset.json"), output=tmp_path / "out", **options)
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    reference = str(folders / "labels" / "case_0.nii.gz")  # the manifest's image is the same file
    predicted = {"prediction": str(folders / "predictions" / "case_0.nii.gz"), "reference": reference}
    assert told["files"]["case_0"] == {**predicted, "image": reference}
    assert told["files"]["case_3"]["prediction"] is None and len(told["files"]) == 4
    assert told["labels"]["labels"] == {"0": "background", "1": "liver", "2": "cancer"}
    assert told["map"] == {"values": {"1": 1, "2": 2}, "files": {}}
    evaluate(Path("predictions"), Path("labels"), output=tmp_path / "out")
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["files"]["case_0"] == {**predicted, "image": None} and told["map"] is None


def test_cases_that_are_skipped_are_told_in_one_line_a_fault(folders, caplog):
    for n in (0, 2):
        write_label(folders / "predictions" / f"case_{n}.nii.gz", np.full(GRID.shape, 7))
    result = evaluate(folders / "predictions", folders / "dataset.json", skip_failed=True)
    assert "2 of 4 cases, failed: case_0, case_2" in printed(result, 80)
    assert "W-FAILED 2 of 4 cases cannot be scored:" in caplog.text
    assert caplog.text.count("E-LABEL-UNDECLARED") == 1


@pytest.mark.real_data
def test_totalsegmentators_own_example_is_evaluated_by_its_numbers(tmp_path, data_dir):
    """Organs of one numbering against those of another: its example, and the same with liver and spleen as 1 and 2."""
    source = data_dir / "totalseg_examples" / "example_seg.nii.gz"
    theirs = sitk.ReadImage(str(source))
    ours = sitk.Cast(sitk.ChangeLabel(theirs, {n: {5: 1, 1: 2}.get(n, 0) for n in range(1, 120)}), sitk.sitkUInt8)
    sitk.WriteImage(ours, str(tmp_path / "ours.nii.gz"))
    named = mapping(tmp_path / "m.json", json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}}))
    labels = mapping(tmp_path / "map.yaml", "liver: 5\nspleen: 1\n")
    result = evaluate(source, tmp_path / "ours.nii.gz", labels=named, label_map=labels)
    assert result["mean"]["dice"] == 1
    assert result["volumes"]["liver"]["mean_prediction_ml"] > 100


def many_cases(folder: Path) -> None:
    """Enough work that a process is surely busy when it is interrupted."""
    grid = Geometry.from_spacing((120, 120, 120), (1, 1, 1)).oriented("LPS")
    array = np.random.default_rng(0).integers(0, 3, grid.shape)
    write_label(folder / "labels" / "case_0.nii.gz", array, grid)
    for n in range(40):
        for kind in ("labels", "predictions"):
            target = folder / kind / f"case_{n}.nii.gz"
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                os.link(folder / "labels" / "case_0.nii.gz", target)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_command_ends_its_processes(tmp_path, how):
    many_cases(tmp_path)
    command = [
        sys.executable,
        "-m",
        "medseg",
        "evaluate",
        "predictions",
        "labels",
        "--workers",
        "2",
        "--metrics",
        "hd95",
    ]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True)
    try:
        workers = wait_for(lambda: busy_descendants(running.pid), 60)
        if how is signal.SIGINT:
            os.killpg(running.pid, how)  # as a terminal does
        else:
            running.send_signal(how)
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert wait_for(lambda: not any(is_running(pid) for pid in workers), 60)
    if how is signal.SIGINT:
        assert (running.returncode, said) == (130, b"interrupted\n")


def wait_for(condition, seconds: float):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def busy_descendants(pid: int) -> list[int]:
    """Two processes at work, and the one they were forked from; by the processor time that they have used."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and int(entry.name) != pid and int(fields[11]) > 30:
            found.append(int(entry.name))
    return found if len(found) >= 3 else []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_cases_of_a_manifest_that_nobody_predicted_are_counted(folders, caplog):
    (folders / "predictions" / "case_3.nii.gz").unlink()
    assert evaluate(folders / "predictions", folders / "dataset.json")["cases"] == 3
    assert "W-PART predicted and scored: 3 of the manifest's 4 cases;" in caplog.text
