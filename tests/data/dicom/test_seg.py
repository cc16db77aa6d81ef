from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataelem import RawDataElement
from pydicom.sr.codedict import codes
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medseg.data.dicom.seg import read_seg, read_segments, segments_of
from medseg.data.volume_io import read_label, write_volume
from medseg.errors import DataError, GeometryError, WorkflowError
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels

COLUMNS, ROWS, SLICES = 9, 7, 5
TURN = np.radians(20)
ROW = np.array([np.cos(TURN), np.sin(TURN), 0])  # direction of a row, LPS
COLUMN = np.array([0, 0, -1.0])  # a turned coronal scan: columns run down the patient
NORMAL = np.cross(ROW, COLUMN)
ORIGIN = np.array([-31.25, 17.5, 204.125])
SPACING = (0.75, 0.5, 2.5)  # of columns, rows, slices
FRAME = generate_uid()
SECRETS = ("Doe^Jane", "PID-4711", "19700131", "ACC-0815")

VOXELS = np.random.default_rng(0).integers(0, 4, (COLUMNS, ROWS, SLICES)).astype(np.uint8)
VOXELS[..., 1] = 0  # a slice without anything, which highdicom leaves out


def grid() -> Geometry:
    """The image's grid, in DICOM's own axis order."""
    direction = np.stack([ROW, COLUMN, NORMAL], axis=1).ravel()
    return Geometry.from_lps((COLUMNS, ROWS, SLICES), origin=ORIGIN, spacing=SPACING, direction=direction)


def ct_slices() -> list[pydicom.Dataset]:
    """Headers of the series that is segmented."""
    study, series, slices = generate_uid(), generate_uid(), []
    for k in range(SLICES):
        item = pydicom.Dataset()
        item.file_meta = pydicom.dataset.FileMetaDataset()
        item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        item.SOPClassUID, item.SOPInstanceUID = CTImageStorage, generate_uid()
        item.StudyInstanceUID, item.SeriesInstanceUID, item.FrameOfReferenceUID = study, series, FRAME
        item.PatientName, item.PatientID, item.PatientBirthDate, item.AccessionNumber = SECRETS
        item.PatientSex, item.StudyID, item.StudyDate, item.StudyTime = "F", "1", "20200101", "120000"
        item.ReferringPhysicianName, item.Modality, item.InstanceNumber = "", "CT", k + 1
        item.Rows, item.Columns = ROWS, COLUMNS
        item.PixelSpacing, item.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        item.ImageOrientationPatient = [*ROW.round(10).tolist(), *COLUMN.tolist()]
        item.ImagePositionPatient = (ORIGIN + k * SPACING[2] * NORMAL).round(6).tolist()
        slices.append(item)
    return slices


def description(number: int, label: str) -> hd.seg.SegmentDescription:
    manual = hd.seg.SegmentAlgorithmTypeValues.MANUAL
    return hd.seg.SegmentDescription(number, label, codes.SCT.Organ, codes.SCT.Liver, manual)


def write_seg(
    path: Path,
    array: np.ndarray,
    kind: str = "BINARY",
    *,
    labels: Sequence[str] = ("Liver", "Left kidney", "Tumour"),
    order: Sequence[int] = (3, 0, 4, 1, 2),
    omit_empty: bool = True,
    largest: int = 255,
) -> Path:
    """A SEG by highdicom of a label map (I, J, K) or of masks (I, J, K, segments), its slices in some order."""
    slices = ct_slices()
    frames = np.moveaxis(np.swapaxes(array, 0, 1), 2, 0)[list(order)]  # (K, rows, columns[, segments])
    hd.seg.Segmentation(
        [slices[k] for k in order],
        frames,
        kind,
        [description(number, label) for number, label in enumerate(labels, 1)],
        generate_uid(),
        1,
        generate_uid(),
        1,
        "maker",
        "model",
        "1",
        "serial",
        omit_empty_frames=omit_empty,
        max_fractional_value=largest,
    ).save_as(path)
    return path


def edit(path: Path, change: Callable[[pydicom.Dataset], None]) -> Path:
    data = pydicom.dcmread(path)
    change(data)
    data.save_as(path)
    return path


def shuffle_frames(data: pydicom.Dataset) -> None:
    """Bring the frames of a file into another order."""
    order = np.random.default_rng(1).permutation(len(data.PerFrameFunctionalGroupsSequence))
    pixels = data.pixel_array[order]
    groups = [data.PerFrameFunctionalGroupsSequence[k] for k in order]
    data.PerFrameFunctionalGroupsSequence = groups
    bits = data.BitsAllocated == 1
    data.PixelData = np.packbits(pixels.ravel(), bitorder="little").tobytes() if bits else pixels.tobytes()
    if len(data.PixelData) % 2:
        data.PixelData += b"\0"


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR", "AIL"])
@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_frames_find_their_voxels_whatever_their_order_and_the_axes_of_the_image(
    tmp_path: Path, kind: str, orientation: str
) -> None:
    path = edit(write_seg(tmp_path / "seg.dcm", VOXELS, kind), shuffle_frames)
    expected = Volume(VOXELS[None], grid()).oriented(orientation)
    read = read_seg(path, expected.geometry, values=None)
    np.testing.assert_array_equal(read.array, expected.array)
    assert read.array.dtype == np.uint8
    assert read.geometry is expected.geometry


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_highdicom_reads_the_same_voxels_at_the_same_place(tmp_path: Path, kind: str) -> None:
    path = write_seg(tmp_path / "seg.dcm", VOXELS, kind)
    volume = hd.seg.segread(path).get_volume(combine_segments=True)
    theirs = Geometry(volume.spatial_shape, np.diag([-1, -1, 1, 1]) @ volume.affine)  # (K, rows, columns), LPS
    np.testing.assert_array_equal(read_seg(path, theirs, values=None).array[0], volume.array)


def test_frames_of_a_tilted_scan_fit_its_sheared_grid(tmp_path: Path) -> None:
    def shear(data: pydicom.Dataset) -> None:
        for item in data.PerFrameFunctionalGroupsSequence:
            position = np.array(item.PlanePositionSequence[0].ImagePositionPatient, float)
            k = (position - ORIGIN) @ NORMAL / SPACING[2]
            item.PlanePositionSequence[0].ImagePositionPatient = (position + 0.8 * k * COLUMN).round(6).tolist()

    path = edit(write_seg(tmp_path / "seg.dcm", VOXELS), shear)
    affine = grid().affine.copy()
    affine[:3, 2] += 0.8 * COLUMN * (-1, -1, 1)
    tilted = Geometry(grid().shape, affine)
    assert not tilted.is_orthogonal
    np.testing.assert_array_equal(read_seg(path, tilted, values=None).array[0], VOXELS)
    with pytest.raises(GeometryError, match=r"E-SEG-GRID .* 9 of 12 frames"):
        read_seg(path, grid(), values=None)


def moved(offset_mm: Sequence[float]) -> Geometry:
    """The image, this far along its own columns, rows and slices."""
    affine = grid().affine.copy()
    affine[:3, 3] += affine[:3, :3] @ (np.asarray(offset_mm) / SPACING)
    return Geometry(grid().shape, affine)


@pytest.mark.parametrize(("offset_mm", "distance"), [((0, 0, 0.6), "0.6"), ((0.3, 0, 0), "0.3"), ((0, -0.2, 0), "0.2")])
def test_a_segmentation_between_the_voxels_is_refused_with_its_distance(
    tmp_path: Path, offset_mm: tuple[float, ...], distance: str
) -> None:
    path = write_seg(tmp_path / "seg.dcm", VOXELS)
    with pytest.raises(GeometryError, match=rf"E-SEG-GRID .*12 of 12 frames .* by {distance} mm"):
        read_seg(path, moved(offset_mm), values=None)


def test_rounding_of_positions_does_no_harm(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "seg.dcm", VOXELS)
    np.testing.assert_array_equal(read_seg(path, moved((0.02, 0.02, 0.02)), values=None).array[0], VOXELS)


def test_pixels_of_another_size_or_turn_are_refused(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "seg.dcm", VOXELS)
    with pytest.raises(
        GeometryError, match=r"E-SEG-GRID .*pixels are 0.75 × 0.5 mm, the voxels 1.688 × 0.875 × 2.5 mm"
    ):
        read_seg(path, grid().resampled((1.5, 1, 2.5)), values=None)
    turn = np.array([[np.cos(0.8), -np.sin(0.8), 0], [np.sin(0.8), np.cos(0.8), 0], [0, 0, 1]])
    affine = grid().affine.copy()
    affine[:3, :3] = affine[:3, :3] @ turn
    with pytest.raises(GeometryError, match="E-SEG-GRID"):
        read_seg(path, Geometry(grid().shape, affine), values=None)


def cropped(part: tuple[slice, slice, slice]) -> Geometry:
    affine = grid().affine.copy()
    affine[:, 3] = affine @ [*(s.start or 0 for s in part), 1]
    return Geometry(tuple(len(range(n)[s]) for n, s in zip(grid().shape, part, strict=True)), affine)


def test_voxels_on_slices_that_the_image_lacks_are_refused(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "seg.dcm", VOXELS)
    part = (slice(None), slice(None), slice(0, 3))
    with pytest.raises(GeometryError, match=r"E-SEG-GRID .*beyond the 3 slices of the image"):
        read_seg(path, cropped(part), values=None)
    empty = VOXELS.copy()
    empty[..., 3:] = 0
    path = write_seg(tmp_path / "seg.dcm", empty, omit_empty=False)  # frames, but nothing on them
    np.testing.assert_array_equal(read_seg(path, cropped(part), values=None).array[0], empty[part])


@pytest.mark.parametrize("orientation", ["RAS", "LPS"])
def test_voxels_beyond_rows_and_columns_are_cut_off_and_told(
    tmp_path: Path, orientation: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_seg(tmp_path / "seg.dcm", VOXELS)
    part = (slice(2, 8), slice(1, 7), slice(None))
    expected = Volume(VOXELS[part][None], cropped(part)).oriented(orientation)
    np.testing.assert_array_equal(read_seg(path, expected.geometry, values=None).array, expected.array)
    total, within = np.count_nonzero(VOXELS), np.count_nonzero(VOXELS[part])
    assert f"W-SEG-OUTSIDE {path}: {total - within} of {total} voxels" in caplog.text


def test_a_segmentation_wholly_beside_the_image_is_refused(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "seg.dcm", VOXELS)
    with pytest.raises(GeometryError, match=r"E-SEG-GRID .*all \d+ voxels lie beyond"):
        read_seg(path, moved((20 * SPACING[0], 0, 0)), values=None)


def test_label_values_come_by_name_whatever_case_and_punctuation(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "seg.dcm", VOXELS)
    read = read_seg(path, grid(), values={"background": 0, "LIVER": 5, "left_kidney": 300, "tumour": 0, "spleen": 2})
    np.testing.assert_array_equal(read.array[0], np.array([0, 5, 300, 0])[VOXELS])
    assert read.array.dtype == np.int16


def test_segments_without_a_value_are_named_with_what_was_meant(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "seg.dcm", VOXELS, labels=("Liver", "Left kidny", "Cyst"))
    with pytest.raises(DataError, match=r"E-SEG-LABELS .*2 of 3 structures") as caught:
        read_seg(path, grid(), values={"liver": 1, "left kidney": 2})
    assert "'Left kidny'; did you mean 'left kidney'?" in str(caught.value)
    assert "'Cyst'; known: left kidney, liver" in str(caught.value)


OVERLAPPING = np.zeros((COLUMNS, ROWS, SLICES, 2), np.uint8)
OVERLAPPING[1:8, 1:6, 1:4, 0] = 1
OVERLAPPING[3:9, 2:4, 2:5, 1] = 1  # 5 × 2 × 2 voxels in both


def test_overlapping_segments_are_refused_with_counts_unless_an_order_is_given(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "seg.dcm", OVERLAPPING, labels=("Liver", "Tumour"))
    with pytest.raises(DataError, match=r"E-SEG-OVERLAP (?s:.*)'Liver' and 'Tumour': 20 voxels"):
        read_seg(path, grid(), values=None)
    with pytest.raises(DataError, match="E-SEG-OVERLAP"):
        read_seg(path, grid(), values=None, paint_order=(1,))
    liver, tumour = OVERLAPPING[..., 0], OVERLAPPING[..., 1]
    on_top = read_seg(path, grid(), values=None, paint_order=(1, 2)).array[0]
    np.testing.assert_array_equal(on_top, np.where(tumour, 2, liver))
    below = read_seg(path, grid(), values=None, paint_order=(2, 1)).array[0]
    np.testing.assert_array_equal(below, np.where(liver, 1, 2 * tumour))
    same = read_seg(path, grid(), values={"liver": 1, "tumour": 1}).array[0]
    np.testing.assert_array_equal(same, liver | tumour)


def test_overlapping_segments_come_as_masks_and_those_of_one_name_are_united(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "seg.dcm", OVERLAPPING, labels=("Liver", "Tumour"))
    masks = read_segments(path, grid())
    assert list(masks) == ["Liver", "Tumour"]
    for channel, mask in enumerate(masks.values()):
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, OVERLAPPING[..., channel] > 0)
    path = write_seg(tmp_path / "seg.dcm", OVERLAPPING, labels=("Lesion", "Lesion"))
    np.testing.assert_array_equal(read_segments(path, grid())["Lesion"], OVERLAPPING.any(axis=-1))


def test_a_fractional_segment_counts_from_the_threshold_on(tmp_path: Path) -> None:
    shares = np.random.default_rng(2).random((COLUMNS, ROWS, SLICES, 2)) * 0.5
    shares = shares.clip(0, 126 / 255)
    shares[0, 0, 0] = 128 / 255, 0  # stored exactly
    path = write_seg(tmp_path / "seg.dcm", shares, "FRACTIONAL", labels=("Liver", "Tumour"))
    stored = hd.seg.segread(path).get_volume(rescale_fractional=True).array  # (K, rows, columns, segments)
    masks = read_segments(path, grid(), threshold=0.3)
    expected = np.swapaxes(np.moveaxis(stored >= 0.3, 0, 2), 0, 1)
    slices_up = hd.seg.segread(path).get_volume_geometry().direction[:, 0] @ NORMAL > 0
    expected = expected if slices_up else expected[:, :, ::-1]
    for channel, mask in enumerate(masks.values()):
        np.testing.assert_array_equal(mask, expected[..., channel])
    assert np.argwhere(read_seg(path, grid(), values=None).array).tolist() == [[0, 0, 0, 0]]
    with pytest.raises(WorkflowError, match=r"E-ARGUMENT .*threshold 0"):
        read_seg(path, grid(), values=None, threshold=0)


@pytest.mark.parametrize("largest", [255, 100, 2, 1])
def test_half_a_voxel_counts_whatever_fractions_are_stored_in(tmp_path: Path, largest: int) -> None:
    whole, half = np.zeros(VOXELS.shape), np.zeros(VOXELS.shape)
    whole[2, 2, 2], half[3, 3, 3] = 1, 0.5 if largest > 1 else 1
    path = write_seg(tmp_path / "seg.dcm", whole + half, "FRACTIONAL", labels=("Liver",), largest=largest)
    np.testing.assert_array_equal(read_seg(path, grid(), values=None).array[0], (whole + half) > 0)
    above = read_seg(path, grid(), values=None, threshold=0.51).array[0]
    np.testing.assert_array_equal(above, whole + half * (largest == 1))
    full = read_seg(path, grid(), values=None, threshold=1).array[0]
    np.testing.assert_array_equal(full, whole + half * (largest == 1))


def test_a_data_set_can_set_the_threshold(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "seg.dcm", (VOXELS == 1) * 0.4, "FRACTIONAL", labels=("Liver",))
    write_volume(tmp_path / "scan.nii.gz", Volume(np.zeros((1, *VOXELS.shape), np.int16), grid()))
    manifest = {"labels": {"0": "background", "1": "liver"}}
    for threshold, expected in [({}, 0), ({"seg_threshold": 0.3}, VOXELS == 1)]:
        labels = Labels.from_dict(manifest | threshold)
        read = read_label(path, image=tmp_path / "scan.nii.gz", labels=labels)
        np.testing.assert_array_equal(read.array[0], np.broadcast_to(expected, VOXELS.shape))


def test_segments_are_listed_with_their_frames(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "seg.dcm", OVERLAPPING, labels=("Liver", "Tumour"))
    assert [(s.number, s.label, s.num_frames) for s in segments_of(path)] == [(1, "Liver", 3), (2, "Tumour", 3)]
    path = write_seg(tmp_path / "seg.dcm", VOXELS, "LABELMAP")  # highdicom adds a background segment
    assert [(s.number, s.num_frames) for s in segments_of(path)] == [(1, 4), (2, 4), (3, 4)]


def test_an_empty_segmentation_is_all_background(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_seg(tmp_path / "seg.dcm", np.zeros_like(VOXELS), omit_empty=False)
    assert not read_seg(path, grid(), values=None).array.any()

    def without_frames(data: pydicom.Dataset) -> None:
        data.NumberOfFrames = 0
        del data.PixelData, data.PerFrameFunctionalGroupsSequence

    edit(path, without_frames)
    read = read_seg(path, grid(), values={"liver": 1, "left kidney": 2, "tumour": 3})
    assert read.array.shape == (1, *grid().shape)
    assert not read.array.any()
    assert caplog.text.count("W-SEG-EMPTY") == 2


def test_another_frame_of_reference_is_refused(tmp_path: Path) -> None:
    path = write_seg(tmp_path / "seg.dcm", VOXELS)
    read_seg(path, grid(), values=None, frame_of_reference_uid=FRAME)
    with pytest.raises(GeometryError, match="E-SEG-FRAME"):
        read_seg(path, grid(), values=None, frame_of_reference_uid=generate_uid())
    with pytest.raises(GeometryError, match="E-SEG-FRAME"):
        read_segments(path, grid(), frame_of_reference_uid=generate_uid())


def lose_half(data: pydicom.Dataset) -> None:
    data.PixelData = data.PixelData[: len(data.PixelData) // 4 * 2]


def lose_position(data: pydicom.Dataset) -> None:
    del data.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence


def nan_position(data: pydicom.Dataset) -> None:
    position = data.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
    position["ImagePositionPatient"] = RawDataElement(
        Tag("ImagePositionPatient"), "DS", 8, b"nan\\0\\0 ", 0, False, True
    )


def lose_segment(data: pydicom.Dataset) -> None:
    del data.SegmentSequence[-1]


def become_ct(data: pydicom.Dataset) -> None:
    data.SOPClassUID = CTImageStorage


def lose_a_place(data: pydicom.Dataset) -> None:
    del data.PerFrameFunctionalGroupsSequence[-1]


def lose_all_places(data: pydicom.Dataset) -> None:
    """As a tiled image of a microscope, whose frames lie in the order of the tiles."""
    data.DimensionOrganizationType = "TILED_FULL"
    del data.PerFrameFunctionalGroupsSequence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_half, r"E-SEG-TRUNCATED .*expected \d+: copy"),
        (lose_position, "E-SEG-FILE .*frame 3 lacks position"),
        (nan_position, "E-SEG-FILE .*frame 1 lacks position"),
        (lose_segment, "E-SEG-FILE .*names no segment that is described"),
        (become_ct, "E-SEG-FILE .*is no SEG"),
        (lose_a_place, "E-SEG-FILE .*12 frames, but places for 11"),
        (lose_all_places, "E-SEG-FILE .*12 frames, but places for 0"),
    ],
)
def test_broken_files_are_refused_without_telling_who_it_is(
    tmp_path: Path, change: Callable[[pydicom.Dataset], None], message: str
) -> None:
    path = edit(write_seg(tmp_path / "seg.dcm", VOXELS), change)
    with pytest.raises(DataError, match=message) as caught:
        read_seg(path, grid(), values=None)
    assert str(path) in str(caught.value)
    assert not any(secret in str(caught.value) for secret in SECRETS)


def test_a_labelmap_with_values_that_nothing_describes_is_refused(tmp_path: Path) -> None:
    path = edit(write_seg(tmp_path / "seg.dcm", VOXELS, "LABELMAP"), lose_segment)
    with pytest.raises(DataError, match=r"E-SEG-VALUES .*the value 3; described are \[1, 2\]"):
        read_seg(path, grid(), values=None)


def test_what_is_no_dicom_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"E-SEG-FILE .*cannot be read as DICOM"):
        read_seg(tmp_path / "a.dcm", grid(), values=None)
    with pytest.raises(DataError, match="E-SEG-FILE"):
        segments_of(tmp_path / "absent.dcm")


def test_messages_name_the_case_where_one_is_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_seg(tmp_path / "seg.dcm", np.zeros_like(VOXELS), omit_empty=False)
    with caplog.at_level(logging.WARNING, logger="medseg"):
        read_seg(path, grid(), values=None, where="case liver_012")
    assert "W-SEG-EMPTY case liver_012:" in caplog.text


BINARY = ("23x38x3/seg/label.seg", "24x38x3/seg/label.seg", "liver.dcm", "partial_overlaps.dcm")
LABELMAPS = ("sparse-labelmap-noppv.dcm", "sparse-labelmap-ppv5.dcm")
HIGHDICOM = ("binary", "binary_fractional", "binary_overlap", "binary_single_frame", "true_fractional")


@pytest.mark.real_data
@pytest.mark.parametrize(
    "name",
    [f"dcmqi_seg/{n}" for n in (*BINARY, *LABELMAPS)]
    + [f"highdicom_seg/seg_image_ct_{n}.dcm" for n in HIGHDICOM]
    + ["dcmqi_sr/seg.dcm"],
)
@pytest.mark.parametrize("orientation", ["RAS", "LPI"])
def test_real_segmentations_equal_what_highdicom_reads(data_dir: Path, name: str, orientation: str) -> None:
    path = data_dir / "dicom_zoo" / name
    seg = hd.seg.segread(path)
    volume = seg.get_volume()
    theirs = Geometry(volume.spatial_shape, np.diag([-1, -1, 1, 1]) @ volume.affine)
    masks = read_segments(path, theirs.oriented(orientation), frame_of_reference_uid=seg.FrameOfReferenceUID)
    numbers = [number for number in seg.segment_numbers if number != 0]
    assert len(masks) == len(numbers)
    for number, mask in zip(numbers, masks.values(), strict=True):
        expected = volume.array[None, ..., seg.segment_numbers.index(number)] > 0.5
        assert expected.any()
        np.testing.assert_array_equal(mask[None], Volume(expected, theirs).oriented(orientation).array)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("seg", "nrrd"),
    [
        ("23x38x3/seg/label.seg", "23x38x3/nrrd/label.nrrd"),
        ("24x38x3/seg/label.seg", "24x38x3/nrrd/label.nrrd"),
        ("liver.dcm", "liver_seg.nrrd"),
        ("sparse-labelmap-noppv.dcm", "sparse_labelmap_noppv_seg.nrrd"),
        ("sparse-labelmap-ppv5.dcm", "sparse_labelmap_ppv5_seg.nrrd"),
    ],
)
def test_real_segmentations_equal_the_nrrd_files_beside_them(data_dir: Path, seg: str, nrrd: str) -> None:
    folder = data_dir / "dicom_zoo" / "dcmqi_seg"
    image = sitk.ReadImage(str(folder / nrrd))
    of_nrrd = Geometry.from_lps(
        image.GetSize(), origin=image.GetOrigin(), spacing=image.GetSpacing(), direction=image.GetDirection()
    )
    expected = sitk.GetArrayFromImage(image).transpose()
    expected[expected == 5] = 0  # the padding value: a plane without a frame
    np.testing.assert_array_equal(read_seg(folder / seg, of_nrrd, values=None).array[0], expected)


@pytest.mark.real_data
def test_real_overlapping_segments_equal_the_nrrd_files_that_hold_them_apart(data_dir: Path) -> None:
    folder = data_dir / "dicom_zoo" / "dcmqi_seg"
    files = [sitk.ReadImage(str(folder / f"partial_overlaps-{n}.nrrd")) for n in (1, 2, 3)]
    first = files[0]
    on = Geometry.from_lps(
        first.GetSize(), origin=first.GetOrigin(), spacing=first.GetSpacing(), direction=first.GetDirection()
    )
    masks = list(read_segments(folder / "partial_overlaps.dcm", on).values())
    for image in files:
        array = sitk.GetArrayFromImage(image).transpose()
        for value in np.unique(array[array > 0]):
            np.testing.assert_array_equal(masks[value - 1], array == value)
    with pytest.raises(DataError, match=r"'GREEN' and 'ORANGE': 3,017 voxels"):
        read_seg(folder / "partial_overlaps.dcm", on, values=None)


@pytest.mark.real_data
def test_a_segmentation_without_a_place_in_the_patient_is_refused(data_dir: Path) -> None:
    path = data_dir / "dicom_zoo" / "highdicom_seg" / "seg_image_cr_binary.dcm"
    with pytest.raises(DataError, match=r"E-SEG-FILE .*frame 1 lacks position"):
        read_seg(path, Geometry.from_spacing((16, 16, 1), (1, 1, 1)), values=None)
    assert [segment.label for segment in segments_of(path)] == ["first segment"]


@pytest.mark.real_data
@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_a_segmentation_of_a_real_series_lands_on_its_nifti(data_dir: Path, tmp_path: Path, kind: str) -> None:
    files = sorted((data_dir / "dicom_ct_liver" / "DICOM_anon").glob("*.dcm"))[20:30]  # by name: downward
    slices = [pydicom.dcmread(path) for path in files]
    mask = np.zeros((len(slices), 512, 512), np.uint8)
    mask[2:9, 100:200, 150:400] = 1
    mask[4:6, 120:140, 200:220] = 2
    labels = [description(1, "Liver"), description(2, "Tumour")]
    uids = (generate_uid(), 1, generate_uid(), 1)
    seg = hd.seg.Segmentation(slices, mask, kind, labels, *uids, "maker", "model", "1", "serial")
    seg.save_as(tmp_path / "seg.dcm")

    affine = np.eye(4)  # of the slices as sorted by name, by hand: LPS columns, then to RAS
    row, column = np.reshape(np.array(slices[0].ImageOrientationPatient, float), (2, 3))
    first, last = (np.array(slices[k].ImagePositionPatient, float) for k in (0, -1))
    affine[:3, 0] = row * float(slices[0].PixelSpacing[1])
    affine[:3, 1] = column * float(slices[0].PixelSpacing[0])
    affine[:3, 2] = (last - first) / (len(slices) - 1)
    affine[:3, 3] = first
    affine = np.diag([-1, -1, 1, 1]) @ affine
    expected = nib.as_closest_canonical(nib.Nifti1Image(mask.transpose(), affine))  # RAS+
    upward = Geometry(expected.shape, expected.affine)
    read = read_seg(tmp_path / "seg.dcm", upward, values={"liver": 1, "tumour": 2})
    np.testing.assert_array_equal(read.array[0], np.asarray(expected.dataobj))
