"""What was tracked is found again: a run's folder, model and table by its MLflow id, and the MLflow UI."""

from __future__ import annotations

import csv
import ipaddress
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from medseg.data.manifest import cache_folder
from medseg.errors import ModelError, WorkflowError
from medseg.files import temporary_path
from medseg.metrics.table import PER_CASE
from medseg.registry import did_you_mean
from medseg.tracking.mlflow_tracker import (
    ENVIRONMENT,
    PARENT_TAG,
    RUN_DIR_TAG,
    ask,
    find_by_local_id,
    is_local_id,
    open_store,
)
from medseg.tracking.sender import StoreError
from medseg.tracking.spool import Delivery
from medseg.tracking.uri import absolute_uri, initialization_lock, sqlite_file, without_password

if TYPE_CHECKING:
    from medseg.tracking.mlflow_tracker import MlflowClient

T = TypeVar("T")

REGISTERED = "models:/"
COMPARISONS = "comparisons"
DOWNLOADS = 8
"""Tables fetched at a time."""


@dataclass(frozen=True)
class TrackedRun:
    """A run with its table, as it was tracked.

    Args:
        run_id: MLflow's id.
        name: What people call it.
        params: The workflow, flattened.
        tags: Those of `medseg.build.provenance`, and MLflow's own.
        rows: Of ``per_case.csv``: case, organ, and a column a metric.
    """

    run_id: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    rows: list[dict[str, str]]


@dataclass(frozen=True)
class _Run:
    """A run in the tracking store.

    Args:
        run_id: MLflow's id.
        name: What people call it.
        status: RUNNING, FINISHED, FAILED or KILLED.
        params: See `TrackedRun`.
        tags: See `TrackedRun`.
        artifacts: URI of its artifacts.
    """

    run_id: str
    name: str
    status: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    artifacts: str

    @classmethod
    def of(cls, run: Any) -> _Run:
        info, data = run.info, run.data
        return cls(info.run_id, info.run_name, info.status, data.params, data.tags, info.artifact_uri)

    @property
    def run_dir(self) -> Path | None:
        """Its run folder, if that is on this machine."""
        folder = Path(self.tags.get(RUN_DIR_TAG, ""))
        return folder if _is_folder_of(folder, self.run_id) else None

    def table_here(self) -> Path | None:
        """Its table, if that is in the run folder or in a store of plain files."""
        folders = [self.run_dir] if self.run_dir else []
        if (place := urlsplit(self.artifacts)).scheme in ("", "file"):
            folders.append(Path(url2pathname(place.path) if place.scheme else self.artifacts))
        return next((folder / PER_CASE for folder in folders if (folder / PER_CASE).exists()), None)


def model_folder(model: str, uri: str | None = None) -> Path:
    """The model folder of a run: in its run folder, or else downloaded once into the user's cache.

    Args:
        model: The run's id, or a registered model: ``models:/name@alias`` or ``models:/name/version``.
        uri: Tracking store; None: $MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``. As for all the others.

    Raises:
        ModelError: If there is no such run or registered model, or the run has logged no model.
    """
    client = _connect(uri)
    run = _found(client, _run_of_registered(client, model) if is_registered(model) else model, uri)
    if run.run_dir and (run.run_dir / "model" / "model.json").exists():
        return run.run_dir / "model"
    return _downloaded(client, run, "model")


def run_folder(run_id: str, uri: str | None = None) -> Path:
    """The run folder of a run.

    Raises:
        ModelError: If there is no such run, or its folder is not on this machine.
    """
    run = _found(_connect(uri), run_id, uri)
    if run.run_dir is None:
        message = (
            f"the folder of run {run.name!r} is not on this machine; open its artifact report.html in MLflow instead"
        )
        raise ModelError("E-RUN-FOLDER", message, where=run_id)
    return run.run_dir


def tracked_run(run_id: str, uri: str | None = None) -> TrackedRun:
    """A run with its table.

    Raises:
        ModelError: If there is no such run, or it has logged no table.
    """
    client = _connect(uri)
    return _with_rows(client, _found(client, run_id, uri))


def experiment_runs(experiment: str, uri: str | None = None) -> list[TrackedRun]:
    """The finished runs of an experiment that have a table, the latest first.

    A cross-validation counts once, by the joint table of its parent, and not again by its folds. Folds whose
    parent has not finished count for themselves.

    Args:
        experiment: Its name.
        uri: Tracking store.

    Raises:
        ModelError: If there is no such experiment, or the store does not answer.
    """
    client = _connect(uri)
    found = _answer(uri, client.get_experiment_by_name, experiment)
    if found is None:
        known = [each.name for each in _answer(uri, client.search_experiments)]
        hint = did_you_mean(experiment, known) or f"; there are {', '.join(known)}"
        raise ModelError("E-EXPERIMENT", f"no experiment of that name in {_shown(uri)}{hint}", where=experiment)
    runs = [_Run.of(run) for run in _all_finished(client, found.experiment_id, uri)]
    with ThreadPoolExecutor(DOWNLOADS) as pool:  # nothing but a remote store makes them wait
        has_table = list(pool.map(lambda run: _has_table(client, run, uri), runs))
        runs = [run for run, has in zip(runs, has_table, strict=True) if has]
        parents = {run.run_id for run in runs}
        runs = [run for run in runs if run.tags.get(PARENT_TAG) not in parents]
        return list(pool.map(lambda run: _with_rows(client, run), runs))


def log_comparison(run_id: str, folder: Path, uri: str | None = None) -> None:
    """Put a folder beside a run's artifacts, in ``comparisons``; one of the same name is replaced file by file.

    Raises:
        ModelError: If there is no such run, or its store does not answer or refuses.
    """
    client = _connect(uri)
    run = _found(client, run_id, uri)
    _answer(uri, client.log_artifacts, run.run_id, str(folder), f"{COMPARISONS}/{folder.resolve().name}")


def register(run: str, name: str, *, alias: str | None = None, tracking_uri: str | None = None) -> dict[str, Any]:
    """Make a run's model a version of a registered model, which ``models:/name@alias`` then means.

    A run that is registered under this name already keeps its version, and only the alias moves.

    Args:
        run: A run folder, or an MLflow run id.
        name: Of the registered model, made if need be.
        alias: Given to this version, and taken from the one that had it.
        tracking_uri: Tracking store; None: the run folder's, else as everywhere.

    Returns:
        ``name, version, alias, run_id, model``; ``model`` is what `medseg predict` takes.

    Raises:
        ModelError: If there is no such run, or it has logged no model.
        WorkflowError: If MLflow does not take the name or the alias.
    """
    delivery = Delivery.load(Path(run))
    run_id, uri = (
        (delivery.run_id or delivery.local_id, tracking_uri or delivery.uri) if delivery else (run, tracking_uri)
    )
    client = _connect(uri)
    found = _found(client, run_id, uri)
    if not _answer(uri, client.list_artifacts, found.run_id, "model"):
        raise _no_artifact(found, "model", "nothing there")
    try:
        version = _version_of(client, found, name)
        if alias:
            ask(client.set_registered_model_alias, name, alias, version)
    except StoreError as error:
        if error.code != "INVALID_PARAMETER_VALUE":
            raise _silent(uri, error) from None
        raise WorkflowError("E-REGISTRY", f"MLflow does not take it: {error}", where=f"{name}@{alias}") from None
    model = f"{REGISTERED}{name}" + (f"@{alias}" if alias else f"/{version}")
    return {"name": name, "version": int(version), "alias": alias, "run_id": found.run_id, "model": model}


def is_registered(model: str) -> bool:
    """Whether a MODEL argument means a registered model."""
    return model.startswith(REGISTERED)


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
    return _answer(uri, open_store, uri)


def _answer(uri: str | None, function: Callable[..., T], *args: Any) -> T:
    """What the store says; if it says nothing, in words."""
    try:
        return ask(function, *args)
    except StoreError as error:
        raise _silent(uri, error) from None


def _silent(uri: str | None, error: StoreError) -> ModelError:
    said = "refuses" if error.refused else "does not answer"
    return ModelError("E-TRACK-DOWN", f"{said}: {error}", where=_shown(uri))


def _shown(uri: str | None) -> str:
    return without_password(absolute_uri(uri))


def _found(client: MlflowClient, run_id: str, uri: str | None) -> _Run:
    try:
        if is_local_id(run_id):
            experiments = [e.experiment_id for e in ask(client.search_experiments)]
            run_id = find_by_local_id(client, experiments, run_id) or run_id
        return _Run.of(ask(client.get_run, run_id))
    except StoreError as error:
        if not error.refused:
            raise _silent(uri, error) from None
        message = f"{run_id!r} is no folder, and {_shown(uri)} has no run of that id; check both, or name another store"
        raise ModelError("E-RUN", message, where=run_id) from None


def _all_finished(client: MlflowClient, experiment: str, uri: str | None) -> Iterator[Any]:
    token = None
    while True:
        page = _answer(uri, partial(client.search_runs, page_token=token), [experiment], "status = 'FINISHED'")
        yield from page
        if not (token := page.token):
            return


def _has_table(client: MlflowClient, run: _Run, uri: str | None) -> bool:
    if run.table_here():
        return True
    return any(artifact.path == PER_CASE for artifact in _answer(uri, client.list_artifacts, run.run_id))


def _with_rows(client: MlflowClient, run: _Run) -> TrackedRun:
    path = run.table_here() or _downloaded(client, run, PER_CASE)
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return TrackedRun(run.run_id, run.name, run.params, run.tags, rows)


def _run_of_registered(client: MlflowClient, model: str) -> str:
    """The id of the run that ``models:/name@alias`` or ``models:/name/version`` comes from."""
    name, is_alias, alias = model.removeprefix(REGISTERED).partition("@")
    if not is_alias:
        name, _, number = name.rpartition("/")
    if not name or not (alias if is_alias else number.isdigit()):
        message = "is no registered model; write models:/NAME@ALIAS or models:/NAME/VERSION"
        raise ModelError("E-REGISTRY", message, where=model)
    try:
        if is_alias:
            version = ask(client.get_model_version_by_alias, name, alias)
        else:
            version = ask(client.get_model_version, name, number)
    except StoreError as error:
        message = f"{error}{_aliases(client, name)}; medseg register RUN {name} --alias {alias or 'NAME'} makes one"
        raise ModelError("E-REGISTRY", message, where=model) from None
    if not version.run_id:
        message = f"version {version.version} names no run; register it with medseg register RUN {name}"
        raise ModelError("E-REGISTRY", message, where=model)
    return str(version.run_id)


def _aliases(client: MlflowClient, name: str) -> str:
    try:
        known = ask(client.get_registered_model, name).aliases
    except StoreError:
        return ""
    return f"; it has {', '.join(f'{alias} (version {version})' for alias, version in known.items()) or 'no alias'}"


def _version_of(client: MlflowClient, run: _Run, name: str) -> str:
    """The run's version of a registered model, made if need be."""
    try:
        ask(client.create_registered_model, name)
    except StoreError as error:
        if error.code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in ask(client.search_model_versions, f"run_id = '{run.run_id}'"):
        if version.name == name:
            return str(version.version)
    # MLflow's register_model wants a model of its own format, and leaves an empty entry if there is none
    return str(ask(client.create_model_version, name, f"{run.artifacts}/model", run.run_id).version)


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
        raise _no_artifact(run, artifact, str(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _no_artifact(run: _Run, artifact: str, reason: str) -> ModelError:
    message = f"run {run.name!r} ({run.status}) has no artifact {artifact!r}: {reason}; has its training ended?"
    return ModelError("E-RUN-ARTIFACT", message, where=run.run_id)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
