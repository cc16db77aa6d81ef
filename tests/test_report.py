"""`medseg report`: what RUN may be, and what is told where it cannot be."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medseg.cli import app
from medseg.data.volume_io import read_label, read_volume
from medseg.errors import MedsegError
from medseg.metrics.table import score_case
from medseg.report import report
from medseg.tracking.mlflow_tracker import open_store
from medseg.train import train

from .reporting.run_folders import make_run, right_sided
from .test_train import WORKFLOW, write_scans


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder in which a tiny training has ended, and its result."""
    home = tmp_path_factory.mktemp("home")
    write_scans(home)
    (home / "tiny.yaml").write_text(WORKFLOW)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return home, train(Path("tiny.yaml"))


def test_a_training_ends_with_its_page_in_the_folder_and_in_mlflow(trained: tuple[Path, dict]) -> None:
    home, result = trained
    page = home / result["report"]
    assert page == home / result["run_dir"] / "report.html"
    assert 'id="viewer"' in page.read_text()
    client = open_store(f"sqlite:///{home / 'mlflow.db'}")
    assert "report.html" in {artifact.path for artifact in client.list_artifacts(result["mlflow_run_id"])}


def test_held_out_predictions_are_kept_on_their_scans_grids_and_are_those_scored(trained: tuple[Path, dict]) -> None:
    home, result = trained
    folder = home / result["run_dir"]
    with (folder / "per_case.csv").open(newline="") as stream:
        told = {(row["case"], row["organ"]): float(row["dice"]) for row in csv.DictReader(stream)}
    assert {path.name for path in (folder / "predictions").iterdir()} == {f"{case}.nii.gz" for case, _ in told}
    from medseg.model import load_spec

    labels = load_spec(folder / "model").labels
    for case in {case for case, _ in told}:
        prediction = read_label(folder / "predictions" / f"{case}.nii.gz")
        assert prediction.geometry.matches(read_volume(home / "images" / f"{case}.nii.gz").geometry)
        for score in score_case(case, read_label(home / "labels" / f"{case}.nii.gz"), prediction, labels):
            assert score.values["dice"] == pytest.approx(told[case, score.organ], abs=1e-6)


def test_a_run_is_named_by_its_mlflow_id_too(trained: tuple[Path, dict], tmp_path: Path) -> None:
    home, result = trained
    store = f"sqlite:///{home / 'mlflow.db'}"
    found = report(result["mlflow_run_id"], output=tmp_path / "deep" / "page.html", tracking_uri=store)
    assert found["cases"] == 2
    assert (tmp_path / "deep" / "page.html").stat().st_size == pytest.approx(found["megabytes"] * 1e6, abs=6e4)


def test_a_report_that_fails_never_fails_the_training(
    trained: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import medseg.train

    def fails(*args: object) -> None:
        raise RuntimeError("out of ink")

    class Tracker:
        def log_file(self, path: Path) -> None:
            raise AssertionError("there is none to log")

    monkeypatch.setattr(medseg.train, "write_run_page", fails)
    result: dict = {}
    with caplog.at_level(logging.WARNING, logger="medseg"):
        medseg.train._report(tmp_path, result, Tracker())  # type: ignore[arg-type]
    assert result == {}
    assert "W-REPORT" in caplog.text
    assert "out of ink" in caplog.text
    assert f"medseg report {tmp_path}" in caplog.text


def test_the_command_says_where_the_page_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", {"a": right_sided()})
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    assert f"open in a browser: {folder / 'report.html'}" in done.stdout
    told = json.loads(CliRunner().invoke(app, ["report", str(folder), "--json"]).stdout)
    assert told["cases"] == told["pictures"] == told["viewer_cases"] == 1
    assert told["megabytes"] < 20


@pytest.mark.parametrize(
    ("content", "arguments", "error_id"),
    [
        pytest.param({}, {}, "E-NO-INPUT", id="an empty folder"),
        pytest.param({"checkpoints/x": ""}, {}, "E-REPORT-RUN", id="a training that has not ended"),
        pytest.param({"per_case.csv": "case,organ,dice,note\n"}, {}, "E-REPORT-TABLE", id="a table without rows"),
        pytest.param({"per_case.csv": "a,b\n1,2\n"}, {}, "E-REPORT-TABLE", id="another table"),
        pytest.param(
            {"per_case.csv": "case,organ,dice,note\na,b,1,\n"}, {"scans": Path(".")}, "E-ARGUMENT", id="scans of a run"
        ),
    ],
)
def test_what_cannot_be_reported_is_told(tmp_path: Path, content: dict, arguments: dict, error_id: str) -> None:
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(MedsegError) as caught:
        report(str(tmp_path), **arguments)
    assert caught.value.error_id == error_id
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(MedsegError) as caught:
        report("0123456789abcdef", tracking_uri=f"sqlite:///{tmp_path / 'none.db'}")
    assert caught.value.error_id == "E-RUN"


@pytest.mark.slow  # builds a wheel, which fetches its build system
def test_a_wheel_holds_the_viewer_and_its_licence(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(root)]
    subprocess.run(command, check=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"medseg/reporting/assets/{name}" for name in ("niivue.umd.js", "niivue.LICENSE.txt", "page.css")} <= names


def test_the_viewer_stands_beside_its_licence() -> None:
    folder = Path(__file__).parents[1] / "medseg" / "reporting" / "assets"
    assert "BSD 2-Clause" in (folder / "niivue.LICENSE.txt").read_text()
    assert (folder / "niivue.umd.js").stat().st_size < 2_500_000


def test_an_existing_folder_takes_the_page_under_its_usual_name(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", {"a": right_sided()})
    (tmp_path / "pages").mkdir()
    done = CliRunner().invoke(app, ["report", str(folder), "-o", str(tmp_path / "pages")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "pages" / "report.html").exists()
    assert f"open in a browser: {tmp_path / 'pages' / 'report.html'}" in done.stdout


def test_a_single_segmentation_is_reported_beside_itself(tmp_path: Path) -> None:
    predictions = make_run(tmp_path / "run", {name: right_sided() for name in "ab"}) / "predictions"
    found = report(str(predictions / "a.nii.gz"), scans=tmp_path / "data" / "images" / "a.nii.gz")
    assert (found["cases"], found["pictures"], found["hint"]) == (1, 1, None)
    assert found["page"] == str(predictions / "report.html")
    with pytest.raises(MedsegError, match="E-REPORT-RUN"):
        report(str(tmp_path / "run" / "per_case.csv"))


def test_a_file_that_cannot_be_read_ends_the_command_with_3(tmp_path: Path) -> None:
    predictions = make_run(tmp_path / "run", {name: right_sided() for name in "ab"}) / "predictions"
    (predictions / "a.nii.gz").write_bytes(b"no scan")
    done = CliRunner().invoke(app, ["report", str(predictions), "--json"])
    assert done.exit_code == 3, done.output
    told = json.loads(done.stdout)
    assert told["cases"] == 1
    assert [entry["case"] for entry in told["failed"]] == ["a"]
    assert told["failed"][0]["message"].startswith(told["failed"][0]["error_id"])
    done = CliRunner().invoke(app, ["report", str(predictions)])
    assert done.exit_code == 3
    assert f"not readable  {told['failed'][0]['error_id']}" in done.stdout
