"""A batch in real processes, which really die."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from medseg.batch import local
from medseg.batch.ledger import Ledger
from medseg.batch.local import oom_kills, places, run_local
from medseg.batch.worker import Place
from medseg.errors import ModelError, WorkerError

from .segmenters import Loading, jobs


def run(tmp_path, contents, *, num_workers=1, does=""):
    todo = jobs(tmp_path, contents)
    ledger = Ledger.begin(tmp_path / "ledger.db", todo, {})
    run_local(ledger, Loading(does), [Place("cpu")] * num_workers)
    return ledger, ledger.rows(todo)


def written(tmp_path, number: int) -> bool:
    return (tmp_path / f"out_c{number}.txt").exists()


def test_several_workers_share_the_cases(tmp_path):
    ledger, rows = run(tmp_path, ["segment:sleep 0.5"] * 8, num_workers=2)
    assert sorted(ledger.committed()) == sorted(row["id"] for row in rows)
    assert len({row["pid"] for row in rows}) == 2 and os.getpid() not in {row["pid"] for row in rows}


@pytest.mark.parametrize("stage", ["read", "segment", "write"])
def test_a_case_that_crashes_its_worker_at_any_stage_is_given_up_and_the_others_are_done(tmp_path, stage, caplog):
    ledger, rows = run(tmp_path, ["a", "b", f"{stage}:crash 0.6", "d", "e"])
    assert [row["state"] for row in rows] == ["done", "done", "quarantined", "done", "done"]
    assert (
        rows[2]["ending"] == "SIGSEGV" and "2 times, the last time alone, by SIGSEGV; it held 0." in rows[2]["message"]
    )
    assert all(row["attempts"] <= 1 for row in rows if row["id"] != "c2"), "what was beside it is not blamed"
    assert sorted(ledger.committed()) == ["c0", "c1", "c3", "c4"]
    assert sum("W-WORKER" in record.message for record in caplog.records) == 2


def test_a_case_that_was_only_unlucky_is_done_at_the_second_attempt(tmp_path):
    _, rows = run(tmp_path, ["a", f"segment:once {tmp_path}/tried", "c"])
    assert [row["state"] for row in rows] == ["done"] * 3 and rows[1]["attempts"] == 1


def test_a_worker_that_dies_after_the_renaming_has_done_its_case(tmp_path):
    ledger, rows = run(tmp_path, ["a", "after:crash", "c"])
    assert [row["state"] for row in rows] == ["done"] * 3
    assert sorted(ledger.committed()) == ["c0", "c1", "c2"] and rows[1]["attempts"] == 0


@pytest.mark.parametrize(
    ("kernel_did_it", "attempts", "message"),
    [(True, 2, "2 times, the last time alone, by SIGKILL, as the kernel"), (False, 0, "5 times by somebody else")],
)
def test_who_killed_a_worker_decides_whom_to_blame(tmp_path, monkeypatch, kernel_did_it, attempts, message):
    count = iter(range(1000))
    monkeypatch.setattr(local, "oom_kills", lambda: {"vmstat": next(count) if kernel_did_it else 1})
    _, rows = run(tmp_path, ["a", "segment:kill"])
    assert [row["state"] for row in rows] == ["done", "quarantined"]
    assert rows[1]["attempts"] == attempts and message in rows[1]["message"]


def test_where_the_kernel_does_not_count_a_kill_is_the_cases_own(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_OOM_COUNTERS", (tmp_path / "absent",))
    assert oom_kills() == {}
    _, rows = run(tmp_path, ["segment:kill"])
    assert rows[0]["state"] == "quarantined" and rows[0]["attempts"] == 2


def test_the_memory_of_a_dead_worker_is_told(tmp_path):
    _, rows = run(tmp_path, ["segment:sleep 1"])
    assert rows[0]["peak_bytes"] > 10e6


@pytest.mark.parametrize("does", ["crash", "kill"])
def test_workers_that_die_before_they_begin_are_not_replaced_for_ever(tmp_path, does):
    with pytest.raises(WorkerError, match="before they begin a scan"):
        run(tmp_path, ["a", "b"], does=does)


def test_a_model_that_cannot_be_used_is_one_error(tmp_path):
    with pytest.raises(ModelError, match="E-MODEL"):
        run(tmp_path, ["a", "b"], num_workers=2, does="refuse")


def test_a_full_disk_stops_all_workers_and_nothing_is_left_in_hand(tmp_path):
    todo = jobs(tmp_path, ["a", f"write:full {tmp_path}/x", *["segment:sleep 0.5"] * 20])
    ledger = Ledger.begin(tmp_path / "ledger.db", todo, {})
    with pytest.raises(OSError, match="No space left"):
        run_local(ledger, Loading(), [Place()] * 2)
    progress = ledger.progress()
    assert progress.done < 20 and not progress.failed and not progress.running


def test_what_is_logged_in_a_worker_is_logged_here(tmp_path, caplog):
    run(tmp_path, ["segment:log careful"])
    assert [record.message for record in caplog.records] == ["W-TEST careful"]


def test_every_case_is_done_once_whoever_is_killed_when(tmp_path):
    """Workers are shot at random; what each case says is in its output, and each was committed once."""
    draw = random.Random(0)
    todo = jobs(tmp_path, ["segment:sleep 0.3"] * 24)
    ledger = Ledger.begin(tmp_path / "ledger.db", todo, {})
    thread = threading.Thread(target=run_local, args=(ledger, Loading(), [Place()] * 2))
    thread.start()
    kills = 0
    while thread.is_alive() and kills < 8:
        time.sleep(draw.uniform(0.1, 0.6))
        workers = [int(worker.split(":")[1]) for worker in workers_of(ledger)]
        if workers:
            os.kill(draw.choice(workers), signal.SIGKILL)
            kills += 1
    thread.join()
    assert kills == 8
    assert [row["state"] for row in ledger.rows(todo)] == ["done"] * 24
    assert sorted(ledger.committed()) == sorted(job.id for job in todo)


def workers_of(ledger: Ledger) -> list[str]:
    with ledger._transaction() as db:
        return [row["worker"] for row in db.execute("SELECT DISTINCT worker FROM cases WHERE state = 'running'")]


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from segmenters import Loading, jobs
from medseg.batch.ledger import Ledger
from medseg.batch.local import run_local
from medseg.batch.worker import Place
if __name__ == "__main__":
    folder = Path(sys.argv[2])
    todo = jobs(folder, ["segment:sleep 0.3"] * 12)
    ledger = Ledger.resume(folder / "ledger.db", todo, {}) or Ledger.begin(folder / "ledger.db", todo, {})
    run_local(ledger, Loading(), [Place()] * 2)
"""


def test_the_whole_command_may_be_killed_and_begun_again(tmp_path):
    (tmp_path / "ask.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "ask.py"), str(Path(__file__).parent), str(tmp_path)]
    for done in (2, 6):
        with subprocess.Popen(command) as asking:
            wait_until(lambda done=done: len(list(tmp_path.glob("out_*"))) >= done)
            asking.kill()
    assert subprocess.run(command, check=True, timeout=60).returncode == 0
    ledger = Ledger.resume(tmp_path / "ledger.db", jobs(tmp_path, ["segment:sleep 0.3"] * 12), {})
    assert ledger is not None and not ledger.progress().is_open
    assert sorted(ledger.committed()) == sorted(f"c{n}" for n in range(12))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_there_is_one_worker_unless_somebody_asks_for_more(monkeypatch):
    monkeypatch.setattr(local, "_num_gpus", lambda: 0)
    monkeypatch.setattr(local, "_num_cores", lambda: 8)
    assert places("auto", 0, 100) == [Place("auto")]
    assert places("auto", 3, 100) == [Place("auto", 2)] * 3
    assert places("cpu", 3, 2) == [Place("cpu", 4)] * 2
    assert places("cpu", 16, 100) == [Place("cpu", 1)] * 16


def test_each_gpu_has_a_worker(monkeypatch):
    monkeypatch.setattr(local, "_num_gpus", lambda: 2)
    assert places("auto", 0, 100) == [Place("cuda:0"), Place("cuda:1")]
    assert [place.device for place in places("cuda", 3, 100)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert places("auto", 0, 1) == [Place("auto")]
    assert places("cpu", 0, 100) == [Place("cpu")]
