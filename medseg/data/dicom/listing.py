"""What a folder of DICOM holds, for a person who wants to know before using it."""

from __future__ import annotations

import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from medseg.data.dicom.drawings import Drawing, read_drawing
from medseg.data.dicom.folder import Series, Skipped, find_series
from medseg.errors import DataError
from medseg.wording import counted

UID_END = 8
"""Characters of a uid that mostly tell the series of a folder apart; more are shown where they do not."""

_MAX_STRUCTURES = 8
_NO_SCAN = "no scan"  # how the reason of a file begins that holds something else
_HEAD = ("#", "modality", "size", "spacing mm", "files", "state", "folder")

Row = dict[str, Any]


def list_folder(folder: Path) -> list[Row]:
    """Every series of a folder and every file that belongs to none, as rows for JSON.

    Args:
        folder: Searched recursively; also a single file.

    Returns:
        First the series: ``kind ("series"), series, path, folder, modality, size, spacing_mm, num_files, tilt_deg,
        problems, notes``; `path` is what other commands take, `problems` is empty if it can be read, `size`
        and `spacing_mm` are None if it has no grid. Then what is drawn on them: ``kind ("drawing"), path, modality
        ("SEG", "RTSTRUCT"), structures, series (uids), problems``. Then the files left out: ``kind ("skipped"),
        path, reason``.

    Raises:
        DataError: If it does not exist.
    """
    found = find_series(folder)
    series = sorted(found.series, key=lambda one: (one.home, one.uid, one.part))
    drawings = {
        one.path: drawing
        for one in found.skipped
        if one.reason.startswith(_NO_SCAN) and (drawing := read_drawing(one.path))
    }
    return [
        *map(_series_row, series),
        *(_drawing_row(path, drawing) for path, drawing in drawings.items()),
        *(_skipped_row(one) for one in found.skipped if one.path not in drawings),
    ]


def listing(rows: Sequence[Row]) -> Text:
    """The rows of `list_folder` for a person: one line a series, then what is wrong or odd, drawn, and left out.

    Lines are as long as their paths, which are there to be copied.
    """
    kinds: dict[str, list[Row]] = {"series": [], "drawing": [], "skipped": []}
    for row in rows:
        kinds[row["kind"]].append(row)
    series, drawings, skipped = kinds.values()
    top = _top(rows)
    lines = [Text(top)] if top else []
    lines += _series_lines(series, top) if series else [Text("no image series", "yellow")]
    for number, row in enumerate(series, 1):
        lines += [Text(f"{number}: {text}", "red") for text in row["problems"]]
        lines += [Text(f"{number}: {text}", "yellow") for text in row["notes"]]
    lines += [_drawing_line(row, series, top) for row in drawings]
    lines += _skipped_lines(skipped, top)
    lines += _end_lines(series, len(skipped))
    return Text("\n").join(lines)


def _series_row(series: Series) -> Row:
    grid = series.grid
    return {
        "kind": "series",
        "series": series.name,
        "path": str(series.path),
        "folder": str(series.home),
        "modality": series.modality,
        "size": list(grid.shape) if grid else None,
        "spacing_mm": [round(spacing, 4) for spacing in grid.spacing_mm] if grid else None,
        "num_files": len(series.files),
        "tilt_deg": round(series.tilt_deg, 2),
        "problems": [_told(problem) for problem in series.problems],
        "notes": list(series.notes),
    }


def _told(problem: DataError) -> str:
    place = Path(problem.where or "")
    is_file = place.is_file()  # else it is the series, whose row says so
    return f"{problem.error_id} {place.name + ': ' if is_file else ''}{problem.message}"


def _drawing_row(path: Path, drawing: Drawing) -> Row:
    return {
        "kind": "drawing",
        "path": str(path),
        "modality": drawing.kind,
        "structures": list(drawing.structures),
        "series": list(drawing.series_uids),
        "problems": [drawing.problem] if drawing.problem else [],
    }


def _skipped_row(skipped: Skipped) -> Row:
    return {"kind": "skipped", "path": str(skipped.path), "reason": skipped.reason}


def _top(rows: Iterable[Row]) -> str:
    """The folder that holds all of them."""
    folders = [row.get("folder") or os.path.dirname(row["path"]) for row in rows]
    return os.path.commonpath(folders) if folders else ""


def _series_lines(series: Sequence[Row], top: str) -> Iterator[Text]:
    cells = [
        (
            str(number),
            row["modality"],
            " × ".join(map(str, row["size"])) if row["size"] else "?",
            " × ".join(f"{spacing:.4g}" for spacing in row["spacing_mm"]) if row["spacing_mm"] else "?",
            str(row["num_files"]),
            "cannot be read" if row["problems"] else "see below" if row["notes"] else "ok",
            os.path.relpath(row["folder"], top) + _mark(row, series),
        )
        for number, row in enumerate(series, 1)
    ]
    widths = [max(map(len, column)) for column in zip(_HEAD, *cells, strict=True)]
    for line in (_HEAD, *cells):
        text = Text("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        text.stylize("bold", 0, len(text) if line is _HEAD else 0)
        text.highlight_words(["cannot be read"], "red")
        text.highlight_words(["see below"], "yellow")
        yield text


def _mark(row: Row, series: Sequence[Row]) -> str:
    """What behind its folder names a series for other commands: where that holds others too, the end of its uid."""
    others = [one["series"] for one in series if one is not row and _is_below(one["folder"], row["folder"])]
    if not others:
        return ""
    ends = (row["series"][-length:] for length in range(UID_END, len(row["series"])))
    return "#" + next((end for end in ends if not any(other.endswith(end) for other in others)), row["series"])


def _is_below(folder: str, top: str) -> bool:
    return Path(folder).is_relative_to(top)


def _drawing_line(row: Row, series: Sequence[Row], top: str) -> Text:
    numbers = [
        str(number)
        for number, one in enumerate(series, 1)
        if any(one["series"] == uid or one["series"].startswith(f"{uid}-") for uid in row["series"] if uid)
    ]
    place = f"on series {', '.join(numbers)}" if numbers else "on no series that is here"
    more = len(row["structures"]) - _MAX_STRUCTURES
    shown = ", ".join(row["structures"][:_MAX_STRUCTURES]) + (f" and {more} more" if more > 0 else "")
    held = "; ".join(row["problems"]) or f"{shown or 'nothing'}, {place}"
    return Text(f"{row['modality']} {os.path.relpath(row['path'], top)}: {held}", "red" if row["problems"] else "")


def _skipped_lines(skipped: Sequence[Row], top: str) -> Iterator[Text]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for row in skipped:
        by_reason[row["reason"]].append(row["path"])
    for reason, paths in sorted(by_reason.items(), key=lambda entry: -len(entry[1])):
        yield Text(f"left out: {len(paths)} × {reason}, e.g. {os.path.relpath(paths[0], top)}")


def _end_lines(series: Sequence[Row], num_skipped: int) -> Iterator[Text]:
    """How many there are of each, and the command that reads one."""
    if not series:
        return
    num_bad = sum(bool(row["problems"]) for row in series)
    bad = f", {num_bad} cannot be read" if num_bad else ""
    out = f"; {counted(num_skipped, 'file')} left out" if num_skipped else ""
    yield Text(f"{len(series)} series{bad}{out}", "bold")
    readable = next((row for row in series if not row["problems"]), None)
    if readable:
        path = readable["folder"] + _mark(readable, series)
        yield Text(f"to convert one: medseg data convert {shlex.quote(path)} scan.nii.gz")
