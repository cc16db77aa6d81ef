"""Jobs worked through in a process of its own: one that kills it is named, and stops no other.

A damaged file can crash a decoder, and the kernel ends a process that asks for too much memory; no
``except`` in the same process sees either.
"""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

from medseg.errors import MedsegError, WorkerError

J = TypeVar("J")
R = TypeVar("R")

Work = Callable[[Mapping[int, J], Callable[[int], None]], Iterable[tuple[int, R]]]
"""Takes numbered jobs and a function to call with a job's number when it is begun; yields numbers with results."""

Say = Callable[[str, Any], None]

MAX_ATTEMPTS = 2

_LOOK_EVERY_S = 0.2

log = logging.getLogger("medseg")


@dataclass(frozen=True)
class Killed:
    """Why a job has no result.

    Args:
        ending: How its process ended, e.g. ``"SIGKILL"``, or ``"exit code 1"``.
        peak_bytes: The most memory that was seen in use.
    """

    ending: str
    peak_bytes: int

    def __str__(self) -> str:
        why = ", as the kernel does for lack of memory" if self.ending == "SIGKILL" else ""
        return (
            f"its process was ended {MAX_ATTEMPTS} times, the last time alone, by {self.ending}{why}; "
            f"it held {self.peak_bytes / 1e9:.1f} GB"
        )


def isolated(work: Work[J, R], jobs: Sequence[J], *, preload: Sequence[str] = ()) -> Iterator[tuple[int, R | Killed]]:
    """Work through jobs in a process of its own, and in another one when that dies.

    Whatever was in hand when a process died is tried again, each job alone, so that blame falls on the right
    one; a job whose process dies then too is given up. What is logged in the process is logged here.

    Args:
        work: What to do, see `Work`. It and its results must pickle.
        jobs: What to do it with.
        preload: Modules to import once for all processes, while nothing else runs in them.

    Yields:
        A job's number with its result, in the order of their coming.

    Raises:
        MedsegError: What `work` raised, rather than yielded.
        WorkerError: If the process dies before it began a job.
    """
    context = multiprocessing.get_context("forkserver")  # a plain fork of a process with threads may hang
    context.set_forkserver_preload(list(preload))
    waiting = [(dict(enumerate(jobs)), 1)]
    while waiting:
        left, attempt = waiting.pop(0)
        worker = _Worker(context, work, left)
        for number, result in worker.results():
            del left[number]
            yield number, result
        if not left:
            continue
        if not worker.in_hand:
            raise WorkerError("E-WORKER", f"the process that does the work was ended by {worker.ending}")
        suspects = {number: left.pop(number) for number in sorted(worker.in_hand)}
        if attempt == MAX_ATTEMPTS:  # alone since the second attempt
            yield from ((number, Killed(worker.ending, worker.peak_bytes)) for number in suspects)
            continue
        log.warning("W-WORKER the process that does the work was ended by %s; another one goes on", worker.ending)
        alone = [({number: job}, attempt + 1) for number, job in suspects.items()]
        waiting = [*alone, *([(left, attempt)] if left else []), *waiting]


class _Worker:
    """A process at work, and what it says."""

    def __init__(self, context: ForkServerContext, work: Work[Any, Any], jobs: Mapping[int, Any]) -> None:
        self.connection, its_end = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_serve, args=(its_end, work, jobs, os.getcwd(), log.getEffectiveLevel()), daemon=True
        )
        self.process.start()
        its_end.close()  # so that its death ends the connection
        self.in_hand: set[int] = set()
        self.peak_bytes = 0

    @property
    def ending(self) -> str:
        return ending_of(self.process.exitcode)

    def results(self) -> Iterator[tuple[int, Any]]:
        """What it has done, until it ends."""
        try:
            for kind, content in self._messages():
                if kind == "begun":
                    self.in_hand.add(content)
                elif kind == "done":
                    self.in_hand.discard(content[0])
                    yield content
                elif kind == "logged":
                    logging.getLogger(content.name).handle(content)
                else:
                    raise content
        finally:
            self.process.terminate()  # where nobody wants more of it; else it has ended
            self.process.join()
            self.connection.close()

    def _messages(self) -> Iterator[tuple[str, Any]]:
        try:
            while True:
                while not wait([self.connection], timeout=_LOOK_EVERY_S):
                    self.peak_bytes = max(self.peak_bytes, peak_bytes_of(self.process.pid))
                yield self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()


def ending_of(code: int | None) -> str:
    """What a process's exit code means: ``"SIGKILL"``, ``"exit code 1"``."""
    return signal.Signals(-code).name if code and code < 0 else f"exit code {code}"


def peak_bytes_of(pid: int | None) -> int:
    """The most memory that a process has held so far; 0 where that cannot be read."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended, or this is no Linux
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def _serve(connection: Connection, work: Work[Any, Any], jobs: Mapping[int, Any], folder: str, level: int) -> None:
    """What the process does."""
    with serving(connection, folder, level) as say:
        for result in work(jobs, lambda number: say("begun", number)):
            say("done", result)


@contextmanager
def serving(connection: Connection, folder: str, level: int) -> Iterator[Say]:
    """What every process does that works for another: it ends with it, logs there, and raises there.

    Args:
        connection: To the one who asked.
        folder: His working folder.
        level: Of what is logged.

    Yields:
        A function that tells him something, of any kind.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asked decides what an interruption means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.chdir(folder)
    threading.Thread(target=end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def say(kind: str, content: Any) -> None:
        with lock:
            connection.send((kind, content))

    log.handlers, log.propagate = [_Forwarded(say)], False
    log.setLevel(level)
    try:
        yield say
    except (MedsegError, OSError) as error:  # a full disk among them
        say("raised", error)
    except Exception as error:
        fault = WorkerError("E-INTERNAL", f"{type(error).__name__}: {error}; this is a fault of medseg")
        fault.add_note(traceback.format_exc())  # which --debug shows
        say("raised", fault)


def end_with_parent() -> None:
    """Wait until the parent process has ended, however it did, and end this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class _Forwarded(logging.handlers.QueueHandler):
    """Hands what is logged to the process that asked for the work."""

    def __init__(self, say: Say) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # the queue is only for enqueue, which is ours
        self.say = say

    def enqueue(self, record: logging.LogRecord) -> None:
        self.say("logged", record)
