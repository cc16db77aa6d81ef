"""The list of a batch's cases and what became of each, in a SQLite file that any number of processes may work from.

Workers *pull*: each takes the next case with a lease that it keeps extending, and writes down what became of it. A
case whose worker is gone comes back, by whoever notices: the one who started the worker, or the lease that runs out.
Segmentations appear by renaming and are written down afterwards; one that is found there without being written down
is written down, and not made again.

On a shared file system that is as safe as its locks, see `database`; clocks must agree to some seconds.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medseg.batch.database import Mode, transaction
from medseg.batch.deaths import Death, given_up
from medseg.errors import MedsegError, WorkerError, WorkflowError
from medseg.files import is_running, temporary_path

State = Literal["todo", "running", "done", "failed", "quarantined"]

LEDGER = "ledger.db"
"""What it is called in the folder of the segmentations."""

LEASE_S = 120.0
"""A case whose worker has not been heard of for so long comes back."""

_COMMITTED = ("done", "recovered")
_ENDS_SO = "substr(worker, -length(?1)) = ?1"

_TABLES = """
CREATE TABLE batch (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE cases (
    position INTEGER PRIMARY KEY,
    id TEXT UNIQUE,         -- of the case
    input TEXT,             -- JSON: what to read
    outputs TEXT,           -- JSON: what to write, the segmentation first
    before INTEGER,         -- when the segmentation was changed last before the batch, in ns; NULL: it was not there
    state TEXT DEFAULT 'todo',
    alone INTEGER DEFAULT 0,     -- whether it was in hand when a worker died: no other is read or written beside it
    attempts INTEGER DEFAULT 0,  -- workers that died while they had it in hand
    kills INTEGER DEFAULT 0,     -- workers that somebody else ended meanwhile
    worker TEXT,
    claimed_at REAL,        -- seconds since 1970, as the others
    lease_until REAL,
    seconds REAL,           -- to read, segment and write it
    told TEXT,              -- JSON: what else is known of its segmentation
    error_id TEXT,
    message TEXT,
    ending TEXT,            -- of the last worker that died over it
    peak_bytes INTEGER      -- the most memory that its worker held
);
CREATE INDEX by_state ON cases (state, alone, position);
CREATE TABLE log (at REAL, id TEXT, worker TEXT, event TEXT, message TEXT);
"""


@dataclass(frozen=True)
class Job:
    """A case to segment.

    Args:
        id: Of the case.
        images: What to read.
        files: What to write; the first is written last, as the sign that all are there.
        alone: Whether nothing else may be read or written beside it.
    """

    id: str
    images: tuple[Path, ...]
    files: tuple[Path, ...]
    alone: bool = False

    @property
    def is_written(self) -> bool:
        return all(file.exists() for file in self.files)


@dataclass(frozen=True)
class Progress:
    """How far a batch is; `running` says since when each case is in hand, in seconds since 1970."""

    total: int
    done: int
    failed: int
    running: Mapping[str, float]

    @property
    def is_open(self) -> bool:
        return self.done + self.failed < self.total

    @property
    def todo(self) -> int:
        """How many nobody has in hand."""
        return self.total - self.done - self.failed - len(self.running)


def worker_name(token: str = "") -> str:
    """A name for this process as a worker, which says where it is.

    Args:
        token: Its end, by which those who started the worker know it; empty: something new.
    """
    return f"{socket.gethostname()}:{os.getpid()}:{token or new_token()}"


def new_token() -> str:
    """Something to call a worker by that no other is called by."""
    return uuid.uuid4().hex[:8]


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other commands out of an output folder, as long as this process lives.

    Raises:
        WorkflowError: If another one is at work there.
    """
    with (folder / ".lock").open("w") as lock:  # the file stays: who removed it would let two others in
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            message = "another medseg writes into this folder; wait, or choose another --output"
            raise WorkflowError("E-OUTPUT-LOCKED", message, where=str(folder)) from None
        yield


@dataclass(frozen=True)
class Ledger:
    """A batch under way.

    Args:
        path: The SQLite file.
        batch: Its key. Workers of an earlier batch that lay at the same place find nothing more to do.
        lease_s: How long a case stays with a worker that is not heard of.
    """

    path: Path
    batch: str
    lease_s: float = LEASE_S

    @classmethod
    def begin(cls, path: Path, jobs: Sequence[Job], options: Mapping[str, Any], *, keep: bool = False) -> Ledger:
        """Write a new ledger, in the place of any other.

        Args:
            path: The file to write.
            jobs: The cases, in the order they are to be done.
            options: What the segmentations hang on, see `resume`.
            keep: Count cases that are written already as done.
        """
        ledger = cls(path.absolute(), uuid.uuid4().hex)
        new = temporary_path(ledger.path)
        try:
            with transaction(new, "rwc") as db:
                for statement in _TABLES.split(";\n"):
                    db.execute(statement)
                db.executemany("INSERT INTO batch VALUES (?, ?)", [("key", ledger.batch), ("options", _text(options))])
                _insert(db, jobs, keep=keep)
        except OSError as error:
            new.unlink(missing_ok=True)
            error.filename = str(ledger.path)  # rather than a name that nobody knows
            raise
        path.with_name(f"{path.name}-journal").unlink(missing_ok=True)  # or it would be played back into the new one
        os.replace(new, ledger.path)  # only now: killed before, nobody takes the old batch's files for the new one's
        return ledger

    @classmethod
    def resume(cls, path: Path, jobs: Sequence[Job], options: Mapping[str, Any]) -> Ledger | None:
        """Go on with a ledger: what failed, or has vanished, is to be done again.

        From now on it is the list of this call's cases; what living workers have in hand stays theirs.

        Args:
            path: The file.
            jobs: The cases of this call. Those that the ledger lacks and that are written already count as done.
            options: What the segmentations hang on: they must be those that the batch began with.

        Returns:
            None if there is no ledger.

        Raises:
            WorkflowError: If the options are others.
        """
        if not path.exists():
            return None
        with transaction(path.absolute()) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'log'").fetchone():
                return None  # killed while it was made
            found = dict(db.execute("SELECT key, value FROM batch").fetchall())
            _check_options(path, json.loads(found["options"]), json.loads(_text(options)))
            _reap(db)
            named = {_key(job.id) for job in jobs}
            rows = _rows(db, "1")
            known = {row["id"]: row["state"] for row in rows}
            _check_images(path, rows, jobs)
            left = [(case,) for case, state in known.items() if case not in named and state != "running"]
            db.executemany("DELETE FROM cases WHERE id = ?", left)
            db.executemany(
                "UPDATE cases SET input = ?, outputs = ? WHERE id = ? AND state != 'running'",
                [(*_files(job), _key(job.id)) for job in jobs],
            )
            again = [
                (_changed_at(job.files[0]), _key(job.id))
                for job in jobs
                if (state := known.get(_key(job.id))) in ("failed", "quarantined")
                or (state == "done" and not job.is_written)
            ]
            db.executemany(
                "UPDATE cases SET state = 'todo', attempts = 0, kills = 0, error_id = NULL, message = NULL, before = ?"
                " WHERE id = ?",
                again,
            )
            _insert(db, [job for job in jobs if _key(job.id) not in known], keep=True)
        return cls(path.absolute(), found["key"])

    @classmethod
    def found(cls, path: Path) -> Ledger:
        """The batch that lies at a place, under way or done, to look at.

        Raises:
            DataError: If it cannot be read.
        """
        with transaction(path.absolute(), "ro") as db:
            return cls(path.absolute(), db.execute("SELECT value FROM batch WHERE key = 'key'").fetchone()[0])

    @property
    def jobs(self) -> list[Job]:
        """All cases."""
        with self._transaction("ro") as db:
            return [_job(row) for row in _rows(db, "1 ORDER BY position")]

    @property
    def options(self) -> dict[str, Any]:
        """What the batch began with."""
        with self._transaction("ro") as db:
            return json.loads(db.execute("SELECT value FROM batch WHERE key = 'options'").fetchone()[0])

    def claim(self, worker: str, *, beside: bool) -> Job | None:
        """Take the next case; those that are to be done alone come last.

        Args:
            worker: Who takes it.
            beside: Whether the worker has another one in hand.

        Returns:
            None if there is none, for now: see `progress`.
        """
        now = time.time()
        with self._transaction() as db:
            for row in _rows(db, "state = 'running' AND lease_until < ? AND worker != ?", now, worker):
                _give_back(db, row, Death("silence", from_elsewhere=True))  # e.g. a machine that was shut down
            found = _rows(db, "state = 'todo' AND alone <= ? ORDER BY alone, position LIMIT 1", 0 if beside else 1)
            if not found:
                return None
            row = found[0]
            db.execute(
                "UPDATE cases SET state = 'running', worker = ?, claimed_at = ?, lease_until = ? WHERE position = ?",
                (worker, now, now + self.lease_s, row["position"]),
            )
            _log(db, row["id"], worker, "claimed")
            return _job(row)

    def renew(self, worker: str) -> None:
        """Extend the leases of all that a worker has in hand."""
        with self._transaction() as db:
            db.execute(
                "UPDATE cases SET lease_until = ? WHERE worker = ? AND state = 'running'",
                (time.time() + self.lease_s, worker),
            )

    def is_held(self, worker: str, job: Job) -> bool:
        """Whether a case is still this worker's."""
        with self._transaction("ro") as db:
            return bool(_rows(db, "state = 'running' AND id = ? AND worker = ?", _key(job.id), worker))

    def finish(self, worker: str, job: Job, *, seconds: float, peak_bytes: int, told: Mapping[str, Any]) -> bool:
        """Write down that a case is done; False if it is no longer this worker's."""
        values = {"seconds": round(seconds, 3), "peak_bytes": peak_bytes, "told": _text(told)}
        return self._end(worker, job, "done", values)

    def fail(self, worker: str, job: Job, error: MedsegError) -> bool:
        """Write down what is wrong with a case; False if it is no longer this worker's."""
        return self._end(worker, job, "failed", {"error_id": error.error_id, "message": str(error)})

    def put_back(self, worker: str, job: Job) -> None:
        """Have a case done later, alone."""
        with self._transaction() as db:
            db.execute(
                "UPDATE cases SET state = 'todo', worker = NULL, alone = 1"
                " WHERE id = ? AND worker = ? AND state = 'running'",
                (_key(job.id), worker),
            )
            _log(db, _key(job.id), worker, "put back")

    def release(self, worker: str) -> None:
        """Give back what a worker has in hand that was asked to stop; the end of its name is enough."""
        with self._transaction() as db:
            for row in _rows(db, f"state = 'running' AND {_ENDS_SO}", worker):
                _give_back(db, row, None)

    def bury(self, worker: str, death: Death) -> bool:
        """Give back what a worker had in hand when it died, or give that up; False if it never had anything.

        Args:
            worker: The end of its name is enough.
            death: How it ended.
        """
        with self._transaction() as db:
            for row in _rows(db, f"state = 'running' AND {_ENDS_SO}", worker):
                _give_back(db, row, death)
            return bool(db.execute(f"SELECT 1 FROM log WHERE {_ENDS_SO} AND id IS NOT NULL", (worker,)).fetchone())

    def reap(self, ours: Iterable[str] = ()) -> int:
        """Give back what processes of this machine had in hand that are no more, of a command that was killed.

        Args:
            ours: Ends of the names of workers that the caller watches over itself.

        Returns:
            How many others are at work.
        """
        with self._transaction() as db:
            return _reap(db, tuple(ours))

    def progress(self) -> Progress:
        """How far the batch is."""
        with self._transaction("ro") as db:
            counts = dict(db.execute("SELECT state, count(*) FROM cases GROUP BY state").fetchall())
            running = {row["id"]: row["claimed_at"] for row in _rows(db, "state = 'running' ORDER BY claimed_at")}
        failed = counts.get("failed", 0) + counts.get("quarantined", 0)
        return Progress(sum(counts.values()), counts.get("done", 0), failed, running)

    def rows(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        """What became of some cases, in their order: the table's columns, and what else was told of each."""
        with self._transaction("ro") as db:
            found = {row["id"]: dict(row) for row in _rows(db, "1")}
        rows = [found[_key(job.id)] for job in jobs]
        return [row | json.loads(row["told"] or "{}") for row in rows]

    def committed(self) -> list[str]:
        """The cases that were written down as done, in that order; each once, if all is well."""
        with self._transaction("ro") as db:
            query = f"SELECT id FROM log WHERE event IN {_COMMITTED} ORDER BY rowid"
            return [row["id"] for row in db.execute(query)]

    def say(self, worker: str, record: logging.LogRecord) -> None:
        """Have something logged where the batch was started."""
        with self._transaction() as db:
            _log(db, None, worker, record.levelname, record.getMessage())

    def heard(self, after: int) -> list[tuple[int, int, str]]:
        """What workers have said since: number, level and message of each."""
        with self._transaction("ro") as db:
            query = "SELECT rowid, event, message FROM log WHERE rowid > ? AND id IS NULL"
            levels = logging.getLevelNamesMapping()
            return [(number, levels[level], message) for number, level, message in db.execute(query, (after,))]

    def _end(self, worker: str, job: Job, state: State, values: Mapping[str, Any]) -> bool:
        columns = "".join(f", {column} = ?" for column in values)
        with self._transaction() as db:
            changed = db.execute(
                f"UPDATE cases SET state = ?{columns} WHERE id = ? AND worker = ? AND state = 'running'",
                (state, *values.values(), _key(job.id), worker),
            )
            if changed.rowcount:
                _log(db, _key(job.id), worker, state, values.get("message"))
            return bool(changed.rowcount)

    @contextmanager
    def _transaction(self, mode: Mode = "rw") -> Iterator[sqlite3.Connection]:
        with transaction(self.path, mode) as db:
            if not db.execute("SELECT 1 FROM batch WHERE key = 'key' AND value = ?", (self.batch,)).fetchone():
                raise WorkerError("E-LEDGER", "another batch has been begun here; this one ends", where=str(self.path))
            yield db


def _insert(db: sqlite3.Connection, jobs: Sequence[Job], *, keep: bool) -> None:
    rows = []
    for job in jobs:
        state = "done" if keep and job.is_written else "todo"
        rows.append((_key(job.id), *_files(job), _changed_at(job.files[0]), state))
    db.executemany("INSERT INTO cases (id, input, outputs, before, state) VALUES (?, ?, ?, ?, ?)", rows)


def _files(job: Job) -> tuple[str, str]:
    """The columns input and outputs, whatever folder the next call is made in."""
    images, files = ([os.path.abspath(path) for path in paths] for paths in (job.images, job.files))
    return _text([job.id, *images]), _text(files)


def _rows(db: sqlite3.Connection, condition: str, *values: Any) -> list[sqlite3.Row]:
    return db.execute(f"SELECT * FROM cases WHERE {condition}", values).fetchall()


def _job(row: sqlite3.Row) -> Job:
    name, *images = json.loads(row["input"])
    files = tuple(map(Path, json.loads(row["outputs"])))
    return Job(name, tuple(map(Path, images)), files, bool(row["alone"]))


def _reap(db: sqlite3.Connection, ours: tuple[str, ...] = ()) -> int:
    others = [row for row in _rows(db, "state = 'running'") if not row["worker"].endswith(ours)]
    gone = [row for row in others if _is_gone(row["worker"])]
    for row in gone:
        _give_back(db, row, Death("the end of the whole command", from_elsewhere=True))
    return len({row["worker"] for row in others} - {row["worker"] for row in gone})


def _give_back(db: sqlite3.Connection, row: sqlite3.Row, death: Death | None) -> None:
    """What to do with a case whose worker is gone; `death`: None if it was asked to go."""
    written = _changed_at(_job(row).files[0])
    if written is not None and written != row["before"]:
        seconds = max(0.0, written / 1e9 - row["claimed_at"])
        db.execute(
            "UPDATE cases SET state = 'done', seconds = ?, told = '{}' WHERE position = ?",
            (round(seconds, 3), row["position"]),
        )
        _log(db, row["id"], row["worker"], "recovered")
        return
    if death is None:
        db.execute("UPDATE cases SET state = 'todo', worker = NULL WHERE position = ?", (row["position"],))
        _log(db, row["id"], row["worker"], "released")
        return
    attempts = row["attempts"] + (not death.from_elsewhere)
    kills = row["kills"] + death.from_elsewhere
    error = given_up(_job(row).images[0], attempts, kills, death)
    state = "quarantined" if error else "todo"
    db.execute(
        "UPDATE cases SET state = ?, alone = 1, attempts = ?, kills = ?, ending = ?, peak_bytes = ?, error_id = ?, message = ?"
        " WHERE position = ?",
        (
            state, attempts, kills, death.ending, death.peak_bytes, error and error.error_id, error and str(error),
            row["position"],
        ),
    )  # fmt: skip
    _log(db, row["id"], row["worker"], "quarantined" if error else "returned", death.ending)


def _check_images(path: Path, rows: Iterable[sqlite3.Row], jobs: Iterable[Job]) -> None:
    now = {_key(job.id): job for job in jobs}
    for row in rows:
        if row["state"] in ("done", "running") and (job := now.get(row["id"])) and _files(job)[0] != row["input"]:
            raise WorkflowError(
                "E-RESUME",
                f"case {job.id} was {_job(row).images[0]} when the batch began, and is {job.images[0]} now; give the same "
                "scans, add --force to begin anew, or choose another --output",
                where=str(path),
            )


def _check_options(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    told = [f"{name} is now {now.get(name)}, was {before.get(name)}" for name in now if now[name] != before.get(name)]
    if told:
        raise WorkflowError(
            "E-RESUME",
            f"the batch began with other options: {'; '.join(told)}; undo that, add --force to begin anew, or choose "
            "another --output",
            where=str(path),
        )


def _is_gone(worker: str) -> bool:
    """Whether a worker was a process of this machine that has ended; of others only the lease tells."""
    host, _, rest = worker.rpartition(":")[0].rpartition(":")
    return host == socket.gethostname() and not is_running(int(rest))


def _changed_at(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _log(db: sqlite3.Connection, case: str | None, worker: str | None, event: str, message: str | None = None) -> None:
    db.execute("INSERT INTO log VALUES (?, ?, ?, ?, ?)", (time.time(), case, worker, event, message))


def _text(value: Any) -> str:
    return json.dumps(value, default=str)


def _key(case: str) -> str:
    """An id as SQLite's UTF-8 takes it, whatever bytes a file is called by."""
    return case.encode(errors="backslashreplace").decode()
