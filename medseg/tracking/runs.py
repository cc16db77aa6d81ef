"""What was tracked is read again: a run's folder and table by its MLflow id, and all runs of an experiment."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from medseg.data.manifest import cache_folder
from medseg.errors import ModelError
from medseg.files import temporary_path
from medseg.metrics.table import PER_CASE, read_rows
from medseg.registry import did_you_mean
from medseg.tracking.mlflow_tracker import PARENT_TAG, RUN_DIR_TAG, ask, find_by_local_id, is_local_id
from medseg.tracking.sender import StoreError
from medseg.tracking.spool import Delivery
from medseg.tracking.store import answer, connect, shown, silent
from medseg.wording import listed

if TYPE_CHECKING:
    from medseg.tracking.mlflow_tracker import MlflowClient

COMPARISONS = "comparisons"
SHORT_ID = re.compile("[0-9a-f]{8,31}")
"""The beginning of an MLflow id of 32."""

DOWNLOADS = 8
"""Tables fetched at a time."""


@dataclass(frozen=True)
class TrackedRun:
    """A run with its table, as it was tracked.

    Args:
        run_id: MLflow's id.
        name: What people call it.
        tags: Those of `medseg.build.provenance`, and MLflow's own.
        rows: Of ``per_case.csv``: case, organ, and a column a metric.
    """

    run_id: str
    name: str
    tags: Mapping[str, str]
    rows: list[dict[str, str]]


@dataclass(frozen=True)
class Run:
    """A run in the tracking store.

    Args:
        run_id: MLflow's id.
        name: What people call it.
        status: RUNNING, FINISHED, FAILED or KILLED.
        tags: See `TrackedRun`.
        artifacts: URI of its artifacts.
    """

    run_id: str
    name: str
    status: str
    tags: Mapping[str, str]
    artifacts: str

    @classmethod
    def of(cls, run: Any) -> Run:
        info, data = run.info, run.data
        return cls(info.run_id, info.run_name, info.status, data.tags, info.artifact_uri)

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


def run_folder(run_id: str, uri: str | None = None) -> Path:
    """The run folder of a run.

    Raises:
        ModelError: If there is no such run, or its folder is not on this machine.
    """
    run = find_run(connect(uri), run_id, uri)
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
    client = connect(uri)
    return _with_rows(client, find_run(client, run_id, uri))


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
    client = connect(uri)
    found = answer(uri, client.get_experiment_by_name, experiment)
    if found is None:
        known = [each.name for each in answer(uri, client.search_experiments)]
        hint = did_you_mean(experiment, known) or f"; there are {', '.join(known)}"
        raise ModelError("E-EXPERIMENT", f"no experiment of that name in {shown(uri)}{hint}", where=experiment)
    runs = [Run.of(run) for run in _all_finished(client, found.experiment_id, uri)]
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
    client = connect(uri)
    run = find_run(client, run_id, uri)
    answer(uri, client.log_artifacts, run.run_id, str(folder), f"{COMPARISONS}/{folder.resolve().name}")


def find_run(client: MlflowClient, run_id: str, uri: str | None) -> Run:
    """A run by its id, by the first eight of its letters or more, or by the id it had before its store answered.

    Raises:
        ModelError: If there is no such run, several have ids that begin so, or the store does not answer.
    """
    try:
        if is_local_id(run_id):
            run_id = find_by_local_id(client, _experiments(client), run_id) or run_id
        elif SHORT_ID.fullmatch(run_id):
            found = [r.info.run_id for r in ask(client.search_runs, _experiments(client), f"run_id LIKE '{run_id}%'")]
            if len(found) > 1:
                raise ModelError("E-RUN", f"means several runs: {listed(found)}; write more of the id", where=run_id)
            run_id = found[0] if found else run_id
        return Run.of(ask(client.get_run, run_id))
    except StoreError as error:
        if not error.refused:
            raise silent(uri, error) from None
        message = f"{run_id!r} is no folder, and {shown(uri)} has no run of that id; check both, or name another store"
        raise ModelError("E-RUN", message, where=run_id) from None


def _experiments(client: MlflowClient) -> list[str]:
    return [experiment.experiment_id for experiment in ask(client.search_experiments)]


def downloaded(client: MlflowClient, run: Run, artifact: str) -> Path:
    """A run's artifact in the user's cache, whole or not there.

    Raises:
        ModelError: If the run has no such artifact.
    """
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
        raise no_artifact(run, artifact, str(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def no_artifact(run: Run, artifact: str, reason: str) -> ModelError:
    """The error to raise for a run that lacks an artifact."""
    message = f"run {run.name!r} ({run.status}) has no artifact {artifact!r}: {reason}; has its training ended?"
    return ModelError("E-RUN-ARTIFACT", message, where=run.run_id)


def _all_finished(client: MlflowClient, experiment: str, uri: str | None) -> Iterator[Any]:
    token = None
    while True:
        page = answer(uri, partial(client.search_runs, page_token=token), [experiment], "status = 'FINISHED'")
        yield from page
        if not (token := page.token):
            return


def _has_table(client: MlflowClient, run: Run, uri: str | None) -> bool:
    if run.table_here():
        return True
    return any(artifact.path == PER_CASE for artifact in answer(uri, client.list_artifacts, run.run_id))


def _with_rows(client: MlflowClient, run: Run) -> TrackedRun:
    rows = read_rows(run.table_here() or downloaded(client, run, PER_CASE))
    return TrackedRun(run.run_id, run.name, run.tags, rows)


def _is_folder_of(folder: Path, run_id: str) -> bool:
    """Whether a folder is that run's, not another one that has the same path on this machine."""
    delivery = Delivery.load(folder) if folder.is_absolute() else None
    return delivery is not None and delivery.run_id == run_id
