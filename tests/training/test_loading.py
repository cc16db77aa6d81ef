"""Real worker processes, killed by real signals."""

import logging
import os
import signal
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from medseg.training import loading
from medseg.training.loading import lasting_batches


class Numbers(Dataset):
    """The numbers up to 40, read by workers that die at their `fatal`-th."""

    def __init__(self, fatal: int = 1000):
        self.fatal, self.count = fatal, 0

    def __getitem__(self, index):
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 35:
            raise ValueError("35")
        return index


def starter(dataset: Dataset):
    """Starts loaders, and remembers them with their workers."""
    started = []

    def start(first: int) -> DataLoader:
        loader = DataLoader(dataset, batch_sampler=[[n] for n in range(first, 40)], num_workers=1, collate_fn=list)
        started.append(loader)
        return loader

    return start, started


def test_a_death_while_something_else_is_done_is_told_at_the_next_batch_only(caplog):
    for _ in DataLoader(Numbers(), batch_sampler=[[0]], num_workers=1, collate_fn=list):
        pass  # a loader started in another way leaves torch's handler behind
    start, started = starter(Numbers())
    batches = lasting_batches(start, 3, where="train.workers")
    found = [next(batches)[0]]
    (worker,) = children()
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.5)  # SIGCHLD comes here, in what stands for a training step
    with caplog.at_level(logging.WARNING, logger="medseg"):
        found += [next(batches)[0] for _ in range(20)]
    assert found == list(range(3, 24))
    assert len(started) == 2
    assert [record.message for record in caplog.records] == [
        "W-WORKER train.workers: a data-loading worker was ended by SIGKILL; "
        "the workers are started again, at most 2 times in a row"
    ]
    batches.close()


def test_deaths_far_apart_are_not_in_a_row(monkeypatch):
    monkeypatch.setattr(loading, "FORGIVEN_AFTER", 5)
    monkeypatch.setattr(loading, "MAX_RESTARTS", 1)
    start, started = starter(Numbers(fatal=11))
    batches = lasting_batches(start, 0, where="train.workers")
    assert [next(batches)[0] for _ in range(28)] == list(range(28))
    assert len(started) > 2  # more often than in a row; how far a worker read ahead of its death is chance
    batches.close()


def test_an_error_in_a_worker_is_not_tried_again():
    start, started = starter(Numbers())
    with pytest.raises(ValueError, match="35"):
        list(lasting_batches(start, 30, where="train.workers"))
    assert len(started) == 1


def children() -> list[int]:
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "pt_data_worker\n"]
