"""The page of a folder of `medseg evaluate`: its pictures come from the files that it remembers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from medseg.evaluate import evaluate
from medseg.metrics.table import EVALUATION
from medseg.report import report, report_summary

from .run_folders import LABELS, make_run, right_sided, shifted


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """Three cases that were scored, and where their files are."""
    run = make_run(tmp_path / "run", {name: shifted(right_sided(), (n, 0, 0)) for n, name in enumerate("abc")})
    data, folder = tmp_path / "data", tmp_path / "scored"
    evaluate(
        run / "predictions", data / "labels", labels=run / "manifest.json", metrics=["dice", "nsd:2"], output=folder
    )
    files = {
        case: {
            "prediction": str(run / "predictions" / f"{case}.nii.gz"),
            "reference": str(data / "labels" / f"{case}.nii.gz"),
            "image": str(data / "images" / f"{case}.nii.gz"),
        }
        for case in "abc"
    }
    change(folder, files=files, labels=LABELS.to_dict())
    return folder


def change(folder: Path, **entries: Any) -> None:
    path = folder / EVALUATION
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def html_of(folder: Path, **arguments: Any) -> tuple[dict[str, Any], str]:
    result = report(str(folder), **arguments)
    return result, (folder / "report.html").read_text()


def test_its_cases_are_pictured_from_the_files_it_names(evaluation: Path) -> None:
    result, html = html_of(evaluation)
    assert (result["cases"], result["pictures"], result["viewer_cases"]) == (3, 3, 3)
    assert 'class="notice"' not in html
    assert "3 segmentations were held to what an expert drew" in html
    assert "within 2 mm of the other" in html
    assert "surface Dice at 2 mm" in html


def test_without_names_its_labels_are_numbers_and_that_is_said(evaluation: Path, tmp_path: Path) -> None:
    change(evaluation, labels=None)
    result, html = html_of(evaluation)
    assert result["pictures"] == 3
    assert "<li><span" in html
    assert "label 1</li>" in html
    assert "<code>--labels</code>" in html
    _, html = html_of(evaluation, labels=tmp_path / "run")
    assert "liver</li>" in html
    assert "<code>--labels</code>" not in html


def test_every_metric_that_was_asked_for_has_its_figure_and_no_network_is_blamed(tmp_path: Path) -> None:
    without = right_sided()
    without[without == 2] = 0
    run = make_run(tmp_path / "run", {"a": without})
    metrics = ["overlap", "surface", "volume"]
    evaluate(run / "predictions", tmp_path / "data" / "labels", metrics=metrics, output=tmp_path / "scored")
    _, html = html_of(tmp_path / "scored")
    for name in ("Dice", "precision", "HD95 (mm)", "surface Dice", "volume difference (ml)"):
        assert f'aria-label="{name} of each organ' in html
    assert "The prediction <b>missed an organ altogether once" in html
    assert "network" not in html[html.index("<header>") :].replace("network’s probabilities", "").split("<script")[0]


def test_without_scans_it_says_how_to_name_them(evaluation: Path, tmp_path: Path) -> None:
    files = json.loads((evaluation / EVALUATION).read_text())["files"]
    change(evaluation, files={case: {**known, "image": None} for case, known in files.items()})
    result, html = html_of(evaluation)
    assert result["pictures"] == 0
    assert "it is not known which scans belong to them; name these with --scans (c, b, a)" in html
    assert "no pictures: name the scans with --scans" in str(report_summary(result))
    result, _ = html_of(evaluation, scans=tmp_path / "data" / "images")
    assert result["pictures"] == 3
    assert "--scans" not in str(report_summary(result))


def test_files_that_are_gone_or_were_never_told_leave_the_numbers(evaluation: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run" / "predictions")
    result, html = html_of(evaluation)
    assert result["pictures"] == 0
    assert "its segmentation is not where it was (c, b, a)" in html
    change(evaluation, files=None)
    _, html = html_of(evaluation)
    assert "it is not known where their files are" in html
    assert "Every case, worst first" in html


def test_files_that_hold_something_else_by_now_are_not_shown(evaluation: Path, tmp_path: Path) -> None:
    predictions = tmp_path / "run" / "predictions"
    shutil.copy(predictions / "c.nii.gz", predictions / "a.nii.gz")
    result, html = html_of(evaluation)
    assert result["pictures"] == 2
    assert "what is drawn there is not what was scored (a)" in html


def test_what_was_not_scored_is_told_beside_the_numbers(evaluation: Path) -> None:
    failed = [{"case": "x", "error_id": "E-PAIR-SHAPE", "message": "E-PAIR-SHAPE case x: …"}]
    change(evaluation, failed=failed, unmatched={"predictions": [], "references": ["y", "z"]})
    _, html = html_of(evaluation)
    headline = html[: html.index("</header>")]
    assert "1 could not be scored: x (E-PAIR-SHAPE)." in headline
    assert "2 had a reference and no segmentation: y, z." in headline
