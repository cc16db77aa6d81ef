from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from medseg.errors import ModelError, WorkflowError
from medseg.tracking.mlflow_tracker import MlflowTracker
from medseg.tracking.runs import model_folder, per_case_table, serve_ui

from .conftest import Server

Begin = Callable[..., MlflowTracker]


@pytest.fixture
def finished(store: str, begin: Begin, tmp_path: Path) -> MlflowTracker:
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


def test_a_run_on_this_machine_is_read_from_its_folder(finished: MlflowTracker, store: str, tmp_path: Path) -> None:
    assert model_folder(finished.run_id, store) == tmp_path / "run" / "model"
    assert per_case_table(finished.run_id, store) == [{"case": "a", "organ": "liver", "dice": "0.5"}]


def test_a_run_whose_folder_is_gone_is_downloaded_once(
    finished: MlflowTracker, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "run")
    folder = model_folder(finished.run_id, store)
    assert folder.is_relative_to(tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    assert per_case_table(finished.run_id, store)[0]["dice"] == "0.5"
    shutil.rmtree(tmp_path / "mlartifacts")
    assert model_folder(finished.run_id, store) == folder
    assert not list(folder.parent.glob(".*"))


def test_a_folder_of_another_run_at_the_same_path_is_not_taken_for_it(
    finished: MlflowTracker, store: str, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "run")
    begin(store).finish("FINISHED")
    (tmp_path / "run" / "per_case.csv").write_text("case,organ,dice\na,liver,0.25\n")
    assert per_case_table(finished.run_id, store)[0]["dice"] == "0.5"


def test_a_run_is_found_by_the_id_it_had_before_its_store_answered(finished: MlflowTracker, store: str) -> None:
    assert model_folder(finished._delivery.local_id, store) == model_folder(finished.run_id, store)


def test_a_run_without_a_model_says_so(store: str, begin: Begin) -> None:
    tracker = begin(store)
    tracker.finish("FAILED")
    with pytest.raises(ModelError, match=r"E-RUN-ARTIFACT.*'fold0' \(FAILED\) has no artifact 'model'"):
        model_folder(tracker.run_id, store)


@pytest.mark.parametrize("run_id", ["0" * 32, "local-" + "0" * 32, "runs/typo"])
def test_an_unknown_run_is_named(store: str, run_id: str) -> None:
    with pytest.raises(ModelError, match=r"is no folder, and .* has no run of that id"):
        model_folder(run_id, store)


def test_looking_for_a_run_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="E-RUN"):
        model_folder("a" * 32, f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_down_is_named() -> None:
    with pytest.raises(ModelError, match=r"E-TRACK-DOWN http://127\.0\.0\.1:9: does not answer: Connection refused"):
        model_folder("a" * 32, "http://127.0.0.1:9")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "myhost"])
def test_the_ui_is_not_opened_to_the_network_without_passwords(store: str, host: str) -> None:
    with pytest.raises(WorkflowError, match="E-UI-HOST"):
        serve_ui(store, host)


@pytest.mark.parametrize("uri", ["http://host:5000", "sqlite:////nowhere/mlflow.db"])
def test_there_is_no_ui_for_servers_or_for_stores_that_do_not_exist(uri: str) -> None:
    with pytest.raises(WorkflowError, match="E-UI-STORE"):
        serve_ui(uri)


def test_the_ui_answers_until_it_is_interrupted(server: Server) -> None:
    with urllib.request.urlopen(server.uri, timeout=20) as page:
        assert b"MLflow" in page.read()
    assert server.interrupt() == 0
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(server.uri, timeout=20)
