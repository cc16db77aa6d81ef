"""A worker watched over in a process that another framework started."""

import multiprocessing
import os
import signal
import time

from medseg.batch.deaths import Death
from medseg.batch.elsewhere import LedgerHandler, work_elsewhere
from medseg.batch.ledger import Ledger
from medseg.batch.worker import Place
from medseg.files import is_running

from .segmenters import Loading, jobs


def elsewhere(ledger, folder, end) -> None:
    fault = work_elsewhere(ledger, Loading(), token="far", place=Place("cpu"), folder=folder)
    end.send(None if fault is None else str(fault))


def started(tmp_path, contents):
    todo = jobs(tmp_path, contents)
    ledger = Ledger.begin(tmp_path / "ledger.db", todo, {})
    context = multiprocessing.get_context("forkserver")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=elsewhere, args=(ledger, str(tmp_path), its))
    process.start()
    its.close()
    return todo, ledger, process, mine


def test_a_worker_elsewhere_returns_what_stopped_it_and_logs_into_the_ledger(tmp_path):
    _, ledger, process, mine = started(tmp_path, ["segment:log careful", f"write:full {tmp_path}/x"])
    assert "No space left" in mine.recv()
    process.join()
    assert [message for _, _, message in ledger.heard(0)] == ["W-TEST careful"]
    mine.close()
    assert LedgerHandler(ledger, "w").level == 30


def test_a_case_that_crashes_workers_elsewhere_is_given_up_with_the_signal_and_the_memory_named(tmp_path):
    todo, ledger, process, mine = started(tmp_path, ["a", "segment:crash 0.6", "c"])
    assert mine.recv() is None
    process.join()
    rows = ledger.rows(todo)
    assert [row["state"] for row in rows] == ["done", "quarantined", "done"]
    assert "2 times, the last time alone, by SIGSEGV; it held 0." in rows[1]["message"]
    assert sum("ended by SIGSEGV" in message for _, _, message in ledger.heard(0)) == 2
    mine.close()


def test_a_worker_ends_with_the_process_that_watches_over_it_and_is_buried_by_the_end_of_its_name(tmp_path):
    todo, ledger, process, mine = started(tmp_path, ["a", "segment:sleep 30"])
    deadline = time.monotonic() + 60
    while not ledger.progress().done and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = ledger.rows(todo)[1]["worker"]
    pid = int(worker.split(":")[1])
    assert worker.endswith("far") and pid != process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)
    assert ledger.bury("far", Death("the actor's end", from_elsewhere=True))
    assert ledger.rows(todo)[1]["state"] == "todo" and ledger.rows(todo)[1]["kills"] == 1
    mine.close()
