"""A sqlite store per test, a real tracking server per module, and short pauses."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medseg.tracking import sender
from medseg.tracking.mlflow_tracker import ENVIRONMENT, MlflowTracker, open_store

START_SECONDS = 60


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sender, "SEND_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(sender, "RETRY_SECONDS", (0.1, 0.2))
    for name, value in ENVIRONMENT.items():  # else the first store opened would set them for good
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


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


class Server:
    """A real ``mlflow server`` that can be killed, stopped and started again on the same port."""

    def __init__(self, database: Path) -> None:
        self._folder = database.parent
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is None:
            command = [sys.executable, "-m", "mlflow", "server", "--port", str(self._port), "--workers", "1"]
            command += ["--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"]
            command += ["--artifacts-destination", str(self._folder / "artifacts")]
            with (self._folder / "server.log").open("a") as output:
                self._process = subprocess.Popen(
                    command, stdout=output, stderr=output, start_new_session=True, cwd=self._folder,
                    env={**os.environ, **ENVIRONMENT},
                )  # fmt: skip
        wait_until(self._answers, START_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        """To the server and its workers."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture(scope="module")
def shared_server(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    database = tmp_path_factory.mktemp("server") / "mlflow.db"
    shutil.copy(empty_store, database)
    server = Server(database)
    yield server
    server.kill()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """The module's server, up."""
    shared_server.start()
    return shared_server


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., MlflowTracker]:
    """Starts a run in ``tmp_path / "run"``."""

    def start(uri: str, *, run_dir: Path = tmp_path / "run", experiment: str = "liver", **others: object) -> MlflowTracker:
        given = {"run_name": "fold0", "params": {"train.lr": 1e-3}, "tags": {"medseg.fold": "0"}, **others}
        return MlflowTracker.start(run_dir, uri=uri, experiment=experiment, **given)  # type: ignore[arg-type]

    return start


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
