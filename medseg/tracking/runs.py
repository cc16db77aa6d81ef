"""What was tracked is found again: a run's folder, model and table by its MLflow id, and the MLflow UI."""

from __future__ import annotations

import csv
import ipaddress
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.data.manifest import cache_folder
from medseg.errors import ModelError, WorkflowError
from medseg.files import temporary_path
from medseg.metrics.table import PER_CASE
from medseg.tracking.mlflow_tracker import ENVIRONMENT, RUN_DIR_TAG, ask, find_by_local_id, is_local_id, open_store
from medseg.tracking.sender import StoreError
from medseg.tracking.spool import Delivery
from medseg.tracking.uri import absolute_uri, initialization_lock, sqlite_file, without_password

if TYPE_CHECKING:
    from medseg.tracking.mlflow_tracker import MlflowClient


@dataclass(frozen=True)
class _Run:
    """A run in the tracking store.

    Args:
        run_id: MLflow's id.
        name: What people call it.
        status: RUNNING, FINISHED, FAILED or KILLED.
        run_dir: Its run folder, if that is on this machine.
    """

    run_id: str
    name: str
    status: str
    run_dir: Path | None


def model_folder(run_id: str, uri: str | None = None) -> Path:
    """The model folder of a run: in its run folder, or else downloaded once into the user's cache.

    Raises:
        ModelError: If there is no such run, or it has logged no model.
    """
    client = _connect(uri)
    run = _found(client, run_id, uri)
    if run.run_dir and (run.run_dir / "model" / "model.json").exists():
        return run.run_dir / "model"
    return _downloaded(client, run, "model")


def per_case_table(run_id: str, uri: str | None = None) -> list[dict[str, str]]:
    """The rows of a run's ``per_case.csv``: case, organ, and a column a metric.

    Raises:
        ModelError: If there is no such run, or it has logged no table.
    """
    client = _connect(uri)
    run = _found(client, run_id, uri)
    path = run.run_dir / PER_CASE if run.run_dir else None
    if path is None or not path.exists():
        path = _downloaded(client, run, PER_CASE)
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def serve_ui(uri: str | None = None, host: str = "127.0.0.1", port: int = 5000, *, auth: bool = False) -> int:
    """Run the MLflow UI on a store until it is interrupted.

    Args:
        uri: A database; None: $MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``.
        host: Address to listen on; others than this machine's own need `auth`.
        port: Port to listen on.
        auth: Ask for users and passwords (MLflow's basic-auth app, which needs ``mlflow[auth]``).

    Returns:
        The exit code of ``mlflow server``.

    Raises:
        WorkflowError: If anybody on the network could read and delete runs, or there is no such store.
    """
    if not auth and not _is_loopback(host):
        message = (
            f"{host} would let everybody on the network read and delete runs; use 127.0.0.1 "
            "(from elsewhere: ssh -L), or turn on authentication"
        )
        raise WorkflowError("E-UI-HOST", message, where="--host")
    uri = absolute_uri(uri)
    if uri.startswith(("http://", "https://")):
        raise WorkflowError("E-UI-STORE", "is a server with a UI of its own; open it in a browser", where=uri)
    database = sqlite_file(uri)
    if database is not None and not database.exists():
        raise WorkflowError(
            "E-UI-STORE", "no runs here yet; train first, or name the store with --uri", where=str(database)
        )
    with initialization_lock(uri):  # not while a training is still making it
        pass
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        host,
        "--port",
        str(port),
    ]
    command += ["--workers", "1", *(["--app-name", "basic-auth"] if auth else [])]
    if database is not None:
        command += ["--artifacts-destination", str(database.parent / "mlartifacts")]
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must not outlive this process
    try:
        with subprocess.Popen(command, env={**ENVIRONMENT, **os.environ}) as server:
            try:
                return server.wait()
            except KeyboardInterrupt:  # Ctrl-C reaches the server too, which ends by itself
                server.terminate()
                server.wait()
                return 0
    finally:
        signal.signal(signal.SIGTERM, former)


def _connect(uri: str | None) -> MlflowClient:
    uri = absolute_uri(uri)
    database = sqlite_file(uri)
    if database is not None and not database.exists():  # else looking for a run would make a store
        message = "does not exist, and neither does a folder of that name; name a folder, or the store's URI"
        raise ModelError("E-RUN", f"the tracking store {message}", where=uri)
    try:
        return open_store(uri)
    except StoreError as error:
        raise ModelError("E-TRACK-DOWN", f"does not answer: {error}", where=without_password(uri)) from None


def _found(client: MlflowClient, run_id: str, uri: str | None) -> _Run:
    where = without_password(absolute_uri(uri))
    try:
        if is_local_id(run_id):
            experiments = [e.experiment_id for e in ask(client.search_experiments)]
            run_id = find_by_local_id(client, experiments, run_id) or run_id
        run = ask(client.get_run, run_id)
    except StoreError as error:
        if not error.refused:
            raise ModelError("E-TRACK-DOWN", f"does not answer: {error}", where=where) from None
        message = f"{run_id!r} is no folder, and {where} has no run of that id; check both, or name another store"
        raise ModelError("E-RUN", message, where=run_id) from None
    folder = Path(run.data.tags.get(RUN_DIR_TAG, ""))
    return _Run(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        run_dir=folder if _is_folder_of(folder, run.info.run_id) else None,
    )


def _is_folder_of(folder: Path, run_id: str) -> bool:
    """Whether a folder is that run's, not another one that has the same path on this machine."""
    delivery = Delivery.load(folder) if folder.is_absolute() else None
    return delivery is not None and delivery.run_id == run_id


def _downloaded(client: MlflowClient, run: _Run, artifact: str) -> Path:
    """A run's artifact in the cache, whole or not there."""
    cache = cache_folder() / "runs" / run.run_id
    path = cache / artifact
    if path.exists() and run.status == "FINISHED":  # an unfinished one may log a newer version
        return path
    cache.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        fetched = Path(ask(client.download_artifacts, run.run_id, artifact, str(temporary)))
        if not fetched.exists() or (fetched.is_dir() and not any(fetched.iterdir())):
            raise StoreError("nothing there")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(fetched, path)
    except StoreError as error:
        message = f"run {run.name!r} ({run.status}) has no artifact {artifact!r}: {error}; has its training ended?"
        raise ModelError("E-RUN-ARTIFACT", message, where=run.run_id) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
