"""Real processes, of which some die."""

import logging
import os
import signal
import time
from pathlib import Path

import pytest

from medseg.batch.isolated import Killed
from medseg.batch.parallel import num_cores, parallel


def act(job: str) -> str:
    kind, _, rest = job.partition(" ")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "log":
        logging.getLogger("medseg.data").warning("W-TEST %s", rest)
    if kind == "fail":
        raise ZeroDivisionError(rest)
    if kind == "folder":
        return os.getcwd()
    if kind == "pid":
        time.sleep(0.3)
        return str(os.getpid())
    return job + job


@pytest.mark.parametrize("num_processes", [0, 1, 3])
def test_every_job_has_its_result(num_processes):
    jobs = ["a", "b", "c", "d", "e"]
    assert dict(parallel(act, jobs, num_processes=num_processes)) == {n: job + job for n, job in enumerate(jobs)}
    assert list(parallel(act, [], num_processes=num_processes)) == []


def test_several_processes_work_at_once_and_one_is_this_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pids = {pid for _, pid in parallel(act, ["pid"] * 6, num_processes=2)}
    assert len(pids) == 2 and str(os.getpid()) not in pids
    assert dict(parallel(act, ["pid"], num_processes=2)) == {0: str(os.getpid())}
    assert {Path(folder) for _, folder in parallel(act, ["folder"] * 2, num_processes=2)} == {tmp_path}


def test_a_job_that_kills_its_process_is_named_and_the_others_are_done(caplog):
    jobs = ["a", "b", "kill", "d", "e"]
    found = dict(parallel(act, jobs, num_processes=2))
    assert isinstance(found.pop(2), Killed)
    assert found == {n: jobs[n] * 2 for n in (0, 1, 3, 4)}
    assert caplog.records[0].message.startswith("W-WORKER a process that does the work was ended")


def test_what_is_logged_in_a_process_is_logged_here(caplog):
    assert len(list(parallel(act, ["log one", "log two"], num_processes=2))) == 2
    assert sorted(record.message for record in caplog.records) == ["W-TEST one", "W-TEST two"]
    assert {record.name for record in caplog.records} == {"medseg.data"}


def test_a_fault_of_ours_is_raised_here():
    with pytest.raises(ZeroDivisionError, match="who knows"):
        list(parallel(act, ["a", "fail who knows", "c"], num_processes=2))


def test_there_is_a_core():
    assert 1 <= num_cores() <= 8
