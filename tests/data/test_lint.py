"""Every fault made for real in a small data set, and found; and nothing found where nothing is wrong."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medseg.check import check
from medseg.data.lint.rows import warnings_kept
from medseg.data.lint.sides import SidedPair, named_pairs, sided_pairs
from medseg.data.lint.voxels import centers_mm, count_values, digest
from medseg.data.sources import read_image
from medseg.data.volume_io import read_geometry, read_label
from medseg.errors import DataError, GeometryError, WorkflowError
from medseg.geometry import Geometry
from medseg.model import Intensity, Preprocessing

from .dicom.test_seg import VOXELS, grid, write_seg

SHAPE = (12, 10, 8)
LPS = np.array([[-1.5, 0, 0, 30], [0, -1.5, 0, 40], [0, 0, 2.0, -50], [0, 0, 0, 1]])
RAS = np.array([[1.5, 0, 0, -30], [0, 1.5, 0, -40], [0, 0, 2.0, -50], [0, 0, 0, 1]])
NUM_CASES = 5


class DataSet:
    """A sound data set on disk, whose files and manifest a test then spoils."""

    def __init__(self, folder: Path, *, labels: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = {
            "name": "tiny",
            "labels": labels or {"0": "background", "1": "liver", "2": "tumour"},
            "modality": {"0": "MR"},
            "training": [],
        }
        for n in range(NUM_CASES):
            label = np.zeros(SHAPE, np.uint8)
            label[2:6, 3:7, 2:5] = 1
            label[7:9, 3:7, 2:5] = 2
            self.write(f"images/c{n}.nii.gz", self.voxels(n))
            self.write(f"labels/c{n}.nii.gz", label)
            entry = {"image": f"images/c{n}.nii.gz", "label": f"labels/c{n}.nii.gz", "fold": n % 2}
            self.manifest["training"].append(entry)

    @staticmethod
    def voxels(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(-500, 500, SHAPE).astype(np.int16)

    def write(self, name: str, voxels: np.ndarray, affine: np.ndarray = LPS) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.Nifti1Image(voxels, affine).to_filename(path)
        return path

    def label(self, n: int) -> np.ndarray:
        return np.asarray(nib.load(self.folder / f"labels/c{n}.nii.gz").dataobj).copy()

    def path(self) -> Path:
        path = self.folder / "dataset.json"
        path.write_text(json.dumps(self.manifest))
        return path

    def check(self, fix: Path | None = None) -> dict[str, Any]:
        return check(self.path(), fix=fix)

    def found(self) -> set[tuple[str, str | None]]:
        return {(row["error_id"], row["case"]) for row in self.check()["rows"]}

    def row(self, error_id: str) -> dict[str, Any]:
        (row,) = [row for row in self.check()["rows"] if row["error_id"] == error_id]
        return row


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return DataSet(tmp_path / "data")


def test_nothing_is_found_where_nothing_is_wrong_and_everything_is_counted(data: DataSet) -> None:
    result = data.check()
    assert result["rows"] == []
    assert (result["checked"], result["errors"], result["warnings"]) == (NUM_CASES, 0, 0)
    assert result["labels"]["1"] == {
        "name": "liver",
        "voxels": 5 * 48,
        "ml": pytest.approx(5 * 48 * 4.5e-3),
        "cases": 5,
    }
    assert result["labels"]["0"]["voxels"] == 5 * (960 - 48 - 24)
    assert result["orientations"] == {f"c{n}": "LPS" for n in range(NUM_CASES)}
    assert result["spacing_mm"]["median"] == [1.5, 1.5, 2.0]
    assert result["scans"]["c3"]["shape"] == [12, 10, 8]
    assert result["needs"] is None
    assert result["fixed"] is None


def spoil_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def spoil_checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-6] ^= 255
    path.write_bytes(bytes(content))


def spoil_header(**fields: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        content = bytearray(gzip.decompress(path.read_bytes()))
        header = nib.Nifti1Header(bytes(content[:348]), check=False)
        for name, value in fields.items():
            header[name] = value
        content[:348] = header.binaryblock
        path.write_bytes(gzip.compress(bytes(content)))

    return spoil


SPOILED = [
    ("E-NIFTI-EMPTY", lambda path: path.write_bytes(b"")),
    ("E-NIFTI-TRUNCATED", spoil_truncated),
    ("E-NIFTI-CRC", spoil_checksum),
    ("E-NIFTI-MAGIC", lambda path: path.write_text("<html>the login page of a server that wanted a password</html>")),
    ("E-MISSING-FILE", lambda path: path.unlink()),
    ("E-SIZE", spoil_header(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])),
    ("E-DIMS", spoil_header(dim=[3, 12, 0, 8, 1, 1, 1, 1])),
    ("E-DTYPE", spoil_header(datatype=128, bitpix=24)),
    ("E-AFFINE", spoil_header(srow_x=[np.nan, 0, 0, 0])),
    ("E-SPACING", spoil_header(srow_z=[0, 0, 200, 0])),
    ("E-NO-GEOMETRY", spoil_header(sform_code=0, qform_code=0)),
    ("W-NIFTI-SUFFIX", lambda path: path.write_bytes(gzip.decompress(path.read_bytes()))),
    ("W-NIFTI-SLOPE", spoil_header(scl_slope=np.inf)),
    ("W-NIFTI-FORMS", spoil_header(qform_code=1, qoffset_x=77)),
]


@pytest.mark.parametrize(("error_id", "spoil"), SPOILED, ids=[name for name, _ in SPOILED])
def test_a_spoiled_image_is_one_row_of_its_case(data: DataSet, error_id: str, spoil: Callable[[Path], None]) -> None:
    spoil(data.folder / "images/c2.nii.gz")
    assert data.found() == {(error_id, "c2")}
    row = data.row(error_id)
    assert row["file"].endswith("images/c2.nii.gz")
    assert row["severity"] == ("error" if error_id.startswith("E") else "warning")
    assert row["file"] not in row["message"]
    assert not row["fixable"]


def test_all_faults_are_told_at_once_also_those_of_one_case(data: DataSet) -> None:
    spoil_truncated(data.folder / "images/c0.nii.gz")
    spoil_checksum(data.folder / "labels/c0.nii.gz")
    (data.folder / "labels/c1.nii.gz").unlink()
    del data.manifest["training"][2]["label"]
    assert data.found() == {
        ("E-NIFTI-TRUNCATED", "c0"),
        ("E-NIFTI-CRC", "c0"),
        ("E-MISSING-FILE", "c1"),
        ("E-MISSING-LABEL", "c2"),
    }


def test_an_image_that_shows_nothing_is_an_error_to_train_on_and_a_warning_to_predict(data: DataSet) -> None:
    for name in ("c1", "t0"):
        data.write(f"images/{name}.nii.gz", np.full(SHAPE, 7, np.int16))
    data.manifest["test"] = ["images/t0.nii.gz"]
    assert data.found() == {("E-CONSTANT", "c1"), ("W-CONSTANT", "t0")}


def test_nan_voxels_are_a_warning_when_few_and_an_error_when_many(data: DataSet) -> None:
    few, many = (np.random.default_rng(9).random((20, 20, 20), np.float32) for _ in range(2))
    few[0, 0, :3], many[0] = np.nan, np.nan
    for n, voxels in ((0, few), (1, many)):
        data.write(f"images/c{n}.nii.gz", voxels)
        data.write(f"labels/c{n}.nii.gz", np.resize(np.uint8([0, 1, 2]), voxels.shape))
    assert data.found() == {("W-NOT-FINITE", "c0"), ("E-NOT-FINITE", "c1")}
    assert "3 voxels" in data.row("W-NOT-FINITE")["message"]


def test_a_label_of_another_shape_or_elsewhere_is_an_error_that_is_not_corrected(data: DataSet) -> None:
    moved = LPS.copy()
    moved[:3, 3] += (0, 3, 4)
    data.write("labels/c0.nii.gz", data.label(0)[:, :, 1:])
    data.write("labels/c1.nii.gz", data.label(1), moved)
    assert data.found() == {("E-PAIR-SHAPE", "c0"), ("E-PAIR-AFFINE", "c1")}
    assert "5 mm" in data.row("E-PAIR-AFFINE")["message"]
    assert not data.row("E-PAIR-AFFINE")["fixable"]


def test_channels_are_counted_and_those_on_a_grid_of_their_own_are_named(data: DataSet) -> None:
    four = np.stack([data.voxels(n) for n in range(40, 44)], -1)
    data.write("images/c0.nii.gz", four)
    data.write("images/c1_b.nii.gz", data.voxels(50)[1:])
    data.manifest["training"][1]["image"] = ["images/c1.nii.gz", "images/c1_b.nii.gz"]
    assert data.found() == {("E-CHANNELS", "c0"), ("E-CHANNELS", "c1"), ("W-CHANNEL-GRID", "c1")}


def test_channels_on_grids_of_their_own_are_judged_as_training_does(data: DataSet) -> None:
    coarse = LPS @ np.diag([2.0, 2.0, 1.0, 1.0])
    aside = coarse.copy()
    aside[0, 3] += 500
    data.manifest["modality"] = {"0": "MR", "1": "PET"}
    for n, entry in enumerate(data.manifest["training"]):
        data.write(f"pet/c{n}.nii.gz", data.voxels(60 + n)[::2, ::2], aside if n == 4 else coarse)
        entry["image"] = [entry["image"], f"pet/c{n}.nii.gz"]
    assert data.found() == {("E-CHANNEL-GRID", "c4"), *(("W-CHANNEL-GRID", f"c{n}") for n in range(4))}
    images = [data.folder / name for name in data.manifest["training"][4]["image"]]
    preprocessing = Preprocessing(intensity=(Intensity(normalize="none"),) * 2)
    with pytest.raises(GeometryError, match="E-CHANNEL-GRID"):
        read_image(images, preprocessing)


# DICOM


def write_series(
    write_slice: Callable[..., Path], folder: str, *, seed: int, patient: str, places: tuple[int, ...] = (0, 2, 4, 6)
) -> None:
    generator = np.random.default_rng(seed)
    for z in places:
        pixels = generator.integers(0, 999, (8, 9), np.uint16)
        write_slice(f"{folder}/{z}.dcm", float(z), pixels, PatientID=patient, SeriesInstanceUID=f"1.2.{seed}")


def series_set(tmp_path: Path, write_slice: Callable[..., Path], patients: list[str], **more: Any) -> Path:
    """A series for each patient with a NIfTI label, in folds 0, 1, 0 …"""
    training = []
    for n, patient in enumerate(patients):
        write_series(write_slice, f"ct{n}", seed=n, patient=patient, **more)
        grid = read_geometry(tmp_path / f"ct{n}")
        label = np.zeros(grid.shape, np.uint8)
        label[2:5, 2:5, 1:3] = 1
        nib.Nifti1Image(label, grid.affine).to_filename(tmp_path / f"l{n}.nii.gz")
        training.append({"image": f"ct{n}", "label": f"l{n}.nii.gz", "id": f"c{n}", "fold": n % 2})
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": {"0": "background", "1": "a"}, "training": training}))
    return path


def test_one_patient_in_two_folds_is_known_by_the_dicom_files_and_never_named(
    tmp_path: Path, write_slice: Callable[..., Path]
) -> None:
    path = series_set(tmp_path, write_slice, ["Q-1", "Q-1", "R-2", "S-3"])
    result = check(path)
    (row,) = result["rows"]
    assert row["error_id"] == "E-LEAKAGE"
    assert "c0, c1 are of one patient" in row["message"]
    fixed = check(path, fix=tmp_path / "out")["fixed"]
    assert fixed["remaining_errors"] == 0
    assert check(tmp_path / "out" / "dataset.json")["rows"] == []
    written = "".join(file.read_text() for file in (tmp_path / "out").glob("*.json"))
    assert "Q-1" not in json.dumps(result) + json.dumps(fixed) + written


def test_an_id_that_all_dicom_files_bear_is_a_warning(tmp_path: Path, write_slice: Callable[..., Path]) -> None:
    rows = check(series_set(tmp_path, write_slice, ["ANON"] * 4))["rows"]
    assert [row["error_id"] for row in rows] == ["W-PATIENT-ID"]


def test_patients_that_the_manifest_tells_apart_are_not_joined_by_an_id(
    tmp_path: Path, write_slice: Callable[..., Path]
) -> None:
    """As where one of several sites writes the same id into all its files."""
    path = series_set(tmp_path, write_slice, ["ANON", "ANON", "R-2", "S-3"])
    data = json.loads(path.read_text())
    for n, entry in enumerate(data["training"]):
        entry["patient"] = f"person {n}"
    path.write_text(json.dumps(data))
    assert [row["error_id"] for row in check(path)["rows"]] == ["W-PATIENT-ID"]


def test_channels_of_different_frames_of_reference_are_told(tmp_path: Path, write_slice: Callable[..., Path]) -> None:
    path = series_set(tmp_path, write_slice, ["a", "b"])
    data = json.loads(path.read_text())
    data["modality"] = {"0": "MR", "1": "MR"}
    for n, entry in enumerate(data["training"]):
        for z in (0, 2, 4, 6):
            pixels = np.random.default_rng(9 + z + n).integers(0, 999, (8, 9), np.uint16)
            uids = {"SeriesInstanceUID": f"1.3.{n}", "FrameOfReferenceUID": "1.9" if n else None}
            write_slice(f"second{n}/{z}.dcm", float(z), pixels, PatientID="ab"[n], **uids)
        entry["image"] = [entry["image"], f"second{n}"]
    path.write_text(json.dumps(data))
    assert {(row["error_id"], row["case"]) for row in check(path)["rows"]} == {("W-CHANNEL-FRAME", "c1")}


def test_a_workflow_that_allows_missing_slices_has_them_interpolated(
    tmp_path: Path, write_slice: Callable[..., Path]
) -> None:
    path = series_set(tmp_path, write_slice, ["a", "b"], places=(0, 2, 4, 8, 10))
    assert {row["error_id"] for row in check(path)["rows"]} == {"E-DICOM-MISSING-SLICE"}
    workflow = tmp_path / "t.yaml"
    workflow.write_text(
        "{name: t, data: {manifest: dataset.json, spacing_mm: native, allow_missing_slices: true}, "
        "network: {name: unet, args: {channels: [4, 8]}}, "
        "train: {patch_size: [8, 8, 4], batch_size: 1, iterations: 2}, validate: {fold: 0}}"
    )
    assert {row["error_id"] for row in check(workflow)["rows"]} == {"W-DICOM-INTERPOLATED"}


def test_a_scan_that_is_missing_is_told_once(tmp_path: Path, write_slice: Callable[..., Path]) -> None:
    path = series_set(tmp_path, write_slice, ["a", "b", "c", "d"])
    data = json.loads(path.read_text())
    (tmp_path / "masks").mkdir()
    data["training"][1] |= {"image": "absent", "label": "masks"}
    path.write_text(json.dumps(data))
    assert {(row["error_id"], row["case"]) for row in check(path)["rows"]} == {("E-MISSING-FILE", "c1")}


@pytest.mark.parametrize(("name", "structures"), [("tumour", {}), ("lesion", {"Tumour": 4})])
def test_gapped_labels_of_segs_have_names_and_need_no_rewriting(
    tmp_path: Path, name: str, structures: dict[str, int]
) -> None:
    training = []
    for n in range(2):
        image = np.random.default_rng(n).integers(0, 99, grid().shape).astype(np.int16)
        nib.Nifti1Image(image, grid().affine).to_filename(tmp_path / f"i{n}.nii.gz")
        write_seg(tmp_path / f"s{n}.dcm", VOXELS)
        training.append({"image": f"i{n}.nii.gz", "label": f"s{n}.dcm", "fold": n})
    labels = {"0": "background", "1": "liver", "2": "left kidney", "4": name}
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": labels, "structures": structures, "training": training}))
    result = check(path, fix=tmp_path / "out")
    assert {row["error_id"] for row in result["rows"]} == {"E-LABELS"}
    counts = [2 * int((value == VOXELS).sum()) for value in (1, 2, 3)]
    assert [result["labels"][value]["voxels"] for value in "124"] == counts
    assert result["fixed"]["remaining_errors"] == 0
    again = check(tmp_path / "out" / "dataset.json")
    assert again["rows"] == []
    assert [again["labels"][value]["voxels"] for value in "123"] == counts


def test_gapped_labels_of_masks_drawn_on_a_series_are_rewritten(
    tmp_path: Path, write_slice: Callable[..., Path]
) -> None:
    path = series_set(tmp_path, write_slice, ["a", "b"])
    mask = np.zeros((8, 9), np.uint8)
    mask[2:5, 2:5], mask[6, 6] = 1, 3
    data = json.loads(path.read_text())
    for n, entry in enumerate(data["training"]):
        (tmp_path / f"m{n}").mkdir()
        for k in range(4):
            Image.fromarray(mask).save(tmp_path / f"m{n}/{2 * k}.png")
        entry["label"] = f"m{n}"
    data["labels"] = {"0": "background", "1": "a", "3": "b"}
    path.write_text(json.dumps(data))
    fixed = check(path, fix=tmp_path / "out")["fixed"]
    assert "label of case c0 is rewritten: values 3 → 2" in fixed["changes"]
    again = check(tmp_path / "out" / "dataset.json")
    assert again["rows"] == []
    assert again["labels"]["2"]["voxels"] == 2 * 4


def test_undeclared_labels_are_listed_with_their_voxels(data: DataSet) -> None:
    label = data.label(3)
    label[0, 0, :3] = 9
    label[0, 1, 0] = 7
    data.write("labels/c3.nii.gz", label)
    assert data.found() == {("E-LABEL-UNDECLARED", "c3")}
    assert "label 7 (1 voxels), 9 (3 voxels), but declared are 0, 1, 2" in data.row("E-LABEL-UNDECLARED")["message"]
    assert data.check()["labels"]["9"]["name"] is None
    data.manifest["ignore_label"] = 9
    assert "9" not in data.row("E-LABEL-UNDECLARED")["message"].split("but")[0]


def test_label_values_that_are_no_integers_are_an_error_and_empty_labels_a_warning(data: DataSet) -> None:
    data.write("labels/c0.nii.gz", data.label(0) * np.float32(0.5))
    data.write("labels/c1.nii.gz", data.label(1) * 0)
    assert data.found() == {("E-LABEL-VALUES", "c0"), ("W-LABEL-EMPTY", "c1")}


def test_a_label_absent_everywhere_is_an_error_and_absent_outside_one_fold_a_warning(data: DataSet) -> None:
    data.manifest["labels"]["3"] = "cyst"
    assert data.found() == {("E-LABEL-ABSENT", None)}
    label = data.label(1)
    label[0, 0, 0] = 3
    data.write("labels/c1.nii.gz", label)
    assert data.found() == {("W-LABEL-ABSENT", None)}
    assert "label 3 (cyst) stands in fold 1 alone (1 cases)" in data.row("W-LABEL-ABSENT")["message"]


def copy_as_other_file(data: DataSet, *, name: str, of: str = "images/c0.nii.gz", dtype: Any = np.float32) -> None:
    """A file's voxels once more: as floats, its axes turned to RAS, not compressed."""
    turned = nib.as_closest_canonical(nib.load(data.folder / of))
    data.write(name, np.asarray(turned.dataobj).astype(dtype), turned.affine)


def test_the_same_scan_under_another_name_type_and_axis_order_is_leakage(data: DataSet) -> None:
    copy_as_other_file(data, name="images/again.nii")
    data.manifest["training"].append({"image": "images/again.nii", "label": "labels/c0.nii.gz", "fold": 1})
    data.manifest["test"] = ["images/c0.nii.gz"]
    data.manifest["test"][0] = {"image": "images/c0.nii.gz", "id": "t"}
    found = data.found()
    assert ("E-DUPLICATE-SCAN", "again") in found
    assert ("E-DUPLICATE-SCAN", "t") in found
    messages = [row["message"] for row in data.check()["rows"] if row["error_id"] == "E-DUPLICATE-SCAN"]
    assert any("c0 stands in fold 0, again in fold 1" in message for message in messages)
    assert any("c0 stands in fold 0, t in test" in message for message in messages)


def test_the_same_scan_twice_in_one_fold_is_a_warning(data: DataSet) -> None:
    (data.folder / "images/c2.nii.gz").write_bytes((data.folder / "images/c0.nii.gz").read_bytes())
    assert ("W-DUPLICATE-SCAN", "c2") in data.found()
    assert data.check()["errors"] == 0


def test_a_patient_on_two_sides_is_leakage_and_is_not_named(data: DataSet) -> None:
    for n in (0, 1):
        data.manifest["training"][n]["patient"] = "Jane Doe"
    data.write("images/t.nii.gz", data.voxels(77))
    data.manifest["training"][2]["patient"] = "John Doe"
    data.manifest["test"] = [{"image": "images/t.nii.gz", "patient": "John Doe"}]
    assert data.found() == {("E-LEAKAGE", "c0"), ("E-LEAKAGE", "c2")}
    assert "Doe" not in json.dumps(data.check())


def test_spacing_far_from_the_median_is_named_with_its_factor(data: DataSet) -> None:
    thick = LPS @ np.diag([1, 1, 2.5, 1])
    for kind in ("images", "labels"):
        voxels = np.asarray(nib.load(data.folder / kind / "c4.nii.gz").dataobj)
        data.write(f"{kind}/c4.nii.gz", voxels, thick)
    assert data.found() == {("W-SPACING", "c4")}
    assert "5 mm along S, 2.5 × the median 2;" in data.row("W-SPACING")["message"]


def test_an_odd_orientation_is_named(data: DataSet) -> None:
    for kind in ("images", "labels"):
        voxels = np.asarray(nib.load(data.folder / kind / "c4.nii.gz").dataobj)
        data.write(f"{kind}/c4.nii.gz", voxels, RAS)
    assert data.found() == {("W-ORIENTATION", "c4")}
    assert "RAS, but to LPS in 4 of 5" in data.row("W-ORIENTATION")["message"]


def test_a_ct_without_its_intercept_is_named(data: DataSet) -> None:
    data.manifest["modality"] = {"0": "CT"}
    data.write("images/c1.nii.gz", data.voxels(1) + np.int16(1024))
    assert data.found() == {("W-HU", "c1")}


def test_a_picture_among_volumes_is_an_error(data: DataSet) -> None:
    for kind in ("images", "labels"):
        voxels = np.asarray(nib.load(data.folder / kind / "c1.nii.gz").dataobj)
        data.write(f"{kind}/c1.nii.gz", voxels[:, :, 3])
    assert ("E-SPATIAL-DIMS", "c1") in data.found()


def test_a_file_that_changed_since_the_manifest_was_written_is_an_error(data: DataSet) -> None:
    data.manifest["training"][0]["sha256"] = {"image": ["0" * 64]}
    assert data.found() == {("E-SHA256", "c0")}


def test_a_file_outside_the_root_is_an_error_and_left_out_of_a_correction(data: DataSet, tmp_path: Path) -> None:
    elsewhere = data.write("../elsewhere.nii.gz", data.voxels(0))
    data.manifest["training"][0]["image"] = "../elsewhere.nii.gz"
    assert data.found() == {("E-OUTSIDE-ROOT", "elsewhere")}
    assert data.row("E-OUTSIDE-ROOT")["file"] == str(elsewhere.resolve())
    fixed = data.check(fix=tmp_path / "out")["fixed"]
    assert list(fixed["left_out"]) == ["elsewhere"], "whether it is meant, only a person knows"
    data.manifest["allow_outside_root"] = True
    assert data.found() == set()


KIDNEYS = {"0": "background", "1": "kidney_left", "2": "kidney_right"}


@pytest.mark.parametrize("affine", [LPS, RAS, LPS[:, [1, 0, 2, 3]]], ids=["LPS", "RAS", "PLS"])
def test_left_and_right_are_told_by_the_patients_axes_not_by_the_arrays(tmp_path: Path, affine: np.ndarray) -> None:
    data = DataSet(tmp_path, labels=KIDNEYS)
    data.manifest["pairs"] = [[1, 2]]
    x = np.stack(np.meshgrid(*map(np.arange, SHAPE), [1], indexing="ij"), -1)[..., 0, :] @ affine[0]  # mm to the Right
    middle = np.median(x)
    for n in range(NUM_CASES):
        label = np.where(x < middle, 1, 2).astype(np.uint8)
        label[:, :, :2] = 0
        data.write(f"images/c{n}.nii.gz", data.voxels(n), affine)
        data.write(f"labels/c{n}.nii.gz", label, affine)
    assert data.found() == set()
    swapped = data.label(3)
    data.write("labels/c3.nii.gz", np.choose(swapped, [0, 2, 1]).astype(np.uint8), affine)
    assert data.found() == {("W-LEFT-RIGHT", "c3")}
    assert "the kidney_left lies" in data.row("W-LEFT-RIGHT")["message"]
    for n in range(3):
        data.write(f"labels/c{n}.nii.gz", np.choose(data.label(n), [0, 2, 1]).astype(np.uint8), affine)
    assert data.found() == {("W-LEFT-RIGHT", name) for name in ("c0", "c1", "c2", "c3", None)}
    strong = next(row for row in data.check()["rows"] if row["case"] is None)
    assert "LEFT AND RIGHT ARE EXCHANGED in 4 of 5 cases" in strong["message"]


def test_a_pair_that_the_manifest_leaves_out_is_named(tmp_path: Path) -> None:
    data = DataSet(tmp_path, labels={"0": "background", "1": "Right lung", "2": "Left lung"})
    assert ("W-PAIRS", None) in data.found()
    assert '"pairs": [[2, 1]]' in data.row("W-PAIRS")["message"]


def test_pairs_are_known_by_their_names_whatever_their_style() -> None:
    assert named_pairs({0: "background", 1: "kidney_left", 2: "kidney_right"}) == [SidedPair(1, 2)]
    assert named_pairs({1: "Right Kidney", 2: "Left kidney"}) == [SidedPair(2, 1)]
    assert named_pairs({1: "lung upper lobe L", 2: "lung upper lobe R"}) == [SidedPair(1, 2)]
    assert named_pairs({1: "kidney_left", 2: "lung_right", 3: "vertebra L", 4: "L5"}) == []
    names = {1: "kidney R", 2: "kidney L", 3: "eye a", 4: "eye b", 5: "liver", 6: "Spleen"}
    expected = [SidedPair(2, 1), SidedPair(3, 4), SidedPair(6, 5)]
    assert sided_pairs(names, [(1, 2), (3, 4)]) == expected, "names count before the order of a pair"


def test_counts_centers_and_hashes_are_those_of_brute_force() -> None:
    generator = np.random.default_rng(5)
    array = generator.integers(0, 5, (9, 7, 6)).astype(np.int16)
    array[0, 0, 0] = -3
    values, counts = np.unique(array, return_counts=True)
    assert count_values(array) == dict(zip(values.tolist(), counts.tolist(), strict=True))
    array[1, 1, 1] = 30000
    array = array.astype(np.int32) * 5
    values, counts = np.unique(array, return_counts=True)
    assert count_values(array) == dict(zip(values.tolist(), counts.tolist(), strict=True))
    geometry = Geometry(array.shape, LPS)
    found = centers_mm(array, geometry, {5, 20, 77})
    assert set(found) == {5, 20}
    for value, center in found.items():
        expected = np.mean([(LPS @ [*index, 1])[:3] for index in np.argwhere(array == value)], axis=0)
        np.testing.assert_allclose(center, expected)
    zeros = np.zeros((4, 3, 2), np.float32)
    assert digest(zeros) == digest(-zeros) == digest(np.asfortranarray(zeros).astype(np.uint8))
    assert digest(zeros) != digest(zeros.reshape(3, 4, 2))
    one = zeros.copy()
    one[3, 2, 1] = 1
    assert digest(one) != digest(zeros)


def test_warnings_of_one_thread_do_not_reach_another_and_the_logger_is_left_as_it_was() -> None:
    from concurrent.futures import ThreadPoolExecutor

    log = logging.getLogger("medseg")
    before = list(log.handlers)

    def work(n: int) -> list[str]:
        for _ in range(50):
            log.warning("W-N %d: text", n)
        return kept.take()

    with warnings_kept() as kept, ThreadPoolExecutor(4) as pool:
        for n, messages in enumerate(pool.map(work, range(40))):
            assert messages == [f"W-N {n}: text"]
    assert log.handlers == before


MANIFEST_FAULTS = [
    ("E-DUPLICATE-CASE", {"id": "c0", "image": "other/c0.nii.gz", "label": "labels/c0.nii.gz", "fold": 0}, "c0"),
    ("E-OUTPUT-NAME", {"id": "../c9", "image": "other/c0.nii.gz", "label": "labels/c0.nii.gz", "fold": 0}, "../c9"),
    ("E-MANIFEST", {"label": "labels/c0.nii.gz", "fold": 0}, None),
    ("E-MANIFEST", {"image": "other/c0.nii.gz", "label": {"liver": "a.nii.gz"}, "fold": 0}, None),
    ("E-FOLD", {"image": "other/c9.nii.gz", "label": "labels/c0.nii.gz", "fold": "0"}, None),
    ("E-FOLD", {"image": "other/c9.nii.gz", "label": "labels/c0.nii.gz"}, None),
    ("E-VARIABLE", {"image": "${NOT_SET_ANYWHERE}/c9.nii.gz", "fold": 0}, None),
]


@pytest.mark.parametrize(("error_id", "entry", "case"), MANIFEST_FAULTS)
def test_a_manifests_own_faults_do_not_hide_those_of_its_files(
    data: DataSet, error_id: str, entry: dict[str, Any], case: str | None
) -> None:
    for name in ("c0", "c9"):
        data.write(f"other/{name}.nii.gz", data.voxels(99))
    data.manifest["training"].append(entry)
    spoil_truncated(data.folder / "images/c1.nii.gz")
    assert data.found() == {(error_id, case), ("E-NIFTI-TRUNCATED", "c1")}


def test_a_slip_in_an_optional_key_is_named(data: DataSet) -> None:
    data.manifest["ignore_lable"] = 255
    data.manifest["release"] = "1.0"
    data.manifest["training"][0]["patients"] = "x"
    messages = [row["message"] for row in data.check()["rows"]]
    assert [message.split(";")[1].strip() for message in messages] == [
        "did you mean 'ignore_label'?",
        "did you mean 'patient'?",
    ]


def test_a_manifest_that_cannot_be_read_is_refused(data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="E-MANIFEST"):
        check(tmp_path / "absent.json")
    del data.manifest["labels"]
    with pytest.raises(DataError, match=r"E-MANIFEST.*'labels'"):
        data.check()
    data.manifest["labels"] = {"0": "background", "one": "liver"}
    with pytest.raises(DataError, match="E-LABELS"):
        data.check()


# --fix


def corrected(data: DataSet, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result of a correction, and that of checking what it wrote."""
    before = {path: path.read_bytes() for path in data.folder.rglob("*") if path.is_file()}
    data.path()
    before[data.path()] = data.path().read_bytes()
    result = data.check(fix=out)
    assert {path: path.read_bytes() for path in data.folder.rglob("*") if path.is_file()} == before, "originals changed"
    assert not list(out.rglob("*.tmp"))
    return result["fixed"], check(out / "dataset.json")


def test_masks_of_0_and_255_become_0_and_1(tmp_path: Path) -> None:
    data = DataSet(tmp_path / "data", labels={"0": "background", "1": "liver"})
    for n in range(NUM_CASES):
        label = np.minimum(data.label(n), 1)
        data.write(f"labels/c{n}.nii.gz", label * np.uint8(255) if n < 2 else label)
    assert data.found() == {("E-LABEL-UNDECLARED", "c0"), ("E-LABEL-UNDECLARED", "c1")}
    assert data.check()["rows"][0]["fixable"]
    fixed, again = corrected(data, tmp_path / "out")
    assert again["rows"] == []
    assert again["labels"]["1"]["cases"] == NUM_CASES
    assert fixed["remaining_errors"] == 0
    assert "label of case c0 is rewritten: values 255 → 1" in fixed["changes"]
    written = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert written["training"][0]["label"] == "labels/c0.nii.gz"
    assert written["training"][2]["label"] == str(tmp_path / "data/labels/c2.nii.gz")
    assert sorted(path.name for path in (tmp_path / "out" / "labels").iterdir()) == ["c0.nii.gz", "c1.nii.gz"]


def test_a_mask_of_255_is_not_touched_where_255_means_something_else(tmp_path: Path) -> None:
    data = DataSet(tmp_path / "data", labels={"0": "background", "1": "liver"})
    for n in range(NUM_CASES):
        data.write(f"labels/c{n}.nii.gz", np.minimum(data.label(n), 1))
    mixed = np.minimum(data.label(0), 1)
    mixed[0, 0, 0] = 255
    data.write("labels/c0.nii.gz", mixed)
    assert not data.row("E-LABEL-UNDECLARED")["fixable"]
    data.manifest["ignore_label"] = 255
    assert data.found() == set()


def test_gapped_labels_are_renumbered_in_manifest_and_files_and_the_mapping_is_told(tmp_path: Path) -> None:
    data = DataSet(tmp_path / "data", labels={"0": "background", "2": "liver", "5": "tumour"})
    data.manifest |= {"regions": {"whole": [2, 5], "tumour": 5}, "region_order": [2, 5], "ignore_label": 1}
    data.manifest["licence"] = "CC0"
    for n in range(NUM_CASES):
        label = np.choose(data.label(n), [0, 2, 5]).astype(np.uint8)
        label[0, 0, 0] = 1
        data.write(f"labels/c{n}.nii.gz", label)
    assert data.found() == {("E-LABELS", None)}
    row = data.row("E-LABELS")
    assert row["fixable"]
    assert "2 → 1, 5 → 2, 1 → 255" in row["message"]
    fixed, again = corrected(data, tmp_path / "out")
    assert fixed["mapping"] == {"0": 0, "2": 1, "5": 2, "1": 255}
    assert again["rows"] == []
    written = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert written["labels"] == {"0": "background", "1": "liver", "2": "tumour"}
    assert written["regions"] == {"whole": [1, 2], "tumour": [2]}
    assert written["ignore_label"] == 255
    assert written["licence"] == "CC0"
    assert written["label_mapping"] == fixed["mapping"]
    assert json.loads((tmp_path / "out" / "changes.json").read_text())["label_mapping"] == fixed["mapping"]
    for n in range(NUM_CASES):
        new, old = read_label(tmp_path / f"out/labels/c{n}.nii.gz"), read_label(tmp_path / f"data/labels/c{n}.nii.gz")
        table = np.zeros(6, np.uint8)
        table[[2, 5, 1]] = (1, 2, 255)
        np.testing.assert_array_equal(new.array, table[old.array])
        assert new.geometry.matches(old.geometry, tolerance=1e-5)


def test_labels_stored_as_floats_become_integers_and_stay_where_they_are(data: DataSet, tmp_path: Path) -> None:
    oblique = LPS.copy()
    oblique[:3, :3] = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) @ oblique[:3, :3]
    data.write("images/c2.nii.gz", data.voxels(2), oblique)
    data.write("labels/c2.nii.gz", data.label(2).astype(np.float64), oblique)
    assert data.found() == {("W-LABEL-FLOAT", "c2")}
    _, again = corrected(data, tmp_path / "out")
    assert again["rows"] == []
    by_itk = sitk.ReadImage(str(tmp_path / "out/labels/c2.nii.gz"))
    assert by_itk.GetPixelIDTypeAsString() == "8-bit unsigned integer"
    np.testing.assert_array_equal(sitk.GetArrayFromImage(by_itk).transpose(), data.label(2))
    np.testing.assert_allclose(nib.load(tmp_path / "out/labels/c2.nii.gz").affine, oblique, atol=1e-5)


def test_what_cannot_be_used_is_left_out_and_listed(data: DataSet, tmp_path: Path) -> None:
    moved = LPS.copy()
    moved[0, 3] += 5
    data.write("labels/c1.nii.gz", data.label(1), moved)
    spoil_truncated(data.folder / "images/c3.nii.gz")
    data.manifest["training"].append({"label": "labels/c0.nii.gz", "fold": 1})
    data.manifest["training"].append(data.manifest["training"][1] | {"id": "c9", "label": "labels/c0.nii.gz"})
    data.manifest["numTraining"] = 7
    fixed, again = corrected(data, tmp_path / "out")
    assert {name: reason.split()[0] for name, reason in fixed["left_out"].items()} == {
        "c1": "E-PAIR-AFFINE",
        "c3": "E-NIFTI-TRUNCATED",
    }
    assert again["errors"] == 0
    assert sorted(again["orientations"]) == ["c0", "c2", "c4", "c9"]
    assert json.loads((tmp_path / "out/dataset.json").read_text())["numTraining"] == 4
    assert any("training[5] is left out: a case needs an 'image'" in change for change in fixed["changes"])


def test_leakage_is_corrected_where_nobody_has_to_choose(data: DataSet, tmp_path: Path) -> None:
    for name, of in (("again", "c0"), ("t", "c2")):
        copy_as_other_file(data, name=f"images/{name}.nii", of=f"images/{of}.nii.gz")
        copy_as_other_file(data, name=f"labels/{name}.nii", of=f"labels/{of}.nii.gz", dtype=np.uint8)
    data.manifest["training"].append({"image": "images/again.nii", "label": "labels/again.nii", "fold": 1})
    data.manifest["test"] = [{"image": "images/t.nii", "label": "labels/t.nii"}]
    for n in (0, 1, 4):
        data.manifest["training"][n]["patient"] = "p"
    assert data.check()["errors"] == 3
    fixed, again = corrected(data, tmp_path / "out")
    assert sorted(again["orientations"]) == ["c0", "c1", "c3", "c4", "t"], "the test case stays, its copy goes"
    assert fixed["left_out"] == {
        "again": "E-DUPLICATE-SCAN has the same voxels and label as c0",
        "c2": "E-DUPLICATE-SCAN has the same voxels and label as t",
    }
    assert "case c1 moves from fold 1 to fold 0, where its patient is" in fixed["changes"]
    assert again["errors"] == fixed["remaining_errors"] == 0


def test_copies_with_different_labels_are_left_for_a_person_to_decide(data: DataSet, tmp_path: Path) -> None:
    data.write("images/c1.nii.gz", data.voxels(0))
    label = data.label(1)
    label[0, 0, 0] = 1
    data.write("labels/c1.nii.gz", label)
    assert not data.row("E-DUPLICATE-SCAN")["fixable"]
    fixed, again = corrected(data, tmp_path / "out")
    assert fixed["left_out"] == {}
    assert fixed["remaining_errors"] == again["errors"] == 1
    assert fixed["remaining"][0]["error_id"] == "E-DUPLICATE-SCAN"


def test_pairs_and_ids_are_corrected(tmp_path: Path) -> None:
    data = DataSet(tmp_path / "data", labels={"0": "background", "1": "kidney_right", "2": "kidney_left"})
    data.manifest["training"][1] |= {"id": "c0"}
    data.manifest["training"][2] |= {"id": "a/b"}
    _, again = corrected(data, tmp_path / "out")
    assert again["rows"] == []
    assert set(again["orientations"]) == {"c0", "c0_2", "a_b", "c3", "c4"}
    assert json.loads((tmp_path / "out/dataset.json").read_text())["pairs"] == [[2, 1]]


def test_a_correction_needs_an_empty_folder_and_a_case(data: DataSet, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("")
    with pytest.raises(DataError, match="E-OUTPUT-EXISTS"):
        data.check(fix=tmp_path / "out")
    with pytest.raises(WorkflowError, match="E-FIX"):
        check(data.folder / "images", fix=tmp_path / "new")
    for n in range(NUM_CASES):
        (data.folder / f"labels/c{n}.nii.gz").unlink()
    with pytest.raises(DataError, match=r"E-FIX.*E-MISSING-FILE"):
        data.check(fix=tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Real scans


@pytest.mark.real_data
def test_the_real_hippocampi_have_two_labels_stored_as_floats_and_no_other_fault(data_dir: Path) -> None:
    result = check(data_dir / "hippocampus" / "dataset.json")
    assert {(row["error_id"], row["case"]) for row in result["rows"]} == {
        ("W-LABEL-FLOAT", "hippocampus_003"),
        ("W-LABEL-FLOAT", "hippocampus_243"),
    }
    assert result["checked"] == 220
    assert result["labels"]["1"]["cases"] == result["labels"]["2"]["cases"] == 220


@pytest.mark.real_data
def test_the_real_livers_with_thick_slices_stand_out(data_dir: Path) -> None:
    result = check(data_dir / "liver_lits11" / "dataset.json")
    assert {(row["error_id"], row["case"]) for row in result["rows"]} == {
        ("W-SPACING", "liver_0"),
        ("W-SPACING", "liver_1"),
    }


@pytest.mark.real_data
def test_the_real_sarcomas_are_sound_although_their_labels_have_a_qform_alone(data_dir: Path) -> None:
    result = check(data_dir / "sarcoma_petct" / "dataset.json")
    assert (result["checked"], result["rows"]) == (40, [])


@pytest.mark.real_data
def test_the_real_prostates_segmentation_on_another_grid_is_refused(data_dir: Path, tmp_path: Path) -> None:
    scan = "10000_1000000"
    case = {"id": scan, "image": [f"{scan}_adc.mha", f"{scan}_hbv.mha"], "label": f"{scan}_prostate_seg.nii.gz"}
    manifest = {
        "labels": {"0": "background", "1": "prostate"},
        "modality": {"0": "ADC", "1": "HBV"},
        "root": str(data_dir / "prostate_mha"),
        "training": [case],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    (row,) = check(tmp_path / "dataset.json")["rows"]
    assert row["error_id"] == "E-PAIR-SHAPE"
    assert "(116, 114, 31)" in row["message"]
    assert "(640, 640, 31)" in row["message"]


@pytest.mark.real_data
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_real_abdomen_is_only_suspect_when_its_header_mirrors_it(
    data_dir: Path, tmp_path: Path, mirrored: bool
) -> None:
    segmentation = nib.load(data_dir / "totalseg_examples/example_seg.nii.gz")
    affine = np.diag([-1.0, 1, 1, 1]) @ segmentation.affine if mirrored else segmentation.affine
    label = np.asarray(segmentation.dataobj).astype(np.uint8)
    label[label > 6] = 0
    data = DataSet(tmp_path)
    data.manifest["labels"] = dict(
        enumerate(("background", "spleen", "kidney R", "kidney L", "gallbladder", "liver", "stomach"))
    )
    data.manifest["pairs"] = [[2, 3]]
    del data.manifest["training"][1:]
    data.write("labels/c0.nii.gz", label, affine)
    data.write("images/c0.nii.gz", np.random.default_rng(0).random(label.shape, np.float32), affine)
    found = data.found()
    assert found == ({("W-LEFT-RIGHT", "c0"), ("W-LEFT-RIGHT", None)} if mirrored else set())
