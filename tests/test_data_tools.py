from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medseg.data.manifest import Manifest
from medseg.data.volume_io import read_label, read_volume, write_volume
from medseg.data_tools import conversion_text, convert, make_phantom
from medseg.errors import DataError, GeometryError
from medseg.geometry import Geometry, Volume

from .data.dicom.test_seg import VOXELS, grid, write_seg

SHAPE = (32, 32, 16)


def test_phantom_folder_is_a_data_set_with_its_manifest(tmp_path: Path) -> None:
    result = make_phantom(tmp_path / "set", num_cases=2, shape=SHAPE)
    manifest = Manifest.load(result["manifest"])
    manifest.check_files()
    assert result["cases"] == len(manifest.training) == 2
    assert manifest.name == "set"
    assert manifest.labels.organs == ("liver", "tumour")
    for case in manifest.training:
        assert case.label
        image, label = read_volume(case.images[0]), read_label(case.label)
        assert image.geometry.shape == SHAPE
        assert image.geometry.matches(label.geometry)


def test_phantom_called_again_makes_only_what_is_missing(tmp_path: Path) -> None:
    make_phantom(tmp_path, num_cases=2, shape=SHAPE)
    kept, lost = (tmp_path / "images" / f"case_00{n}.nii.gz" for n in (0, 1))
    before, content = kept.stat(), lost.read_bytes()
    lost.unlink()
    make_phantom(tmp_path, num_cases=2, shape=SHAPE)
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == before.st_mtime_ns


def test_phantom_refuses_to_mix_with_another_data_set(tmp_path: Path) -> None:
    make_phantom(tmp_path / "set", num_cases=1, shape=SHAPE)
    with pytest.raises(DataError, match=r"dataset\.json: describes another data set"):
        make_phantom(tmp_path / "set", num_cases=1, seed=5, shape=SHAPE)
    with pytest.raises(DataError, match="is not empty"):
        make_phantom(tmp_path, num_cases=1, shape=SHAPE)


def test_phantom_with_unknown_labels_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'liver'"):
        make_phantom(tmp_path / "set", labels="livre")
    assert not (tmp_path / "set").exists()


def tilted_series(write_slice: Callable[..., Path], folder: str) -> None:
    """Twenty slices whose stack leans by 16.7°, with a bar that runs straight up through the patient."""
    for k in range(20):
        pixels = np.zeros((40, 30), np.uint16)
        shift = 0.6 * k / 0.5  # rows are 0.5 mm apart, and each slice begins 0.6 mm further down them
        pixels[max(0, round(24 - shift)) : round(32 - shift), 10:20] = 900
        write_slice(f"{folder}/{k}.dcm", 2.0 * k, pixels, ImagePositionPatient=[-10.0, -20.0 + 0.6 * k, 2.0 * k])


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_a_tilted_scan_and_its_label_are_straightened_alike_for_every_program(
    tmp_path: Path, write_slice: Callable[..., Path], caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    tilted_series(write_slice, "ct")
    scan = read_volume(tmp_path / "ct")
    assert not scan.geometry.is_orthogonal
    drawn = tmp_path / "drawn.nii.gz"
    write_volume(drawn, Volume((scan.array > 450).astype(np.uint8), scan.geometry))
    image, label = tmp_path / f"image{suffix}", tmp_path / f"label{suffix}"
    with caplog.at_level(logging.WARNING):
        convert(tmp_path / "ct", image)
    assert "W-STRAIGHTENED" in caplog.text
    assert "16.7°" in caplog.text
    convert(drawn, label, image=tmp_path / "ct")
    read, mask = sitk.ReadImage(str(image)), sitk.ReadImage(str(label))  # which refuses sheared axes
    assert read.GetPixelID() == sitk.sitkInt16
    assert (read.GetOrigin(), read.GetSize(), read.GetDirection()) == (
        mask.GetOrigin(),
        mask.GetSize(),
        mask.GetDirection(),
    )
    bar = sitk.GetArrayFromImage(mask)  # (K, J, I)
    voxels = np.argwhere(bar == 1) @ np.diag(read.GetSpacing()[::-1])
    direction = np.linalg.svd(voxels - voxels.mean(0), full_matrices=False)[2][0]
    across = np.abs(direction @ [1, 0, 0])
    assert across > np.cos(np.radians(20)), "the bar runs along the slices' axis, give or take the tilt"
    ml = (bar == 1).sum() * np.prod(read.GetSpacing()) / 1000
    assert ml == pytest.approx((scan.array > 450).sum() * scan.geometry.voxel_ml, rel=0.05)
    middle = scan.geometry.affine @ [15, 20, 10, 1]
    index = mask.TransformPhysicalPointToIndex([-middle[0], -middle[1], middle[2]])
    assert mask[index] == int(scan.array[0, 15, 20, 10] > 450)


def test_a_label_on_another_grid_is_refused_or_brought_to_its_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fine = Geometry.from_spacing((20, 20, 10), (1, 1, 2))
    coarse = fine.resampled((2, 2, 2))
    write_volume(tmp_path / "image.nii.gz", Volume(np.zeros((1, *fine.shape), np.int16), fine))
    label = np.zeros((1, *coarse.shape), np.uint8)
    label[0, 2:6, 2:6, 2:6] = 3
    write_volume(tmp_path / "mask.nii.gz", Volume(label, coarse))
    files = tmp_path / "mask.nii.gz", tmp_path / "out.nii.gz"
    with pytest.raises(
        GeometryError, match=r"E-PAIR-SHAPE .*medseg data convert LABEL NEW_LABEL --image IMAGE --resample"
    ):
        convert(*files, image=tmp_path / "image.nii.gz")
    with caplog.at_level(logging.WARNING):
        result = convert(*files, image=tmp_path / "image.nii.gz", resample=True)
    assert result["shape"] == [20, 20, 10]
    assert set(result["labels"]) == {0, 3}
    assert "label 3 0.512 → 0.512 ml" in caplog.text
    assert read_label(files[1]).geometry.matches(fine)
    with pytest.raises(DataError, match=r"--resample: .*--image"):
        convert(files[0], tmp_path / "other.nii.gz", resample=True)


def test_a_converted_seg_is_told_with_the_names_of_its_structures(tmp_path: Path) -> None:
    write_volume(tmp_path / "image.nii.gz", Volume(np.zeros((1, *VOXELS.shape), np.int16), grid()))
    seg = write_seg(tmp_path / "seg.dcm", VOXELS)
    result = convert(seg, tmp_path / "out.nii.gz", image=tmp_path / "image.nii.gz")
    assert result["names"] == {1: "Liver", 2: "Left kidney", 3: "Tumour"}
    text = conversion_text(result)
    assert "9 × 7 × 5 voxels of 0.75 × 0.5 × 2.5 mm" in text
    assert f"2 Left kidney  {(VOXELS == 2).sum()} voxels" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent", r"E-MISSING-FILE .*absent: does not exist"),
        ("empty", r"E-DICOM-NO-SERIES .*it is empty"),
        ("texts", r"E-DICOM-NO-SERIES .*no DICOM among 1 files"),
        ("masks", r"E-LABEL-IMAGE .*add --image SCAN"),
        ("ct#9.9", r"E-DICOM-NO-SERIES .*no series 9\.9; there are 1\.2\.826"),
        ("ct#typo", r"E-DICOM-NO-SERIES .*no series typo; there are 1\.2\.826"),
        ("fake.dcm", r"E-SUFFIX .*fake\.dcm: is not DICOM"),
        ("seg.dcm", r"E-DICOM-NO-SERIES .*add --image SCAN"),
    ],
)
def test_each_mistake_of_a_conversion_has_its_own_answer(
    tmp_path: Path, write_slice: Callable[..., Path], name: str, expected: str
) -> None:
    for folder in ("empty", "texts", "masks"):
        (tmp_path / folder).mkdir()
    for file in ("texts/a.txt", "masks/1.png", "fake.dcm"):
        (tmp_path / file).write_text("nothing")
    write_slice("ct/0.dcm")
    write_seg(tmp_path / "seg.dcm", VOXELS)
    with pytest.raises(DataError, match=expected):
        convert(tmp_path / name, tmp_path / "out.nii.gz")


def test_a_series_is_named_by_the_end_of_its_uid_with_or_without_an_ellipsis(
    tmp_path: Path, write_slice: Callable[..., Path]
) -> None:
    for k in range(3):
        write_slice(f"ct/{k}.dcm", 2.0 * k)
    for end in ("826.0.1.1", "…826.0.1.1"):
        result = convert(tmp_path / f"ct#{end}", tmp_path / "out.nii.gz", force=True)
        assert result["shape"] == [4, 3, 3]
    with pytest.raises(DataError, match=r"E-LABEL-KIND .*convert the scan itself without --image"):
        convert(tmp_path / "ct", tmp_path / "label.nii.gz", image=tmp_path / "ct")
