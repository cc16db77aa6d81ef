"""`medseg check`: workflows, manifests and folders; what people see and what programs read."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from medseg.check import check, check_table
from medseg.data.dataset import CaseCache
from medseg.data.manifest import Manifest
from medseg.data.volume_io import write_volume
from medseg.errors import DataError, MedsegError, Problems
from medseg.geometry import Geometry, Volume
from medseg.model import Intensity, Preprocessing
from medseg.workflow import Workflow

SHAPE = (20, 22, 12)
AFFINE = np.array([[-1.0, 0, 0, 10], [0, -1.0, 0, 20], [0, 0, 2.0, -30], [0, 0, 0, 1]])
WORKFLOW = """\
name: tiny
data:
  manifest: dataset.json
  spacing_mm: [1.0, 1.0, 2.0]
network: {name: unet, args: {channels: [4, 8]}}
train:
  patch_size: [16, 16, 8]
  batch_size: 2
  iterations: 10
validate: {fold: 0}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sound data set of six scans and a workflow."""
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path, 6)
    (tmp_path / "tiny.yaml").write_text(WORKFLOW)
    return tmp_path


def write_data(folder: Path, num_cases: int, **more: Any) -> None:
    training = []
    for n in range(num_cases):
        generator = np.random.default_rng(n)
        label = np.zeros((1, *SHAPE), np.uint8)
        label[0, 3:9, 4:10, 2:6] = 1
        paths = {kind: f"{kind}s/scan_{n}.nii.gz" for kind in ("image", "label")}
        for kind, array in (("image", generator.normal(0, 99, label.shape).astype(np.int16)), ("label", label)):
            (folder / f"{kind}s").mkdir(exist_ok=True)
            write_volume(folder / paths[kind], Volume(array, Geometry(SHAPE, AFFINE)))
        training.append({**paths, "fold": n % 3})
    manifest = {"name": "tiny", "labels": {"0": "background", "1": "liver"}, "training": training, **more}
    (folder / "dataset.json").write_text(json.dumps(manifest))


def change(path: Path, old: str, new: str) -> Path:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return path


def found(result: dict[str, Any]) -> set[tuple[str, str | None]]:
    return {(row["error_id"], row["case"]) for row in result["rows"]}


def printed(result: dict[str, Any], width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(check_table(result))
    return console.export_text()


def test_a_sound_workflow_has_no_problem_and_its_needs_are_those_of_the_real_cache(home: Path) -> None:
    result = check(home / "tiny.yaml")
    assert result["rows"] == []
    needs = result["needs"]
    assert not (home / "cache" / "cases").exists(), "checking writes nothing"
    manifest = Manifest.load(home / "dataset.json")
    preprocessing = Preprocessing(spacing_mm=(1.0, 1.0, 2.0), intensity=(Intensity(normalize="zscore"),))
    CaseCache(home / "real", preprocessing, manifest.labels).prepare(manifest.training)
    arrays = sum(path.stat().st_size for name in ("image", "label") for path in (home / "real").rglob(f"{name}.npy"))
    headers = 2 * 6 * 128
    index = 6 * 10_000 * 3 * 8  # at most: an organ may have fewer voxels
    assert needs["cache_gb"] * 1e9 == pytest.approx(arrays - headers + index)
    assert needs["ram_gb"] == needs["cache_gb"]
    assert needs["batch_gb"] * 1e9 == 2 * 16 * 16 * 8 * (4 + 1)
    assert (needs["cases"], needs["iterations"]) == (6, 10)
    assert needs["hours"] > 0
    assert "one step of 2 × 16 × 16 × 8 voxels takes" in needs["hours_from"]
    text = " ".join(printed(result).split())
    assert "That takes roughly" in text
    assert "--dry-run" in text


def test_a_workflows_and_its_datas_faults_are_told_together(home: Path) -> None:
    change(home / "tiny.yaml", "unet", "unett")
    change(home / "tiny.yaml", "batch_size: 2", "batch_size: 9")
    (home / "images/scan_4.nii.gz").write_bytes(b"")
    result = check(home / "tiny.yaml")
    assert found(result) == {("E-UNKNOWN-NAME", None), ("E-BATCH-SIZE", None), ("E-NIFTI-EMPTY", "scan_4")}
    line = next(row["file"] for row in result["rows"] if row["error_id"] == "E-UNKNOWN-NAME")
    assert line.endswith("tiny.yaml:5:11 network.name")
    assert result["needs"]["cases"] == 5


def test_a_fold_that_does_not_exist_or_teaches_nothing_of_a_label_is_an_error(home: Path) -> None:
    change(home / "tiny.yaml", "fold: 0", "fold: 7")
    assert found(check(home / "tiny.yaml")) == {("E-FOLD", None)}
    change(home / "tiny.yaml", "fold: 7", "fold: 1")
    change(home / "dataset.json", '"1": "liver"', '"1": "liver", "2": "cyst"')
    for n in (1, 4):  # fold 1
        label = np.zeros((1, *SHAPE), np.uint8)
        label[0, 3:9, 4:10, 2:6], label[0, 0, 0, 0] = 1, 2
        write_volume(home / f"labels/scan_{n}.nii.gz", Volume(label, Geometry(SHAPE, AFFINE)))
    assert found(check(home / "tiny.yaml")) == {("E-LABEL-ABSENT", None), ("W-LABEL-ABSENT", None)}


def test_a_patient_on_two_sides_is_told_once_and_without_a_name(home: Path) -> None:
    change(home / "dataset.json", '"fold": 0', '"patient": "Jane Doe", "fold": 0')
    change(home / "dataset.json", '"fold": 1', '"patient": "Jane Doe", "fold": 1')
    result = check(home / "tiny.yaml")
    assert [row["error_id"] for row in result["rows"]] == ["E-LEAKAGE"]
    assert "Doe" not in json.dumps(result)


def test_a_patch_much_larger_than_the_scans_is_named_with_a_better_one(home: Path) -> None:
    change(home / "tiny.yaml", "[16, 16, 8]", "[64, 16, 12]")
    (row,) = check(home / "tiny.yaml")["rows"]
    assert row["error_id"] == "W-PATCH-SIZE"
    assert "20 × 16 × 12" in row["message"]
    change(home / "tiny.yaml", "[64, 16, 12]", "[20, 22, 12]")
    assert check(home / "tiny.yaml")["rows"] == []


def test_too_little_disk_is_an_error_and_too_little_memory_a_warning(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medseg.build.needs._free_disk", lambda folder: 1000)
    monkeypatch.setattr("medseg.build.needs._machine_memory", lambda: 1000)
    assert found(check(home / "tiny.yaml")) == {("E-DISK", None), ("W-MEMORY", None)}
    change(home / "tiny.yaml", "spacing_mm: [1.0, 1.0, 2.0]", "cache: disk")
    assert found(check(home / "tiny.yaml")) == {("E-DISK", None)}


def test_what_a_workflow_says_of_reading_counts(home: Path) -> None:
    volumes = np.random.default_rng(0).normal(0, 9, (3, *SHAPE)).astype(np.float32)
    write_volume(home / "images/scan_0.nii.gz", Volume(volumes, Geometry(SHAPE, AFFINE)))
    assert found(check(home / "tiny.yaml")) == {("E-CHANNELS", "scan_0")}
    change(home / "tiny.yaml", "spacing_mm:", "select_volume: 0\n  spacing_mm:")
    assert check(home / "tiny.yaml")["rows"] == []


def test_intensities_for_other_channels_than_there_are_are_an_error(home: Path) -> None:
    intensities = "intensity: [{normalize: foreground}, {normalize: zscore}]\n  spacing_mm:"
    change(home / "tiny.yaml", "spacing_mm:", intensities)
    assert found(check(home / "tiny.yaml")) == {("E-CHANNELS", None)}
    change(home / "tiny.yaml", ", {normalize: zscore}", "")
    assert check(home / "tiny.yaml")["rows"] == []


def test_a_workflow_that_cannot_be_read_is_refused_with_its_lines(home: Path) -> None:
    change(home / "tiny.yaml", "batch_size", "bach_size")
    with pytest.raises(Problems, match=r"tiny.yaml:8:3 train.bach_size"):
        check(home / "tiny.yaml")
    change(home / "tiny.yaml", "bach_size", "batch_size")
    change(home / "tiny.yaml", "dataset.json", "datset.json")
    with pytest.raises(MedsegError, match=r"tiny.yaml:3:3 .*dataset.json"):
        check(home / "tiny.yaml")


def test_a_phantoms_cases_are_made_and_sound(home: Path) -> None:
    spec = {"kind": "ct", "seed": 3, "cases": 2, "shape": [40, 36, 24], "labels": "liver"}
    names = [f"case_{n:03d}.nii.gz" for n in range(2)]
    manifest = {
        "labels": {"0": "background", "1": "liver", "2": "tumour"},
        "modality": {"0": "CT"},
        "phantom": spec,
        "training": [{"image": f"images/{name}", "label": f"labels/{name}"} for name in names],
    }
    (home / "phantom.json").write_text(json.dumps(manifest))
    result = check(home / "phantom.json")
    assert (result["checked"], result["errors"]) == (2, 0), result["rows"]


def test_a_folder_of_scans_is_preflighted(home: Path) -> None:
    scans = home / "images"
    (scans / "scan_1.nii.gz").write_bytes(b"")
    (scans / "notes.txt").write_text("no scan")
    constant = Volume(np.zeros((1, *SHAPE), np.int16), Geometry(SHAPE, AFFINE))
    write_volume(scans / "scan_2.nii.gz", constant)
    (scans / "scan_3.nii.gz").write_bytes((scans / "scan_4.nii.gz").read_bytes())
    result = check(scans)
    assert found(result) == {
        ("E-NIFTI-EMPTY", "scan_1"),
        ("W-CONSTANT", "scan_2"),
        ("W-DUPLICATE-SCAN", "scan_4"),
    }
    assert (result["checked"], result["errors"], result["warnings"]) == (6, 1, 2)
    assert result["labels"] == {}
    assert result["scans"]["scan_0"]["spacing_mm"] == [1.0, 1.0, 2.0]
    text = printed(result)
    assert "20 × 22 × 12" in text
    assert "LPS" in text
    (home / "empty").mkdir()
    with pytest.raises(DataError, match="E-NO-INPUT"):
        check(home / "empty")


def test_a_folder_with_its_manifest_is_checked_by_it_and_one_without_says_that_no_label_was_read(home: Path) -> None:
    (home / "labels/scan_2.nii.gz").write_bytes(b"")
    result = check(home)
    assert found(result) == {("E-NIFTI-EMPTY", "scan_2")}
    assert result["checked"] == 6
    assert "NO LABEL" not in printed(result)
    assert "NO LABEL WAS LOOKED AT" in printed(check(home / "images"))


def test_the_footer_tells_corrected_problems_from_cases_left_out(home: Path) -> None:
    label = np.zeros((1, *SHAPE), np.float32)
    label[0, 3:9, 4:10, 2:6] = 1
    write_volume(home / "labels/scan_0.nii.gz", Volume(label, Geometry(SHAPE, AFFINE)))
    (home / "labels/scan_2.nii.gz").write_bytes(b"")
    text = printed(check(home / "dataset.json"), width=200)
    assert "corrects 1 problem and leaves out 1 case that cannot be used" in text


def test_volumes_and_orientations_are_told_of_volumes_alone(tmp_path: Path) -> None:
    grid = Geometry.from_spacing((20, 22), (1.0, 1.0))
    for n in range(2):
        write_volume(
            tmp_path / f"{n}.png", Volume(np.arange(440, dtype=np.uint8).reshape(1, 20, 22) + np.uint8(n), grid)
        )
        write_volume(tmp_path / f"m{n}.png", Volume(np.eye(20, 22, dtype=np.uint8)[None], grid))
    training = [{"image": f"{n}.png", "label": f"m{n}.png"} for n in range(2)]
    labels = {"0": "background", "1": "cell"}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, "training": training}))
    result = check(tmp_path)
    assert result["orientations"] == {}
    assert result["labels"]["1"]["ml"] is None
    assert "ml" not in printed(result)
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": labels, "modality": {"0": "R", "1": "G", "2": "B"}, "training": training})
    )
    assert "select_volume" not in json.dumps(check(tmp_path)["rows"])


def test_hours_grow_with_the_iterations_and_a_large_patch_is_scaled_from_a_smaller_one(home: Path) -> None:
    change(home / "tiny.yaml", "iterations: 10", "iterations: 1000000")
    change(home / "tiny.yaml", "[16, 16, 8]", "[512, 512, 512]")
    started = time.monotonic()
    needs = check(home / "tiny.yaml")["needs"]
    assert time.monotonic() - started < 60
    assert needs["hours"] > 100
    assert "scaled to 2 × 512 × 512 × 512" in needs["hours_from"]


def test_a_manifest_given_as_a_workflow_is_called_one(home: Path) -> None:
    with pytest.raises(MedsegError, match=r"dataset\.json: is a manifest; give a workflow"):
        Workflow.load(home / "dataset.json")


def test_one_scan_can_be_checked(home: Path) -> None:
    result = check(home / "images/scan_0.nii.gz")
    assert (result["checked"], result["rows"]) == (1, [])


def test_people_see_errors_first_and_a_sentence_that_is_the_same_once(tmp_path: Path) -> None:
    write_data(tmp_path, 30)
    for n in range(26):
        (tmp_path / f"images/scan_{n}.nii.gz").unlink()
    write_volume(tmp_path / "labels/scan_28.nii.gz", Volume(np.zeros((1, *SHAPE), np.uint8), Geometry(SHAPE, AFFINE)))
    (tmp_path / "labels/scan_29.nii.gz").write_bytes(b"")
    result = check(tmp_path / "dataset.json")
    assert (result["errors"], result["warnings"]) == (27, 1)
    assert len(result["rows"]) == 28
    text = printed(result)
    assert text.startswith("30 cases checked: 27 errors, 1 warning\nas ")
    assert "\norientation: LPS in 4\n" in text
    assert text.index("E-MISSING-FILE") < text.index("E-NIFTI-EMPTY") < text.index("W-LABEL-EMPTY")
    assert "26 errors" in text
    assert text.count("does not exist") == 1, "one sentence for all"
    assert "26 cases: scan_0, scan_1, scan_2 …" in text
    assert "labels/scan_29.nii.gz: the file is empty" in text


def test_the_result_is_json_and_a_row_has_six_fields(home: Path) -> None:
    (home / "images/scan_4.nii.gz").write_bytes(b"")
    result = check(home / "tiny.yaml")
    (row,) = json.loads(json.dumps(result))["rows"]
    assert row == {
        "error_id": "E-NIFTI-EMPTY",
        "message": "the file is empty; copy it again or remove the case",
        "case": "scan_4",
        "file": str(home / "images/scan_4.nii.gz"),
        "fixable": False,
        "severity": "error",
    }


def test_a_correction_of_a_workflows_data_is_told_and_can_be_trained_on(home: Path) -> None:
    label = np.zeros((1, *SHAPE), np.uint8)
    label[0, 3:9, 4:10, 2:6] = 255
    write_volume(home / "labels/scan_0.nii.gz", Volume(label, Geometry(SHAPE, AFFINE)))
    result = check(home / "tiny.yaml", fix=home / "out")
    assert "label of case scan_0 is rewritten: values 255 → 1" in printed(result)
    assert str(home / "out" / "dataset.json") in printed(result).replace("\n", "")
    change(home / "tiny.yaml", "dataset.json", "out/dataset.json")
    assert check(home / "tiny.yaml")["rows"] == []
    assert json.loads(json.dumps(result))["fixed"]["remaining_errors"] == 0


def test_pictures_for_a_patch_with_three_sizes_are_an_error(home: Path) -> None:
    for kind in ("image", "label"):
        for n in range(6):
            image = np.arange(20 * 22, dtype=np.int16).reshape(1, 20, 22) + n * np.int16(1000)
            array = image if kind == "image" else np.eye(20, 22, dtype=np.uint8)[None]
            write_volume(home / f"{kind}s/scan_{n}.nii.gz", Volume(array, Geometry.from_spacing((20, 22), (1.0, 1.0))))
    rows = check(home / "tiny.yaml")["rows"]
    assert {row["error_id"] for row in rows} == {"E-SPATIAL-DIMS"}
    assert sorted(row["file"].split()[-1] for row in rows) == ["data.spacing_mm", "train.patch_size"]
