"""The list of a batch's cases and what became of each, in a SQLite file that any number of processes may work from.

Workers *pull*: each takes the next case with a lease that it keeps extending, and writes down what became of it. A
case whose worker is gone comes back, by whoever notices: the one who started the worker, or the lease that runs out.
Segmentations appear by renaming and are written down afterwards; one that is found there without being written down
is written down, and not made again.

The file is opened anew for each transaction, which locks it whole (``BEGIN IMMEDIATE``, a rollback journal), so
processes and threads need no care. On a shared file system that is as safe as its locks: NFS needs version 4, or a
lock daemon on all machines, and no ``nolock`` among its mount options; clocks must agree to some seconds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medseg.errors import DataError, MedsegError, WorkerError, WorkflowError
from medseg.files import is_running

State = Literal["todo", "running", "done", "failed", "quarantined"]

LEASE_S = 120.0
"""A case whose worker has not been heard of for so long comes back."""

MAX_ATTEMPTS = 2
"""Workers that a case may take with it, before it is given up."""

MAX_KILLS = 5
"""Workers that somebody else may end while they have a case in hand, before it is given up."""

_BUSY_S = 60.0
_COMMITTED = ("done", "recovered")

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
class Death:
    """How a worker ended.

    Args:
        ending: E.g. ``"SIGKILL"``, or ``"exit code 1"``.
        peak_bytes: The most memory that was seen in use; 0: not known.
        from_elsewhere: Whether somebody else ended it, so that its cases are not to blame.
    """

    ending: str
    peak_bytes: int = 0
    from_elsewhere: bool = False


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


def worker_name(token: str | None = None, *, pid: int | None = None) -> str:
    """A name that says which process of which machine a worker is.

    Args:
        token: Tells it from later processes of that number; None: something new.
        pid: Of a process of this machine; None: this one.
    """
    return f"{socket.gethostname()}:{pid or os.getpid()}:{token or uuid.uuid4().hex[:8]}"


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
        for old in (path, path.with_name(f"{path.name}-journal")):
            old.unlink(missing_ok=True)
        with ledger._transaction(mode="rwc") as db:
            for statement in _TABLES.split(";\n"):
                db.execute(statement)
            db.executemany("INSERT INTO batch VALUES (?, ?)", [("key", ledger.batch), ("options", _text(options))])
            _insert(db, jobs, keep=keep)
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
        unknown = cls(path.absolute(), "")
        with unknown._transaction(check=False) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'log'").fetchone():
                return None  # killed while it was made
            found = dict(db.execute("SELECT key, value FROM batch").fetchall())
            _check_options(path, json.loads(found["options"]), json.loads(_text(options)))
            _reap(db)
            named = {_key(job.id) for job in jobs}
            known = {row["id"]: row["state"] for row in _rows(db, "1")}
            left = [(case,) for case, state in known.items() if case not in named and state != "running"]
            db.executemany("DELETE FROM cases WHERE id = ?", left)
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
        return cls(unknown.path, found["key"])

    @property
    def options(self) -> dict[str, Any]:
        """What the batch began with."""
        with self._transaction(immediate=False) as db:
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
            for row in _rows(db, "state = 'running' AND lease_until < ?", now):
                _give_back(db, row, Death("silence"))
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
        """Give back what a worker has in hand that was asked to stop."""
        with self._transaction() as db:
            for row in _rows(db, "state = 'running' AND worker = ?", worker):
                _give_back(db, row, None)

    def bury(self, worker: str, death: Death) -> bool:
        """Give back what a worker had in hand when it died, or give that up; False if it never had anything."""
        with self._transaction() as db:
            for row in _rows(db, "state = 'running' AND worker = ?", worker):
                _give_back(db, row, death)
            return bool(db.execute("SELECT 1 FROM log WHERE worker = ? AND id IS NOT NULL", (worker,)).fetchone())

    def reap(self) -> None:
        """Give back what processes of this machine had in hand that are no more, of a command that was killed."""
        with self._transaction() as db:
            _reap(db)

    def progress(self) -> Progress:
        """How far the batch is."""
        with self._transaction(immediate=False) as db:
            counts = dict(db.execute("SELECT state, count(*) FROM cases GROUP BY state").fetchall())
            running = {row["id"]: row["claimed_at"] for row in _rows(db, "state = 'running' ORDER BY claimed_at")}
        failed = counts.get("failed", 0) + counts.get("quarantined", 0)
        return Progress(sum(counts.values()), counts.get("done", 0), failed, running)

    def rows(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        """What became of some cases, in their order: the table's columns, and what else was told of each."""
        with self._transaction(immediate=False) as db:
            found = {row["id"]: dict(row) for row in _rows(db, "1")}
        rows = [found[_key(job.id)] for job in jobs]
        return [row | json.loads(row["told"] or "{}") for row in rows]

    def committed(self) -> list[str]:
        """The cases that were written down as done, in that order; each once, if all is well."""
        with self._transaction(immediate=False) as db:
            query = f"SELECT id FROM log WHERE event IN {_COMMITTED} ORDER BY rowid"
            return [row["id"] for row in db.execute(query)]

    def say(self, worker: str, record: logging.LogRecord) -> None:
        """Have something logged where the batch was started."""
        with self._transaction() as db:
            _log(db, None, worker, record.levelname, record.getMessage())

    def heard(self, after: int) -> list[tuple[int, int, str]]:
        """What workers have said since: number, level and message of each."""
        with self._transaction(immediate=False) as db:
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
    def _transaction(
        self, *, mode: str = "rw", immediate: bool = True, check: bool = True
    ) -> Iterator[sqlite3.Connection]:
        with _faults_told(self.path), closing(_connected(self.path, mode)) as db:  # which takes back what is not ended
            db.execute("BEGIN IMMEDIATE" if immediate else "BEGIN")
            if (
                check
                and mode == "rw"
                and not db.execute("SELECT 1 FROM batch WHERE key = 'key' AND value = ?", (self.batch,)).fetchone()
            ):
                raise WorkerError("E-LEDGER", "another batch has been begun here; this one ends", where=str(self.path))
            yield db
            db.execute("COMMIT")


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=_BUSY_S, isolation_level=None)
    db.row_factory = sqlite3.Row
    if mode == "rwc":
        db.execute("PRAGMA page_size = 1024")  # a few lines change at a time
    return db


@contextmanager
def _faults_told(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours: a full disk into the OSError that it is elsewhere."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "")
        if name in ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from error
        if name.startswith("SQLITE_BUSY"):
            message = f"is locked by other processes for more than {_BUSY_S:.0f} s; does its file system have locks?"
            raise WorkerError("E-LEDGER", message, where=str(path)) from error
        message = f"cannot be read ({error}); delete it, and --resume passes over what is segmented already"
        raise DataError("E-LEDGER", message, where=str(path)) from error


def _insert(db: sqlite3.Connection, jobs: Sequence[Job], *, keep: bool) -> None:
    rows = []
    for job in jobs:
        state = "done" if keep and job.is_written else "todo"
        images, files = _text([job.id, *map(str, job.images)]), _text(list(map(str, job.files)))
        rows.append((_key(job.id), images, files, _changed_at(job.files[0]), state))
    db.executemany("INSERT INTO cases (id, input, outputs, before, state) VALUES (?, ?, ?, ?, ?)", rows)


def _rows(db: sqlite3.Connection, condition: str, *values: Any) -> list[sqlite3.Row]:
    return db.execute(f"SELECT * FROM cases WHERE {condition}", values).fetchall()


def _job(row: sqlite3.Row) -> Job:
    name, *images = json.loads(row["input"])
    files = tuple(map(Path, json.loads(row["outputs"])))
    return Job(name, tuple(map(Path, images)), files, bool(row["alone"]))


def _reap(db: sqlite3.Connection) -> None:
    for row in _rows(db, "state = 'running'"):
        if _is_gone(row["worker"]):
            _give_back(db, row, Death("the end of the whole command", from_elsewhere=True))


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
    given_up = attempts >= MAX_ATTEMPTS or kills >= MAX_KILLS
    error = _given_up(_job(row), attempts, kills, death) if given_up else None
    db.execute(
        "UPDATE cases SET state = ?, alone = 1, attempts = ?, kills = ?, ending = ?, peak_bytes = ?, error_id = ?, message = ?"
        " WHERE position = ?",
        (
            "quarantined" if given_up else "todo", attempts, kills, death.ending, death.peak_bytes,
            error and error.error_id, error and str(error), row["position"],
        ),
    )  # fmt: skip
    _log(db, row["id"], row["worker"], "quarantined" if given_up else "returned", death.ending)


def _given_up(job: Job, attempts: int, kills: int, death: Death) -> DataError:
    memory = f"; it held {death.peak_bytes / 1e9:.1f} GB" if death.peak_bytes else ""
    if attempts >= MAX_ATTEMPTS:
        lack = ", as the kernel does for lack of memory" if death.ending == "SIGKILL" else ""
        found = f"its process was ended {attempts} times, the last time alone, by {death.ending}{lack}{memory}"
        remedy = "look at this scan, or give the job more memory"
    else:
        found = f"its process was ended {kills} times by somebody else, the last time by {death.ending}{memory}"
        remedy = "find out who ends processes here (a limit of memory or time?), then --resume"
    return DataError("E-WORKER", f"{found}; {remedy}", where=str(job.images[0]))


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
