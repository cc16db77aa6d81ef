"""A run's parameters, metrics and files go to MLflow, and no store, slow, down or dying, holds training up.

Every line is first written to the run folder (`medseg.tracking.spool`); a background thread sends it
from there (`medseg.tracking.sender`). Runs are always named by their id: MLflow's notion of an active
run joins whatever was left open before.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from medseg.errors import ModelError, WorkflowError
from medseg.files import write_atomically
from medseg.tracking.sender import BackgroundSender, Sender, StoreError
from medseg.tracking.spool import REWIND, Delivery, Record, Spool, lock_run
from medseg.tracking.uri import absolute_uri, initialization_lock, sqlite_file, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient as MlflowClient  # for the siblings' annotations: only this file imports MLflow

T = TypeVar("T")
Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_DIR_TAG = "medseg.run_dir"
LOCAL_ID_TAG = "medseg.local_id"
PARENT_TAG = "mlflow.parentRunId"

START_SECONDS = 30.0
"""How long a run waits for its store before it begins without."""

FINISH_SECONDS = 60.0
"""How long the end of a run waits for what is still to be sent."""

TABLES_TAG = "mlflow.loggedArtifacts"
"""Which artifacts MLflow shows as tables."""

TEXT_COLUMNS = ("case", "organ", "patient", "note")
"""Columns of a table that hold no numbers; a case may well be called 001."""

MAX_NAME, MAX_VALUE, MAX_DIGEST = 250, 6000, 36  # characters, by MLflow's rules
THUMBNAIL_PIXELS = 256

# MLflow retries a request for minutes, prints to stdout and reports its use to its makers, unless told otherwise.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

log = logging.getLogger("medseg")


class MlflowTracker:
    """One MLflow run, fed from a run folder; made by `start`.

    Args:
        run_dir: The run folder.
        delivery: Where its lines go.
        uri: The same with the password, if it has one.
        lock: Held while the run is being written.
    """

    def __init__(self, run_dir: Path, delivery: Delivery, *, uri: str, lock: IO[str]) -> None:
        self._run_dir = run_dir
        self._delivery = delivery
        self._lock = lock
        self._spool = Spool(run_dir)
        self._sender = Sender(run_dir, delivery, self._spool, MlflowRun(run_dir, delivery, uri))
        self._background = BackgroundSender(self._sender, uri=delivery.uri, remedy=f"medseg sync {run_dir}")

    @classmethod
    def start(
        cls,
        run_dir: Path,
        *,
        uri: str | None = None,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None = None,
        parent_run_id: str | None = None,
    ) -> MlflowTracker:
        """Begin a run, or go on with the one that the folder (or `run_id`) already has.

        Args:
            run_dir: Keeps the lines until they are sent, and what is needed to send them later.
            uri: Any MLflow tracking URI; None: $MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``.
            experiment: Made if need be.
            run_name: What people call the run.
            params: Flat. A parameter that the run already has keeps its value: MLflow's are immutable.
            tags: Written anew each time.
            run_id: A run begun elsewhere, to go on with; needless where `run_dir` has one.
            parent_run_id: Run to nest this one in, as its `MlflowTracker.run_id` has it.

        Raises:
            WorkflowError: If the store answers but refuses (unknown kind of URI, deleted experiment, no rights),
                or another process writes this run. A store that does not answer is no error.
        """
        run_dir = run_dir.resolve()
        lock = lock_run(run_dir)
        delivery = Delivery.load(run_dir) or Delivery(
            uri="",
            experiment=experiment,
            run_name=run_name,
            local_id=f"local-{uuid.uuid4().hex}",
            started_ms=_now_ms(),
            parent_run_id=parent_run_id,
            run_id=run_id,
            joined=run_id is not None,
        )
        if uri or not delivery.uri:
            uri = absolute_uri(uri)
            delivery.note(run_dir, uri=without_password(uri))
        tracker = cls(run_dir, delivery, uri=uri or delivery.uri, lock=lock)
        tracker._begin(params, tags)
        return tracker

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; until it exists there, a local one that `medseg` finds it by all the same."""
        return self._delivery.run_id or self._delivery.local_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers. NaN and infinity (an organ that no case has) are left out: charts cannot show them."""
        now = _now_ms()
        self._spool.append(
            {"kind": "metric", "key": safe_name(name), "value": float(value), "step": int(step), "time": now}
            for name, value in metrics.items()
            if math.isfinite(value)
        )

    def log_picture(self, picture: npt.NDArray[np.uint8], name: str, step: int) -> None:
        """Keep a picture in the run folder and log it; MLflow shows the steps of a name under one slider.

        Args:
            picture: RGB, (H, W, 3).
            name: E.g. the case.
            step: Iteration.
        """
        key = re.sub(r"[^A-Za-z0-9_\-. ]", "_", name)
        path = self._run_dir / "pictures" / f"step-{step:06d}" / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        Image.fromarray(picture).save(content, "PNG", compress_level=3)
        write_atomically(path, content.getvalue())
        self._spool.append([{"kind": "picture", "path": self._kept(path), "key": key, "step": int(step)}])

    def log_file(self, path: Path, folder: str = "") -> None:
        """Log a file, or a folder with all that is in it, into an artifact folder."""
        self._spool.append([{"kind": "file", "path": self._kept(path), "folder": folder}])

    def log_table(self, path: Path) -> None:
        """Log a CSV, and beside it the same as JSON, which MLflow shows as a table and `load_table` reads.

        Args:
            path: The CSV, with a header; all columns but TEXT_COLUMNS are numbers, an empty field is none.
        """
        self.log_file(path)
        shown = self._run_dir / path.with_suffix(".json").name
        write_atomically(shown, _table_json(path).encode())
        self._spool.append([{"kind": "table", "path": self._kept(shown)}])

    def log_data_set(self, name: str, digest: str, *, source: str, profile: Mapping[str, Any]) -> None:
        """Say what the run learns from; nothing is read.

        Args:
            name: Of the data set.
            digest: Hash of its content; MLflow keeps the first 36 characters.
            source: Where it is described, as the user wrote it.
            profile: What else people want to know of it, e.g. numbers of cases.
        """
        said = {"name": name, "digest": digest[:MAX_DIGEST], "source": source, "profile": dict(profile)}
        self._spool.append([{"kind": "data_set", **said}])

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; one that is there already gets the new value."""
        self._log_texts("tag", tags)

    def rewind(self, step: int, count: int) -> None:
        """Say that the training went back to a step and takes another course from there.

        The store shows both courses, as it forgets nothing; a step's latest value is that of the second.

        Args:
            step: The last one whose numbers still hold.
            count: How often this has happened; saying it again changes nothing.
        """
        self._spool.append([{"kind": REWIND, "key": str(count), "step": int(step)}])

    def finish(self, status: Status, *, wait_seconds: float = FINISH_SECONDS) -> None:
        """End the run, waiting a bounded time for what is still to be sent."""
        self._spool.append([{"kind": "status", "status": status, "time": _now_ms()}])
        done = self._background.finish(wait_seconds)
        if num_unsent := self._sender.num_unsent():
            log.warning(
                f"W-TRACK-UNSENT {num_unsent} lines for {self._delivery.uri} are not sent; "
                f"when it answers again: medseg sync {self._run_dir}"
            )
        if done:  # else the lock keeps a second sender away until this process ends
            self._lock.close()

    def _begin(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self._log_texts("param", params)
        self._log_texts("tag", tags)
        self._spool.append([{"kind": "status", "status": "RUNNING"}])
        trouble = self._background.start(START_SECONDS)
        if trouble and trouble.refused and self._delivery.run_id is None:
            self._background.abandon()
            self._lock.close()
            message = f"the tracking store refuses this run: {trouble}; mend track.uri or track.experiment"
            raise WorkflowError("E-TRACK-URI", message, where=self._delivery.uri)

    def _log_texts(self, kind: str, entries: Mapping[str, Any]) -> None:
        self._spool.append(
            {"kind": kind, "key": safe_name(name), "value": str(value)[:MAX_VALUE]} for name, value in entries.items()
        )

    def _kept(self, path: Path) -> str:
        """A path relative to the run folder, into which what lies elsewhere is copied, for `sync` to find."""
        path = path.resolve()
        if not path.is_relative_to(self._run_dir):
            copy = self._run_dir / "tracked" / path.name
            copy.parent.mkdir(exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, copy, dirs_exist_ok=True)
            else:
                shutil.copy2(path, copy)
            path = copy
        return str(path.relative_to(self._run_dir))


class MlflowRun:
    """A run in an MLflow store, made on first use.

    Args:
        run_dir: Its run folder.
        delivery: What is known of the run; gets its id.
        uri: The store, with password if it has one.
    """

    def __init__(self, run_dir: Path, delivery: Delivery, uri: str) -> None:
        self._run_dir = run_dir
        self._delivery = delivery
        self._uri = uri
        self._connected: MlflowClient | None = None

    def prepare(self) -> None:
        self._connected = self._connected or open_store(self._uri)
        if self._delivery.run_id is None:
            experiment = self._experiment()
            run_id = self._made_before_or_now(experiment)
            self._link(experiment, run_id)
            self._delivery.note(self._run_dir, run_id=run_id)

    def points(self, key: str) -> set[tuple[int, int]]:
        return {(metric.step, metric.timestamp) for metric in ask(self._client.get_metric_history, self._run_id, key)}

    def is_open(self) -> bool:
        return bool(ask(self._client.get_run, self._run_id).info.lifecycle_stage == "active")

    def send(self, records: Sequence[Record]) -> None:
        client, run_id, first = self._client, self._run_id, records[0]
        path = self._run_dir / first.get("path", "")
        if first["kind"] == "status" and first["status"] == "RUNNING":
            ask(client.update_run, run_id, status="RUNNING")
        elif first["kind"] == "status":
            ask(client.set_terminated, run_id, status=first["status"], end_time=first["time"])
        elif not path.exists():
            log.warning(f"W-TRACK-FILE {path} is gone and was not sent")
        elif first["kind"] == "picture":
            self._send_picture(path, first["key"], first["step"])
        elif first["kind"] == "data_set":
            self._send_data_set(first)
        elif first["kind"] == "table":
            self._send_table(path)
        elif first["kind"] == "file" and path.is_dir():
            ask(client.log_artifacts, run_id, str(path), f"{first['folder']}/{path.name}".strip("/"))
        elif first["kind"] == "file":
            ask(client.log_artifact, run_id, str(path), first["folder"] or None)
        else:
            self._send_batch(records)

    @property
    def _client(self) -> MlflowClient:
        assert self._connected is not None
        return self._connected

    @property
    def _run_id(self) -> str:
        assert self._delivery.run_id is not None
        return self._delivery.run_id

    def _send_batch(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(r["key"], r["value"], r["time"], r["step"]) for r in records if r["kind"] == "metric"]
        params = [Param(r["key"], r["value"]) for r in records if r["kind"] == "param"]
        tags = [RunTag(r["key"], r["value"]) for r in records if r["kind"] == "tag"]
        ask(self._client.log_batch, self._run_id, metrics=metrics, params=params, tags=tags, synchronous=True)

    def _send_picture(self, path: Path, key: str, step: int) -> None:
        """Under the name log_image would give it, but without its random part: sent twice, it is there once."""
        unique = uuid.uuid5(uuid.NAMESPACE_URL, f"{self._delivery.local_id}/{key}/{step}")
        stem = f"{key}+step+{step}+timestamp+{self._delivery.started_ms}+{unique}"
        with tempfile.TemporaryDirectory(prefix="medseg-") as folder:
            shutil.copyfile(path, Path(folder, f"{stem}.png"))
            with Image.open(path) as picture:
                picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
                picture.save(Path(folder, f"{stem}+compressed.webp"))
            ask(self._client.log_artifacts, self._run_id, folder, "images")
        ask(self._client.set_tag, self._run_id, "mlflow.loggedImages", "True")

    def _send_table(self, path: Path) -> None:
        """As log_table would, which appends to what is there: sent twice, it is there once."""
        ask(self._client.log_artifact, self._run_id, str(path))
        tables = json.loads(ask(self._client.get_run, self._run_id).data.tags.get(TABLES_TAG, "[]"))
        table = {"path": path.name, "type": "table"}
        if table not in tables:
            ask(self._client.set_tag, self._run_id, TABLES_TAG, json.dumps([*tables, table]))

    def _send_data_set(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source, profile = json.dumps({"uri": record["source"]}), json.dumps(record["profile"])
        data_set = Dataset(record["name"], record["digest"], "local", source, profile=profile)
        inputs = [DatasetInput(data_set, [InputTag("mlflow.data.context", "training")])]
        ask(self._client.log_inputs, self._run_id, datasets=inputs)

    def _made_before_or_now(self, experiment: str) -> str:
        """The run's id; an earlier attempt may have made the run and not heard of it."""
        delivery = self._delivery
        if found := find_by_local_id(self._client, [experiment], delivery.local_id):
            return found
        tags = {LOCAL_ID_TAG: delivery.local_id, RUN_DIR_TAG: str(self._run_dir), "mlflow.source.name": "medseg"}
        if delivery.parent_run_id:
            tags[PARENT_TAG] = delivery.parent_run_id
        create = self._client.create_run
        return str(ask(create, experiment, delivery.started_ms, tags, run_name=delivery.run_name).info.run_id)

    def _link(self, experiment: str, run_id: str) -> None:
        """Nest under a parent, and take in children, that knew each other only by a local id."""
        parent = self._delivery.parent_run_id
        if parent and is_local_id(parent) and (found := find_by_local_id(self._client, [experiment], parent)):
            ask(self._client.set_tag, run_id, PARENT_TAG, found)
        children = f"tags.`{PARENT_TAG}` = '{self._delivery.local_id}'"
        for child in ask(self._client.search_runs, [experiment], children):
            ask(self._client.set_tag, child.info.run_id, PARENT_TAG, run_id)

    def _experiment(self) -> str:
        name = self._delivery.experiment
        found = ask(self._client.get_experiment_by_name, name)
        if found is None:
            database = sqlite_file(self._uri)
            location = (database.parent / "mlartifacts").as_uri() if database else None  # not wherever one stands
            try:
                return str(ask(self._client.create_experiment, name, artifact_location=location))
            except StoreError as error:
                if error.code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = ask(self._client.get_experiment_by_name, name)  # another run was faster
        if found is None or found.lifecycle_stage != "active":
            raise StoreError(f"experiment {name!r} was deleted; restore it or choose another", "BAD_REQUEST")
        return str(found.experiment_id)


def sync(run_dir: Path, *, uri: str | None = None) -> int:
    """Send what a run could not send while it ran; a run that died without a word is marked KILLED.

    Args:
        run_dir: The run folder.
        uri: The store, if it has moved or needs a password; None: the one the run was tracked in.

    Returns:
        How many lines were sent.

    Raises:
        ModelError: If the folder was never tracked, or its store does not answer or refuses.
        WorkflowError: If the run is still being written (its own process sends then).
    """
    run_dir = run_dir.resolve()
    delivery = Delivery.load(run_dir)
    if delivery is None:
        raise ModelError("E-SYNC-RUN", "holds no tracking.json; name a run folder of medseg train", where=str(run_dir))
    with lock_run(run_dir):
        spool = Spool(run_dir)
        statuses = [line.record["status"] for line in spool.read() if line.record["kind"] == "status"]
        if statuses[-1:] in ([], ["RUNNING"]):
            spool.append([{"kind": "status", "status": "KILLED", "time": _now_ms()}])
        run = MlflowRun(run_dir, delivery, absolute_uri(uri or delivery.uri))
        sender = Sender(run_dir, delivery, spool, run)
        try:
            return sender.send()
        except StoreError as error:
            message = f"{sender.num_unsent()} lines are not sent: {error}; start the store, or name another with --uri"
            raise ModelError("E-TRACK-DOWN", message, where=without_password(uri or delivery.uri)) from None


def open_store(uri: str) -> MlflowClient:
    """A client of a tracking store; a sqlite store that does not exist yet is made.

    Raises:
        StoreError: If it does not answer.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    def first_answer() -> MlflowClient:
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # what goes wrong comes back as exceptions, and medseg words it
            logging.getLogger(name).setLevel(logging.CRITICAL)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        return client

    with initialization_lock(uri), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # MLflow's own use of SQLAlchemy
        return ask(first_answer)


def ask(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call MLflow.

    Raises:
        StoreError: For whatever it raises; errors of HTTP, SQL and cloud libraries come through it as they are.
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:
        code = "BAD_REQUEST" if isinstance(error, ImportError) else getattr(error, "error_code", None)
        raise StoreError(_reason(error), code) from error


def find_by_local_id(client: MlflowClient, experiments: Sequence[str], local_id: str) -> str | None:
    """MLflow's id of a run that has a local one; None if it is not there."""
    found = ask(client.search_runs, list(experiments), f"tags.`{LOCAL_ID_TAG}` = '{local_id}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def is_local_id(run_id: str) -> bool:
    """Whether an id was given by `MlflowTracker` because the store could not."""
    return run_id.startswith("local-")


def safe_name(name: str) -> str:
    """A name MLflow takes: letters, digits and ``_-. :/``; no empty or relative parts between slashes."""
    parts = [part for part in re.sub(r"[^\w\-. :/]", "_", name).split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_NAME] or "_"


def _table_json(path: Path) -> str:
    """A CSV as MLflow writes tables: the columns' names, and a list for each row."""
    with path.open(newline="") as stream:
        columns, *rows = csv.reader(stream)
    is_text = [column in TEXT_COLUMNS for column in columns]
    data = [[field if text else _number(field) for field, text in zip(row, is_text, strict=True)] for row in rows]
    return json.dumps({"columns": columns, "data": data})


def _number(field: str) -> float | None:
    """None for what JSON has no number for."""
    value = float(field or "nan")
    return value if math.isfinite(value) else None


def _reason(error: Exception) -> str:
    """One line for people: "Connection refused", not the tale of every library it passed through."""
    root: BaseException = error
    while root.__context__ is not None:
        root = root.__context__
    told = root.strerror or str(root) if isinstance(root, OSError) else str(error)
    return (told.strip().splitlines() or [type(error).__name__])[0][:300]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
