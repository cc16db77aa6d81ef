from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from medseg.data.dicom.headers import is_dicom_file
from medseg.data.dicom.listing import list_folder, listing
from medseg.errors import DataError

Write = Callable[..., Path]


def rendered(rows: list[dict[str, Any]], width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(listing(rows))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_tell_series_then_what_was_left_out(tmp_path: Path, write_slice: Write) -> None:
    for z in (0, 2, 4):
        write_slice(f"whole/{z}", z, SeriesInstanceUID="1.2.3")
    for z in (0, 2, 6):
        write_slice(f"gap/{z}", z, SeriesInstanceUID="1.2.4")
    write_slice("nowhere", 0, SeriesInstanceUID="1.2.5", ImagePositionPatient=None)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("notes")
    rows = list_folder(tmp_path)
    assert rows[0] == {
        "kind": "series",
        "series": "1.2.3",
        "path": f"{tmp_path}#1.2.3",
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
    assert (rows[2]["size"], rows[2]["spacing_mm"]) == (None, None)
    assert rows[2]["problems"][0].startswith("E-DICOM-GEOMETRY nowhere: ")
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
    assert lines[1].split() == ["1", "1.2.3", "MR", "4", "×", "3", "×", "3", "0.75", "×", "0.5", "×", "2", "3", "ok"]
    assert lines[2].endswith("cannot be read")
    assert lines[3].startswith("2: E-DICOM-MISSING-SLICE")
    assert next(line for line in lines if "not DICOM" in line).split()[:3] == ["not", "DICOM", "30"]
    assert len(lines) <= 8


def test_long_uids_stay_whole_on_a_narrow_terminal(tmp_path: Path, write_slice: Write) -> None:
    uid = "1.2.826.0.1.3680043.9.4245.3115138630835728997848661150714813892"
    write_slice("a", 0, SeriesInstanceUID=uid)
    lines = rendered(list_folder(tmp_path), width=60).splitlines()
    assert uid == "".join(line[3:].split()[0] for line in lines[1:] if line[3:].strip())[: len(uid)]


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
    skipped = {row["path"] for row in rows if row["kind"] == "skipped"}
    copies = sum(
        int(note.split()[1]) for row in rows if row["kind"] == "series" for note in row["notes"] if "DUPLICATE" in note
    )
    in_series = sum(row["num_files"] for row in rows if row["kind"] == "series")
    assert skipped <= {str(path) for path in files}
    assert in_series + copies >= len(files) - len(skipped)  # volumes of one multi-frame file count it again
    assert all(row["reason"] for row in rows if row["kind"] == "skipped")
    assert {row["path"] for row in rows if row.get("reason") == "not DICOM"} == {
        str(path) for path in files if not is_dicom_file(path)
    }
    rendered(rows)
