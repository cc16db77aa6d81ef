"""What people read at the end of `medseg predict`, and the table it leaves."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from medseg.errors import MedsegError, Problems
from medseg.files import write_atomically

SUMMARY = "summary.csv"

COLUMNS = (
    "case", "input", "output", "state", "seconds", "network_seconds", "windows", "windows_in_air", "uncertainty",
    "attempts", "peak_mb", "error_id", "message",
)  # fmt: skip

_MOST_LISTED = 10


def write_summary(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a row for each case of a batch; what is not known of it is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


def prediction_summary(result: Mapping[str, Any]) -> RenderableType:
    """How many scans were segmented, where they are, and what was wrong with the others, equal faults in one line."""
    if "planned" in result:
        lines = [f"  {entry['case']}  {entry['input']}  {entry['output']}" for entry in result["planned"]]
        return _lines([f"{len(lines)} would be segmented", *lines])
    done, failed, skipped = result["done"], result["failed"], result.get("skipped", ())
    given_up = sum(entry["error_id"] == "E-WORKER" for entry in failed)
    seconds = result["seconds"]
    counts = [f"{len(done)} segmented in {seconds:.0f} s"]
    counts += [f"{len(skipped)} were there already"] if skipped else []
    counts += [f"{len(failed)} failed"] if failed else []
    lines = [", ".join(counts)]
    if len(done) <= _MOST_LISTED:
        lines += [f"  {entry['case']}  {entry['output']}" for entry in done]
    if failed:
        lines += str(Problems([_fault(entry) for entry in failed])).splitlines()
    if len(done) + len(failed) < 2:
        return _lines(lines)
    table = Table("done", "failed", "quarantined", "seconds", "scans a minute", "in the network", box=None)
    network = sum(entry.get("network_seconds") or 0 for entry in done)
    share = f"{network:.0f} s" if network else "–"
    pace = f"{60 * len(done) / seconds:.1f}" if seconds else "–"
    table.add_row(str(len(done)), str(len(failed) - given_up), str(given_up), f"{seconds:.0f}", pace, share)
    places = [f"each case: {result['summary']}", f"look at them: medseg report {Path(result['summary']).parent}"]
    return Group(_lines(lines), table, _lines(places))


def _fault(entry: Mapping[str, Any]) -> MedsegError:
    """The error that an entry tells, apart from the place it names."""
    error_id, message = entry["error_id"], entry["message"]
    for place in (entry["input"], f"case {entry['case']}"):
        if message.startswith(begin := f"{error_id} {place}: "):
            return MedsegError(error_id, message.removeprefix(begin), where=place)
    return MedsegError(error_id, message.removeprefix(f"{error_id} "))


def _lines(lines: Sequence[str]) -> Text:
    return Text("\n".join(lines), overflow="ignore", no_wrap=True)
