"""A SQLite file that any number of processes write into, a transaction at a time.

It is opened anew for each transaction, which locks it whole (``BEGIN IMMEDIATE``, a rollback journal), so processes and
threads need no care. On a shared file system that is as safe as its locks: NFS needs version 4, or a lock daemon on all
machines, and no ``nolock`` among its mount options.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from medseg.errors import DataError, WorkerError

Mode = Literal["ro", "rw", "rwc"]
"""To read, to write, or to make the file."""

_BUSY_S = 60.0


@contextmanager
def transaction(path: Path, mode: Mode = "rw") -> Iterator[sqlite3.Connection]:
    """What is done in it is done whole, or, after an error, not at all.

    Args:
        path: The file, absolute.
        mode: What for.

    Raises:
        OSError: If the disk is full, or the file cannot be opened.
        WorkerError: If others keep it locked.
        DataError: If it is no such file.
    """
    with _faults_told(path), closing(_connected(path, mode)) as db:  # which takes back what is not ended
        db.execute("BEGIN" if mode == "ro" else "BEGIN IMMEDIATE")
        yield db
        db.execute("COMMIT")


def _connected(path: Path, mode: Mode) -> sqlite3.Connection:
    opened = "rw" if mode == "ro" else mode  # for a journal that a killed process left must be played back to read
    db = sqlite3.connect(f"{path.as_uri()}?mode={opened}", uri=True, timeout=_BUSY_S, isolation_level=None)
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
            number = errno.EACCES if path.exists() else errno.ENOENT
            raise OSError(number, os.strerror(number), str(path)) from error
        if name.startswith("SQLITE_BUSY"):
            message = f"is locked by other processes for more than {_BUSY_S:.0f} s; does its file system have locks?"
            raise WorkerError("E-LEDGER", message, where=str(path)) from error
        message = f"cannot be read ({error}); delete it, and --resume passes over what is segmented already"
        raise DataError("E-LEDGER", message, where=str(path)) from error
