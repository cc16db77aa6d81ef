from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from medseg.tracking.sender import BackgroundSender, Sender, StoreError
from medseg.tracking.spool import Delivery, Record, Spool


class MemoryStore:
    """A store that appends every metric it is sent, as MLflow does, and fails on demand."""

    def __init__(self) -> None:
        self.requests: list[list[Record]] = []
        self.fail_before: StoreError | None = None
        self.fail_after: StoreError | None = None
        self.open = True
        self.refused_key = ""

    def prepare(self) -> None: ...

    def points(self, key: str) -> set[tuple[int, int]]:
        sent = [r for request in self.requests for r in request if r["kind"] == "metric" and r["key"] == key]
        return {(r["step"], r["time"]) for r in sent}

    def send(self, records: Sequence[Record]) -> None:
        if self.fail_before:
            raise self.fail_before
        if any(record.get("key") == self.refused_key for record in records):
            raise StoreError("bad name", "INVALID_PARAMETER_VALUE")
        self.requests.append(list(records))
        if self.fail_after:
            raise self.fail_after

    def is_open(self) -> bool:
        return self.open

    @property
    def sent(self) -> list[tuple[str, int | None]]:
        return [(r.get("key", r["kind"]), r.get("step")) for request in self.requests for r in request]


def metrics(*steps: int, key: str = "loss") -> list[Record]:
    return [{"kind": "metric", "key": key, "value": 0.5, "step": step, "time": 1} for step in steps]


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


def make(run_dir: Path, memory: MemoryStore, **fields: object) -> tuple[Sender, Spool]:
    """A sender with what is on disk, as a new process has it."""
    delivery = Delivery.load(run_dir) or Delivery("u", "e", "n", "local-1", 5, **fields)  # type: ignore[arg-type]
    spool = Spool(run_dir)
    return Sender(run_dir, delivery, spool, memory), spool


def test_each_line_is_sent_once_over_several_rounds(tmp_path: Path, memory: MemoryStore) -> None:
    sender, spool = make(tmp_path, memory)
    spool.append(metrics(1, 2))
    assert sender.send() == 2
    spool.append(metrics(2, 3))
    assert sender.send() == 1
    assert sender.send() == 0
    assert memory.sent == [("loss", 1), ("loss", 2), ("loss", 3)]


def test_what_a_dead_store_missed_is_sent_when_it_is_back(tmp_path: Path, memory: MemoryStore) -> None:
    sender, spool = make(tmp_path, memory)
    spool.append(metrics(1))
    memory.fail_before = StoreError("connection refused")
    for _ in range(2):
        with pytest.raises(StoreError, match="refused"):
            sender.send()
    assert sender.num_unsent() == 1
    memory.fail_before = None
    spool.append(metrics(2))
    sender.send()
    assert memory.sent == [("loss", 1), ("loss", 2)]
    assert sender.num_unsent() == 0


@pytest.mark.parametrize("new_process", [False, True])
def test_lines_whose_answer_was_lost_are_not_sent_twice(tmp_path: Path, memory: MemoryStore, new_process: bool) -> None:
    sender, spool = make(tmp_path, memory)
    spool.append(metrics(1, 2))
    memory.fail_after = StoreError("timed out")
    with pytest.raises(StoreError):
        sender.send()
    memory.fail_after = None
    if new_process:
        sender, spool = make(tmp_path, memory)
    spool.append(metrics(3))
    sender.send()
    assert memory.sent == [("loss", 1), ("loss", 2), ("loss", 3)]


def test_a_run_begun_elsewhere_is_asked_which_steps_it_has(tmp_path: Path, memory: MemoryStore) -> None:
    memory.requests.append(metrics(1, 2))
    sender, spool = make(tmp_path, memory, joined=True)
    spool.append(metrics(2, 3))
    sender.send()
    assert memory.sent == [("loss", 1), ("loss", 2), ("loss", 3)]


def test_a_line_that_the_store_refuses_is_left_out_and_named(
    tmp_path: Path, memory: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    sender, spool = make(tmp_path, memory)
    spool.append([*metrics(1), *metrics(1, key="bad"), *metrics(2)])
    memory.refused_key = "bad"
    sender.send()
    assert memory.sent == [("loss", 1), ("loss", 2)]
    assert sender.num_unsent() == 0
    assert "W-TRACK-REFUSED" in caplog.text
    assert "'key': 'bad'" in caplog.text


def test_nothing_is_dropped_when_a_person_deleted_the_run(tmp_path: Path, memory: MemoryStore) -> None:
    sender, spool = make(tmp_path, memory)
    spool.append(metrics(1, 2))
    memory.open, memory.fail_before = False, StoreError("must be active", "INVALID_PARAMETER_VALUE")
    with pytest.raises(StoreError):
        sender.send()
    assert sender.num_unsent() == 2


def test_requests_keep_to_mlflows_limits_and_to_the_order(tmp_path: Path, memory: MemoryStore) -> None:
    sender, spool = make(tmp_path, memory)
    params = [{"kind": "param", "key": f"p{n}", "value": "1"} for n in range(150)]
    file = {"kind": "file", "path": "x", "folder": ""}
    spool.append([*params, *metrics(*range(2500)), file, *metrics(2500)])
    sender.send()
    sizes = [len(request) for request in memory.requests]
    assert sizes == [100, 1000, 1000, 550, 1, 1]
    assert [kind for kind, _ in memory.sent][-2:] == ["file", "loss"]
    assert len(memory.sent) == 2652


def test_a_failing_store_is_reported_once_with_its_remedy(
    tmp_path: Path, memory: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sender, spool = make(tmp_path, memory)
    spool.append(metrics(1))
    memory.fail_before = StoreError("connection refused")
    tries = threading.Semaphore(0)
    send = sender.send

    def counted() -> int:
        tries.release()
        return send()

    sender.send = counted  # type: ignore[method-assign]
    background = BackgroundSender(sender, uri="http://store", remedy="medseg sync runs/x")
    assert background.start(5) is not None
    for _ in range(4):
        assert tries.acquire(timeout=5)
    assert background.finish(5)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith("W-TRACK-DOWN http://store: connection refused")
    assert messages[0].endswith("medseg sync runs/x")


def test_finish_gives_up_on_a_store_that_hangs(tmp_path: Path, memory: MemoryStore) -> None:
    sender, _ = make(tmp_path, memory)
    release = threading.Event()
    memory.prepare = lambda: release.wait(10)  # type: ignore[assignment, method-assign, return-value]
    background = BackgroundSender(sender, uri="u", remedy="r")
    assert background.start(0.1) is None
    assert not background.finish(0.1)
    release.set()
    assert background.finish(5)
