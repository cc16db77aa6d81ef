from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from medseg.errors import ModelError, WorkflowError
from medseg.tracking.mlflow_tracker import MlflowTracker, open_store
from medseg.tracking.models import model_folder, register

from .conftest import Server

Begin = Callable[..., MlflowTracker]


def test_an_alias_means_the_run_that_has_it_now(
    finished: MlflowTracker, store: str, begin: Begin, tmp_path: Path
) -> None:
    told = register(str(tmp_path / "run"), "liver", alias="champion")
    assert told == {
        "name": "liver",
        "version": 1,
        "alias": "champion",
        "run_id": finished.run_id,
        "model": "models:/liver@champion",
    }
    assert model_folder("models:/liver@champion", store) == tmp_path / "run" / "model"
    assert model_folder("models:/liver/1", store) == tmp_path / "run" / "model"
    better = begin(store, run_dir=tmp_path / "better")
    (tmp_path / "better" / "model").mkdir()
    (tmp_path / "better" / "model" / "model.json").write_text('{"format": 1}')
    better.log_file(tmp_path / "better" / "model")
    better.finish("FINISHED")
    assert register(better.run_id, "liver", alias="champion", tracking_uri=store)["version"] == 2
    assert model_folder("models:/liver@champion", store) == tmp_path / "better" / "model"
    back = register(finished.run_id, "liver", alias="champion", tracking_uri=store)
    assert back["version"] == 1  # not a third one
    assert model_folder("models:/liver@champion", store) == tmp_path / "run" / "model"


def test_a_registered_model_is_downloaded_from_a_server(
    server: Server, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    tracker = begin(server.uri, experiment="registered")
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "model.json").write_text('{"format": 1}')
    tracker.log_file(tmp_path / "run" / "model")
    tracker.finish("FINISHED")
    shutil.rmtree(tmp_path / "run")
    register(tracker.run_id, "remote", alias="champion", tracking_uri=server.uri)
    folder = model_folder("models:/remote@champion", server.uri)
    assert (folder / "model.json").read_text() == '{"format": 1}'
    assert folder.is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/liver@best", r"it has champion \(version 1\); medseg register RUN liver --alias best"),
        ("models:/liver/7", r"E-REGISTRY .*it has champion"),
        ("models:/spleen@best", r"E-REGISTRY .*medseg register RUN spleen --alias best"),
        ("models:/liver", r"lacks an alias or a version; write models:/NAME@ALIAS .*; it has champion \(version 1\)"),
        ("models:/@best", r"lacks a name; write models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_what_is_not_registered_says_what_is(finished: MlflowTracker, store: str, model: str, message: str) -> None:
    register(finished.run_id, "liver", alias="champion", tracking_uri=store)
    with pytest.raises(ModelError, match=message):
        model_folder(model, store)


def test_a_registered_model_is_what_predict_loads(finished: MlflowTracker, store: str, tmp_path: Path) -> None:
    from medseg.build.model import find_model  # torch takes seconds to import

    register(finished.run_id, "liver", alias="champion", tracking_uri=store)
    assert find_model("models:/liver@champion", store) == tmp_path / "run" / "model"


def test_a_folder_that_is_no_run_folder_is_told_from_an_unknown_id(store: str, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    with pytest.raises(ModelError, match=r"E-RUN .*else: is a folder, but no run folder"):
        register(str(tmp_path / "else"), "liver", tracking_uri=store)


def test_a_run_without_a_model_is_not_registered(store: str, begin: Begin) -> None:
    tracker = begin(store)
    tracker.finish("FINISHED")
    with pytest.raises(ModelError, match="E-RUN-ARTIFACT"):
        register(tracker.run_id, "liver", tracking_uri=store)
    assert open_store(store).search_registered_models() == []  # not even an empty one


def test_names_that_mlflow_does_not_take_are_told(finished: MlflowTracker, store: str) -> None:
    with pytest.raises(WorkflowError, match="E-REGISTRY"):
        register(finished.run_id, "liver/ct", tracking_uri=store)
    with pytest.raises(WorkflowError, match="E-REGISTRY"):
        register(finished.run_id, "liver", alias="latest", tracking_uri=store)
