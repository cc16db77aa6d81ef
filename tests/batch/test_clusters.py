"""The executors of other packages, on this machine: Ray's actors, and submitit's processes in the place of Slurm's tasks."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from importlib import import_module
from pathlib import Path

import pytest

from medseg.batch.ledger import Ledger
from medseg.batch.ray_executor import run_ray
from medseg.batch.slurm_executor import run_slurm
from medseg.batch.worker import Place
from medseg.errors import ModelError, WorkerError, WorkflowError
from medseg.files import is_running

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


KILLED = [("worker", "a process that does the work was ended by SIGKILL"), ("actor", "an actor was ended")]


@pytest.mark.parametrize(("whom", "told"), KILLED)
def test_two_actors_of_which_one_is_killed_do_every_case_once(tmp_path, ray_here, caplog, whom, told):
    todo, ledger = begun(tmp_path, ["segment:log careful", *["segment:sleep 0.4"] * 11])
    thread = threading.Thread(target=kill_one, args=(ledger, whom))
    thread.start()
    run_ray(ledger, Loading(), "cpu", num_workers=2)
    thread.join()
    assert_each_done_once(ledger, todo)
    assert any("W-TEST careful" in record.message for record in caplog.records)
    assert any(told in record.message for record in caplog.records)
    assert len({row["pid"] for row in ledger.rows(todo) if "pid" in row}) >= 2


class Unknown(Loading):
    """Cannot be read where the actors are."""

    def __reduce__(self):
        return import_module, ("a_module_that_is_not_there",)


def test_a_cluster_where_something_is_not_installed_is_one_error_that_names_it(tmp_path, ray_here):
    _, ledger = begun(tmp_path, ["a"])
    with pytest.raises(WorkerError, match=r"ended by .*a_module_that_is_not_there.* before they begin a scan"):
        run_ray(ledger, Unknown(), "cpu", num_workers=1)


def test_a_case_that_crashes_its_actors_process_is_given_up_with_the_signal_named(tmp_path, ray_here):
    todo, ledger = begun(tmp_path, ["a", "segment:crash", "c"])
    run_ray(ledger, Loading(), "cpu", num_workers=1)
    assert [row["state"] for row in ledger.rows(todo)] == ["done", "quarantined", "done"]
    assert "2 times, the last time alone, by SIGSEGV" in ledger.rows(todo)[1]["message"]


def kill_one(ledger, whom) -> None:
    """Kill a process that has a case in hand, or what watches over it, when a few are done."""
    wait_until(lambda: ledger.progress().done >= 3 and ledger.progress().running)
    with ledger._transaction() as db:
        (worker,) = db.execute("SELECT worker FROM cases WHERE state = 'running'").fetchone()
    pid = int(worker.split(":")[1])
    os.kill(pid if whom == "worker" else parent(parent(pid)), signal.SIGKILL)


def parent(pid) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


SCRIPT = """
import sys
from pathlib import Path
from segmenters import Loading, jobs
from medseg.batch.ledger import Ledger
from medseg.batch.ray_executor import run_ray
from medseg.batch.slurm_executor import run_slurm
from medseg.batch.worker import Place
folder = Path(sys.argv[1])
todo = jobs(folder, ["segment:sleep 0.5"] * 16)
ledger = Ledger.resume(folder / "ledger.db", todo, {}) or Ledger.begin(folder / "ledger.db", todo, {})
if sys.argv[2] == "ray":
    run_ray(ledger, Loading(), "cpu", num_workers=2)
else:
    run_slurm(ledger, Loading(), Place("cpu"), num_workers=2, options={"cluster": "local"})
"""


@pytest.mark.parametrize("package", [pytest.param("ray", marks=pytest.mark.slow), "submitit"])
def test_the_whole_command_may_be_killed_and_resumed_without_workers_piling_up(tmp_path, package):
    pytest.importorskip(package)
    (tmp_path / "ask.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "ask.py"), str(tmp_path), package]
    found_there = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": found_there}
    with subprocess.Popen(command, env=environment) as asking:
        wait_until(lambda: len(list(tmp_path.glob("out_*"))) >= 2)
        asking.kill()
    if package == "ray":
        wait_until(lambda: not any(is_running(pid) for pid in working(tmp_path)))
    subprocess.run(command, env=environment, check=True, timeout=120)
    todo = jobs(tmp_path, ["segment:sleep 0.5"] * 16)
    ledger = Ledger.resume(tmp_path / "ledger.db", todo, {})
    assert_each_done_once(ledger, todo)
    assert len(list((tmp_path / "slurm").glob("*_submitted.pkl"))) == (2 if package == "submitit" else 0)


def working(folder) -> list[int]:
    with closing(sqlite3.connect(folder / "ledger.db")) as db:
        found = db.execute("SELECT DISTINCT worker FROM cases WHERE state = 'running'").fetchall()
    return [int(worker.split(":")[1]) for (worker,) in found]


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
