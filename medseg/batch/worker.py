"""What a worker of a batch does: case after case, reading the next and writing the last while one is segmented."""

from __future__ import annotations

import logging
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from medseg.batch.ledger import Job, Ledger
from medseg.batch.repeating import repeating
from medseg.errors import DataError, MedsegError, WorkerError
from medseg.files import NO_ROOM
from medseg.memory import asked_for, is_out_of_memory

_LOOK_EVERY_S = 0.5

log = logging.getLogger("medseg")


@dataclass(frozen=True)
class Place:
    """Where a worker computes.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
        num_threads: Of the processor; None: as many as torch thinks.
    """

    device: str = "auto"
    num_threads: int | None = None


class Segmenter(Protocol):
    """A loaded model, asked by several threads: one reads, two segment and write, and the model sees that they take turns."""

    def prepare(self, job: Job) -> Any:
        """Read a case."""

    def segment(self, job: Job, prepared: Any) -> Any:
        """Compute."""

    def write(self, job: Job, found: Any) -> dict[str, Any]:
        """Write all files of a case, and say what is worth knowing of its segmentation, in JSON's types.

        ``waited_seconds`` among it is the time that it had to wait for another one's turn, which does not count.
        """


Load = Callable[[Place], Segmenter]
"""Makes the segmenter, in the process that uses it. It must pickle."""


def work(ledger: Ledger, load: Load, *, worker: str, place: Place | None = None) -> None:
    """Do a ledger's cases until none is left, or in the hands of others who may yet die.

    At most three cases are in memory: one that is read ahead, one whose windows are predicted, one that is brought back
    and written. What is wrong with a case is written down and stops no other.

    Args:
        ledger: Of the batch.
        load: Makes the segmenter.
        worker: Who this is, see `worker_name`.
        place: Where to compute.

    Raises:
        MedsegError: If the model cannot be used.
        OSError: If the disk is full: there is no room for the others either.
    """
    segmenter = load(place or Place())
    hand = _Hand(ledger, worker, segmenter)
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(2, "segment") as others, _leases(ledger, worker):
        try:
            upcoming, before = reader.submit(hand.take), None
            while taken := upcoming.result():
                upcoming = reader.submit(hand.take)
                now = others.submit(hand.segment, taken)
                del taken
                if before:
                    before.result()  # ere a third one comes into memory
                before = now
            if before:
                before.result()
        except BaseException:
            hand.stopped.set()
            raise
        finally:
            reader.shutdown()
            others.shutdown()
            ledger.release(worker)


@dataclass
class _Taken:
    """A case in hand."""

    job: Job
    prepared: Any
    seconds: float


class _Hand:
    """What a worker has in hand: the cases that it has claimed and not ended."""

    def __init__(self, ledger: Ledger, worker: str, segmenter: Segmenter) -> None:
        self.ledger, self.worker, self.segmenter = ledger, worker, segmenter
        self.stopped = threading.Event()
        self._jobs: dict[str, Job] = {}
        self._changed = threading.Condition()

    def take(self) -> _Taken | None:
        """The next case, read; None when all are done."""
        while job := self._claimed():
            started = time.monotonic()
            try:
                return _Taken(job, self.segmenter.prepare(job), time.monotonic() - started)
            except Exception as error:
                self._failed(job, error)
        return None

    def segment(self, taken: _Taken) -> None:
        """Segment it, write what the model finds, and write that down."""
        try:
            self._segment(taken)
        except BaseException:  # which is met when the next case has been taken: let none be waited for
            self.stopped.set()
            raise

    def _segment(self, taken: _Taken) -> None:
        started = time.monotonic()
        try:
            found = self.segmenter.segment(taken.job, taken.prepared)
            taken.prepared = None  # its memory is wanted for the next
            if not self.ledger.is_held(self.worker, taken.job):  # another one does it, or a new batch has begun here
                self._ended(taken.job)
                return
            told = self.segmenter.write(taken.job, found)
        except Exception as error:
            self._failed(taken.job, error)
            return
        seconds = taken.seconds + time.monotonic() - started - told.pop("waited_seconds", 0.0)
        self.ledger.finish(self.worker, taken.job, seconds=seconds, peak_bytes=_peak_bytes(), told=told)
        self._ended(taken.job)

    def _claimed(self) -> Job | None:
        """Claim a case, waiting for one if need be."""
        while not self.stopped.is_set():
            with self._changed:
                beside = bool(self._jobs)
                if any(job.alone for job in self._jobs.values()):
                    self._changed.wait(_LOOK_EVERY_S)
                    continue
                if job := self.ledger.claim(self.worker, beside=beside):
                    self._jobs[job.id] = job
                    return job
                progress = self.ledger.progress()
                if not progress.is_open:
                    return None
                self._changed.wait(_LOOK_EVERY_S)
        return None

    def _failed(self, job: Job, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise error  # there is no room for the others either
        if is_out_of_memory(error) and not job.alone:
            log.warning("W-MEMORY %s: out of memory beside another one; it is done again, alone", job.images[0])
            self.ledger.put_back(self.worker, job)
        else:
            self.ledger.fail(self.worker, job, _fault(error, job))
        self._ended(job)

    def _ended(self, job: Job) -> None:
        with self._changed:
            del self._jobs[job.id]
            self._changed.notify_all()


def _fault(error: Exception, job: Job) -> MedsegError:
    if isinstance(error, MedsegError):
        return error
    if is_out_of_memory(error):
        message = f"the memory is not enough{asked_for(error)}; crop it, or use more"
        return DataError("E-MEMORY", message, where=str(job.images[0]))
    log.debug("case %s", job.id, exc_info=error)
    return WorkerError("E-INTERNAL", f"{type(error).__name__}: {error}", where=f"case {job.id}")


def _leases(ledger: Ledger, worker: str) -> AbstractContextManager[None]:
    """Keep extending what a worker has."""

    def renew() -> None:
        try:
            ledger.renew(worker)
        except (MedsegError, OSError) as error:  # the one who works will meet it too
            log.debug("the leases could not be extended", exc_info=error)

    return repeating(renew, ledger.lease_s / 4)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
