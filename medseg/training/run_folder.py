"""A run's folder: one writer at a time, and tables that a resumed run continues exactly."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.errors import WorkflowError
from medseg.files import remove_leftovers, write_atomically

RESULT = "result.json"
"""Written last: a run without it is unfinished."""

FOLDS = "folds.json"
"""Written first: a folder with it holds the runs of all folds."""

VALIDATION_COLUMNS = ("step", "case", "organ", "dice")


class RunFolder:
    """``runs/<workflow>/<time>-<id>/``, locked while it is open.

    Args:
        path: Made if need be.

    Raises:
        WorkflowError: If another process is training into it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / ".lock").open("w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, whatever its workers do
        except OSError:
            self._lock.close()
            raise WorkflowError(
                "E-RUN-LOCKED",
                "another training writes into this folder; wait, or choose another --output",
                where=str(path),
            ) from None
        remove_leftovers(path)
        remove_leftovers(self.model)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    @property
    def validation_table(self) -> Path:
        """A row per step, case and organ."""
        return self.path / "validation.csv"

    @property
    def log_file(self) -> Path:
        """A JSON line per logged step."""
        return self.path / "log.jsonl"

    def write(self, name: str, text: str) -> None:
        """Write a text file whole."""
        write_atomically(self.path / name, text.encode())

    def record(self, name: str, text: str, *, free: tuple[str, ...] = ()) -> None:
        """Write down what the run is made from; a resumed run must be made from the same.

        Args:
            name: Of the file.
            text: Its content.
            free: Beginnings of lines that may differ, as nothing hangs on them.

        Raises:
            WorkflowError: If the file is there and says something else.
        """
        known = self.path / name
        if known.exists():
            before, now = (
                [line.strip() for line in whole.splitlines() if not line.strip().startswith(free)]
                for whole in (known.read_text(), text)
            )
            if before != now:
                raise WorkflowError(
                    "E-RESUME",
                    f"differs from what this run began with: {_first_difference(before, now)}; undo that, or start a new run",
                    where=str(known),
                )
        self.write(name, text)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        with self.log_file.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")

    def add_validation(self, step: int, rows: Sequence[tuple[str, str, float]]) -> None:
        """Append (case, organ, dice) rows."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self.validation_table.exists():
            writer.writerow(VALIDATION_COLUMNS)
        writer.writerows([(step, *row) for row in rows])
        with self.validation_table.open("a") as stream:
            stream.write(text.getvalue())

    def continue_from(self, step: int) -> None:
        """Drop what a killed run wrote after the checkpoint it resumes from, torn lines included."""
        if self.log_file.exists():
            kept = [line for line in _lines(self.log_file) if _step_of(line) <= step]
            write_atomically(self.log_file, "".join(f"{line}\n" for line in kept).encode())
        if self.validation_table.exists():
            rows = [row for row in csv.reader(_lines(self.validation_table)) if len(row) == len(VALIDATION_COLUMNS)]
            kept_rows = [row for row in rows if row[0].isdigit() and int(row[0]) <= step]
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([VALIDATION_COLUMNS, *kept_rows])
            write_atomically(self.validation_table, text.getvalue().encode())
        for folder in self.pictures.glob("step-*"):
            if int(folder.name.split("-")[1]) > step:
                for picture in folder.iterdir():
                    picture.unlink()
                os.rmdir(folder)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write into it."""
        self._lock.close()  # the file stays: who removed it would let two others in


def _lines(table: Path) -> list[str]:
    """Its lines; the last may be torn by a kill, in the middle of a character too."""
    return table.read_text(errors="replace").splitlines()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # torn by a kill
        return float("inf")


def _first_difference(before: Sequence[str], now: Sequence[str]) -> str:
    for old, new in zip(before, now, strict=False):
        if old != new:
            return f"{old!r} is now {new!r}"
    return "its length"
