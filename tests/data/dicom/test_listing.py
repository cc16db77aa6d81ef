from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from rich.console import Console

from medseg.data.dicom.folder import find_one
from medseg.data.dicom.headers import is_dicom_file
from medseg.data.dicom.listing import list_folder, listing
from medseg.errors import DataError

Write = Callable[..., Path]


def rendered(rows: list[dict[str, Any]], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(listing(rows), soft_wrap=True)  # as the command line prints text
    return console.file.getvalue()  # type: ignore[attr-defined]


def structure_set(write_slice: Write, name: str, series: str, *rois: tuple[str, int]) -> Path:
    """An RTSTRUCT with that many contours in each ROI, drawn on a series."""
    drawn, study, frame = Dataset(), Dataset(), Dataset()
    drawn.SeriesInstanceUID, study.RTReferencedSeriesSequence = series, [drawn]
    frame.RTReferencedStudySequence = [study]
    structures, drawings = [], []
    for number, (roi, num_contours) in enumerate(rois, 1):
        structure, drawing, contour = Dataset(), Dataset(), Dataset()
        structure.ROINumber, structure.ROIName = number, roi
        contour.ContourGeometricType = "CLOSED_PLANAR"
        drawing.ReferencedROINumber, drawing.ContourSequence = number, [contour] * num_contours
        structures.append(structure)
        drawings.append(drawing)
    return write_slice(
        name,
        modality="RTSTRUCT",
        SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3",
        SeriesInstanceUID="1.2.9",
        ReferencedFrameOfReferenceSequence=[frame],
        StructureSetROISequence=structures,
        ROIContourSequence=drawings,
    )


def test_rows_tell_series_then_what_was_left_out(tmp_path: Path, write_slice: Write) -> None:
    for z in (0, 2, 4):
        write_slice(f"whole/{z}", z, SeriesInstanceUID="1.2.3")
    for z in (0, 2, 6):
        write_slice(f"gap/{z}", z, SeriesInstanceUID="1.2.4")
    write_slice("nowhere", 0, SeriesInstanceUID="1.2.5", ImagePositionPatient=None)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("notes")
    rows = list_folder(tmp_path)
    assert rows[2] == {
        "kind": "series",
        "series": "1.2.3",
        "path": f"{tmp_path / 'whole'}#1.2.3",
        "folder": str(tmp_path / "whole"),
        "modality": "MR",
        "size": [4, 3, 3],
        "spacing_mm": [0.75, 0.5, 2.0],
        "num_files": 3,
        "tilt_deg": 0.0,
        "problems": [],
        "notes": [],
    }
    assert rows[1]["problems"][0].startswith("E-DICOM-MISSING-SLICE 1 of 4 slices missing")
    assert rows[1]["size"] == [4, 3, 4]
    assert (rows[0]["size"], rows[0]["spacing_mm"]) == (None, None)
    assert rows[0]["problems"][0].startswith("E-DICOM-GEOMETRY nowhere: ")
    assert rows[3] == {"kind": "skipped", "path": str(tmp_path / "a.txt"), "reason": "not DICOM"}
    assert len(rows) == 5
    json.dumps(rows)


def test_a_person_sees_one_line_a_series_and_one_a_reason(tmp_path: Path, write_slice: Write) -> None:
    for z in (0, 2, 4):
        write_slice(f"whole/{z}", z, SeriesInstanceUID="1.2.3")
    for z in (0, 2, 6):
        write_slice(f"gap/{z}", z, SeriesInstanceUID="1.2.4")
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("notes")
    lines = rendered(list_folder(tmp_path)).splitlines()
    assert lines[0] == str(tmp_path)
    assert lines[3].split() == ["2", "MR", "4", "×", "3", "×", "3", "0.75", "×", "0.5", "×", "2", "3", "ok", "whole"]
    assert lines[2].split()[-4:] == ["cannot", "be", "read", "gap"]
    assert lines[4].startswith("1: E-DICOM-MISSING-SLICE")
    assert lines[5].startswith("left out: 30 × not DICOM, e.g. ")
    assert lines[6] == "2 series, 1 cannot be read; 30 files left out"
    assert lines[7] == f"to convert one: medseg data convert {tmp_path / 'whole'} scan.nii.gz"
    assert len(lines) == 8


def test_paths_stay_whole_on_a_narrow_terminal_and_in_a_pipe(tmp_path: Path, write_slice: Write) -> None:
    folder = "a folder with a long name/that goes on and on/and on until the lines of a terminal end"
    write_slice(f"{folder}/a", 0)
    write_slice("other/b", 0, SeriesInstanceUID="1.2.4")
    write_slice("other/note.dcm", 0, Modality="SR")
    told = rendered(list_folder(tmp_path), width=40)
    assert any(line.endswith(f"ok     {folder}") for line in told.splitlines())
    assert "e.g. other/note.dcm" in told
    command = told.splitlines()[-1].removeprefix("to convert one: ")
    assert find_one(Path(shlex.split(command)[3])).home == tmp_path / folder


def test_a_folder_within_another_series_folder_is_told_apart_from_it(tmp_path: Path, write_slice: Write) -> None:
    write_slice("a", 0, SeriesInstanceUID="1.2.31")
    write_slice("inner/b", 0, SeriesInstanceUID="1.2.32")
    lines = rendered(list_folder(tmp_path)).splitlines()
    assert [line.split()[-1] for line in lines[2:4]] == [".#1.2.31", "inner"]


def test_what_is_drawn_on_a_series_is_shown_with_it(tmp_path: Path, write_slice: Write) -> None:
    for z in (0, 2):
        write_slice(f"scan/{z}", z, SeriesInstanceUID="1.2.3")
    path = structure_set(write_slice, "drawn/rs.dcm", "1.2.3", ("GTV-1", 3), ("cord", 1))
    structure_set(write_slice, "drawn/elsewhere.dcm", "1.2.77", ("GTV-2", 2))
    rows = list_folder(tmp_path)
    assert rows[2] == {
        "kind": "drawing",
        "path": str(path),
        "modality": "RTSTRUCT",
        "structures": ["GTV-1 (3 contours)", "cord (1 contour)"],
        "series": ["1.2.3"],
        "problems": [],
    }
    told = rendered(rows)
    assert "RTSTRUCT drawn/rs.dcm: GTV-1 (3 contours), cord (1 contour), on series 1\n" in told
    assert "RTSTRUCT drawn/elsewhere.dcm: GTV-2 (2 contours), on no series that is here\n" in told
    for secret in ("Secret", "PID-4711", "19010203"):
        assert secret not in json.dumps(rows)


def test_a_drawing_that_cannot_be_read_says_why(tmp_path: Path, write_slice: Write) -> None:
    structure_set(write_slice, "rs.dcm", "1.2.3")
    (row,) = list_folder(tmp_path)
    assert row["problems"][0].startswith("E-RTSTRUCT-FILE has no list of ROIs")
    assert "RTSTRUCT rs.dcm: E-RTSTRUCT-FILE" in rendered([row])


def test_series_that_share_a_folder_are_told_by_the_end_of_their_uid_which_is_enough_to_read_one(
    tmp_path: Path, write_slice: Write
) -> None:
    for last in "12":
        write_slice(last, 0, SeriesInstanceUID=f"1.2.826.0.1.3680043.9.4245.31151386308357289978486611507148{last}")
    assert [line.split()[-1] for line in rendered(list_folder(tmp_path)).splitlines()[2:4]] == [
        ".#15071481",
        ".#15071482",
    ]
    assert find_one(Path(f"{tmp_path}#15071482")).uid.endswith("82")


def test_an_empty_folder_says_so_and_an_absent_one_is_refused(tmp_path: Path) -> None:
    assert list_folder(tmp_path) == []
    assert rendered([]).strip() == "no image series"
    with pytest.raises(DataError, match="E-MISSING-FILE"):
        list_folder(tmp_path / "absent")


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["dicom_zoo", "dicom_ct_lung_rtstruct", "totalseg_examples"])
def test_every_file_of_real_folders_is_in_a_series_or_left_out_with_a_reason(data_dir: Path, name: str) -> None:
    rows = list_folder(data_dir / name)
    files = [path for path in (data_dir / name).rglob("*") if path.is_file()]
    skipped = {row["path"] for row in rows if row["kind"] != "series"}
    copies = sum(
        int(note.split()[1]) for row in rows if row["kind"] == "series" for note in row["notes"] if "DUPLICATE" in note
    )
    in_series = sum(row["num_files"] for row in rows if row["kind"] == "series")
    assert skipped <= {str(path) for path in files}
    assert in_series + copies >= len(files) - len(skipped)  # volumes of one multi-frame file count it again
    assert all(row["reason"] for row in rows if row["kind"] == "skipped")
    assert all(row["structures"] for row in rows if row["kind"] == "drawing")
    assert {row["path"] for row in rows if row.get("reason") == "not DICOM"} == {
        str(path) for path in files if not is_dicom_file(path)
    }
    rendered(rows)
