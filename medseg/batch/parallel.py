"""Jobs worked through in several processes at once."""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver
from typing import Any, TypeVar

from medseg.batch.isolated import Killed, end_with_parent, isolated

J = TypeVar("J")
R = TypeVar("R")

MAX_PROCESSES = 8
"""Used unless somebody asks for more: each needs memory for a job of its own."""

log = logging.getLogger("medseg")


def num_cores() -> int:
    """Cores that this process may use, up to `MAX_PROCESSES`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_PROCESSES)


def parallel(
    function: Callable[[J], R], jobs: Sequence[J], *, num_processes: int, preload: Sequence[str] = ()
) -> Iterator[tuple[int, R | Killed]]:
    """Call a function with each job.

    Where a process dies, what is left is done one at a time, in a process that may die too: the job that kills it is
    then known. What is logged in the processes is logged here.

    Args:
        function: What to do. It, the jobs and the results must pickle, and the jobs must be many times shorter than
            an hour: one that has begun is not stopped, unless by Ctrl-C.
        jobs: What to do it with.
        num_processes: How many at once; up to 1: in this process, which then shares the fate of the worst job.
        preload: Modules to import once for all processes.

    Yields:
        A job's number with its result, in the order of their coming.
    """
    num_processes = min(num_processes, len(jobs))
    if num_processes <= 1:
        yield from ((number, function(job)) for number, job in enumerate(jobs))
        return
    left = dict(enumerate(jobs))
    try:
        for number, result in _pooled(function, left, num_processes, preload):
            del left[number]
            yield number, result
    except BrokenProcessPool:
        log.warning("W-WORKER a process that does the work was ended; %d are left, one at a time", len(left))
        numbers = list(left)
        for place, outcome in isolated(partial(_in_turn, function), list(left.values()), preload=preload):
            yield numbers[place], outcome


def _pooled(
    function: Callable[[J], R], jobs: Mapping[int, J], num_processes: int, preload: Sequence[str]
) -> Iterator[tuple[int, R]]:
    context = multiprocessing.get_context("forkserver")  # a plain fork of a process with threads may hang
    context.set_forkserver_preload(list(preload))
    pool = ProcessPoolExecutor(num_processes, context, _begin, (os.getcwd(), log.getEffectiveLevel()))
    try:
        with interruption_waits():
            forkserver.ensure_running()
            number_of = {pool.submit(_recorded, function, job): number for number, job in jobs.items()}
        for future in as_completed(number_of):
            number = number_of.pop(future)  # or all results would be kept until the end
            result, records = future.result()
            for record in records:
                logging.getLogger(record.name).handle(record)
            yield number, result
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def interruption_waits() -> Iterator[None]:
    """Put off Ctrl-C, here and in the processes that are started, which would die with a traceback while they import."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(folder: str, level: int) -> None:
    """What each process does first."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: it has nothing to save
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.chdir(folder)
    threading.Thread(target=end_with_parent, daemon=True).start()
    log.propagate = False
    log.setLevel(level)


def _recorded(function: Callable[[J], R], job: J) -> tuple[R, list[logging.LogRecord]]:
    """The result, and what was logged meanwhile."""
    said: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    log.handlers = [logging.handlers.QueueHandler(said)]  # which makes records pickle
    result = function(job)
    return result, [said.get() for _ in range(said.qsize())]


def _in_turn(
    function: Callable[[Any], R], jobs: Mapping[int, Any], begun: Callable[[int], None]
) -> Iterable[tuple[int, R]]:
    for number, job in jobs.items():
        begun(number)
        yield number, function(job)
