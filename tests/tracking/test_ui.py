from __future__ import annotations

import urllib.error
import urllib.request

import pytest

from medseg.errors import WorkflowError
from medseg.tracking.mlflow_tracker import open_store
from medseg.tracking.ui import serve_ui

from .conftest import Server


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "myhost"])
def test_the_ui_is_not_opened_to_the_network_without_passwords(store: str, host: str) -> None:
    with pytest.raises(WorkflowError, match="E-UI-HOST"):
        serve_ui(store, host)


@pytest.mark.parametrize("uri", ["http://host:5000", "sqlite:////nowhere/mlflow.db"])
def test_there_is_no_ui_for_servers_or_for_stores_that_do_not_exist(uri: str) -> None:
    with pytest.raises(WorkflowError, match="E-UI-STORE"):
        serve_ui(uri)


def test_the_ui_tells_where_the_runs_of_each_experiment_are(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = open_store(store).create_experiment("liver [CT]")
    started: list[list[str]] = []

    class Server:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            started.append(command)

        def __enter__(self) -> Server:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def wait(self) -> int:
            return 7

    monkeypatch.setattr("medseg.tracking.ui.subprocess.Popen", Server)
    assert serve_ui(store, "::1", 5001) == 7
    assert started[0][started[0].index("--port") + 1] == "5001"
    told = capsys.readouterr().err
    assert f"liver [CT]  http://[::1]:5001/#/experiments/{number}/runs?workflowType=machine_learning\n" in told


def test_the_ui_answers_until_it_is_interrupted(server: Server) -> None:
    with urllib.request.urlopen(server.uri, timeout=20) as page:
        assert b"MLflow" in page.read()
    assert server.interrupt() == 0
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(server.uri, timeout=20)
