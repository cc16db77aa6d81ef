"""Tracking URIs: where runs are recorded, the same from every folder and for every process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from medseg.tracking.sender import StoreError

DEFAULT_URI = "sqlite:///mlflow.db"


def absolute_uri(uri: str | None) -> str:
    """A tracking URI that means the same from every folder; None: $MLFLOW_TRACKING_URI, else ./mlflow.db."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    if database := sqlite_file(uri):
        return f"sqlite:///{database}"
    return uri if "://" in uri or uri == "databricks" else Path(uri).resolve().as_uri()


def sqlite_file(uri: str) -> Path | None:
    """The database behind a sqlite URI, None for every other store."""
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """What may be written to disk and shown."""
    password = urlsplit(uri).password
    return uri.replace(f":{password}@", "@") if password else uri


@contextmanager
def initialization_lock(uri: str) -> Iterator[None]:
    """One process at a time makes a sqlite store: MLflow's migrations fail if two run at once."""
    database = sqlite_file(uri)
    if database is None:
        yield
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = database.with_name(f"{database.name}.lock").open("w")
    except OSError as error:
        if not database.exists():
            raise StoreError(f"{database}: {error.strerror}", "BAD_REQUEST") from None
        yield  # a store that may only be read was made long ago
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
