from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as MatplotlibPath
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian, generate_uid

from medseg.data.dicom.rtstruct import read_rois, read_rtstruct, rois_of
from medseg.data.volume_io import read_label, write_volume
from medseg.errors import DataError, GeometryError
from medseg.geometry import Geometry, Volume

SHAPE = (20, 16, 6)
FRAME = generate_uid()
SOP_UIDS = tuple(generate_uid() for _ in range(SHAPE[2]))
SECRETS = ("Doe^Jane", "PID-4711", "19700131")


def grid(*, shear: float = 0) -> Geometry:
    """An oblique grid; sheared, as by a tilted gantry, where asked for."""
    a, b = np.radians(15), np.radians(25)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.8, -0.9, 2.5])
    affine[:3, 2] += shear * affine[:3, 1]
    affine[:3, 3] = (35.5, 80.25, -333.125)
    return Geometry(SHAPE, affine)


@dataclass
class Drawn:
    """A contour to write: corners (N, 2) in voxels, on a slice that may be a fraction."""

    corners: object
    k: float
    names: str | None = None  # SOP instance UID
    kind: str = "CLOSED_PLANAR"

    def points_lps(self, on: Geometry) -> np.ndarray:
        corners = np.asarray(self.corners, float)
        index = np.column_stack([corners, np.full(len(corners), self.k)]) if corners.shape[1] == 2 else corners
        return (index @ on.affine[:3, :3].T + on.affine[:3, 3]) * (-1, -1, 1)


@dataclass
class Structure:
    name: str
    contours: Sequence[Drawn] = field(default_factory=list)
    frame: str = FRAME


def decimals(numbers: np.ndarray) -> RawDataElement:
    """Contour Data with more digits than the standard allows, as common exporters write it."""
    text = "\\".join(repr(float(x)) for x in numbers.ravel()).encode()
    text += b" " * (len(text) % 2)
    return RawDataElement(Tag("ContourData"), "DS", len(text), text, 0, True, True)


def write(path: Path, *structures: Structure, on: Geometry | None = None) -> Path:
    """An RTSTRUCT whose ROI numbers are 1, 2, …"""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.Modality = "RTSTRUCT"
    data.PatientName, data.PatientID, data.PatientBirthDate = SECRETS
    data.StructureSetROISequence, data.ROIContourSequence = [], []
    for number, structure in enumerate(structures, 1):
        roi, drawing = pydicom.Dataset(), pydicom.Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, structure.name, structure.frame
        drawing.ReferencedROINumber, drawing.ContourSequence = number, []
        for contour in structure.contours:
            item, points = pydicom.Dataset(), contour.points_lps(on or grid())
            item.ContourGeometricType, item.NumberOfContourPoints = contour.kind, len(points)
            item["ContourData"] = decimals(points)
            if contour.names:
                image = pydicom.Dataset()
                image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = CTImageStorage, contour.names
                item.ContourImageSequence = [image]
            drawing.ContourSequence.append(item)
        data.StructureSetROISequence.append(roi)
        data.ROIContourSequence.append(drawing)
    data.save_as(path, enforce_file_format=True)
    return path


def read(
    path: Path,
    values: dict[str, int] | None = None,
    *,
    paint_order: Sequence[int] = (),
    on: Geometry | None = None,
    frame: str | None = FRAME,
    where: str | None = None,
) -> np.ndarray:
    volume = read_rtstruct(
        path,
        on or grid(),
        sop_uids=SOP_UIDS,
        frame_of_reference_uid=frame,
        values=values,
        paint_order=paint_order,
        where=where,
    )
    assert volume.geometry is on or volume.geometry.matches(grid())
    assert volume.array.shape == (1, *SHAPE)
    return volume.array[0]


def edit(path: Path, change: Callable[[pydicom.Dataset], None]) -> Path:
    data = pydicom.dcmread(path)
    change(data)
    data.save_as(path)
    return path


def box(low: tuple[int, int], high: tuple[int, int]) -> np.ndarray:
    """Around voxels low … high, both included."""
    (i0, j0), (i1, j1) = np.array(low) - 0.5, np.array(high) + 0.5
    return np.array([(i0, j0), (i1, j0), (i1, j1), (i0, j1)])


BOX = box((3, 4), (14, 12))
VOXELS_OF_BOX = (slice(3, 15), slice(4, 13))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("shear", [0, 0.6])
def test_outlines_on_an_oblique_image_fill_the_centres_within(tmp_path: Path, named: bool, shear: float) -> None:
    rng = np.random.default_rng(0)
    expected, contours = np.zeros(SHAPE, bool), []
    centres = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE[:2]], indexing="ij"), axis=-1).reshape(-1, 2)
    for k in (4, 0, 2):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 25))
        corners = (9.3, 7.6) + rng.uniform(3, 9, (25, 1)) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        expected[:, :, k] = MatplotlibPath(corners).contains_points(centres).reshape(SHAPE[:2])
        contours.append(Drawn(corners, k, SOP_UIDS[k] if named else None))
    path = write(tmp_path / "rs.dcm", Structure("GTV", contours), on=grid(shear=shear))
    array = read(path, on=grid(shear=shear))
    np.testing.assert_array_equal(array, expected)
    assert array.dtype == np.uint8


def test_contours_that_name_other_images_are_placed_where_they_lie_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = generate_uid()  # of the series before it was cropped
    drawn = [Drawn(BOX, 1, other), Drawn(BOX, 2.05, other), Drawn(BOX, 3, SOP_UIDS[3])]
    array = read(write(tmp_path / "rs.dcm", Structure("GTV", drawn)))
    np.testing.assert_array_equal(np.flatnonzero(array.any(axis=(0, 1))), [1, 2, 3])
    assert "W-RTSTRUCT-GEOMETRY" in caplog.text
    assert "2 of 3 contours name other images than the slices they lie on" in caplog.text


def test_contours_that_name_nothing_or_a_slice_that_was_missing_are_no_cause_for_alarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX, 1), Drawn(BOX, 2)])))
    path = write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX, 1, SOP_UIDS[1]), Drawn(BOX, 2, SOP_UIDS[2])]))
    uids = (SOP_UIDS[0], "", *SOP_UIDS[2:])
    read_rtstruct(path, grid(), sop_uids=uids, frame_of_reference_uid=FRAME, values=None)
    assert not caplog.text


def test_on_a_file_contours_lie_where_they_are_and_a_word_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_volume(tmp_path / "scan.nii.gz", Volume(np.zeros((1, *SHAPE), np.int16), grid()))

    def read_on_file(path: Path) -> np.ndarray:
        return read_label(path, image=tmp_path / "scan.nii.gz").array[0]

    path = write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX, k, SOP_UIDS[k]) for k in (1, 2)]))
    np.testing.assert_array_equal(read_on_file(path), read(path))
    assert caplog.text.count("W-RTSTRUCT-GEOMETRY") == 1
    assert "the image is a file" in caplog.text
    with pytest.raises(GeometryError, match=r"E-RTSTRUCT-REFERENCE .*0 lie on one"):
        read_on_file(write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX, 1.5, SOP_UIDS[1])])))


def test_a_slice_without_a_uid_is_found_by_place(tmp_path: Path) -> None:
    path = write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX, 1, SOP_UIDS[1]), Drawn(BOX, 2, SOP_UIDS[2])]))
    uids = ("", "", *SOP_UIDS[2:])  # slices that were missing and filled in
    volume = read_rtstruct(path, grid(), sop_uids=uids, frame_of_reference_uid=FRAME, values=None)
    assert np.flatnonzero(volume.array[0].any(axis=(0, 1))).tolist() == [1, 2]


def test_contours_between_the_slices_are_refused_with_counts_and_distance(tmp_path: Path) -> None:
    drawn = [Drawn(BOX, 1), Drawn(BOX, 2.5), Drawn(BOX, 3.3), Drawn(BOX, 4, SOP_UIDS[4])]
    path = write(tmp_path / "rs.dcm", Structure("GTV", drawn))
    with pytest.raises(GeometryError, match="E-RTSTRUCT-REFERENCE") as caught:
        read(path)
    assert "1 of 4 contours name a slice of the image, 2 lie on one, 2 are up to 1.25 mm off" in str(caught.value)
    assert "slices are 2.5 mm apart" in str(caught.value)


def test_distances_on_a_sheared_grid_are_across_the_slices(tmp_path: Path) -> None:
    sheared = grid(shear=1.5)
    path = write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX, 2.4)]), on=sheared)
    with pytest.raises(GeometryError, match=r"up to 1 mm off \(slices are 2.5 mm apart"):
        read(path, on=sheared)


@pytest.mark.parametrize("k", [-1, 6, 40])
def test_contours_beyond_the_last_slice_are_refused(tmp_path: Path, k: int) -> None:
    path = write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX, 1), Drawn(BOX, k)]))
    with pytest.raises(GeometryError, match=r"E-RTSTRUCT-REFERENCE .*1 lie on one, 1 are up to"):
        read(path)


def test_contours_across_the_slices_are_refused(tmp_path: Path) -> None:
    coronal = [(3, 8, 0), (14, 8, 0), (14, 8, 4), (3, 8, 4)]
    with pytest.raises(GeometryError, match=r"E-RTSTRUCT-REFERENCE .*0 lie on one"):
        read(write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(coronal, 0)])))


def test_a_named_slice_counts_more_than_a_rounded_position_but_not_more_than_the_place(tmp_path: Path) -> None:
    path = write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX, 2.4, SOP_UIDS[2])]))
    assert np.flatnonzero(read(path).any(axis=(0, 1))).tolist() == [2]
    path = write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX, 4, SOP_UIDS[2])]))
    with pytest.raises(GeometryError, match=r"1 of 1 contours name a slice .*0 lie on one, 1 are up to 5 mm off"):
        read(path)


def test_without_slice_and_frame_of_reference_a_place_means_nothing(tmp_path: Path) -> None:
    foreign = generate_uid()
    path = write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX, 1), Drawn(BOX, 2, SOP_UIDS[2])], foreign))
    with pytest.raises(GeometryError, match=r"E-RTSTRUCT-REFERENCE .*another frame of reference") as caught:
        read(path)
    assert foreign in str(caught.value)
    assert FRAME in str(caught.value)
    with pytest.raises(GeometryError, match="another frame of reference"):
        read(path, frame=None)
    path = write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX, 2, SOP_UIDS[2])], foreign))  # its slice is known
    assert read(path).any()


def hole_drawn_apart() -> list[Drawn]:
    return [Drawn(BOX, 2), Drawn(box((6, 6), (9, 9)), 2)]


def keyhole() -> list[Drawn]:
    (i0, j0), (i1, j1), (i2, j2), (i3, j3) = box((6, 6), (9, 9))
    bridge = (2.5, 7.0)
    inner = [(i0, 7.0), (i3, j3), (i2, j2), (i1, j1), (i0, j0), (i0, 7.0)]
    return [Drawn([*BOX, bridge, *inner, bridge], 2)]


@pytest.mark.parametrize("drawn", [hole_drawn_apart, keyhole])
def test_holes_stay_open(tmp_path: Path, drawn: Callable[[], list[Drawn]]) -> None:
    expected = np.zeros(SHAPE, bool)
    expected[(*VOXELS_OF_BOX, 2)] = True
    expected[6:10, 6:10, 2] = False
    np.testing.assert_array_equal(read(write(tmp_path / "rs.dcm", Structure("GTV", drawn()))), expected)


def test_points_and_open_lines_are_skipped_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = [Drawn([(5, 5)], 3, kind="POINT"), Drawn(BOX, 3, kind="OPEN_PLANAR"), Drawn([(5, 5), (9, 5)], 3)]
    path = write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX, 2), *odd]))
    array = read(path)
    assert np.flatnonzero(array.any(axis=(0, 1))).tolist() == [2]
    assert "W-RTSTRUCT-OPEN" in caplog.text
    assert "3 contours are points or lines" in caplog.text
    assert [(roi.number, roi.name, roi.num_contours) for roi in rois_of(path)] == [(1, "GTV", 2)]


def test_contours_that_reach_beyond_the_image_are_cut_off_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = [Drawn(box((-5, 4), (6, 30)), 1), Drawn(BOX, 2), Drawn(BOX - 100, 3)]
    array = read(write(tmp_path / "rs.dcm", Structure("GTV", drawn)))
    expected = np.zeros(SHAPE, bool)
    expected[:7, 4:, 1] = True
    expected[(*VOXELS_OF_BOX, 2)] = True
    np.testing.assert_array_equal(array, expected)
    assert "W-RTSTRUCT-OUTSIDE" in caplog.text
    assert "2 of 3 contours reach beyond the image's rows and columns (1 wholly)" in caplog.text


def test_contours_wholly_beside_the_image_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rs.dcm", Structure("GTV", [Drawn(BOX - 100, 1), Drawn(BOX + 50, 2)]))
    with pytest.raises(GeometryError, match=r"E-RTSTRUCT-REFERENCE .*all 2 contours lie beyond"):
        read(path)


@pytest.mark.parametrize("again", [BOX, np.roll(BOX, 1, axis=0), BOX[::-1], np.vstack([BOX, BOX[:1]]), BOX + 0.01])
def test_a_contour_drawn_twice_is_used_once(
    tmp_path: Path, again: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = [Drawn(BOX, 2, SOP_UIDS[2]), Drawn(again, 2, SOP_UIDS[2])]
    array = read(write(tmp_path / "rs.dcm", Structure("GTV", drawn)))
    assert array[(*VOXELS_OF_BOX, 2)].all()
    assert "W-RTSTRUCT-REPEATED" in caplog.text
    assert "1 contours are drawn twice" in caplog.text


def test_a_wall_between_voxels_is_a_ring_and_no_contour_drawn_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = BOX + np.array([(0.3, 0.3), (-0.3, 0.3), (-0.3, -0.3), (0.3, -0.3)])
    array = read(write(tmp_path / "rs.dcm", Structure("Wall", [Drawn(BOX, 2), Drawn(inner, 2), Drawn(BOX, 3)])))
    assert np.flatnonzero(array.any(axis=(0, 1))).tolist() == [3]
    assert "REPEATED" not in caplog.text


def test_slices_between_contoured_ones_are_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    far = box((17, 0), (18, 1))  # beside the box: another lesion
    liver, cord = [Drawn(BOX, k) for k in (1, 3, 5)], [Drawn(far, k) for k in (0, 1, 5)]
    path = write(tmp_path / "rs.dcm", Structure("Liver", liver), Structure("Cord", cord))
    assert np.flatnonzero((read(path) == 1).any(axis=(0, 1))).tolist() == [1, 3, 5]
    assert "W-RTSTRUCT-GAPS" in caplog.text
    assert "2 of 'Liver', 3 of 'Cord'" in caplog.text


def test_lesions_apart_and_contours_on_every_slice_have_no_gaps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far = box((17, 0), (18, 1))
    read(write(tmp_path / "rs.dcm", Structure("Lesions", [Drawn(BOX, 0), Drawn(BOX, 1), Drawn(far, 4), Drawn(far, 5)])))
    assert not caplog.text


def test_crossing_contours_of_one_roi_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drawn = [Drawn(box((2, 2), (6, 6)), 2, SOP_UIDS[2]), Drawn(box((5, 4), (9, 9)), 2, SOP_UIDS[2])]
    array = read(write(tmp_path / "rs.dcm", Structure("GTV", drawn)))
    assert array.sum() == 25 + 30 - 2 * 6
    assert "W-RTSTRUCT-CROSSING" in caplog.text
    assert "6 voxels lie in two contours" in caplog.text


def two_rois() -> list[Structure]:
    return [
        Structure("Liver", [Drawn(BOX, 2, SOP_UIDS[2]), Drawn(BOX, 3, SOP_UIDS[3])]),
        Structure("GTV-1", [Drawn(box((12, 10), (17, 14)), 3, SOP_UIDS[3])]),  # 3 × 3 voxels in both
    ]


def test_overlapping_rois_are_refused_with_counts_unless_an_order_is_given(tmp_path: Path) -> None:
    path = write(tmp_path / "rs.dcm", *two_rois())
    with pytest.raises(DataError, match=r"E-RTSTRUCT-OVERLAP (?s:.*)'Liver' and 'GTV-1': 9 voxels"):
        read(path)
    liver, tumour = np.zeros((2, *SHAPE), int)
    liver[(*VOXELS_OF_BOX, slice(2, 4))] = 1
    tumour[12:18, 10:15, 3] = 1
    np.testing.assert_array_equal(read(path, paint_order=(1, 2)), np.where(tumour, 2, liver))
    np.testing.assert_array_equal(
        read(path, {"gtv 1": 1, "liver": 7}, paint_order=(1, 7)), np.where(liver, 7 * liver, tumour)
    )
    masks = read_rois(path, grid(), sop_uids=SOP_UIDS, frame_of_reference_uid=FRAME)
    assert list(masks) == ["Liver", "GTV-1"]
    np.testing.assert_array_equal(masks["Liver"], liver)
    np.testing.assert_array_equal(masks["GTV-1"], tumour)


def test_rois_without_a_value_are_named_with_what_was_meant(tmp_path: Path) -> None:
    path = write(tmp_path / "rs.dcm", *two_rois(), Structure("Couch"))
    with pytest.raises(DataError, match=r"E-RTSTRUCT-LABELS .*2 of 3 structures") as caught:
        read(path, {"livers": 1, "GTV 1": 2})
    assert "'Liver'; did you mean 'livers'?" in str(caught.value)
    assert "'Couch'" in str(caught.value)


def test_an_roi_of_value_0_is_left_out_whatever_it_holds(tmp_path: Path) -> None:
    couch = Structure("Couch", [Drawn(BOX, 2.5), Drawn(BOX - 100, 1)], generate_uid())
    path = write(tmp_path / "rs.dcm", *two_rois()[:1], couch)
    assert np.unique(read(path, {"liver": 3, "couch": 0})).tolist() == [0, 3]


def test_an_roi_without_voxels_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    speck = [Drawn(np.array([(3.1, 3.1), (3.3, 3.1), (3.3, 3.3)]), 1, SOP_UIDS[1])]
    path = write(tmp_path / "rs.dcm", Structure("Liver"), Structure("Speck", speck))
    assert not read(path).any()
    assert "W-RTSTRUCT-EMPTY" in caplog.text
    assert "'Liver' (0 contours), 'Speck' (1 contours)" in caplog.text


def first_contour(data: pydicom.Dataset) -> pydicom.Dataset:
    return data.ROIContourSequence[0].ContourSequence[0]


def lose_a_number(data: pydicom.Dataset) -> None:
    first_contour(data).ContourData = first_contour(data).ContourData[:-1]


def lose_a_point(data: pydicom.Dataset) -> None:
    first_contour(data).ContourData = first_contour(data).ContourData[:-3]


def write_words(data: pydicom.Dataset) -> None:
    first_contour(data)["ContourData"] = RawDataElement(Tag("ContourData"), "DS", 12, b"one\\two\\nine", 0, True, True)


def write_nan(data: pydicom.Dataset) -> None:
    text = b"\\".join([b"nan"] * 12) + b" "
    first_contour(data)["ContourData"] = RawDataElement(Tag("ContourData"), "DS", len(text), text, 0, True, True)


def become_ct(data: pydicom.Dataset) -> None:
    data.SOPClassUID, data.Modality = CTImageStorage, "CT"


def lose_rois(data: pydicom.Dataset) -> None:
    data.StructureSetROISequence = []


def lose_contours(data: pydicom.Dataset) -> None:
    del data.ROIContourSequence


def lose_number(data: pydicom.Dataset) -> None:
    del data.StructureSetROISequence[0].ROINumber


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_a_number, r"E-RTSTRUCT-CONTOUR .* ROI 'Liver' contour 1: 11 numbers for 4 points"),
        (lose_a_point, r"E-RTSTRUCT-CONTOUR .*9 numbers for 4 points"),
        (write_words, r"E-RTSTRUCT-CONTOUR .*points that are no numbers"),
        (write_nan, r"E-RTSTRUCT-CONTOUR .*expected three finite ones"),
        (become_ct, r"E-RTSTRUCT-FILE .*is no RTSTRUCT \(its modality is CT\)"),
        (lose_rois, r"E-RTSTRUCT-FILE .*no list of ROIs"),
        (lose_contours, r"E-RTSTRUCT-FILE .*no list of ROIs or of contours"),
        (lose_number, r"E-RTSTRUCT-FILE .*an ROI has no number"),
    ],
)
@pytest.mark.filterwarnings("ignore:The value length:UserWarning")  # pydicom, where these tests decode long decimals
def test_broken_files_are_refused_without_telling_who_it_is(
    tmp_path: Path, change: Callable[[pydicom.Dataset], None], message: str
) -> None:
    path = edit(write(tmp_path / "rs.dcm", *two_rois()), change)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert not any(secret in str(caught.value) for secret in SECRETS)
    with pytest.raises(DataError, match=r"^E-\S+ case liver_012"):
        read(path, where="case liver_012")


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.8, 0.99])
@pytest.mark.parametrize("undefined_length", [True, False])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float, undefined_length: bool) -> None:
    path = write(tmp_path / "rs.dcm", *two_rois())

    def mark_lengths(data: pydicom.Dataset) -> None:
        for name in ("StructureSetROISequence", "ROIContourSequence"):
            data[name].is_undefined_length = undefined_length

    whole = edit(path, mark_lengths).read_bytes()
    assert read(path, paint_order=(1, 2)).any()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match="E-RTSTRUCT-FILE"):
        read(path, paint_order=(1, 2))


def test_what_is_no_dicom_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_text("<html>404</html>")
    for path in (tmp_path / "a.dcm", tmp_path / "absent.dcm"):
        with pytest.raises(DataError, match=r"E-RTSTRUCT-FILE .*cannot be read as DICOM"):
            read(path)
        with pytest.raises(DataError, match="E-RTSTRUCT-FILE"):
            rois_of(path)


@dataclass
class RealSeries:
    geometry: Geometry
    sop_uids: list[str]
    frame: str


def real_series(folder: Path, pattern: str = "*") -> RealSeries:
    """The grid of a folder with one series, upward along its normal."""
    slices = [pydicom.dcmread(path, stop_before_pixels=True) for path in folder.glob(pattern)]
    row, column = np.reshape(np.array(slices[0].ImageOrientationPatient, float), (2, 3))
    normal = np.cross(row, column)
    slices.sort(key=lambda s: float(np.dot(s.ImagePositionPatient, normal)))
    first, last = (np.array(slices[k].ImagePositionPatient, float) for k in (0, -1))
    step = (last - first) / (len(slices) - 1)
    between_rows, between_columns = (float(x) for x in slices[0].PixelSpacing)
    spacing = (between_columns, between_rows, float(np.linalg.norm(step)))
    direction = np.stack([row, column, step / spacing[2]], axis=1).ravel()
    shape = (slices[0].Columns, slices[0].Rows, len(slices))
    geometry = Geometry.from_lps(shape, origin=first, spacing=spacing, direction=direction)
    return RealSeries(geometry, [s.SOPInstanceUID for s in slices], slices[0].FrameOfReferenceUID)


def read_real(path: Path, series: RealSeries) -> np.ndarray:
    return read_rtstruct(
        path, series.geometry, sop_uids=series.sop_uids, frame_of_reference_uid=series.frame, values=None
    ).array[0]


def check_equals_nifti(array: np.ndarray, series: RealSeries, nifti: Path) -> None:
    mask = nib.load(nifti)
    np.testing.assert_allclose(mask.affine, series.geometry.affine, atol=1e-3)
    np.testing.assert_array_equal(array, np.asarray(mask.dataobj))  # exact: Dice 1


@pytest.mark.real_data
def test_a_real_lung_tumour_equals_the_mask_beside_it(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = data_dir / "dicom_ct_lung_rtstruct"
    series = real_series(folder / "dicom" / "image")
    array = read_real(folder / "dicom" / "mask" / "DCM_RS_00060.dcm", series)
    check_equals_nifti(array, series, folder / "nifti" / "mask" / "mask.nii.gz")
    assert array.sum() == 125256
    assert "GEOMETRY" not in caplog.text  # it names no slices at all, as many do


@pytest.mark.real_data
@pytest.mark.parametrize("patient", ["STS_008", "STS_019", "STS_025", "STS_042"])
@pytest.mark.parametrize("modality", ["CT", "MR_T1", "PET"])
def test_real_sarcomas_whose_references_are_gone_are_resolved_by_place(
    data_dir: Path, patient: str, modality: str
) -> None:
    folder = data_dir / "dicom_sarcoma" / patient
    series = real_series(folder / modality / "image")
    array = read_real(folder / modality / "mask" / "RS.dcm", series)
    check_equals_nifti(array, series, folder / "nifti_reference" / f"{modality}_mask.nii.gz")


@pytest.mark.real_data
def test_contours_of_a_pet_are_refused_on_an_mr_that_lies_between_its_slices(data_dir: Path) -> None:
    folder = data_dir / "dicom_sarcoma" / "STS_019"
    series = real_series(folder / "MR_T1" / "image")
    moved = series.geometry.affine.copy()
    moved[2, 3] += 1  # a third of a slice
    series.geometry = Geometry(series.geometry.shape, moved)
    with pytest.raises(GeometryError, match=r"0 of 15 contours name a slice of the image, 0 lie on one, 15 are up to"):
        read_real(folder / "PET" / "mask" / "RS.dcm", series)


@pytest.mark.real_data
def test_a_real_file_of_a_contouring_library_keeps_its_hole(data_dir: Path) -> None:
    folder = data_dir / "dicom_zoo" / "rtutils_mock"
    series = real_series(folder, "ct_*.dcm")
    array = read_real(folder / "rt.dcm", series)
    expected = np.zeros(series.geometry.shape, bool)
    # corners at -51 and -27 mm: voxels 151.55 … 200.7; those of the hole at -47 and -32 mm: 159.7 … 190.5, its
    # corners cut off
    expected[152:201, 152:201, 0] = True
    inner = array[160:191, 160:191, 0]
    assert array.sum() == expected.sum() - (inner == 0).sum()
    assert (inner == 0).sum() > 0.9 * inner.size


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["invalid_reference_rt.dcm", "non_existent_reference_rt.dcm"])
def test_real_contours_on_a_slice_that_is_not_there_are_refused(data_dir: Path, name: str) -> None:
    folder = data_dir / "dicom_zoo" / "rtutils_mock"
    with pytest.raises(GeometryError, match=r"8 of 12 contours name .*8 lie on one, 4 are up to 5 mm off"):
        read_real(folder / name, real_series(folder, "ct_*.dcm"))
