from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medseg.errors import ModelError
from medseg.tracking.mlflow_tracker import MlflowTracker, open_store
from medseg.tracking.models import model_folder
from medseg.tracking.runs import experiment_runs, log_comparison, tracked_run

from .conftest import Server

Begin = Callable[..., MlflowTracker]


def test_a_run_on_this_machine_is_read_from_its_folder(finished: MlflowTracker, store: str, tmp_path: Path) -> None:
    assert model_folder(finished.run_id, store) == tmp_path / "run" / "model"
    assert tracked_run(finished.run_id, store).rows == [{"case": "a", "organ": "liver", "dice": "0.5"}]


def test_a_run_whose_folder_is_gone_is_downloaded_once(
    finished: MlflowTracker, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "run")
    folder = model_folder(finished.run_id, store)
    assert folder.is_relative_to(tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    assert tracked_run(finished.run_id, store).rows[0]["dice"] == "0.5"
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
    assert tracked_run(finished.run_id, store).rows[0]["dice"] == "0.5"


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


def with_table(client: Any, experiment: str, dice: float, *, num_rows: int = 1, **tags: str) -> str:
    """A finished run of another machine, whose table is in the store alone; its id."""
    run = client.create_run(experiment, tags=tags, run_name=f"dice {dice}")
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    folder.mkdir(parents=True)
    rows = "".join(f"case_{n // 10:03d},organ_{n % 10},{dice},\n" for n in range(num_rows))
    (folder / "per_case.csv").write_text(f"case,organ,dice,note\n{rows}")
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


@pytest.fixture
def experiment(store: str, tmp_path: Path) -> str:
    """Id of an empty experiment, "liver"."""
    return str(open_store(store).create_experiment("liver", artifact_location=(tmp_path / "artifacts").as_uri()))


def test_the_first_letters_of_an_id_are_enough_where_they_tell_it_from_others(
    finished: MlflowTracker, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracked_run(finished.run_id[:8], store).run_id == finished.run_id
    with pytest.raises(ModelError, match="has no run of that id"):
        tracked_run(finished.run_id[:7], store)
    with pytest.raises(ModelError, match="has no run of that id"):
        tracked_run("0" * 8, store)
    monkeypatch.setattr("uuid.uuid4", lambda: uuid.UUID(finished.run_id[:12] + "0" * 20))
    open_store(store).create_run("0")
    monkeypatch.undo()
    with pytest.raises(ModelError, match=f"E-RUN {finished.run_id[:8]}: means several runs: .*{finished.run_id}"):
        tracked_run(finished.run_id[:8], store)


def test_a_tracked_run_has_its_tags_and_rows(finished: MlflowTracker, store: str) -> None:
    run = tracked_run(finished.run_id, store)
    assert (run.run_id, run.name) == (finished.run_id, "fold0")
    assert run.tags["medseg.fold"] == "0"
    assert run.rows == [{"case": "a", "organ": "liver", "dice": "0.5"}]


def test_forty_runs_with_tables_of_200_rows_are_read_fast(store: str, experiment: str) -> None:
    from mlflow.entities import Metric, Param, RunTag

    client = open_store(store)
    for n in range(40):
        run_id = with_table(client, experiment, n / 40, num_rows=200)
        client.log_batch(
            run_id,
            metrics=[Metric(f"val/dice/organ_{organ}", n / 40, step, step) for organ in range(10) for step in range(5)],
            params=[Param("network.name", "unet"), Param("train.seed", str(n))],
            tags=[RunTag("medseg.manifest_sha256", "ab" * 32)],
        )
    began = time.process_time()  # of this process: the machine may be busy
    runs = experiment_runs("liver", store)
    assert time.process_time() - began < 2.5
    assert len({run.run_id for run in runs}) == 40
    assert {len(run.rows) for run in runs} == {200}
    assert {run.tags["medseg.manifest_sha256"] for run in runs} == {"ab" * 32}
    assert [{f"dice {row['dice']}" for row in run.rows} for run in runs] == [{run.name} for run in runs]


def test_a_cross_validation_counts_by_its_joint_table_alone(store: str, experiment: str) -> None:
    client = open_store(store)
    parent = with_table(client, experiment, 0.5)
    for dice in (0.25, 0.75):
        with_table(client, experiment, dice, **{"mlflow.parentRunId": parent})
    unfinished = client.create_run(experiment).info.run_id
    orphan = with_table(client, experiment, 0.125, **{"mlflow.parentRunId": unfinished})
    assert [run.run_id for run in experiment_runs("liver", store)] == [orphan, parent]


def test_runs_without_a_table_and_runs_under_way_are_left_out(store: str, experiment: str) -> None:
    client = open_store(store)
    client.set_terminated(client.create_run(experiment).info.run_id)
    client.set_terminated(with_table(client, experiment, 0.5), status="FAILED")
    done = with_table(client, experiment, 0.75)
    assert [run.run_id for run in experiment_runs("liver", store)] == [done]


def test_an_unknown_experiment_names_the_nearest(store: str, experiment: str) -> None:
    with pytest.raises(ModelError, match=r"E-EXPERIMENT livre: .*did you mean 'liver'"):
        experiment_runs("livre", store)


def test_tables_behind_a_server_are_downloaded_and_a_comparison_is_put_beside_them(
    server: Server,
    begin: Begin,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shown_table: Callable[[str, str], Any],
) -> None:
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    ids = set()
    for name in ("a", "b"):
        tracker = begin(server.uri, run_dir=tmp_path / name, experiment="remote")
        (tmp_path / name / "per_case.csv").write_text(f"case,organ,dice\n{name},liver,0.5\n")
        tracker.log_table(tmp_path / name / "per_case.csv")
        tracker.finish("FINISHED")
        shutil.rmtree(tmp_path / name)
        ids.add(tracker.run_id)
    runs = experiment_runs("remote", server.uri)
    assert {run.run_id for run in runs} == ids
    assert sorted(run.rows[0]["case"] for run in runs) == ["a", "b"]

    folder = tmp_path / "unet vs vnet"
    folder.mkdir()
    (folder / "page.html").write_text("<!doctype html>")
    log_comparison(runs[0].run_id, folder, server.uri)
    found = open_store(server.uri).list_artifacts(runs[0].run_id, "comparisons/unet vs vnet")
    assert [item.path for item in found] == ["comparisons/unet vs vnet/page.html"]
    table = shown_table(server.uri, runs[0].run_id)
    assert table["dice"].tolist() == [0.5]
