"""One worker, in this process: the next case is read and the last one written while one is segmented."""

import threading
import time

import pytest

from medseg.batch.ledger import Ledger
from medseg.batch.progress import line
from medseg.batch.worker import work
from medseg.errors import ModelError

from .segmenters import Loading, jobs


def run(tmp_path, contents, journal=None):
    """The rows of a batch that one worker has done."""
    todo = jobs(tmp_path, contents)
    ledger = Ledger.begin(tmp_path / "ledger.db", todo, {})
    work(ledger, Loading(journal=journal), worker="w")
    assert not ledger.progress().is_open
    return ledger.rows(todo)


def stages(journal) -> dict[tuple[str, str], tuple[float, float]]:
    """When each stage of each case began and ended."""
    lines = [one.split() for one in journal.read_text().splitlines()]
    return {(case, stage): (float(begun), float(ended)) for case, stage, begun, ended in lines}


def test_every_case_is_done_and_what_is_known_of_it_written_down(tmp_path):
    rows = run(tmp_path, ["a", "segment:sleep 0.2", "c"])
    assert [row["state"] for row in rows] == ["done"] * 3
    assert [(tmp_path / f"out_c{n}.txt").read_text() for n in range(3)] == ["a", "segment:sleep 0.2", "c"]
    assert (
        rows[1]["seconds"] >= 0.2 > rows[0]["seconds"] and rows[0]["device"] == "auto" and rows[0]["peak_bytes"] > 1e7
    )


def test_the_next_case_is_read_and_the_last_one_written_while_one_is_segmented(tmp_path):
    slow = {"read": 0.2, "segment": 0.4, "write": 0.2}

    class Slow(Loading):
        def __call__(self, place):
            made = super().__call__(place)
            for stage, seconds in slow.items():
                name = {"read": "prepare"}.get(stage, stage)
                original = getattr(made, name)
                object.__setattr__(made, name, delayed(original, seconds))
            return made

    todo = jobs(tmp_path, ["a", "b", "c", "d"])
    ledger = Ledger.begin(tmp_path / "ledger.db", todo, {})
    started = time.monotonic()
    work(ledger, Slow(), worker="w")
    seconds = time.monotonic() - started
    assert 0.2 + 4 * 0.4 + 0.2 <= seconds < 4 * 0.8, "the first is read and the last written with nothing beside it"


def delayed(function, seconds):
    turn = threading.Lock()  # as a model has

    def slow(*arguments):
        with turn:
            time.sleep(seconds)
        return function(*arguments)

    return slow


def test_at_most_one_case_is_read_ahead_and_one_waits_to_be_written(tmp_path):
    journal = tmp_path / "journal"
    run(tmp_path, ["write:sleep 0.3", "b", "c", "d"], journal)
    found = stages(journal)
    assert found["c2", "segment"][0] >= found["c0", "segment"][1]
    assert found["c3", "read"][0] >= found["c1", "segment"][1], "c2 is read ahead, c3 not yet"
    assert found["c2", "segment"][0] >= found["c0", "write"][1], "c1 waits for c0's writing, so c2 waits for its turn"


@pytest.mark.parametrize("stage", ["read", "segment", "write"])
def test_what_is_wrong_with_a_case_at_any_stage_stops_no_other(tmp_path, stage):
    rows = run(tmp_path, ["a", f"{stage}:refuse x.nii", "c", f"{stage}:break y", "e"])
    assert [row["state"] for row in rows] == ["done", "failed", "done", "failed", "done"]
    assert rows[1]["message"] == "E-TEST x.nii: is wrong"
    assert rows[3]["message"] == "E-INTERNAL case c3: ZeroDivisionError: y"
    assert not (tmp_path / "out_c1.txt").exists()


@pytest.mark.parametrize("more", [[], ["c", "d", "e"]])
@pytest.mark.parametrize("stage", ["read", "segment", "write"])
def test_a_full_disk_stops_the_batch_and_what_was_in_hand_goes_back(tmp_path, stage, more):
    todo = jobs(tmp_path, ["a", f"{stage}:full {tmp_path}/x", *more])
    ledger = Ledger.begin(tmp_path / "ledger.db", todo, {})
    with pytest.raises(OSError, match="No space left"):
        work(ledger, Loading(), worker="w")
    rows = ledger.rows(todo)
    assert rows[1]["state"] == "todo" and {row["state"] for row in rows} <= {"done", "todo"}
    assert not ledger.progress().running


@pytest.mark.parametrize("stage", ["read", "segment"])
def test_a_case_that_lacks_memory_beside_another_is_done_alone(tmp_path, stage, caplog):
    journal = tmp_path / "journal"
    rows = run(tmp_path, ["a", f"{stage}:memory {tmp_path}/tried", "c", "d"], journal)
    assert [row["state"] for row in rows] == ["done"] * 4
    assert rows[1]["alone"] and "W-MEMORY" in caplog.text
    found = stages(journal)
    assert found["c1", "read"][0] >= max(ended for (case, _), (_, ended) in found.items() if case != "c1")


def test_a_model_that_cannot_be_used_is_an_error_and_costs_no_case(tmp_path):
    todo = jobs(tmp_path, ["a"])
    ledger = Ledger.begin(tmp_path / "ledger.db", todo, {})
    with pytest.raises(ModelError):
        work(ledger, Loading("refuse"), worker="w")
    assert ledger.rows(todo)[0]["state"] == "todo"


def test_a_worker_waits_for_cases_that_others_may_yet_give_back(tmp_path):
    todo = jobs(tmp_path, ["a", "b"])
    ledger = Ledger.begin(tmp_path / "ledger.db", todo, {})
    ledger.claim("other", beside=False)
    thread = threading.Thread(target=work, args=(ledger, Loading()), kwargs={"worker": "w"})
    thread.start()
    time.sleep(1)
    assert thread.is_alive() and ledger.progress().done == 1
    ledger.release("other")
    thread.join(timeout=20)
    assert ledger.progress().done == 2


def test_a_worker_keeps_its_lease_while_a_case_takes_long(tmp_path):
    todo = jobs(tmp_path, ["segment:sleep 2"])
    begun = Ledger.begin(tmp_path / "ledger.db", todo, {})
    ledger = Ledger(begun.path, begun.batch, lease_s=0.8)
    thread = threading.Thread(target=work, args=(ledger, Loading()), kwargs={"worker": "w"})
    thread.start()
    deadline = time.monotonic() + 1.8
    while time.monotonic() < deadline:
        assert ledger.progress().running == {} or ledger.claim("other", beside=False) is None
        time.sleep(0.1)
    thread.join()
    assert ledger.committed() == ["c0"]


def test_the_line_at_the_bar_tells_failures_and_the_case_that_takes_long():
    from medseg.batch.ledger import Progress

    assert line(Progress(9, 3, 0, {"c4": 95.0}), now=100.0) == "segmenting"
    assert line(Progress(9, 3, 2, {"c4": 50.0, "c5": 60.0}), now=100.0) == "segmenting, 2 failed, c4 for 50 s"
