"""The list of a batch's cases: who has what, what comes back, what is given up."""

import json
import logging
import multiprocessing
import os
import resource
import sqlite3
import time
from pathlib import Path

import pytest

from medseg.batch.deaths import MAX_KILLS, Death
from medseg.batch.ledger import Job, Ledger, only_writer, worker_name
from medseg.errors import DataError, WorkerError, WorkflowError

OPTIONS = {"model": "abc", "overlap": 0.5}
CRASH = Death("SIGSEGV", peak_bytes=2_000_000_000)
KILL = Death("SIGKILL", from_elsewhere=True)


def jobs(folder: Path, number: int = 3) -> list[Job]:
    return [Job(f"c{n}", (folder / f"c{n}.mha",), (folder / f"out_c{n}.mha",)) for n in range(number)]


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger.begin(tmp_path / "ledger.db", jobs(tmp_path), OPTIONS)


def claim(ledger: Ledger, worker: str = "w", *, beside: bool = False) -> Job:
    job = ledger.claim(worker, beside=beside)
    assert job is not None
    return job


def finish(ledger: Ledger, job: Job, worker: str = "w") -> bool:
    return ledger.finish(worker, job, seconds=1.5, peak_bytes=10, told={"windows": 8})


def states(ledger: Ledger) -> list[str]:
    return [row["state"] for row in ledger.rows(jobs(ledger.path.parent))]


def row(ledger: Ledger, number: int = 0) -> dict:
    return ledger.rows(jobs(ledger.path.parent))[number]


def test_cases_are_claimed_in_order_and_each_is_done_once(ledger, tmp_path):
    first, second = claim(ledger, "a"), claim(ledger, "b")
    assert (first, second) == tuple(jobs(tmp_path)[:2])
    assert finish(ledger, first, "a") and not finish(ledger, first, "a") and not finish(ledger, second, "a")
    assert states(ledger) == ["done", "running", "todo"]
    assert ledger.committed() == ["c0"]
    assert row(ledger)["seconds"] == 1.5 and row(ledger)["windows"] == 8
    progress = ledger.progress()
    assert (progress.total, progress.done, progress.failed, list(progress.running)) == (3, 1, 0, ["c1"])
    assert progress.is_open


def test_a_batch_is_open_until_every_case_is_done_or_failed(ledger):
    for _ in range(2):
        finish(ledger, claim(ledger))
    job = claim(ledger)
    assert ledger.claim("other", beside=False) is None and ledger.progress().is_open
    assert ledger.fail("w", job, DataError("E-EMPTY", "is empty", where="c2.mha"))
    assert not ledger.progress().is_open
    assert row(ledger, 2)["error_id"] == "E-EMPTY" and row(ledger, 2)["message"] == "E-EMPTY c2.mha: is empty"


def claim_all(path: Path, batch: str, found: "multiprocessing.Queue[str]") -> None:
    ledger = Ledger(path, batch)
    while job := ledger.claim(worker_name(), beside=False):
        found.put(job.id)
    found.put("")


def test_no_case_is_claimed_twice_by_processes_that_claim_at_once(tmp_path):
    many = jobs(tmp_path, 60)
    ledger = Ledger.begin(tmp_path / "ledger.db", many, OPTIONS)
    context = multiprocessing.get_context("forkserver")
    found = context.Queue()
    processes = [context.Process(target=claim_all, args=(ledger.path, ledger.batch, found)) for _ in range(4)]
    for process in processes:
        process.start()
    claimed, ended = [], 0
    while ended < 4:
        case = found.get(timeout=60)
        ended += not case
        claimed += [case] if case else []
    for process in processes:
        process.join()
    assert sorted(claimed) == sorted(job.id for job in many)
    found.close()


def test_a_case_in_hand_when_its_worker_died_is_done_alone_and_last(ledger):
    first, second = claim(ledger), claim(ledger, beside=True)
    assert ledger.bury("w", CRASH)
    third = claim(ledger, "v")
    assert third.id == "c2" and not third.alone
    assert ledger.claim("v", beside=True) is None
    alone = claim(ledger, "v")
    assert alone.id == first.id and alone.alone
    assert finish(ledger, alone, "v") and claim(ledger, "v").id == second.id


def test_a_case_whose_workers_died_twice_is_given_up_with_the_signal_and_the_memory_named(ledger):
    claim(ledger)
    ledger.bury("w", CRASH)
    for case in ("c1", "c2"):
        assert finish(ledger, claim(ledger, "v"), "v"), case
    claim(ledger, "v")
    ledger.bury("v", CRASH)
    assert states(ledger) == ["quarantined", "done", "done"] and not ledger.progress().is_open
    message = row(ledger)["message"]
    assert "E-WORKER" in message and "2 times, the last time alone, by SIGSEGV; it held 2.0 GB" in message
    assert row(ledger)["ending"] == "SIGSEGV" and row(ledger)["attempts"] == 2


def test_workers_that_somebody_else_killed_are_not_the_cases_fault_for_a_while(tmp_path):
    ledger = Ledger.begin(tmp_path / "ledger.db", jobs(tmp_path, 1), OPTIONS)
    for kill in range(MAX_KILLS):
        assert claim(ledger, f"w{kill}").alone == bool(kill)
        ledger.bury(f"w{kill}", KILL)
    (found,) = ledger.rows(jobs(tmp_path, 1))
    assert (found["state"], found["attempts"], found["kills"]) == ("quarantined", 0, MAX_KILLS)
    assert "5 times by somebody else, the last time by SIGKILL" in found["message"]


def test_a_worker_that_never_had_a_case_is_told_apart(ledger):
    assert not ledger.bury("stranger", CRASH)
    assert states(ledger) == ["todo"] * 3


def test_a_segmentation_that_is_there_is_committed_and_not_made_again(ledger, tmp_path):
    job = claim(ledger)
    job.files[0].write_bytes(b"new")
    ledger.bury("w", KILL)
    assert states(ledger) == ["done", "todo", "todo"] and ledger.committed() == ["c0"]
    assert not finish(ledger, job), "the worker that was believed dead comes too late"
    assert ledger.committed() == ["c0"]


def test_what_was_there_before_the_batch_is_no_sign_that_a_case_is_done(tmp_path):
    job = jobs(tmp_path, 1)[0]
    job.files[0].write_bytes(b"old")
    ledger = Ledger.begin(tmp_path / "ledger.db", [job], OPTIONS)
    claim(ledger)
    ledger.release("w")
    assert ledger.progress().done == 0
    claim(ledger)
    job.files[0].with_suffix(".tmp").write_bytes(b"new")
    os.utime(job.files[0].with_suffix(".tmp"), ns=(1, job.files[0].stat().st_mtime_ns + 10**7))
    job.files[0].with_suffix(".tmp").replace(job.files[0])
    ledger.release("w")
    assert ledger.progress().done == 1


def test_a_worker_that_slept_beyond_its_lease_keeps_what_nobody_has_taken(tmp_path):
    ledger = Ledger.begin(tmp_path / "ledger.db", jobs(tmp_path), OPTIONS)
    asleep = Ledger(ledger.path, ledger.batch, lease_s=-1)
    job = claim(asleep, "w")
    assert claim(asleep, "w", beside=True) != job and ledger.is_held("w", job)
    assert claim(ledger, "other") not in (job, None)
    assert not ledger.is_held("w", job) and not finish(ledger, job, "w")
    assert row(ledger)["attempts"] == 0  # it is not to blame


def test_a_batch_that_is_begun_anew_replaces_the_old_one_in_one_step(tmp_path, monkeypatch):
    old = Ledger.begin(tmp_path / "ledger.db", jobs(tmp_path), OPTIONS)

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("medseg.batch.ledger.os.replace", killed)
        Ledger.begin(tmp_path / "ledger.db", jobs(tmp_path), {"model": "new"})
    assert old.options == OPTIONS and states(old) == ["todo"] * 3
    new = Ledger.begin(tmp_path / "ledger.db", jobs(tmp_path), {"model": "new"})
    assert new.options == {"model": "new"}
    with pytest.raises(WorkerError, match="another batch"):
        old.progress()


def test_a_lease_that_runs_out_gives_the_case_to_another_worker(tmp_path):
    begun = Ledger.begin(tmp_path / "ledger.db", jobs(tmp_path, 1), OPTIONS)
    ledger = Ledger(begun.path, begun.batch, lease_s=0.5)
    job = claim(ledger, "silent")
    assert ledger.claim("other", beside=False) is None
    time.sleep(0.3)
    ledger.renew("silent")
    time.sleep(0.3)
    assert ledger.claim("other", beside=False) is None, "it was extended"
    time.sleep(0.5)
    assert claim(ledger, "other") == Job(job.id, job.images, job.files, alone=True)
    assert not finish(ledger, job, "silent") and finish(ledger, job, "other")


def test_a_worker_may_be_named_by_the_end_of_its_name(ledger):
    first, second = claim(ledger, "host:1:abc"), claim(ledger, "host:2:def")
    assert ledger.bury("def", KILL) and not ledger.bury("xyz", KILL)
    assert states(ledger) == ["running", "todo", "todo"]
    ledger.release("abc")
    assert states(ledger) == ["todo"] * 3
    assert [row(ledger, number)["kills"] for number in range(2)] == [0, 1], (first, second)


def test_the_dead_are_reaped_unless_the_caller_watches_over_them(ledger):
    process = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(0,))
    process.start()
    process.join()
    gone = worker_name("abc").replace(f":{os.getpid()}:", f":{process.pid}:")
    for worker in (gone, worker_name("def"), "elsewhere:1:ghi"):
        claim(ledger, worker)
    assert ledger.reap(["abc", "ghi"]) == 1 and states(ledger) == ["running"] * 3
    assert ledger.reap() == 2 and states(ledger) == ["todo", "running", "running"]


def test_what_a_worker_gives_back_is_nobodys_fault(ledger):
    claim(ledger)
    ledger.release("w")
    assert states(ledger) == ["todo"] * 3 and not claim(ledger).alone


def test_a_case_that_lacked_memory_beside_another_is_put_back_to_be_done_alone(ledger):
    job = claim(ledger)
    ledger.put_back("w", job)
    assert [claim(ledger).id for _ in range(3)] == ["c1", "c2", "c0"]
    assert row(ledger)["attempts"] == 0


def test_resume_tries_again_what_failed_and_what_vanished_and_leaves_what_is_done(ledger, tmp_path):
    for job in jobs(tmp_path)[:2]:
        job.files[0].touch()
        finish(ledger, claim(ledger))
    ledger.fail("w", claim(ledger), DataError("E-EMPTY", "is empty"))
    jobs(tmp_path)[1].files[0].unlink()
    resumed = Ledger.resume(ledger.path, jobs(tmp_path), OPTIONS)
    assert resumed is not None and resumed.batch == ledger.batch
    assert states(resumed) == ["done", "todo", "todo"]
    assert row(resumed)["seconds"] == 1.5 and row(resumed, 2)["message"] is None


def test_resume_takes_back_what_a_process_of_this_machine_had_that_is_no_more(ledger, tmp_path):
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=time.sleep, args=(0,))
    process.start()
    gone, alive, far = worker_name().replace(f":{os.getpid()}:", f":{process.pid}:"), worker_name(), "elsewhere:1:abc"
    process.join()
    for worker in (gone, alive, far):
        claim(ledger, worker)
    resumed = Ledger.resume(ledger.path, jobs(tmp_path), OPTIONS)
    assert resumed is not None and states(resumed) == ["todo", "running", "running"]


def test_resume_makes_the_ledger_the_list_of_its_own_cases(ledger, tmp_path):
    finish(ledger, claim(ledger))
    more = jobs(tmp_path, 5)[1:]
    more[3].files[0].touch()
    resumed = Ledger.resume(ledger.path, more, OPTIONS)
    assert resumed is not None
    assert [found["state"] for found in resumed.rows(more)] == ["todo", "todo", "todo", "done"]
    assert resumed.progress().total == 4


def test_resume_with_another_model_or_other_options_is_refused_and_says_what_differs(ledger, tmp_path):
    with pytest.raises(WorkflowError, match=r"E-RESUME .*overlap is now 0.25, was 0.5; undo that") as caught:
        Ledger.resume(ledger.path, jobs(tmp_path), OPTIONS | {"overlap": 0.25})
    assert "model" not in caught.value.message


def test_there_is_nothing_to_resume_without_a_ledger_or_where_making_it_was_cut_off(tmp_path):
    assert Ledger.resume(tmp_path / "ledger.db", jobs(tmp_path), OPTIONS) is None
    (tmp_path / "ledger.db").touch()
    assert Ledger.resume(tmp_path / "ledger.db", jobs(tmp_path), OPTIONS) is None


def test_workers_of_an_earlier_batch_find_nothing_in_the_one_that_took_its_place(ledger, tmp_path):
    Ledger.begin(ledger.path, jobs(tmp_path), OPTIONS)
    with pytest.raises(WorkerError, match="another batch has been begun here"):
        ledger.claim("w", beside=False)


def test_a_file_that_is_no_ledger_is_told_and_left(tmp_path):
    (tmp_path / "ledger.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(DataError, match=r"E-LEDGER .*ledger.db: cannot be read .*delete it"):
        Ledger.resume(tmp_path / "ledger.db", jobs(tmp_path), OPTIONS)


def test_a_ledger_that_finds_no_room_fails_as_any_other_file(tmp_path):
    many = jobs(tmp_path, 500)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
    try:
        with pytest.raises(OSError, match=r"No space left.*ledger.db"):
            Ledger.begin(tmp_path / "ledger.db", many, OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_names_in_any_bytes_come_back_as_they_are(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    job = Job(name, (tmp_path / f"{name}.mha",), (tmp_path / f"{name}_out.mha",))
    ledger = Ledger.begin(tmp_path / "ledger.db", [job], OPTIONS)
    assert claim(ledger) == job and finish(ledger, job)


def test_what_workers_say_is_heard_once(ledger):
    record = logging.makeLogRecord({"levelno": 30, "levelname": "WARNING", "msg": "W-TEST %s", "args": ("a",)})
    ledger.say("w", record)
    ((number, level, message),) = ledger.heard(0)
    assert (level, message) == (logging.WARNING, "W-TEST a")
    assert ledger.heard(number) == []


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    context = multiprocessing.get_context("forkserver")
    with only_writer(tmp_path):
        process = context.Process(target=refused, args=(tmp_path,))
        process.start()
        process.join()
        assert process.exitcode == 7
    with only_writer(tmp_path):
        pass


def refused(folder: Path) -> None:
    try:
        with only_writer(folder):
            os._exit(0)
    except WorkflowError as error:
        os._exit(7 if error.error_id == "E-OUTPUT-LOCKED" else 1)


def test_anybody_can_read_a_ledger_with_sqlite(ledger):
    with sqlite3.connect(ledger.path) as db:
        assert db.execute("SELECT id, state FROM cases ORDER BY position").fetchall()[0] == ("c0", "todo")
        assert json.loads(db.execute("SELECT value FROM batch WHERE key = 'options'").fetchone()[0]) == OPTIONS
    db.close()
