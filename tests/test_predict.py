import csv
import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.batch.ledger import LEDGER, only_writer
from medseg.build.model import predictor
from medseg.data.volume_io import read_label, read_volume, write_volume
from medseg.errors import MedsegError, ModelError, Problems, WorkflowError
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.model import Intensity, ModelSpec, Preprocessing, Window, load_model, save_model
from medseg.nets import NETS
from medseg.predict import predict
from medseg.report import report
from medseg.reporting.page import REPORT
from medseg.reporting.prediction import SUMMARY

GRID = Geometry.from_spacing((20, 18, 16), (1.5, 1.5, 2)).oriented("LPS")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A run folder whose model has random weights: which voxels it finds is of no matter here."""
    entry = NETS["unet"]
    spec = ModelSpec(
        network="unet",
        network_args=entry.tiny,
        spatial_dims=3,
        channels=("CT",),
        labels=Labels({0: "background", 1: "liver"}),
        preprocessing=Preprocessing(spacing_mm=(2.0, 2.0, 2.0), intensity=(Intensity(normalize="zscore"),)),
        window=Window((16, 16, 16)),
    )
    torch.manual_seed(0)
    network = entry.network(spatial_dims=3, in_channels=1, out_channels=2, **entry.tiny)
    run = tmp_path_factory.mktemp("run")
    save_model(run / "model", spec, network.state_dict())
    return str(run)


def write_scan(path, seed: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).normal(size=(1, *GRID.shape)).astype(np.float32)
    write_volume(path, Volume(array, GRID))
    return path


@pytest.fixture
def scans(tmp_path):
    for n in range(3):
        write_scan(tmp_path / "scans" / f"case_{n}.nii.gz", seed=n)
    return tmp_path / "scans"


def segmentations(folder) -> list[str]:
    """What stands in an output folder besides what tells of the batch."""
    return sorted({path.name for path in folder.iterdir()} - {LEDGER, SUMMARY, REPORT, ".lock"})


def case_ids(entries) -> list[str]:
    return [entry["case"] for entry in entries]


def test_a_folder_of_scans_becomes_a_folder_of_segmentations_on_their_grids(model, scans, tmp_path):
    result = predict(model, [scans], output=tmp_path / "out")
    assert case_ids(result["done"]) == ["case_0", "case_1", "case_2"]
    assert result["failed"] == [] and result["seconds"] >= 0
    expected = predictor(model).segment([scans / "case_1.nii.gz"]).label
    written = read_label(tmp_path / "out" / "case_1.nii.gz")
    np.testing.assert_array_equal(written.array, expected.array)
    assert written.geometry.matches(GRID)
    entry = result["done"][1]
    assert {"case", "input", "output", "seconds", "windows", "windows_in_air"} <= set(entry)
    assert entry["input"] == str(scans / "case_1.nii.gz") and entry["output"] == str(tmp_path / "out" / "case_1.nii.gz")
    json.dumps(result)


@pytest.mark.parametrize(
    ("said", "tta", "mirrored"),
    [((), None, ()), ((), True, (0, 1, 2)), ((0,), None, (0,)), ((0,), True, (0,)), ((0,), False, ())],
)
def test_mirroring_is_along_the_axes_that_the_model_names(model, tmp_path, said, tta, mirrored):
    spec, weights = load_model(Path(model, "model"))
    window = replace(spec.window, mirror_axes=said)
    save_model(tmp_path / "other", replace(spec, window=window), weights)
    assert predictor(str(tmp_path / "other"), tta=tta).spec.window.mirror_axes == mirrored


def test_other_scans_of_the_same_names_are_not_taken_for_those_a_batch_began_with(model, scans, tmp_path, monkeypatch):
    (scans / "case_1.nii.gz").write_bytes(b"no scan")
    monkeypatch.chdir(tmp_path)
    predict(model, "scans", output="out")
    other = write_scan(tmp_path / "other" / "case_0.nii.gz", seed=7)
    with pytest.raises(
        WorkflowError, match=r"E-RESUME.*case case_0 was .*scans/case_0.nii.gz .* is other/case_0.nii.gz now"
    ):
        predict(model, ["other"], output="out", resume=True)
    other.rename(other.with_name("case_1.nii.gz"))  # which failed, and may be given anew
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    result = predict(model, [Path("../other")], output="../out", resume=True)
    assert case_ids(result["done"]) == ["case_1"] and result["failed"] == []


def test_arguments_that_would_do_nothing_or_something_else_are_refused(model, scans, tmp_path):
    for wrong, where in (
        ({"slurm": {"partition": "gpu"}}, "--slurm"),
        ({"address": "10.0.0.1:6379"}, "--address"),
        ({"output": tmp_path / "liver.nii.gz"}, "--output"),
    ):
        with pytest.raises(WorkflowError, match=f"E-ARGUMENT {where}"):
            predict(model, [scans], **{"output": tmp_path / "out", **wrong})
    with pytest.raises(Problems, match="is given 2 times; give it once"):
        predict(model, [scans / "case_0.nii.gz"] * 2, output=tmp_path / "out")


def test_a_picture_among_volumes_is_one_line_of_a_dry_run(model, scans, tmp_path):
    flat = np.zeros((1, 20, 18), np.float32)
    write_volume(scans / "flat.nii.gz", Volume(flat, Geometry.from_spacing((20, 18), (1, 1))))
    planned = predict(model, scans, output=tmp_path / "out", dry_run=True)["planned"]
    told = {entry["case"]: entry.get("error_id", "fine") for entry in planned}
    assert told == {"case_0": "fine", "case_1": "fine", "case_2": "fine", "flat": "E-SPATIAL-DIMS"}


@pytest.mark.parametrize("format", ["nrrd", "mha"])
def test_segmentations_are_written_in_the_format_asked_for(model, scans, tmp_path, format):
    predict(model, [scans / "case_0.nii.gz"], output=tmp_path / "out", format=format)
    assert read_label(tmp_path / "out" / f"case_0.{format}").geometry.matches(GRID)


def test_a_scan_that_fails_is_listed_and_stops_no_other(model, scans, tmp_path):
    content = (scans / "case_1.nii.gz").read_bytes()
    (scans / "case_1.nii.gz").write_bytes(content[: len(content) // 2])
    result = predict(model, [scans], output=tmp_path / "out")
    assert case_ids(result["done"]) == ["case_0", "case_2"]
    (failed,) = result["failed"]
    assert failed["case"] == "case_1" and failed["error_id"] == "E-NIFTI-TRUNCATED"
    assert "case_1.nii.gz" in failed["message"]
    assert not (tmp_path / "out" / "case_1.nii.gz").exists()


def test_a_fault_of_our_own_in_one_case_stops_no_other(model, scans, tmp_path, monkeypatch):
    def fails_once(path, volume):
        if path.name == "case_0.nii.gz":
            raise OSError("disk on fire")
        write_volume(path, volume)

    monkeypatch.setattr("medseg.predict.write_volume", fails_once)
    result = predict(model, [scans], output=tmp_path / "out")
    assert case_ids(result["done"]) == ["case_1", "case_2"]
    assert result["failed"][0]["error_id"] == "E-INTERNAL" and "disk on fire" in result["failed"][0]["message"]


def test_probabilities_are_written_beside_the_segmentation(model, scans, tmp_path):
    predict(model, [scans / "case_0.nii.gz"], output=tmp_path / "out", probabilities=True)
    probabilities = read_volume(tmp_path / "out" / "case_0_probabilities.nii.gz")
    label = read_label(tmp_path / "out" / "case_0.nii.gz")
    np.testing.assert_allclose(probabilities.array.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.array.argmax(0), label.array[0])


@pytest.mark.parametrize("written", ["case_0_probabilities.nii.gz", "case_0.nii.gz"])
def test_a_disk_that_is_full_when_the_probabilities_are_written_is_left_without_leftovers(
    model, scans, tmp_path, monkeypatch, written
):
    def fails(path, volume):
        if path.name == written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_volume(path, volume)

    monkeypatch.setattr("medseg.predict.write_volume", fails)
    with pytest.raises(OSError, match="No space left"):
        predict(model, [scans], output=tmp_path / "out", probabilities=True)
    complete = {"case_1.nii.gz", "case_1_probabilities.nii.gz"}  # which is under way meanwhile
    there = {"case_0_probabilities.nii.gz", *complete} - {written}
    assert set(os.listdir(tmp_path / "out")) <= {LEDGER, SUMMARY, ".lock", *there}


def test_existing_segmentations_are_not_overwritten_unasked(model, scans, tmp_path):
    predict(model, [scans / "case_0.nii.gz"], output=tmp_path / "out")
    with pytest.raises(WorkflowError, match="--resume to keep or --force to overwrite") as caught:
        predict(model, [scans], output=tmp_path / "out")
    assert caught.value.error_id == "E-OUTPUT-EXISTS"
    assert segmentations(tmp_path / "out") == ["case_0.nii.gz"]


def test_resume_passes_over_what_is_complete(model, scans, tmp_path):
    predict(model, [scans / "case_0.nii.gz"], output=tmp_path / "out")
    before = os.stat(tmp_path / "out" / "case_0.nii.gz").st_mtime_ns
    result = predict(model, [scans], output=tmp_path / "out", resume=True)
    assert result["skipped"] == ["case_0"] and case_ids(result["done"]) == ["case_1", "case_2"]
    assert os.stat(tmp_path / "out" / "case_0.nii.gz").st_mtime_ns == before


def test_force_overwrites(model, scans, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "case_0.nii.gz").write_bytes(b"old")
    predict(model, [scans / "case_0.nii.gz"], output=out, force=True)
    assert read_label(out / "case_0.nii.gz").geometry.matches(GRID)


def test_a_segmentation_never_takes_the_place_of_its_scan(model, scans):
    content = (scans / "case_0.nii.gz").read_bytes()
    with pytest.raises(Problems, match="is an input"):
        predict(model, [scans], output=scans, force=True)
    assert (scans / "case_0.nii.gz").read_bytes() == content


def test_files_of_one_name_are_refused_before_any_work(model, tmp_path):
    files = [write_scan(tmp_path / name) for name in ("scan.nii.gz", "scan.nrrd")]
    with pytest.raises(MedsegError) as caught:
        predict(model, files, output=tmp_path / "out")
    assert caught.value.error_id == "E-OUTPUT-NAME"
    assert not (tmp_path / "out").exists()


def test_files_of_one_name_below_a_folder_are_called_after_their_path(model, tmp_path):
    for folder in ("a", "b"):
        write_scan(tmp_path / "scans" / folder / "scan.nii.gz")
    result = predict(model, [tmp_path / "scans"], output=tmp_path / "out")
    assert case_ids(result["done"]) == ["a_scan", "b_scan"]


@pytest.fixture
def manifest(scans):
    entries = [{"image": f"case_{n}.nii.gz"} for n in range(3)]
    data = {"labels": {"0": "background", "1": "liver"}, "training": entries[:2], "test": entries[2:]}
    for fold, entry in enumerate(data["training"]):
        entry["fold"] = fold
    path = scans / "dataset.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("split", "expected"),
    [(None, ["case_2"]), ("test", ["case_2"]), ("training", ["case_0", "case_1"]), ("fold_1", ["case_1"])],
)
def test_a_split_chooses_cases_of_a_manifest(model, manifest, tmp_path, split, expected):
    result = predict(model, [manifest], output=tmp_path / "out", split=split, dry_run=True)
    assert case_ids(result["planned"]) == expected


def test_an_unknown_split_is_refused_with_a_suggestion(model, manifest, tmp_path):
    with pytest.raises(WorkflowError, match="did you mean 'fold_1'"):
        predict(model, [manifest], output=tmp_path / "out", split="fold1")


def test_an_id_that_leaves_the_output_folder_is_refused(model, scans, tmp_path):
    data = {"labels": {"0": "background", "1": "liver"}, "training": [{"image": "case_0.nii.gz", "id": "../evil"}]}
    (scans / "dataset.json").write_text(json.dumps(data))
    with pytest.raises(Problems, match="no file name"):
        predict(model, [scans / "dataset.json"], output=tmp_path / "out")


def test_a_dry_run_writes_nothing(model, scans, tmp_path):
    result = predict(model, [scans], output=tmp_path / "out", dry_run=True)
    assert case_ids(result["planned"]) == ["case_0", "case_1", "case_2"] and result["done"] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "error_id"),
    [
        ({"overlap": 1.0}, "E-ARGUMENT"),
        ({"overlap": -0.1}, "E-ARGUMENT"),
        ({"resume": True, "force": True}, "E-ARGUMENT"),
        ({"format": "gif"}, "E-SUFFIX"),
        ({"split": "test"}, "E-SPLIT"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(model, scans, tmp_path, arguments, error_id):
    with pytest.raises(WorkflowError) as caught:
        predict(model, [scans], output=tmp_path / "out", **arguments)
    assert caught.value.error_id == error_id


def test_inputs_that_do_not_exist_are_all_named(model, tmp_path):
    with pytest.raises(Problems) as caught:
        predict(model, [tmp_path / "a.nii.gz", tmp_path / "b"], output=tmp_path / "out")
    assert [error.where for error in caught.value.errors] == [str(tmp_path / "a.nii.gz"), str(tmp_path / "b")]


def test_a_folder_without_scans_is_refused(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MedsegError, match="E-NO-INPUT"):
        predict(model, [tmp_path / "empty"], output=tmp_path / "out")


LETHAL = """\
import multiprocessing, os, signal, sys

def hook(event, arguments):
    if event == "open" and "case_1" in str(arguments[0]) and multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
"""


def test_a_scan_that_kills_the_process_is_one_failure_among_the_others(model, scans, tmp_path):
    """At the shell; whatever process of ours opens the scan is killed."""
    (tmp_path / "sitecustomize.py").write_text(LETHAL)
    files = [str(scans / f"case_{n}.nii.gz") for n in range(3)]
    command = [sys.executable, "-m", "medseg", "predict", model, *files, "-o", "out", "--workers", "2", "--json"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert ended.returncode == 3, ended.stderr
    result = json.loads(ended.stdout)
    assert sorted(case_ids(result["done"])) == ["case_0", "case_2"]
    (failed,) = result["failed"]
    assert failed["error_id"] == "E-WORKER" and failed["input"] == files[1] and "SIGKILL" in failed["message"]
    assert segmentations(tmp_path / "out") == ["case_0.nii.gz", "case_2.nii.gz"]
    assert "Traceback" not in ended.stderr


def test_resume_with_another_model_or_other_options_is_refused(model, scans, tmp_path):
    predict(model, [scans / "case_0.nii.gz"], output=tmp_path / "out")
    with pytest.raises(WorkflowError, match=r"E-RESUME .*ledger.db.* overlap is now 0.25, was None"):
        predict(model, [scans], output=tmp_path / "out", overlap=0.25, resume=True)
    other = changed(model, tmp_path / "other", window=Window((24, 24, 24)))
    with pytest.raises(WorkflowError, match=r"E-RESUME .*model is now"):
        predict(other, [scans], output=tmp_path / "out", resume=True)
    assert case_ids(predict(other, [scans], output=tmp_path / "out", force=True)["done"]) == [
        "case_0",
        "case_1",
        "case_2",
    ]


def test_resume_tries_again_what_failed_and_is_forgiving_of_modality_as_the_batch_was(model, scans, tmp_path):
    content = (scans / "case_1.nii.gz").read_bytes()
    (scans / "case_1.nii.gz").write_bytes(b"")
    assert case_ids(predict(model, [scans], output=tmp_path / "out")["failed"]) == ["case_1"]
    (scans / "case_1.nii.gz").write_bytes(content)
    result = predict(model, [scans], output=tmp_path / "out", resume=True)
    assert (case_ids(result["done"]), result["skipped"], result["failed"]) == (["case_1"], ["case_0", "case_2"], [])


def test_a_row_for_each_case_is_left_beside_the_segmentations(model, scans, tmp_path):
    (scans / "case_1.nii.gz").write_bytes(b"")
    result = predict(model, [scans], output=tmp_path / "out")
    with (tmp_path / "out" / SUMMARY).open() as stream:
        rows = list(csv.DictReader(stream))
    assert result["summary"] == str(tmp_path / "out" / SUMMARY)
    assert [(row["case"], row["state"], row["error_id"]) for row in rows] == [
        ("case_0", "done", ""), ("case_1", "failed", "E-NIFTI-EMPTY"), ("case_2", "done", ""),
    ]  # fmt: skip
    assert int(rows[0]["windows"]) > 0 and float(rows[0]["seconds"]) > 0 and float(rows[0]["peak_mb"]) > 0


def test_a_batch_ends_with_a_page_of_all_its_cases(model, scans, tmp_path):
    (scans / "case_1.nii.gz").write_bytes(b"")
    result = predict(model, [scans], output=tmp_path / "out", report=True)
    page = tmp_path / "out" / REPORT
    assert result["report"] == str(page)
    html = page.read_text()
    assert "2 of 3 scans segmented." in html and "the file is empty" in html
    assert html.count("<figure id=") == 2, "both are pictured"
    for n in (0, 2):
        label = read_label(tmp_path / "out" / f"case_{n}.nii.gz")
        volume = np.count_nonzero(label.array) * 1.5 * 1.5 * 2 / 1000
        told = next(entry for entry in result["done"] if entry["case"] == f"case_{n}")
        assert told["volumes"] == {"liver": pytest.approx(volume)} and told["unit"] == "ml"
        assert f'data-value="{volume:.6g}"' in html
    write_scan(scans / "case_1.nii.gz", seed=1)
    again = predict(model, [scans], output=tmp_path / "out", resume=True, report=True)
    assert case_ids(again["done"]) == ["case_1"]
    assert "3 scans segmented." in page.read_text(), "those of the first call too"
    with (tmp_path / "out" / SUMMARY).open() as stream:
        assert all(float(row["liver_ml"]) >= 0 for row in csv.DictReader(stream))


def test_one_scan_has_no_page_and_who_wants_none_gets_none(model, scans, tmp_path):
    one = predict(model, [scans / "case_0.nii.gz"], output=tmp_path / "one", report=True)
    many = predict(model, [scans], output=tmp_path / "many", report=False)
    assert "report" not in one and "report" not in many
    assert not list(tmp_path.glob("*/report.html"))


def test_a_page_that_fails_is_told_and_the_batch_is_done(model, scans, tmp_path, caplog):
    (tmp_path / "out" / REPORT).mkdir(parents=True)
    result = predict(model, [scans], output=tmp_path / "out", report=True)
    assert len(result["done"]) == 3 and result["failed"] == [] and "report" not in result
    assert "W-REPORT" in caplog.text and f"try: medseg report {tmp_path / 'out'}" in caplog.text


def test_report_knows_a_batchs_scans_labels_and_failures_and_measures_anew(model, scans, tmp_path):
    (scans / "case_1.nii.gz").write_bytes(b"")
    predict(model, [scans], output=tmp_path / "out", uncertainty=True)
    corrected = read_label(tmp_path / "out" / "case_0.nii.gz")
    corrected.array[:] = 0
    corrected.array[:, :4, :5, :6] = 1
    write_volume(tmp_path / "out" / "case_0.nii.gz", corrected)
    found = report(str(tmp_path / "out"))
    assert (found["cases"], found["pictures"], found["refused"], found["failed"]) == (2, 2, 1, [])
    html = Path(found["page"]).read_text()
    assert "liver (ml)" in html and "uncertainty" in html and "the file is empty" in html
    assert f'data-value="{4 * 5 * 6 * 4.5 / 1000:.6g}"' in html
    (tmp_path / "out" / "case_2.nii.gz").unlink()
    found = report(str(tmp_path / "out"))
    assert [entry["error_id"] for entry in found["failed"]] == ["E-FILE"]


@pytest.fixture
def many(tmp_path):
    for n in range(40):
        write_scan(tmp_path / "many" / f"case_{n:02d}.nii.gz", seed=n)
    return tmp_path / "many"


def shell(*arguments) -> list[str]:
    return [sys.executable, "-m", "medseg", "predict", *map(str, arguments), "--json"]


def wait_for_outputs(out, number: int, process) -> None:
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.nii.gz"))) < number:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def committed(out) -> list[str]:
    with closing(sqlite3.connect(out / LEDGER)) as db:
        return sorted(case for (case,) in db.execute("SELECT id FROM log WHERE event IN ('done', 'recovered')"))


def test_a_command_killed_and_one_interrupted_are_completed_by_resume_and_each_case_is_done_once(model, many, tmp_path):
    out, command = tmp_path / "out", shell(model, many, "-o", tmp_path / "out", "--workers", "2")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as killed:
        wait_for_outputs(out, 3, killed)
        killed.kill()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    with subprocess.Popen(
        [*command, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as asked:
        wait_for_outputs(out, len(before) + 3, asked)
        asked.send_signal(signal.SIGINT)
        assert asked.stderr is not None and "go on with --resume" in asked.stderr.read()
    assert asked.returncode == 130
    assert segmentations(out) == sorted(path.name for path in out.glob("*.nii.gz")), "nothing is half-written"
    ended = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    names = [f"case_{n:02d}" for n in range(40)]
    assert committed(out) == names
    assert all((out / name).stat().st_mtime_ns == at for name, at in before.items()), "what is done is not touched"
    result = json.loads(ended.stdout)
    assert sorted(case_ids(result["done"]) + result["skipped"]) == names
    expected = predictor(model).segment([many / "case_07.nii.gz"]).label
    np.testing.assert_array_equal(read_label(out / "case_07.nii.gz").array, expected.array)


def test_a_second_command_on_the_same_folder_is_refused(model, scans, tmp_path):
    (tmp_path / "out").mkdir()
    with only_writer(tmp_path / "out"):
        ended = subprocess.run(shell(model, scans, "-o", tmp_path / "out"), capture_output=True, text=True)
    assert ended.returncode == 2 and "E-OUTPUT-LOCKED" in ended.stderr
    assert segmentations(tmp_path / "out") == []


def changed(model: str, folder, **changes) -> str:
    """The model with other words in its model.json."""
    spec, weights = load_model(Path(model) / "model")
    save_model(folder / "model", replace(spec, **changes), weights)
    return str(folder)


def test_a_unet_plus_plus_trained_with_deep_supervision_can_be_stopped_early(model, scans, tmp_path):
    entry = NETS["unet_plus_plus"]
    torch.manual_seed(0)
    network = entry.network(3, 1, 2, **entry.tiny, deep_supervision=True)
    spec, _ = load_model(Path(model) / "model")
    nested = tmp_path / "nested"
    save_model(nested, replace(spec, network="unet_plus_plus", network_args=entry.tiny), network.state_dict())
    segmented = {}
    for level in (None, 1):
        out = tmp_path / f"level_{level}"
        predict(str(nested), [scans], output=out, prune=level, probabilities=True)
        segmented[level] = read_volume(out / "case_0_probabilities.nii.gz").array
    pruned = (
        predictor(str(nested), pruned_at=1).segment([scans / "case_0.nii.gz"], with_probabilities=True).probabilities
    )
    np.testing.assert_allclose(segmented[1], pruned.array, atol=1e-3)
    assert np.abs(segmented[1] - segmented[None]).max() > 0.01
    with pytest.raises(WorkflowError, match="pruned_at is 9; it must be from 1 to"):
        predict(str(nested), [scans], output=tmp_path / "out", prune=9)


def test_a_network_that_was_not_trained_for_it_cannot_be_stopped_early(model, scans, tmp_path):
    with pytest.raises(ModelError, match=r"E-PRUNE .*not trained to be stopped early"):
        predict(model, [scans], output=tmp_path / "out", prune=1)


def series(write_slice, folder: str, modality: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 2000, (16, 16)).astype(np.uint16)
    for z in range(8):
        write_slice(f"{folder}/{z}", 2.0 * z, pixels, modality=modality, SeriesInstanceUID=f"1.2.{len(folder)}")


def test_a_scan_of_another_modality_is_refused_unless_forced(model, write_slice, tmp_path, caplog):
    series(write_slice, "scans/mr", "MR")
    series(write_slice, "scans/liver", "CT")
    result = predict(model, [tmp_path / "scans"], output=tmp_path / "out")
    assert case_ids(result["done"]) == ["liver"]
    (failed,) = result["failed"]
    assert failed["case"] == "mr" and failed["error_id"] == "E-MODALITY"
    assert "modality MR; expected CT, as channel 'CT' says; add --force" in failed["message"]
    result = predict(model, [tmp_path / "scans"], output=tmp_path / "out", force=True)
    assert case_ids(result["done"]) == ["liver", "mr"]
    assert any(record.message.startswith("W-MODALITY") and "scans/mr" in record.message for record in caplog.records)


def test_a_model_whose_channel_tells_no_modality_takes_any(model, write_slice, tmp_path):
    series(write_slice, "scans/mr", "MR")
    vague = changed(model, tmp_path / "vague", channels=("image",))
    assert case_ids(predict(vague, [tmp_path / "scans"], output=tmp_path / "out")["done"]) == ["mr"]


def test_a_file_whose_values_are_no_hounsfield_units_is_told(model, tmp_path, caplog):
    """A NIfTI does not say what made it, its values may."""
    array = np.random.default_rng(0).integers(0, 900, (1, *GRID.shape)).astype(np.int16)
    write_volume(tmp_path / "mr.nii.gz", Volume(array, GRID))
    predict(model, [tmp_path / "mr.nii.gz"], output=tmp_path / "out")
    assert any("W-HU" in record.message and "mr.nii.gz" in record.message for record in caplog.records)
