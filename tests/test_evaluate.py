import json
import math

import numpy as np
import pytest
import SimpleITK as sitk

from medseg.data.volume_io import write_volume
from medseg.errors import MedsegError, Problems, WorkflowError
from medseg.evaluate import evaluate
from medseg.geometry import Geometry, Volume

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
            assert set(found) >= {"mean", "std", "median", "ci95", "n", "n_missing"}
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
    assert caplog.text.count("W-UNMATCHED") == 2


def test_labels_give_the_organs_of_a_folder_their_names(folders):
    result = evaluate(folders / "predictions", folders / "labels", labels=folders / "dataset.json")
    assert list(result["per_organ"]) == ["liver", "cancer"]


def test_two_files_need_no_common_name(folders):
    result = evaluate(folders / "predictions" / "case_0.nii.gz", folders / "labels" / "case_1.nii.gz")
    assert result["cases"] == 1 and 0 < result["mean"]["dice"] < 1


def test_probabilities_beside_the_predictions_are_left_alone(folders):
    array = np.zeros((3, *GRID.shape), np.float32)
    write_volume(folders / "predictions" / "case_0_probabilities.nii.gz", Volume(array, GRID))
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
    with pytest.raises(Problems, match="E-LABEL-UNDECLARED"):
        evaluate(folders / "predictions", folders / "dataset.json")


def test_nothing_in_common_is_an_error_that_shows_names(folders):
    (folders / "other").mkdir()
    (folders / "predictions" / "case_0.nii.gz").rename(folders / "other" / "scan.nii.gz")
    with pytest.raises(MedsegError, match=r"E-NO-PAIRS .*scan.*case_0"):
        evaluate(folders / "other", folders / "labels")


def test_an_unknown_metric_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(WorkflowError, match="did you mean 'dice'"):
        evaluate(tmp_path / "absent", tmp_path / "absent", metrics=["dic"])
