"""What a run has to tell its tracking store, kept in the run folder until it is told."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from medseg.errors import ModelError, WorkflowError
from medseg.files import write_atomically

LINES_FILE = "tracking.jsonl"
STATE_FILE = "tracking.json"
LOCK_FILE = "tracking.lock"

REWIND = "rewind"
"""Kind of a line that is for the spool alone: the store keeps what it has, and gets the new values beside it."""

Record = Mapping[str, Any]
Identity = tuple[str, str, int | None]


@dataclass(frozen=True)
class Line:
    """One line of the spool.

    Args:
        record: What it says, e.g. ``{"kind": "metric", "key": "train/loss", "value": 0.5, "step": 3, "time": 1}``.
        end: Where the next line begins, in bytes.
    """

    record: Record
    end: int


class Spool:
    """The lines a run has logged, in order: ``tracking.jsonl``.

    A line is whole or it is ignored: one torn by SIGKILL or a full disk is skipped for good. A metric
    or parameter that was logged before (a resumed training replays the steps after its checkpoint, to the
    same values) is not taken again. A line of the kind ``rewind`` says that the training went back to a step
    and takes another course from there: the metrics after that step may be logged once more.

    Args:
        run_dir: The run folder; made if need be.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / LINES_FILE
        self._known: set[Identity] = set()
        for line in self.read():
            self._learn(line.record)
        if self._ends_torn():
            with self._path.open("ab") as stream:
                stream.write(b"\n")  # shut the torn line off, lest it swallow the next one

    def append(self, records: Iterable[Record]) -> None:
        """Add the records that are not there yet; once this returns, a kill of the process loses none of them."""
        lines = []
        for record in records:
            if _identity(record) not in self._known:
                lines.append(json.dumps(record).encode() + b"\n")
                self._learn(record)
        try:
            with self._path.open("ab") as stream:
                stream.write(b"".join(lines))
        except OSError as error:
            error.filename = str(self._path)  # which writing leaves out
            raise

    def read(self, start: int = 0) -> list[Line]:
        """The whole lines from a byte offset on; safe to call while another thread appends."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(start)
            content = stream.read()
        lines, end = [], start
        for text in content.splitlines(keepends=True):
            end += len(text)
            record = _parse(text)
            if record is not None:
                lines.append(Line(record, end))
        return lines

    def _learn(self, record: Record) -> None:
        if name := _identity(record):
            self._known.add(name)
        if record["kind"] == REWIND:
            self._known = {
                (kind, key, step) for kind, key, step in self._known if step is None or step <= record["step"]
            }

    def _ends_torn(self) -> bool:
        if not self._path.exists() or self._path.stat().st_size == 0:
            return False
        with self._path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read() != b"\n"


@dataclass
class Delivery:
    """Where a run's lines go and how far they have come: ``tracking.json``.

    Args:
        uri: Tracking store, absolute, without a password.
        experiment: MLflow experiment.
        run_name: What people call the run.
        local_id: The run's name until the store gives it one; a tag of it afterwards, by which it is found again.
        started_ms: When the run began, milliseconds since 1970.
        parent_run_id: Run that this one is nested in, by either of its ids.
        run_id: MLflow's id; None until the run exists there.
        sent: Lines before this byte have arrived.
        attempted: Lines between `sent` and this byte were sent, but nobody saw them arrive.
        joined: Whether the run was begun elsewhere, so that the store may hold steps this spool knows nothing of.
    """

    uri: str
    experiment: str
    run_name: str
    local_id: str
    started_ms: int
    parent_run_id: str | None = None
    run_id: str | None = None
    sent: int = 0
    attempted: int = 0
    joined: bool = False

    @classmethod
    def load(cls, run_dir: Path) -> Delivery | None:
        """Read a run folder's state; None if it was never tracked.

        Raises:
            ModelError: If the file is damaged.
        """
        path = run_dir / STATE_FILE
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            message = f"cannot be read ({error}); delete it, and the run is tracked anew"
            raise ModelError("E-TRACK-STATE", message, where=str(path)) from None

    def note(self, run_dir: Path, **changes: Any) -> None:
        """Change fields, here and on disk."""
        for name, value in changes.items():
            setattr(self, name, value)
        write_atomically(run_dir / STATE_FILE, json.dumps(asdict(self), indent=2).encode() + b"\n")


def lock_run(run_dir: Path) -> IO[str]:
    """Keep other processes from sending the same lines; ends when it is closed, and however the process ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = (run_dir / LOCK_FILE).open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a forked data loader would inherit that
    except OSError:
        lock.close()
        message = "another process is writing this run, and sends what it logs itself; wait for it or stop it"
        raise WorkflowError("E-TRACK-BUSY", message, where=str(run_dir)) from None
    return lock


def _identity(record: Record) -> Identity | None:
    """What may be said only once; None for what the store overwrites anyway (tags, files, pictures, status)."""
    if record["kind"] in ("metric", "param"):
        return record["kind"], record["key"], record.get("step")
    if record["kind"] == REWIND:
        return REWIND, record["key"], None
    return None


def _parse(text: bytes) -> Record | None:
    if not text.endswith(b"\n"):
        return None
    try:
        return dict(json.loads(text))
    except ValueError:  # torn: a strict prefix of a JSON object is never JSON
        return None
