"""The executors of other packages, on this machine: Ray's actors, and submitit's processes in the place of Slurm's tasks."""

import os
import signal
import sys
import threading
import time

import pytest

from medseg.batch.ledger import Ledger
from medseg.batch.ray_executor import run_ray
from medseg.batch.slurm_executor import run_slurm
from medseg.batch.worker import Place
from medseg.errors import ModelError, WorkflowError

from .segmenters import Loading, jobs

pytestmark = pytest.mark.filterwarnings("default")  # what these packages warn of is theirs


def begun(tmp_path, contents):
    todo = jobs(tmp_path, contents)
    return todo, Ledger.begin(tmp_path / "ledger.db", todo, {})


def assert_each_done_once(ledger, todo) -> None:
    assert [row["state"] for row in ledger.rows(todo)] == ["done"] * len(todo)
    assert sorted(ledger.committed()) == sorted(job.id for job in todo)


def test_an_executor_whose_package_is_missing_names_the_extra(tmp_path, monkeypatch):
    _, ledger = begun(tmp_path, ["a"])
    for name in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(WorkflowError, match=r"E-EXTRA .*medseg\[ray\]"):
        run_ray(ledger, Loading(), "cpu", num_workers=1)
    with pytest.raises(WorkflowError, match=r"E-EXTRA .*medseg\[slurm\]"):
        run_slurm(ledger, Loading(), Place(), num_workers=1, options={})


@pytest.fixture
def ray_here():
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_two_actors_of_which_one_is_killed_do_every_case_once(tmp_path, ray_here, caplog):
    todo, ledger = begun(tmp_path, ["segment:log careful", *["segment:sleep 0.4"] * 11])
    thread = threading.Thread(target=kill_one, args=(ledger,))
    thread.start()
    run_ray(ledger, Loading(), "cpu", num_workers=2)
    thread.join()
    assert_each_done_once(ledger, todo)
    assert any("W-TEST careful" in record.message for record in caplog.records)
    assert any("an actor was ended" in record.message for record in caplog.records)
    assert len({row["pid"] for row in ledger.rows(todo) if "pid" in row}) >= 2


def test_a_case_that_crashes_actors_is_given_up(tmp_path, ray_here):
    todo, ledger = begun(tmp_path, ["a", "segment:crash", "c"])
    run_ray(ledger, Loading(), "cpu", num_workers=1)
    assert [row["state"] for row in ledger.rows(todo)] == ["done", "quarantined", "done"]


def kill_one(ledger) -> None:
    """Kill the process that has a case in hand, when a few are done."""
    deadline = time.monotonic() + 60
    while ledger.progress().done < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    with ledger._transaction() as db:
        (worker,) = db.execute("SELECT worker FROM cases WHERE state = 'running'").fetchone()
    os.kill(int(worker.split(":")[1]), signal.SIGKILL)


def test_an_array_of_tasks_does_every_case_once(tmp_path, caplog):
    pytest.importorskip("submitit")
    todo, ledger = begun(tmp_path, ["segment:log careful", "segment:refuse x", *["segment:sleep 0.2"] * 6])
    run_slurm(ledger, Loading(), Place("cpu"), num_workers=2, options={"cluster": "local", "timeout_min": "5"})
    assert [row["state"] for row in ledger.rows(todo)] == ["done", "failed", *["done"] * 6]
    assert len({row["pid"] for row in ledger.rows(todo) if "pid" in row}) == 2
    assert any("W-TEST careful" in record.message for record in caplog.records)


def test_a_case_that_crashes_its_task_is_given_up_and_the_array_submitted_again(tmp_path):
    pytest.importorskip("submitit")
    todo, ledger = begun(tmp_path, ["a", "segment:crash", "c"])
    run_slurm(ledger, Loading(), Place("cpu"), num_workers=1, options={"cluster": "local"})
    assert [row["state"] for row in ledger.rows(todo)] == ["done", "quarantined", "done"]


def test_a_model_that_no_task_can_use_is_one_error(tmp_path):
    pytest.importorskip("submitit")
    _, ledger = begun(tmp_path, ["a"])
    with pytest.raises(ModelError, match="E-MODEL"):
        run_slurm(ledger, Loading("refuse"), Place("cpu"), num_workers=1, options={"cluster": "local"})
