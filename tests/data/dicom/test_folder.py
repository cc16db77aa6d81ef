from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import MediaStorageDirectoryStorage, SegmentationStorage, generate_uid

from medseg.data.dicom.folder import Series, find_series, is_dicom, read_dicom, read_series, split_series_path
from medseg.data.transforms import StraightenVolumed, geometry_of, meta_tensor
from medseg.errors import DataError, MedsegError
from medseg.geometry import Volume

Write = Callable[..., Path]

OBLIQUE = (0.6, 0.8, 0.0, 0.0, 0.0, -1.0)
"""Rows run to the left and back, columns downward; the normal is (-0.8, 0.6, 0)."""


def only(folder: Path) -> Series:
    (series,) = find_series(folder).series
    return series


def problem_ids(series: Series) -> list[str]:
    return [problem.error_id for problem in series.problems]


def note_ids(series: Series) -> list[str]:
    return [note.split()[0] for note in series.notes]


def slice_values(volume: Volume) -> list[float]:
    """The first voxel of each slice."""
    return volume.array[0, 0, 0].tolist()


def test_slices_are_ordered_by_position_not_by_name_or_number(tmp_path: Path, write_slice: Write) -> None:
    for name, z, number in (("a", 4.0, 1), ("b", -2.0, 3), ("c", 1.0, 2)):
        write_slice(name, z, np.full((3, 4), int(z) + 10, np.uint16), InstanceNumber=number)
    series = only(tmp_path)
    assert [path.name for path in series.files] == ["b", "c", "a"]
    assert slice_values(read_series(series)) == [8, 11, 14]
    assert [pydicom.dcmread(path).SOPInstanceUID for path in series.files] == list(series.sop_uids)


@pytest.mark.parametrize("axes", [(1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), OBLIQUE])
def test_every_voxel_lies_where_the_standard_says(tmp_path: Path, write_slice: Write, axes: tuple[float, ...]) -> None:
    row, column = np.array(axes[:3]), np.array(axes[3:])
    normal, origin = np.cross(row, column), np.array([12.5, -30.25, 100.0])
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 1000, (3, 5, 4)).astype(np.uint16)  # (slices, rows, columns)
    for k in (2, 0, 1):
        position = (origin + 2.5 * k * normal).tolist()
        write_slice(f"{k}.dcm", 0, stored[k], ImagePositionPatient=position, ImageOrientationPatient=list(axes))
    volume = read_dicom(tmp_path)
    assert volume.array.shape == (1, 4, 5, 3)
    for i, j, k in np.ndindex(4, 5, 3):
        # PS3.3 C.7.6.2.1.1: the column index steps along the row by PixelSpacing[1], the row index by [0]
        lps = origin + row * 0.75 * i + column * 0.5 * j + normal * 2.5 * k
        ras = volume.geometry.affine @ [i, j, k, 1]
        np.testing.assert_allclose(ras[:3], lps * [-1, -1, 1], atol=1e-9)
        assert volume.array[0, i, j, k] == stored[k, j, i]


def test_a_missing_slice_is_refused_with_its_position_or_interpolated_and_told(
    tmp_path: Path, write_slice: Write, caplog: pytest.LogCaptureFixture
) -> None:
    for z in (0, 2, 6, 8, 14):
        write_slice(f"{z}", z, np.full((3, 4), 10 * z, np.uint16))
    series = only(tmp_path)
    assert problem_ids(series) == ["E-DICOM-MISSING-SLICE"]
    with pytest.raises(
        DataError, match=r"3 of 8 slices missing.*\(-10\.00, -20\.00, 4\.00\), .*10\.00\), .*12\.00\) mm"
    ):
        read_series(series)
    with caplog.at_level(logging.WARNING, "medseg"):
        volume = read_series(series, allow_missing_slices=True)
    assert slice_values(volume) == [0, 20, 40, 60, 80, 100, 120, 140]
    assert volume.geometry.spacing_mm == pytest.approx((0.75, 0.5, 2.0))
    assert "3 of 8 slices are interpolated" in caplog.text
    assert [uid == "" for uid in series.sop_uids] == [False, False, True, False, False, True, True, False]


def test_irregular_gaps_are_named_and_resampled_only_if_allowed(tmp_path: Path, write_slice: Write) -> None:
    for z in (0, 2, 4, 7, 9):
        write_slice(f"{z}", z, np.full((3, 4), 10 * z, np.uint16))
    with pytest.raises(DataError, match=r"E-DICOM-IRREGULAR.*3 × 2, 1 × 3 mm"):
        read_dicom(tmp_path)
    volume = read_dicom(tmp_path, allow_missing_slices=True)
    # round(9 / 2) = 4 steps of 2.25 mm from the first slice to the last
    assert volume.geometry.spacing_mm[2] == pytest.approx(2.25)
    np.testing.assert_allclose(slice_values(volume), [0, 22.5, 45, 67.5, 90], atol=0.5)


def test_positions_rounded_in_the_header_make_a_regular_grid(tmp_path: Path, write_slice: Write) -> None:
    for k in range(9):
        write_slice(f"{k}", round(1.25 * k, 1))
    series = only(tmp_path)
    assert not series.problems
    assert series.geometry.spacing_mm[2] == pytest.approx(1.25)


def test_a_slice_far_away_is_not_bridged_even_if_gaps_are_allowed(tmp_path: Path, write_slice: Write) -> None:
    for z in (0, 2, 4, 10_000):
        write_slice(f"{z}", z)
    with pytest.raises(DataError, match=r"E-DICOM-GEOMETRY .*4 slices where 5001"):
        read_dicom(tmp_path, allow_missing_slices=True)


def test_a_slice_aside_of_the_stack_is_refused(tmp_path: Path, write_slice: Write) -> None:
    for z in (0, 2, 4):
        write_slice(f"{z}", z, ImagePositionPatient=[-10.0 + (z == 2) * 3, -20.0, float(z)])
    with pytest.raises(DataError, match=r"E-DICOM-GEOMETRY .*2 lies 3 mm aside"):
        read_dicom(tmp_path, allow_missing_slices=True)


def test_copies_of_a_slice_are_left_out(tmp_path: Path, write_slice: Write) -> None:
    paths = [write_slice(f"{z}", z) for z in (0, 2, 4)]
    (tmp_path / "copy").write_bytes(paths[1].read_bytes())
    write_slice("resent", 4)  # equal pixels under a new uid
    series = only(tmp_path)
    assert len(series.frames) == 3
    assert not series.problems
    assert note_ids(series) == ["W-DICOM-DUPLICATE"]
    assert slice_values(read_series(series)) == [0, 2, 4]


@pytest.mark.parametrize("keep_uid", [True, False])
def test_different_pixels_at_one_position_are_refused(tmp_path: Path, write_slice: Write, keep_uid: bool) -> None:
    for z in (0, 2, 4):
        write_slice(f"{z}", z)
    uid = pydicom.dcmread(tmp_path / "2").SOPInstanceUID if keep_uid else generate_uid()
    write_slice("other", 2, np.full((3, 4), 7, np.uint16), SOPInstanceUID=uid)
    with pytest.raises(DataError, match=r"E-DICOM-DUPLICATE-POSITION.*\(-10\.00, -20\.00, 2\.00\) mm: 2, other"):
        read_dicom(tmp_path, allow_missing_slices=True)


@pytest.mark.parametrize(
    ("keyword", "first", "second"),
    [
        ("TemporalPositionIdentifier", 1, 2),
        ("AcquisitionNumber", 4, 11),
        ("EchoTime", 4.9, 90),
        ("DiffusionBValue", 0.0, 800.0),
        ("TriggerTime", 0, 350.5),
        ("ImageType", ["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]),
    ],
)
def test_phases_of_one_position_become_volumes(
    tmp_path: Path, write_slice: Write, keyword: str, first: object, second: object
) -> None:
    for z in (0, 2, 4):
        write_slice(f"{z}_second", z, np.full((3, 4), 200 + z, np.uint16), **{keyword: second})
        write_slice(f"{z}_first", z, np.full((3, 4), 100 + z, np.uint16), **{keyword: first})
    one, two = find_series(tmp_path).series
    assert (one.part, two.part) == (1, 2)
    assert keyword in one.notes[0]
    assert slice_values(read_series(one)) == [100, 102, 104]
    assert slice_values(read_dicom(two.path)) == [200, 202, 204]
    with pytest.raises(DataError, match="E-DICOM-SEVERAL"):
        read_dicom(Path(f"{tmp_path}#{one.uid}"))


def test_two_attributes_together_tell_phases_apart(tmp_path: Path, write_slice: Write) -> None:
    for z in (0, 2):
        for echo in (5, 10):
            for kind in ("M", "P"):
                pixels = np.full((3, 4), z + echo + 100 * (kind == "P"), np.uint16)
                write_slice(f"{z}{echo}{kind}", z, pixels, EchoTime=echo, ImageType=["ORIGINAL", "PRIMARY", kind])
    values = [slice_values(read_series(one)) for one in find_series(tmp_path).series]
    assert sorted(values) == [[5, 7], [10, 12], [105, 107], [110, 112]]


def test_what_differs_from_slice_to_slice_splits_nothing(tmp_path: Path, write_slice: Write) -> None:
    for number, z in enumerate((0, 2, 4, 6)):
        write_slice(f"{z}", z, AcquisitionNumber=number)
    write_slice("other", 2, np.full((3, 4), 7, np.uint16), AcquisitionNumber=9)
    assert problem_ids(only(tmp_path)) == ["E-DICOM-DUPLICATE-POSITION"]


def test_slices_not_made_alike_are_noted(tmp_path: Path, write_slice: Write) -> None:
    write_slice("a", 0, EchoTime=5)
    write_slice("b", 2, EchoTime=90)
    assert note_ids(only(tmp_path)) == ["W-DICOM-MIXED"]


def test_a_tilted_gantry_shears_the_grid_and_is_straightened_by_preprocessing(
    tmp_path: Path, write_slice: Write, caplog: pytest.LogCaptureFixture
) -> None:
    angle = np.radians(20)
    axes = [1.0, 0.0, 0.0, 0.0, float(np.cos(angle)), float(-np.sin(angle))]
    for z in (0, 3, 6):
        write_slice(f"{z}", z, ImageOrientationPatient=axes)
    series = only(tmp_path)
    assert series.tilt_deg == pytest.approx(20)
    assert note_ids(series) == ["W-DICOM-TILT"]
    volume = read_series(series)
    assert "W-DICOM-TILT" in caplog.text
    np.testing.assert_allclose(volume.geometry.affine[:3, 2], [0, 0, 3], atol=1e-9)  # along the table, not the normal
    straight = geometry_of(StraightenVolumed(["image"])({"image": meta_tensor(volume)})["image"])
    assert straight.is_orthogonal
    assert not volume.geometry.is_orthogonal


@pytest.mark.parametrize(
    "elements",
    [
        {"ImageOrientationPatient": [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]},
        {"PixelSpacing": [0.6, 0.75]},
        {"FrameOfReferenceUID": "1.2.826.0.1.99"},
        {"pixels": np.zeros((5, 4), np.uint16)},
    ],
)
def test_what_makes_no_common_grid_is_split(tmp_path: Path, write_slice: Write, elements: dict[str, object]) -> None:
    for z in (0, 2):
        write_slice(f"{z}", z)
    for z in (4, 6):
        position = [float(z), -20.0, 0.0] if "ImageOrientationPatient" in elements else [-10.0, -20.0, float(z)]
        write_slice(f"{z}", z, **{"ImagePositionPatient": position, **elements})
    found = find_series(tmp_path).series
    assert [len(one.frames) for one in found] == [2, 2]
    assert not any(one.problems for one in found)


def test_a_hair_of_difference_in_orientation_splits_nothing(tmp_path: Path, write_slice: Write) -> None:
    for k in range(4):
        write_slice(f"{k}", 2 * k, ImageOrientationPatient=[1.0, 1e-6 * k, 0.0, -1e-6 * k, 1.0, 0.0])
    assert not only(tmp_path).problems


def test_every_other_file_is_skipped_with_its_reason(tmp_path: Path, write_slice: Write) -> None:
    for z in (0, 2):
        write_slice(f"scan/{z}", z)
    write_slice("scout", 0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_slice("seg", 0, SOPClassUID=SegmentationStorage, Modality="SEG")
    write_slice("dose", 0, Modality="RTDOSE")
    report = {"Rows": None, "Columns": None, "PixelData": None, "Modality": "SR"}
    write_slice("report", 0, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.33", **report)
    write_slice("DICOMDIR", 0, SOPClassUID=MediaStorageDirectoryStorage)
    (tmp_path / ".DS_Store").write_bytes(b"Bud1")
    (tmp_path / "notes.txt").write_text("slice 3 looks odd")
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "round").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\x10\x00UI\xff\x7f" + b"1.2")
    found = find_series(tmp_path)
    assert [len(one.frames) for one in found.series] == [2]
    reasons = {skipped.path.name: skipped.reason for skipped in found.skipped}
    assert reasons["scout"] == "localizer"
    assert reasons["seg"] == "no scan: Segmentation Storage"
    assert reasons["dose"].startswith("no scan")
    assert reasons["report"] == "no scan: Comprehensive SR Storage"
    assert reasons["DICOMDIR"].startswith("DICOMDIR")
    assert reasons[".DS_Store"] == "litter of the operating system"
    assert reasons["notes.txt"] == reasons["empty.dcm"] == "not DICOM"
    assert reasons["loop"].startswith("no file")
    assert reasons["round"] == "link to a folder, not followed"
    assert reasons["pipe"].startswith("no file")
    assert "broken.dcm" in reasons
    assert len(reasons) == 12


def test_an_unreadable_file_is_skipped(tmp_path: Path, write_slice: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = write_slice("a", 0)

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # as root, a mode of 0 stops nobody
    (skipped,) = find_series(tmp_path).skipped
    assert (skipped.path, skipped.reason) == (locked, "cannot be read: Permission denied")


@pytest.mark.parametrize(
    "elements",
    [
        {"ImagePositionPatient": None},
        {"ImageOrientationPatient": None},
        {"PixelSpacing": None},
        {"PixelSpacing": [0.0, 0.75]},
        {"ImageOrientationPatient": [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]},
        {"ImageOrientationPatient": [0.0] * 6},
        {"NumberOfFrames": 2, "PixelData": bytes(48)},
    ],
)
def test_without_position_orientation_or_spacing_nothing_is_guessed(
    tmp_path: Path, write_slice: Write, elements: dict[str, object]
) -> None:
    for z in (0, 2):
        write_slice(f"{z}", z, InstanceNumber=z, SliceLocation=z, **elements)
    series = only(tmp_path)
    assert problem_ids(series) == ["E-DICOM-GEOMETRY"]
    with pytest.raises(DataError, match="and 1 more files"):
        read_series(series)
    with pytest.raises(DataError, match="E-DICOM-GEOMETRY"):
        _ = series.geometry


@pytest.mark.parametrize(
    ("error_id", "elements"),
    [
        ("E-DICOM-COLOR", {"PhotometricInterpretation": "PALETTE COLOR"}),
        ("E-DICOM-COLOR", {"SamplesPerPixel": 3, "PixelData": bytes(72)}),
        ("E-DICOM-TRUNCATED", {"PixelData": bytes(20)}),
        ("E-DICOM-TRUNCATED", {"PixelData": None}),
        ("E-DICOM-MOSAIC", {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}),
    ],
)
def test_pixels_that_are_no_slice_are_told_before_they_are_read(
    tmp_path: Path, write_slice: Write, error_id: str, elements: dict[str, object]
) -> None:
    write_slice("a", 0, **elements)
    write_slice("b", 2)
    problems = [problem for one in find_series(tmp_path).series for problem in one.problems]
    assert [problem.error_id for problem in problems] == [error_id]
    assert problems[0].where == str(tmp_path / "a")


def test_one_slice_is_a_volume_as_thick_as_it_says(tmp_path: Path, write_slice: Write) -> None:
    path = write_slice("a", 5, np.arange(12, dtype=np.int16).reshape(3, 4))
    volume = read_dicom(path)
    assert volume.array.shape == (1, 4, 3, 1)
    assert volume.geometry.spacing_mm == pytest.approx((0.75, 0.5, 2.0))
    assert read_dicom(write_slice("b", 5, SpacingBetweenSlices=3.5)).geometry.spacing_mm[2] == pytest.approx(3.5)
    negative = write_slice("n", 5, SpacingBetweenSlices=-3.5)  # nuclear medicine tells the direction by it
    assert read_dicom(negative).geometry.spacing_mm[2] == pytest.approx(2.0)
    with pytest.raises(DataError, match=r"E-DICOM-GEOMETRY .*how thick"):
        read_dicom(write_slice("c", 5, SliceThickness=None))


def test_a_slice_given_without_its_scan_says_how_many_there_are(
    tmp_path: Path, write_slice: Write, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write_slice(f"scan/{z}", z) for z in (0, 2, 4)]
    write_slice("scan/other", 0, SeriesInstanceUID="1.2.3")
    write_slice("scan/inner/5", 6)
    read_dicom(paths[1])
    assert "W-DICOM-ALONE" in caplog.text
    assert "1 of 3 slices of this series that lie in its folder; give the folder" in caplog.text
    assert note_ids(only(write_slice("alone/a", 0))) == []
    films = [write_slice(f"films/{k}", k, Modality="DX") for k in range(2)]
    assert note_ids(only(films[0])) == []


def test_another_spacing_in_the_header_than_between_the_slices_is_noted(tmp_path: Path, write_slice: Write) -> None:
    for z in (0, 4, 8):  # every second slice of a scan
        write_slice(f"{z}", z, SpacingBetweenSlices=2)
    assert note_ids(only(tmp_path)) == ["W-DICOM-SPACING"]


def test_without_a_preamble_a_class_or_a_series_uid_a_slice_is_still_one(tmp_path: Path, write_slice: Write) -> None:
    for z in (0, 2):
        path = write_slice(f"{z}", z, SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
        path.write_bytes(path.read_bytes()[132:])
    assert is_dicom(tmp_path)
    assert slice_values(read_dicom(tmp_path)) == [0, 2]
    for z in (0, 2):
        file = pydicom.dcmread(tmp_path / f"{z}", force=True)
        file.SOPClassUID = file.SeriesInstanceUID = file.SOPInstanceUID = ""
        with (tmp_path / f"{z}").open("wb") as to:
            pydicom.dcmwrite(to, file)
    series = only(tmp_path)
    assert (series.name, note_ids(series)) == ("no-uid", ["W-DICOM-NO-UID"])
    assert slice_values(read_dicom(series.path)) == [0, 2]


def test_files_without_a_series_uid_are_taken_together_by_folder(tmp_path: Path, write_slice: Write) -> None:
    for folder in ("one", "two"):
        for z in (0, 2):
            pixels = np.full((3, 4), z + 10 * (folder == "two"), np.uint16)
            write_slice(f"{folder}/{z}", z, pixels, SeriesInstanceUID="")
    assert [one.name for one in find_series(tmp_path).series] == ["no-uid-1", "no-uid-2"]
    assert slice_values(read_dicom(Path(f"{tmp_path}#no-uid-2"))) == [10, 12]


def test_a_picture_that_names_the_patient_is_noted(tmp_path: Path, write_slice: Write) -> None:
    write_slice("a", BurnedInAnnotation="YES")
    assert note_ids(only(tmp_path)) == ["W-DICOM-BURNED-IN"]


def frame_at(z: float, **more: dict[str, object]) -> dict[str, dict[str, object]]:
    return {"PlanePositionSequence": {"ImagePositionPatient": [-10.0, -20.0, z]}, **more}


def test_frames_of_one_file_follow_their_own_groups(tmp_path: Path, write_enhanced: Write) -> None:
    pixels = np.random.default_rng(1).integers(0, 100, (3, 3, 4)).astype(np.uint16)
    slopes = (3.0, 2.0, 0.5)
    groups = [
        frame_at(z, PixelValueTransformationSequence={"RescaleSlope": slope, "RescaleIntercept": 1.0})
        for z, slope in zip((4.0, 0.0, 2.0), slopes, strict=True)
    ]
    path = write_enhanced("a", pixels, groups)
    series = only(tmp_path)
    assert [frame.number for frame in series.frames] == [1, 2, 0]
    assert series.files == (path,)
    volume = read_series(series)
    expected = np.stack([pixels[n].T * slopes[n] + 1 for n in (1, 2, 0)], axis=-1)
    np.testing.assert_array_equal(volume.array[0], expected)
    np.testing.assert_allclose(volume.geometry.affine[:3, 3], [10, 20, 0])
    assert volume.geometry.spacing_mm == pytest.approx((0.75, 0.5, 2.0))


def test_times_stacks_and_files_of_frames_are_told_apart(tmp_path: Path, write_enhanced: Write) -> None:
    pixels = np.arange(4, dtype=np.uint16)[:, None, None] * np.ones((1, 3, 4), np.uint16)
    for file in (0, 1):
        groups = [
            frame_at(z, FrameContentSequence={"TemporalPositionIndex": time, "StackID": str(file)})
            for time in (1, 2)
            for z in (0.0, 2.0)
        ]
        write_enhanced(f"{file}", pixels + 10 * file, groups)
    values = [slice_values(read_series(one)) for one in find_series(tmp_path).series]
    assert values == [[0, 1], [2, 3], [10, 11], [12, 13]]


def test_frames_without_groups_of_their_own_are_refused(tmp_path: Path, write_enhanced: Write) -> None:
    write_enhanced("a", np.zeros((3, 3, 4), np.uint16), [frame_at(0.0), frame_at(2.0)])
    assert problem_ids(only(tmp_path)) == ["E-DICOM-GEOMETRY"]


def test_a_folder_of_several_series_lists_them_and_takes_a_name(tmp_path: Path, write_slice: Write) -> None:
    for number in (1, 2):
        for z in (0, 2):
            pixels = np.full((3, 4), 10 * number + z, np.uint16)
            write_slice(f"{number}{z}", z, pixels, SeriesInstanceUID=f"1.2.3.{number}")
    with pytest.raises(DataError, match=r"E-DICOM-SEVERAL .*#1\.2\.3\.1 \(MR, 2 slices\), .*#1\.2\.3\.2"):
        read_dicom(tmp_path)
    assert slice_values(read_dicom(Path(f"{tmp_path}#1.2.3.2"))) == [20, 22]
    with pytest.raises(DataError, match=r"E-DICOM-NO-SERIES .*no series 1\.9; there are 1\.2\.3\.1"):
        read_dicom(Path(f"{tmp_path}#1.9"))


def test_a_folder_without_series_says_what_it_holds(tmp_path: Path, write_slice: Write) -> None:
    with pytest.raises(DataError, match="E-MISSING-FILE"):
        find_series(tmp_path / "absent")
    write_slice("scout", 0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    with pytest.raises(DataError, match=r"E-DICOM-NO-SERIES .*1 × localizer"):
        read_dicom(tmp_path)


def test_a_series_path_is_split_at_its_mark_only(tmp_path: Path) -> None:
    assert split_series_path(Path("scans/a#1.2.3")) == (Path("scans/a"), "1.2.3")
    assert split_series_path(Path("scans/a#1.2.3-2")) == (Path("scans/a"), "1.2.3-2")
    assert split_series_path(Path("scans/patient#1/ct")) == (Path("scans/patient#1/ct"), None)
    (tmp_path / "scan#1").mkdir()
    assert split_series_path(tmp_path / "scan#1") == (tmp_path / "scan#1", None)


def test_what_is_dicom_is_known_by_its_first_bytes(tmp_path: Path, write_slice: Write) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "scan.dcm").write_text("a shopping list")
    assert not is_dicom(tmp_path)
    assert not is_dicom(tmp_path / "a" / "scan.dcm")
    assert is_dicom(write_slice("b/any.name"))
    assert is_dicom(tmp_path)
    assert not is_dicom(tmp_path / "absent")


def test_no_message_names_the_patient(tmp_path: Path, write_slice: Write, caplog: pytest.LogCaptureFixture) -> None:
    for z in (0, 2, 6):
        write_slice(f"{z}", z, BurnedInAnnotation="YES", SeriesDescription="Secret^Name", AccessionNumber="ACC-1")
    damaged = write_slice("x", 4).read_bytes()
    (tmp_path / "x").write_bytes(damaged.replace(b"-10.0\\-20.0\\4.0 ", b"Secret^Name     ").replace(b"\\20", b"\\zz"))
    found = find_series(tmp_path)
    for one in found.series:
        try:
            read_series(one, allow_missing_slices=True)
        except MedsegError as error:
            caplog.handler.stream.write(str(error))
    told = caplog.text + repr([(one.problems, one.notes, one.name) for one in found.series]) + repr(found.skipped)
    for secret in ("Secret", "Name", "PID-4711", "19010203", "ACC-1"):
        assert secret not in told


def test_damaged_bytes_never_crash_the_search_or_the_reading(
    tmp_path: Path, write_slice: Write, write_enhanced: Write
) -> None:
    pixels = np.zeros((2, 3, 4), np.uint16)
    originals = [write_slice("a", 0, RescaleSlope=1), write_enhanced("b", pixels, [frame_at(0.0), frame_at(2.0)])]
    contents = [np.frombuffer(path.read_bytes(), np.uint8) for path in originals]
    rng = np.random.default_rng(0)
    for path in originals:
        path.unlink()
    for number in range(150):
        content = contents[number % 2].copy()
        content[rng.integers(132, len(content), 8)] = rng.integers(0, 256, 8)
        (tmp_path / "damaged").write_bytes(content[: rng.integers(200, len(content) + 200)].tobytes())
        for one in find_series(tmp_path).series:
            try:
                read_series(one, allow_missing_slices=True)
            except MedsegError:
                continue


# Real scans


@pytest.mark.real_data
def test_a_ct_that_runs_downward_equals_what_itk_reads_from_our_list(data_dir: Path) -> None:
    series = only(data_dir / "dicom_ct_liver")
    volume = read_series(series)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in series.files])
    image = reader.Execute()
    np.testing.assert_array_equal(volume.array[0], sitk.GetArrayFromImage(image).transpose())
    origin, spacing, direction = volume.geometry.lps()
    np.testing.assert_allclose(origin, image.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(spacing, image.GetSpacing(), atol=1e-3)
    np.testing.assert_allclose(direction, image.GetDirection(), atol=1e-6)
    assert volume.array.dtype == np.int16


def assert_same_voxels_at_same_mm(volume: Volume, reference: Path) -> None:
    """Every voxel of a NIfTI file has its equal in the volume, at the same place."""
    image = nib.load(reference)
    values = np.squeeze(np.asarray(image.dataobj, np.float64))
    to_ours = np.linalg.inv(volume.geometry.affine) @ image.affine
    index = to_ours[:3] @ np.vstack([np.indices(values.shape).reshape(3, -1), np.ones(values.size)])
    nearest = np.rint(index).astype(int)
    assert np.abs(index - nearest).max() < 1e-3
    assert nearest.min() >= 0
    np.testing.assert_allclose(volume.array[0][tuple(nearest)], values.ravel(), rtol=1e-6, atol=1e-5)


@pytest.mark.real_data
@pytest.mark.parametrize("patient", ["STS_008", "STS_019", "STS_025", "STS_042"])
@pytest.mark.parametrize("modality", ["CT", "MR_T1", "PET"])
def test_ct_mr_and_pet_equal_their_nifti_references(data_dir: Path, patient: str, modality: str) -> None:
    folder = data_dir / "dicom_sarcoma" / patient
    reference = folder / "nifti_reference" / f"{modality}_image.nii.gz"
    assert_same_voxels_at_same_mm(read_dicom(folder / modality), reference)


@pytest.mark.real_data
def test_a_lung_ct_equals_its_nifti_reference(data_dir: Path) -> None:
    folder = data_dir / "dicom_ct_lung_rtstruct"
    assert_same_voxels_at_same_mm(read_dicom(folder), folder / "nifti" / "image" / "phantom.nii.gz")


@pytest.mark.real_data
@pytest.mark.parametrize(
    "name",
    [
        "ge/anatomical/001",
        "siemens/anatomical/001",
        "hitachi/anatomical/001",
        "generic/anatomical/001",
        "generic/anatomical/002_non_isotropic",
        "philips_enhanced/anatomical/001",
        "siemens_multiframe/anatomical/001",
        "hyperfine/anatomical/001",
    ],
)
def test_vendors_files_single_and_multi_frame_equal_their_nifti_references(data_dir: Path, name: str) -> None:
    folder = data_dir / "dicom_zoo" / "dicom2nifti" / name
    assert_same_voxels_at_same_mm(read_dicom(folder), folder.with_name(f"{folder.name}_ground_truth.nii.gz"))


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["enhanced_mr_siemens_xa10", "dcmqi_seg/24x38x3/multiframe"])
def test_multi_frame_files_equal_what_highdicom_reads(data_dir: Path, name: str) -> None:
    highdicom = pytest.importorskip("highdicom")
    for series in find_series(data_dir / "dicom_zoo" / name).series:
        volume = read_series(series)
        other = highdicom.imread(series.files[0]).get_volume()  # (K, J, I), LPS
        to_other = np.linalg.inv(other.affine) @ np.diag([-1, -1, 1, 1]) @ volume.geometry.affine
        shape = volume.geometry.shape
        index = to_other[:3] @ np.vstack([np.indices(shape).reshape(3, -1), np.ones(np.prod(shape))])
        nearest = np.rint(index).astype(int)
        assert np.abs(index - nearest).max() < 1e-3
        np.testing.assert_array_equal(other.array[tuple(nearest)].reshape(shape), volume.array[0])


@pytest.mark.real_data
def test_a_multi_frame_ct_equals_its_single_slices(data_dir: Path) -> None:
    folder = data_dir / "dicom_zoo" / "dcmqi_seg" / "24x38x3"
    many, one = read_dicom(folder / "image"), read_dicom(folder / "multiframe")
    np.testing.assert_array_equal(many.array, one.array)
    assert many.geometry.matches(one.geometry)


@pytest.mark.real_data
def test_a_head_ct_with_tilt_and_uneven_gaps_is_refused_with_both_named(data_dir: Path) -> None:
    series = only(data_dir / "dicom_zoo" / "ct_head_GE_tilt_irregular")
    assert series.tilt_deg == pytest.approx(18.5, abs=0.01)
    assert problem_ids(series) == ["E-DICOM-IRREGULAR"]
    assert "13 × 4.22, 13 × 7.38, 1 × 1.14 mm" in series.problems[0].message
    volume = read_series(series, allow_missing_slices=True)
    np.testing.assert_allclose(volume.geometry.affine[:3, 2], [0, 0, 151.94 / 36], atol=1e-4)
    first = pydicom.dcmread(series.files[0]).pixel_array
    np.testing.assert_array_equal(volume.array[0, :, :, 0], first.T)


@pytest.mark.real_data
def test_a_study_of_many_series_is_told_apart(data_dir: Path) -> None:
    found = find_series(data_dir / "dicom_mr_brain")
    assert sorted(len(one.frames) for one in found.series) == [22, 22, 22, 22, 32, 35, 40]
    assert not any(one.problems or one.notes for one in found.series)
    assert not found.skipped
    assert all(one.tilt_deg < 0.05 for one in found.series)


@pytest.mark.real_data
def test_slices_without_class_and_series_uid_are_a_volume(data_dir: Path) -> None:
    series = only(data_dir / "totalseg_examples" / "example_ct_dicom")
    assert series.geometry.shape == (512, 512, 20)
    assert not series.problems
