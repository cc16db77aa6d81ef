from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import medseg
from medseg.errors import ModelError, WorkflowError
from medseg.tracking.mlflow_tracker import MlflowTracker, absolute_uri, open_store, safe_name, sync, without_password
from medseg.tracking.spool import Delivery

from .conftest import Server, wait_until

Begin = Callable[..., MlflowTracker]


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in open_store(uri).get_metric_history(run_id, key)]


def artifacts(uri: str, run_id: str, folder: str = "") -> list[str]:
    found = []
    for item in open_store(uri).list_artifacts(run_id, folder):
        found += artifacts(uri, run_id, item.path) if item.is_dir else [item.path]
    return found


def answered(run_dir: Path) -> bool:
    """Whether the store has confirmed all that was sent so far."""
    delivery = Delivery.load(run_dir)
    return delivery is not None and delivery.sent == delivery.attempted


def run_python(script: str, *arguments: object, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(Path(medseg.__file__).parents[1])}
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


WRITE_A_RUN = """
import sys
from pathlib import Path
from medseg.tracking.mlflow_tracker import MlflowTracker

tracker = MlflowTracker.start(Path(sys.argv[1]), experiment="liver", run_name="x", params={"a": 1}, tags={})
tracker.log_metrics({"train/loss": 0.5}, 1)
tracker.finish("FINISHED")
print(tracker.run_id)
"""

DIE_BETWEEN_SENDING_AND_NOTING_IT = """
import os, signal, sys
from pathlib import Path
from medseg.tracking.mlflow_tracker import MlflowTracker
from medseg.tracking.spool import Delivery

note = Delivery.note

def die_before_noting(self, run_dir, **changes):
    if "sent" in changes and self.run_id and self.sent == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    note(self, run_dir, **changes)

Delivery.note = die_before_noting
begin = MlflowTracker._begin

def log_then_begin(self, params, tags):
    self.log_metrics({"train/loss": 0.25}, 1)
    self.log_metrics({"train/loss": 0.125}, 2)
    begin(self, params, tags)

MlflowTracker._begin = log_then_begin
MlflowTracker.start(Path("run"), uri=sys.argv[1], experiment="liver", run_name="x", params={}, tags={})
"""


def test_a_run_arrives_with_everything_in_it(store: str, begin: Begin, tmp_path: Path) -> None:
    tracker = begin(store)
    tracker.log_metrics({"train/loss": 0.5, "val/dice/left kidney (l+r)": 0.75, "val/dice/spleen": math.nan}, 10)
    tracker.log_metrics({"train/loss": 0.25}, 20)
    tracker.log_picture(np.full((30, 40, 3), 7, np.uint8), "case_1", 20)
    (tmp_path / "run" / "per_case.csv").write_text("case,organ,dice\ncase_1,liver,0.9\n")
    tracker.log_file(tmp_path / "run" / "per_case.csv")
    outside = tmp_path / "elsewhere" / "notes.txt"
    outside.parent.mkdir()
    outside.write_text("kept")
    tracker.log_file(outside)
    model = tmp_path / "run" / "model"
    model.mkdir()
    (model / "model.json").write_text("{}")
    tracker.log_file(model)
    tracker.finish("FINISHED")

    run = open_store(store).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "fold0"
    assert run.data.params == {"train.lr": "0.001"}
    assert run.data.tags["medseg.fold"] == "0"
    assert run.data.metrics == {"train/loss": 0.25, "val/dice/left kidney _l_r_": 0.75}
    assert history(store, tracker.run_id, "train/loss") == [(10, 0.5), (20, 0.25)]
    logged = artifacts(store, tracker.run_id)
    assert {"per_case.csv", "notes.txt", "model/model.json"} <= set(logged)
    pictures = sorted(path for path in logged if path.startswith("images/case_1+step+20+"))
    assert [path.rsplit(".")[-1] for path in pictures] == ["webp", "png"]
    assert len(logged) == 5


TABLE = "case,organ,patient,dice,note\n001,liver,7,0.5,\n001,spleen,7,,missed\n"


def test_a_table_is_shown_by_mlflow_with_numbers_as_numbers(
    store: str, begin: Begin, tmp_path: Path, shown_table: Callable[[str, str], Any]
) -> None:
    tracker = begin(store)
    (tmp_path / "run" / "per_case.csv").write_text(TABLE)
    tracker.log_table(tmp_path / "run" / "per_case.csv")
    tracker.finish("FINISHED")
    again = begin(store)  # a resumed run logs it once more
    again.log_table(tmp_path / "run" / "per_case.csv")
    again.finish("FINISHED")

    table = shown_table(store, tracker.run_id)
    assert list(table.columns) == ["case", "organ", "patient", "dice", "note"]
    assert list(table["organ"]) == ["liver", "spleen"]
    assert table["dice"][0] == 0.5
    assert math.isnan(table["dice"][1])
    assert list(table["note"]) == ["", "missed"]
    assert sorted(artifacts(store, tracker.run_id)) == ["per_case.csv", "per_case.json"]
    shown = open_store(store).get_run(tracker.run_id).data.tags["mlflow.loggedArtifacts"]
    assert json.loads(shown) == [{"path": "per_case.json", "type": "table"}]
    raw = json.loads((tmp_path / "run" / "per_case.json").read_text())
    assert raw["data"][1] == ["001", "spleen", "7", None, "missed"]


def test_a_data_set_is_named_with_its_digest_once_however_often_it_is_told(store: str, begin: Begin) -> None:
    for _ in range(2):
        tracker = begin(store)
        tracker.log_data_set("liver_ct", "0123456789abcdef" * 4, source="../liver.json", profile={"cases": 131})
        tracker.finish("FINISHED")
    client = open_store(store)
    (told,) = client.get_run(tracker.run_id).inputs.dataset_inputs
    assert (told.dataset.name, told.dataset.digest) == ("liver_ct", "0123456789abcdef0123456789abcdef0123")
    assert json.loads(told.dataset.source) == {"uri": "../liver.json"}
    assert json.loads(told.dataset.profile) == {"cases": 131}
    experiment = client.get_experiment_by_name("liver")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "dataset.name = 'liver_ct'")
    assert [run.info.run_id for run in found] == [tracker.run_id]


def test_what_a_server_of_another_age_does_not_know_holds_up_nothing_else(
    store: str, begin: Begin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

    def unknown(*_: object, **__: object) -> None:
        raise MlflowException("No such endpoint", ENDPOINT_NOT_FOUND)

    monkeypatch.setattr(MlflowClient, "log_inputs", unknown)
    tracker = begin(store)
    tracker.log_data_set("liver_ct", "0" * 64, source="liver.json", profile={})
    tracker.log_metrics({"train/loss": 0.5}, 1)
    tracker.finish("FINISHED")
    assert history(store, tracker.run_id, "train/loss") == [(1, 0.5)]
    assert "W-TRACK-REFUSED" in caplog.text


def test_tags_of_a_run_under_way_can_be_searched_by(store: str, begin: Begin, tmp_path: Path) -> None:
    runs = {}
    for network in ("unet", "vnet"):
        tracker = begin(store, run_dir=tmp_path / network, tags={"medseg.network": network})
        tracker.log_tags({"medseg.manifest_sha256": "ab" * 32})
        tracker.finish("FINISHED")
        runs[network] = tracker.run_id
    client = open_store(store)
    experiment = client.get_experiment_by_name("liver")
    assert experiment is not None
    wanted = f"tags.medseg.network = 'vnet' and tags.medseg.manifest_sha256 = '{'ab' * 32}'"
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id], wanted)] == [runs["vnet"]]


def test_a_resumed_run_is_the_same_one_and_replayed_steps_count_once(store: str, begin: Begin) -> None:
    first = begin(store)
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": 1 / step}, step)
    first.finish("KILLED")
    assert open_store(store).get_run(first.run_id).info.status == "KILLED"

    resumed = begin(store, params={"train.lr": 5.0}, tags={"medseg.fold": "changed"})
    assert resumed.run_id == first.run_id
    for step in (2, 3, 4):
        resumed.log_metrics({"train/loss": 10.0}, step)
    assert open_store(store).get_run(first.run_id).info.status == "RUNNING"
    resumed.finish("FAILED")
    run = open_store(store).get_run(first.run_id)
    assert run.info.status == "FAILED"
    assert run.data.params == {"train.lr": "0.001"}
    assert run.data.tags["medseg.fold"] == "changed"
    assert history(store, first.run_id, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 10.0)]


def test_a_run_begun_in_another_folder_goes_on_without_repeating_steps(
    store: str, begin: Begin, tmp_path: Path
) -> None:
    first = begin(store)
    first.log_metrics({"train/loss": 1.0}, 1)
    first.finish("KILLED")
    time.sleep(0.002)  # another timestamp: the store itself would take the step again
    moved = begin(store, run_dir=tmp_path / "other", run_id=first.run_id)
    assert moved.run_id == first.run_id
    moved.log_metrics({"train/loss": 2.0}, 1)
    moved.log_metrics({"train/loss": 3.0}, 2)
    moved.finish("FINISHED")
    assert history(store, first.run_id, "train/loss") == [(1, 1.0), (2, 3.0)]


def test_a_fold_is_nested_under_its_parent(store: str, begin: Begin, tmp_path: Path) -> None:
    parent = begin(store, run_dir=tmp_path / "cv")
    child = begin(store, run_dir=tmp_path / "cv" / "fold_0", parent_run_id=parent.run_id)
    child.finish("FINISHED")
    parent.finish("FINISHED")
    assert open_store(store).get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_each_step_is_there_once_after_a_kill_between_sending_and_noting_it(store: str, tmp_path: Path) -> None:
    process = run_python(DIE_BETWEEN_SENDING_AND_NOTING_IT, store, cwd=tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    delivery = Delivery.load(tmp_path / "run")
    assert delivery is not None
    assert delivery.run_id is not None
    assert delivery.sent == 0
    assert len(history(store, delivery.run_id, "train/loss")) == 2  # they had arrived

    sync(tmp_path / "run")
    assert history(store, delivery.run_id, "train/loss") == [(1, 0.25), (2, 0.125)]
    assert open_store(store).get_run(delivery.run_id).info.status == "KILLED"


def test_two_runs_started_at_once_into_a_store_that_does_not_exist_both_complete(tmp_path: Path) -> None:
    processes = [run_python(WRITE_A_RUN, name, cwd=tmp_path) for name in ("a", "b")]
    ids = []
    for process, (output, errors) in [(p, p.communicate(timeout=120)) for p in processes]:
        assert process.returncode == 0, errors
        assert errors == ""  # no chatter of MLflow or alembic either
        ids.append(output.strip())
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert len(set(ids)) == 2
    for run_id in ids:
        assert open_store(uri).get_run(run_id).info.status == "FINISHED"
        assert history(uri, run_id, "train/loss") == [(1, 0.5)]


@pytest.mark.parametrize("uri", ["sqllite:///mlflow.db", "ftp://store"])
def test_a_uri_of_no_known_kind_is_refused_before_training(begin: Begin, uri: str) -> None:
    with pytest.raises(WorkflowError, match="E-TRACK-URI"):
        begin(uri)


def test_a_deleted_experiment_is_refused_before_training(store: str, begin: Begin) -> None:
    client = open_store(store)
    client.delete_experiment(client.create_experiment("old"))
    with pytest.raises(WorkflowError, match="'old' was deleted; restore it"):
        begin(store, experiment="old")


def test_only_one_process_writes_a_run(store: str, begin: Begin, tmp_path: Path) -> None:
    tracker = begin(store)
    script = "import sys; from pathlib import Path; from medseg.tracking.mlflow_tracker import sync; sync(Path('run'))"
    process = run_python(script, cwd=tmp_path)
    _, errors = process.communicate(timeout=60)
    tracker.finish("FINISHED")
    assert "E-TRACK-BUSY" in errors


def test_a_folder_that_was_never_tracked_cannot_be_synced(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="E-SYNC-RUN"):
        sync(tmp_path)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("val/dice/left kidney", "val/dice/left kidney"),
        ("val/dice/Milz (größe)", "val/dice/Milz _größe_"),
        ("a//b/../c", "a/b/c"),
        ("%", "_"),
        ("..", "_"),
    ],
)
def test_names_are_what_mlflow_takes(name: str, safe: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert safe_name(name) == safe
    _validate_metric_name(safe)


def test_uris_mean_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("sqlite:////srv/runs.db") == "sqlite:////srv/runs.db"
    assert absolute_uri("http://host:5000") == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-env")
    assert absolute_uri(None) == "http://from-env"


def test_passwords_are_not_written_down() -> None:
    assert without_password("postgresql://ada:s3cret@db:5432/runs") == "postgresql://ada@db:5432/runs"
    assert without_password("http://host:5000") == "http://host:5000"


def test_importing_the_tracker_does_not_import_mlflow(tmp_path: Path) -> None:
    script = "import sys, medseg.tracking.mlflow_tracker; print('mlflow' in sys.modules)"
    output, _ = run_python(script, cwd=tmp_path).communicate(timeout=60)
    assert output.strip() == "False"


def test_training_finishes_and_everything_arrives_when_the_server_is_back(
    server: Server, begin: Begin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = begin(server.uri, experiment="killed")
    run_id = tracker.run_id
    tracker.log_metrics({"train/loss": 1.0}, 1)
    wait_until(lambda: history(server.uri, run_id, "train/loss") == [(1, 1.0)])
    wait_until(lambda: answered(tmp_path / "run"))  # else its answer may die with the server, and it is sent twice
    server.kill()
    began = time.monotonic()
    for step in range(2, 200):
        tracker.log_metrics({"train/loss": 1 / step}, step)
    tracker.log_picture(np.zeros((8, 8, 3), np.uint8), "case_1", 200)
    (tmp_path / "run" / "per_case.csv").write_text(TABLE)
    tracker.log_table(tmp_path / "run" / "per_case.csv")
    tracker.log_data_set("liver_ct", "0" * 64, source="liver.json", profile={})
    assert time.monotonic() - began < 1  # nobody waited
    tracker.finish("FINISHED")
    assert time.monotonic() - began < 20  # connection refused is quick; the machine may be busy
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [message.split()[0] for message in told] == ["W-TRACK-DOWN", "W-TRACK-UNSENT"]
    assert all(f"medseg sync {tmp_path / 'run'}" in message for message in told)
    with pytest.raises(ModelError, match="E-TRACK-DOWN"):
        sync(tmp_path / "run")

    server.start()
    assert sync(tmp_path / "run") == 203
    assert sync(tmp_path / "run") == 0
    assert history(server.uri, run_id, "train/loss") == [(step, 1 / step) for step in range(1, 200)]
    assert open_store(server.uri).get_run(run_id).info.status == "FINISHED"
    logged = artifacts(server.uri, run_id)
    assert len([path for path in logged if path.startswith("images/")]) == 2  # the picture and its thumbnail
    assert {"per_case.csv", "per_case.json"} <= set(logged)
    run = open_store(server.uri).get_run(run_id)
    assert "per_case.json" in run.data.tags["mlflow.loggedArtifacts"]
    assert [told.dataset.name for told in run.inputs.dataset_inputs] == ["liver_ct"]


def test_a_server_that_hangs_for_a_while_costs_nothing_and_gets_each_step_once(
    server: Server, begin: Begin, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = begin(server.uri, experiment="stopped")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server.signal(signal.SIGSTOP)
    began = time.monotonic()
    for step in range(100):
        tracker.log_metrics({"train/loss": float(step)}, step)
    assert time.monotonic() - began < 1
    wait_until(lambda: "W-TRACK-DOWN" in caplog.text)
    server.signal(signal.SIGCONT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    tracker.finish("FINISHED")
    assert "W-TRACK-UNSENT" not in caplog.text
    assert history(server.uri, tracker.run_id, "train/loss") == [(step, float(step)) for step in range(100)]


def test_runs_begun_while_the_server_is_down_are_made_and_nested_by_sync(
    server: Server, begin: Begin, tmp_path: Path
) -> None:
    nobody = "http://127.0.0.1:9"
    parent = begin(nobody, run_dir=tmp_path / "cv", experiment="down")
    child = begin(nobody, run_dir=tmp_path / "cv" / "fold_0", experiment="down", parent_run_id=parent.run_id)
    assert parent.run_id.startswith("local-")
    child.log_metrics({"train/loss": 0.5}, 1)
    child.finish("FINISHED")
    parent.finish("FINISHED")

    sync(tmp_path / "cv" / "fold_0", uri=server.uri)  # the child first: its parent does not exist yet
    sync(tmp_path / "cv", uri=server.uri)
    made: dict[str, Any] = {}
    for name in ("cv", "cv/fold_0"):
        delivery = Delivery.load(tmp_path / name)
        assert delivery is not None
        made[name] = open_store(server.uri).get_run(str(delivery.run_id))
    assert made["cv/fold_0"].data.tags["mlflow.parentRunId"] == made["cv"].info.run_id
    assert made["cv/fold_0"].data.metrics == {"train/loss": 0.5}
    assert made["cv/fold_0"].info.status == "FINISHED"


def test_a_run_the_server_made_without_being_heard_is_not_made_twice(
    server: Server, begin: Begin, tmp_path: Path
) -> None:
    tracker = begin(server.uri, experiment="unheard")
    tracker.finish("FINISHED")
    delivery = Delivery.load(tmp_path / "run")
    assert delivery is not None
    delivery.note(tmp_path / "run", run_id=None)
    sync(tmp_path / "run")
    again = Delivery.load(tmp_path / "run")
    assert again is not None
    assert again.run_id == tracker.run_id
