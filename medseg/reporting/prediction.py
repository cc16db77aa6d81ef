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
from medseg.wording import counted, duration, listed

SUMMARY = "summary.csv"

COLUMNS = (
    "case", "input", "output", "state", "seconds", "network_seconds", "windows", "windows_in_air", "uncertainty",
    "agreement", "crf", "attempts", "peak_mb", "error_id", "message",
)  # fmt: skip

_MOST_LISTED = 10


def summary_row(case: str, image: Path, output: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """A case's row of the table.

    Args:
        case: Its id.
        image: Its scan.
        output: Its segmentation, if there is one.
        told: What the ledger says of it.
    """
    peak_mb = round(told["peak_bytes"] / 1e6) if told["peak_bytes"] else None
    written = str(output) if told["state"] == "done" else None
    return {**told, "case": case, "input": str(image), "output": written, "peak_mb": peak_mb}


def write_summary(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a row for each case of a batch, its organs' volumes last; what is not known of it is empty."""
    volumes = [{f"{organ}_{row['unit']}": size for organ, size in row.get("volumes", {}).items()} for row in rows]
    organs = dict.fromkeys(column for found in volumes for column in found)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *organs], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row, found in zip(rows, volumes, strict=True):
        writer.writerow({**row, **found, "crf": "; ".join(row.get("crf") or ())})
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


def prediction_summary(result: Mapping[str, Any]) -> RenderableType:
    """How many scans were segmented, where they are, and what was wrong with the others, equal faults in one line."""
    if "planned" in result:
        return _lines(_plan(result["planned"]))
    done, failed, skipped = result["done"], result["failed"], result.get("skipped", ())
    given_up = sum(entry["error_id"] == "E-WORKER" for entry in failed)
    seconds = result["seconds"]
    counts = [f"{len(done)} segmented in {seconds:.0f} s"]
    counts += [f"{len(skipped)} were there already"] if skipped else []
    counts += [f"{len(failed)} failed"] if failed else []
    lines = [", ".join(counts)]
    if len(done) <= _MOST_LISTED:
        for entry in done:
            lines.append(f"  {entry['case']}  {entry['output']}")
            lines += [f"    CRF: {words}" for words in entry.get("crf") or ()]
    unsure = sorted((entry for entry in done if "uncertainty" in entry), key=lambda entry: -entry["uncertainty"])
    if len(unsure) > 1:
        first = [f"{entry['case']} ({entry['uncertainty']:.2f})" for entry in unsure]
        lines += [f"look at these first, they are the least sure: {listed(first)}"]
    if failed:
        lines += str(Problems([fault_told(entry) for entry in failed])).splitlines()
    if len(done) + len(failed) < 2:
        return _lines(lines)
    table = Table("done", "failed", "quarantined", "seconds", "scans a minute", "in the network", box=None)
    network = sum(entry.get("network_seconds") or 0 for entry in done)
    share = f"{network:.0f} s" if network else "–"
    pace = f"{60 * len(done) / seconds:.1f}" if seconds else "–"
    table.add_row(str(len(done)), str(len(failed) - given_up), str(given_up), f"{seconds:.0f}", pace, share)
    look = result.get("report") or f"medseg report {Path(result['summary']).parent}"
    places = [f"each case: {result['summary']}", f"look at them: {look}"]
    return Group(_lines(lines), table, _lines(places))


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{1000 * gigabytes:.0f} MB"


def _plan(planned: Sequence[Mapping[str, Any]]) -> list[str]:
    """What would be done, and what it would take."""
    known = [entry for entry in planned if "windows" in entry]
    lines = [f"{len(known)} would be segmented, as far as headers tell"]
    lines[0] += f"; {len(planned) - len(known)} could not" if len(known) < len(planned) else ""
    if known:
        windows, seconds = (sum(entry[key] for entry in known) for key in ("windows", "network_seconds"))
        memory, gpu = (max(entry[key] for entry in known) for key in ("memory_gb", "gpu_memory_gb"))
        lines += [
            f"{counted(windows, 'window')}, {duration(seconds)} in the network, on one worker",
            f"{_size(memory)} of memory at the most beside the model" + (f", {_size(gpu)} of the GPU's" if gpu else ""),
        ]
    for entry in planned:
        told = f"{counted(entry['windows'], 'window')}  {entry['output']}" if "windows" in entry else entry["message"]
        lines.append(f"  {entry['case']}  {entry['input']}  {told}")
    return lines


def fault_told(entry: Mapping[str, Any]) -> MedsegError:
    """The error that an entry tells, apart from the place it names."""
    error_id, message = entry["error_id"], entry["message"]
    for place in (entry["input"], f"case {entry['case']}"):
        if message.startswith(begin := f"{error_id} {place}: "):
            return MedsegError(error_id, message.removeprefix(begin), where=place)
    return MedsegError(error_id, message.removeprefix(f"{error_id} "))


def _lines(lines: Sequence[str]) -> Text:
    return Text("\n".join(lines), overflow="ignore", no_wrap=True)
