"""Real processes that really die: by a signal, by a crash, by running out of luck once."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from medseg.batch.isolated import Killed, isolated
from medseg.errors import DataError, Problems, WorkerError


def doubled(jobs: Mapping[int, str], begun: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    for number, job in jobs.items():
        begun(number)
        yield number, act(job)


def doubled_in_threads(jobs: Mapping[int, str], begun: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    """All jobs are begun before the first is done."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        for number in jobs:
            begun(number)
        yield from zip(jobs, pool.map(act, jobs.values()), strict=True)


def act(job: str) -> str:
    kind, _, rest = job.partition(" ")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "crash":
        ctypes.string_at(0)
    if kind == "once" and not Path(rest).exists():
        Path(rest).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "log":
        logging.getLogger("medseg").warning("W-TEST %s", rest)
    if kind == "pid":
        return str(os.getpid())
    time.sleep(0.3 if kind == "slow" else 0)
    return job + job


def refuse(jobs: Mapping[int, str], begun: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    yield 0, jobs[0]
    raise Problems([DataError("E-ONE", "is wrong", where="a"), DataError("E-TWO", "is wrong too", where="b")])


def break_down(jobs: Mapping[int, str], begun: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    raise ZeroDivisionError("who knows")
    yield 0, jobs[0]


def die_at_once(jobs: Mapping[int, str], begun: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield 0, jobs[0]


def test_every_job_has_its_result_from_another_process():
    found = dict(isolated(doubled, ["a", "pid", "c"]))
    assert found[0] == "aa" and found[2] == "cc"
    assert found[1] not in (str(os.getpid()), "pid")
    assert list(isolated(doubled, [])) == []


@pytest.mark.parametrize(("job", "ending"), [("kill", "SIGKILL"), ("crash", "SIGSEGV")])
def test_a_job_that_kills_its_process_is_named_and_the_others_are_done(job, ending, caplog):
    found = dict(isolated(doubled, ["a", job, "c", job, "e"]))
    assert [found[n] for n in (0, 2, 4)] == ["aa", "cc", "ee"]
    for number in (1, 3):
        assert isinstance(found[number], Killed) and found[number].ending == ending
    assert f"2 times, the last time alone, by {ending}" in str(found[1])
    assert [record.message.split(" ")[0] for record in caplog.records] == ["W-WORKER", "W-WORKER"]


def test_what_was_in_hand_beside_the_killer_is_not_blamed():
    found = dict(isolated(doubled_in_threads, ["slow", "slow", "kill", "slow"]))
    assert [found[n] for n in (0, 1, 3)] == ["slowslow"] * 3
    assert isinstance(found[2], Killed)


def test_a_job_that_was_only_unlucky_is_done_at_the_second_attempt(tmp_path):
    job = f"once {tmp_path / 'tried'}"
    assert dict(isolated(doubled, ["a", job])) == {0: "aa", 1: job + job}


def test_the_memory_of_a_killed_process_is_told():
    (_, killed) = next(isolated(doubled_with_memory, [300]))
    assert isinstance(killed, Killed) and killed.peak_bytes > 300e6


def doubled_with_memory(jobs: Mapping[int, int], begun: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    for number, megabytes in jobs.items():
        begun(number)
        _held = bytearray(os.urandom(1)) * (megabytes * 10**6)
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGKILL)
        yield number, megabytes


def test_what_the_work_raises_is_raised_here_with_all_it_holds():
    results = isolated(refuse, ["a", "b"])
    assert next(results) == (0, "a")
    with pytest.raises(Problems) as caught:
        next(results)
    assert [error.where for error in caught.value.errors] == ["a", "b"]


def test_a_fault_of_our_own_keeps_its_traceback_for_those_who_ask():
    with pytest.raises(WorkerError, match="ZeroDivisionError: who knows") as caught:
        list(isolated(break_down, ["a"]))
    assert "break_down" in caught.value.__notes__[0]


def test_a_process_that_dies_before_it_began_is_not_started_for_ever():
    with pytest.raises(WorkerError, match="was ended by SIGKILL"):
        list(isolated(die_at_once, ["a", "b"]))


def test_what_is_logged_there_is_logged_here(caplog):
    list(isolated(doubled, ["log something"]))
    assert [record.message for record in caplog.records] == ["W-TEST something"]


def test_the_process_ends_with_the_one_that_asked(tmp_path):
    script = tmp_path / "ask.py"
    script.write_text(
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from test_isolated import doubled\n"
        "from medseg.batch.isolated import isolated\n"
        "if __name__ == '__main__':\n"
        "    for number, pid in isolated(doubled, ['pid', 'slow', 'slow', *['slow'] * 100]):\n"
        "        print(pid, flush=True)\n"
    )
    command = [sys.executable, str(script), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        worker = int(asking.stdout.readline())
        os.kill(worker, 0)
        asking.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
