"""A sqlite store per test, a real tracking server per module, and short pauses."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import medseg
from medseg.tracking import sender
from medseg.tracking.mlflow_tracker import ENVIRONMENT, MlflowTracker, open_store


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sender, "SEND_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(sender, "RETRY_SECONDS", (0.1, 0.2))
    for name, value in ENVIRONMENT.items():  # else the first store opened would set them for good
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database to copy: MLflow takes seconds to make one."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        open_store(f"sqlite:///{database}")
    return database


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> str:
    """URI of an empty store of the test's own."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


SERVE = "import sys; from medseg.tracking.ui import serve_ui; sys.exit(serve_ui(sys.argv[1], port=int(sys.argv[2])))"


class Server:
    """The MLflow server of ``medseg ui``, which can be killed, stopped and started again on the same port."""

    def __init__(self, database: Path) -> None:
        self._folder = database.parent
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-c", SERVE, f"sqlite:///{database}", port]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is None:
            environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(medseg.__file__).parents[1])}
            with (self._folder / "server.log").open("a") as log:
                self._process = subprocess.Popen(
                    self._command, stdout=log, stderr=log, cwd=self._folder, env=environment, start_new_session=True
                )
        wait_until(self._answers, 120)

    def signal(self, number: signal.Signals) -> None:
        """To the server and its workers."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def interrupt(self) -> int:
        """Ctrl-C; the exit code."""
        assert self._process is not None
        self.signal(signal.SIGINT)
        code = self._process.wait(60)
        self._process = None
        return code

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/api/2.0/mlflow/experiments/search?max_results=1", timeout=5):
                return True
        except OSError:
            return False


@pytest.fixture(scope="session")
def shared_server(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    database = tmp_path_factory.mktemp("server") / "mlflow.db"
    shutil.copy(empty_store, database)
    server = Server(database)
    yield server
    server.kill()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """The session's server, up."""
    shared_server.start()
    return shared_server


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., MlflowTracker]:
    """Starts a run in ``tmp_path / "run"``."""

    def start(
        uri: str, *, run_dir: Path = tmp_path / "run", experiment: str = "liver", **others: object
    ) -> MlflowTracker:
        given = {"run_name": "fold0", "params": {"train.lr": 1e-3}, "tags": {"medseg.fold": "0"}, **others}
        return MlflowTracker.start(run_dir, uri=uri, experiment=experiment, **given)  # type: ignore[arg-type]

    return start


@pytest.fixture
def finished(store: str, begin: Callable[..., MlflowTracker], tmp_path: Path) -> MlflowTracker:
    """A run with a model and a table, in ``tmp_path / "run"``."""
    tracker = begin(store)
    folder = tmp_path / "run" / "model"
    folder.mkdir()
    (folder / "model.json").write_text('{"format": 1}')
    (folder / "model.safetensors").write_bytes(b"weights")
    tracker.log_file(folder)
    (tmp_path / "run" / "per_case.csv").write_text("case,organ,dice\na,liver,0.5\n")
    tracker.log_file(tmp_path / "run" / "per_case.csv")
    tracker.finish("FINISHED")
    return tracker


@pytest.fixture
def shown_table(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """The data frame that MLflow makes of a run's ``per_case.json``, from a store's URI and the run's id."""

    def load(uri: str, run_id: str) -> Any:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # load_table looks for runs in the store of the process
        client = open_store(uri)
        return client.load_table(client.get_run(run_id).info.experiment_id, "per_case.json", [run_id])

    return load


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
