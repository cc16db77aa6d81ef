"""What is said at the end of a batch, and the table it leaves."""

import csv

from rich.console import Console

from medseg.reporting.prediction import prediction_summary, write_summary


def shown(result) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(prediction_summary(result))
    return capture.get()


def done(number: int) -> dict:
    entry = {"case": f"c{number}", "input": f"in/c{number}.nii", "output": f"out/c{number}.nii.gz", "seconds": 2.0}
    return entry | {"network_seconds": 1.5}


def failed(number: int, error_id: str, message: str) -> dict:
    place = f"in/b{number}.nii"
    return {"case": f"b{number}", "input": place, "error_id": error_id, "message": f"{error_id} {place}: {message}"}


def result(**entries) -> dict:
    return {"done": [], "failed": [], "skipped": [], "seconds": 30.0, "summary": "out/summary.csv"} | entries


def test_one_scan_is_told_in_a_line_and_where_it_is():
    assert shown(result(done=[done(1)])).splitlines() == ["1 segmented in 30 s", "  c1  out/c1.nii.gz"]


def test_it_is_told_what_a_crf_compared(tmp_path):
    entry = done(1) | {"crf": ["24 × 20 × 22 voxels, windowed (120 neighbors), 0.1 s"]}
    assert shown(result(done=[entry])).splitlines()[-1] == f"    CRF: {entry['crf'][0]}"
    write_summary(tmp_path / "summary.csv", [entry, done(2) | {"crf": None}])
    with (tmp_path / "summary.csv").open(encoding="utf-8") as stream:
        assert [row["crf"] for row in csv.DictReader(stream)] == [entry["crf"][0], ""]


def test_a_batch_ends_with_one_table_and_equal_faults_in_one_line():
    faults = [failed(n, "E-NIFTI-EMPTY", "is empty") for n in range(6)]
    given_up = failed(6, "E-WORKER", "its process was ended 2 times")
    told = shown(result(done=[done(n) for n in range(20)], failed=[*faults, given_up], skipped=["old"]))
    lines = told.splitlines()
    assert lines[0] == "20 segmented in 30 s, 1 were there already, 7 failed"
    assert [line for line in lines if "E-NIFTI-EMPTY" in line] == [
        "E-NIFTI-EMPTY in/b0.nii, in/b1.nii, in/b2.nii and 3 more: is empty"
    ]
    heads = next(n for n, line in enumerate(lines) if "scans a minute" in line)
    assert lines[heads + 1].split() == ["20", "6", "1", "30", "40.0", "30", "s"]
    assert "out/c1.nii.gz" not in told and "medseg report out" in told


def test_what_is_not_known_of_a_case_is_empty_in_the_table(tmp_path):
    write_summary(tmp_path / "summary.csv", [{"case": "a", "state": "done", "seconds": 1.5, "worker": "w"}])
    with (tmp_path / "summary.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["case"], row["seconds"], row["error_id"]) == ("a", "1.5", "") and "worker" not in row


def test_the_table_tells_the_volumes_of_every_organ_that_a_case_has(tmp_path):
    rows = [
        {"case": "a", "volumes": {"liver": 1500.5, "spleen": 0.0}, "unit": "ml"},
        {"case": "b", "error_id": "E-DISK"},
    ]
    write_summary(tmp_path / "summary.csv", rows)
    with (tmp_path / "summary.csv").open() as stream:
        first, second = csv.DictReader(stream)
    assert (first["liver_ml"], first["spleen_ml"], second["liver_ml"]) == ("1500.5", "0.0", "")


def test_a_batch_with_a_page_names_it():
    told = shown(result(done=[done(n) for n in range(2)], report="out/report.html"))
    assert "look at them: out/report.html" in told and "medseg report" not in told
