"""What a folder of DICOM holds, for a person who wants to know before using it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from medseg.data.dicom.folder import Series, Skipped, find_series
from medseg.errors import DataError

UID_END = 8
"""Characters of a uid that tell the series of a folder apart."""

Row = dict[str, Any]


def list_folder(folder: Path) -> list[Row]:
    """Every series of a folder and every file that belongs to none, as rows for JSON.

    Args:
        folder: Searched recursively; also a single file.

    Returns:
        First the series: ``kind ("series"), series, path, folder, modality, size, spacing_mm, num_files, tilt_deg,
        problems, notes``; `path` is what other commands take, `problems` is empty if it can be read, `size`
        and `spacing_mm` are None if it has no grid. Then the files left out: ``kind ("skipped"), path, reason``.

    Raises:
        DataError: If it does not exist.
    """
    found = find_series(folder)
    series = sorted(found.series, key=lambda one: (one.home, one.uid, one.part))
    return [*map(_series_row, series), *map(_skipped_row, found.skipped)]


def listing(rows: Sequence[Row]) -> RenderableType:
    """The rows of `list_folder` for a terminal: a table, what is wrong or odd below it, files left out by reason."""
    series = [row for row in rows if row["kind"] == "series"]
    skipped: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "skipped":
            skipped[row["reason"]].append(row["path"])
    parts: list[RenderableType] = []
    if series:
        top = os.path.commonpath([row["folder"] for row in series])
        parts += [Text(top, no_wrap=True, overflow="ignore"), _series_table(series, top)]
    else:
        parts.append(Text("no image series", style="yellow"))
    for number, row in enumerate(series, 1):
        parts += [Text(f"{number}: {text}", style="red") for text in row["problems"]]
        parts += [Text(f"{number}: {text}", style="yellow") for text in row["notes"]]
    if skipped:
        parts.append(_skipped_table(skipped))
    return Group(*parts)


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


def _skipped_row(skipped: Skipped) -> Row:
    return {"kind": "skipped", "path": str(skipped.path), "reason": skipped.reason}


def _series_table(rows: Sequence[Row], top: str) -> Table:
    """A series is told by its folder, and where it shares that with others, by the end of its uid."""
    shared = Counter(row["folder"] for row in rows)
    where = Column("folder", overflow="fold")  # to be copied whole
    table = Table("#", where, "modality", "size", "spacing mm", "files", "state", box=None, pad_edge=False)
    for number, row in enumerate(rows, 1):
        folder = os.path.relpath(row["folder"], top)
        table.add_row(
            str(number),
            folder if shared[row["folder"]] == 1 else f"{folder}#{row['series'][-UID_END:]}",
            row["modality"],
            " × ".join(map(str, row["size"])) if row["size"] else "?",
            " × ".join(f"{spacing:.4g}" for spacing in row["spacing_mm"]) if row["spacing_mm"] else "?",
            str(row["num_files"]),
            _state(row),
        )
    return table


def _state(row: Row) -> Text:
    if row["problems"]:
        return Text("cannot be read", style="red")
    return Text("see below", style="yellow") if row["notes"] else Text("ok", style="green")


def _skipped_table(skipped: dict[str, list[str]]) -> Table:
    table = Table("left out", "files", "e.g.", box=None, pad_edge=False)
    for reason, paths in sorted(skipped.items(), key=lambda entry: -len(entry[1])):
        table.add_row(reason, str(len(paths)), Text(Path(paths[0]).name, overflow="ellipsis"))
    return table
