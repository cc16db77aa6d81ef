"""A batch's work in a process that another framework started, perhaps on another machine.

That process only watches: the work is done in one of its own, so that here as everywhere a scan that kills its worker
is told by the signal and the memory, and the next worker is there at once, without the framework.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from medseg.batch.ledger import Ledger
from medseg.batch.local import run_local
from medseg.batch.worker import Load, Place
from medseg.errors import MedsegError

log = logging.getLogger("medseg")


def work_elsewhere(
    ledger: Ledger, load: Load, *, token: str, place: Place, folder: str, preload: Sequence[str] = ()
) -> Exception | None:
    """Do a ledger's cases, see `medseg.batch.worker.work`.

    Args:
        ledger: As all the others.
        load: Makes the segmenter.
        token: What the names of the workers made here end with.
        place: Where to compute.
        folder: The working folder of the one who asked.
        preload: Modules to import once for all processes.

    Returns:
        What stopped the batch, if anything: a fault of the model, or a full disk.
    """
    if Path(folder).is_dir():
        os.chdir(folder)
    log.handlers, log.propagate = [LedgerHandler(ledger, token)], False
    try:
        run_local(ledger, load, [place], preload=preload, part_of=token)
    except (MedsegError, OSError) as error:
        return error
    return None


class LedgerHandler(logging.Handler):
    """Hands what is logged to the command that started the batch, by way of the ledger."""

    def __init__(self, ledger: Ledger, worker: str) -> None:
        super().__init__(logging.WARNING)
        self.ledger, self.worker = ledger, worker

    def emit(self, record: logging.LogRecord) -> None:
        """Write it down; a ledger that cannot be written is no reason to stop."""
        try:
            self.ledger.say(self.worker, record)
        except (MedsegError, OSError):
            self.handleError(record)


def tell(ledger: Ledger, heard: int) -> int:
    """Log here what workers have said in the ledger since; the number of the last of it."""
    for number, level, message in ledger.heard(heard):
        log.log(level, "%s", message)
        heard = number
    return heard
