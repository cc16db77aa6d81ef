"""Batches that outlive the worker processes they come from."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data._utils import signal_handling

from medseg.errors import TrainingError
from medseg.training.state import Batch

MAX_RESTARTS = 2
FORGIVEN_AFTER = 100
"""Batches after which a death no longer counts as one in a row with the next."""

DYING_SECONDS = 10.0

LOST = "something that broke its connection"
"""What ended a worker that is gone before it can be asked."""

LAST_MEMORY = "the system kills what takes its last memory: use fewer train.workers, data.cache: disk, or more memory"
REMEDIES = {
    "SIGKILL": LAST_MEMORY,
    LOST: LAST_MEMORY,
    "SIGBUS": "shared memory may be full: enlarge /dev/shm, or use fewer train.workers",
}
OTHER_REMEDY = "with train.workers=0 cases are read without worker processes, and --debug shows where that breaks"

log = logging.getLogger("medseg")


def lasting_batches(loader: Callable[[int], Iterable[Batch]], first: int, *, where: str) -> Iterator[Batch]:
    """The batches of a loader, which is started again where one of its workers dies.

    What a batch holds hangs on its number alone, so nobody sees that they come from other workers.

    Args:
        loader: First batch number → batches from there on.
        first: Number of the first batch.
        where: What decides the number of workers, for messages.

    Raises:
        TrainingError: If workers die once more after `MAX_RESTARTS` restarts in a row.
    """
    number, restarts, restarted_at = first, 0, first
    while True:
        batches: Iterator[Batch] | None = None
        workers: Iterable[Any] = ()
        try:
            batches = _started(loader(number))
            workers = getattr(batches, "_workers", ())  # torch tells of them nowhere else
            for batch in batches:
                number += 1
                yield batch
            return
        except Exception as error:
            death = _death(workers) or (LOST if isinstance(error, ConnectionError | EOFError) else None)
            if death is None:
                raise
        restarts = restarts + 1 if number - restarted_at < FORGIVEN_AFTER else 1
        restarted_at = number
        found = f"a data-loading worker was ended by {death}"
        if restarts > MAX_RESTARTS:
            remedy = REMEDIES.get(death, OTHER_REMEDY)
            raise TrainingError("E-WORKER", f"{found}, {restarts} times in a row; {remedy}", where=where)
        log.warning(f"W-WORKER {where}: {found}; the workers are started again, at most {MAX_RESTARTS} times in a row")
        del batches  # the others end now, not beside the new ones


def _started(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Start the workers, but let their death be told by the next batch alone.

    torch has SIGCHLD raise in the main thread, which may be amid an update of the weights or in the writing of a file.
    """
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "__module__", None) == signal_handling.__name__:  # of a loader that was started without this
        before = signal.SIG_DFL
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return batches


def _death(workers: Iterable[Any]) -> str | None:
    """What ended the first worker that did not end by itself; None if all are well."""
    ended = wait([worker.sentinel for worker in workers], DYING_SECONDS)
    for worker in workers:
        if worker.sentinel in ended:  # the kernel closes its files before it says what it died of
            worker.join(DYING_SECONDS)
        if worker.exitcode:
            return signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else f"exit code {worker.exitcode}"
    return None
