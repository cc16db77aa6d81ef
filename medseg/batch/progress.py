"""What people see of a batch while they wait: one line, read from the ledger, whoever does the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from medseg.batch.ledger import Ledger, Progress
from medseg.batch.repeating import repeating
from medseg.display import console, progress_bar
from medseg.errors import MedsegError

_LOOK_EVERY_S = 0.5
_LONG_S = 20.0
"""A case that takes longer is named."""


@contextmanager
def watched(ledger: Ledger) -> Iterator[None]:
    """Show a progress bar meanwhile, where people look."""
    people = console()
    if not people.is_terminal:
        yield
        return
    with progress_bar(people) as bar:
        shown = bar.add_task("segmenting", total=None)

        def look() -> None:
            try:
                progress = ledger.progress()
            except (MedsegError, OSError):  # those who work will say so
                return
            bar.update(
                shown, total=progress.total, completed=progress.done + progress.failed, description=line(progress)
            )

        look()
        with repeating(look, _LOOK_EVERY_S):
            yield


def line(progress: Progress, now: float | None = None) -> str:
    """What is said at the bar: how many failed, and which case takes long."""
    told = ["segmenting"]
    if progress.failed:
        told.append(f"{progress.failed} failed")
    for case, since in progress.running.items():
        seconds = (now or time.time()) - since
        if seconds > _LONG_S:
            told.append(f"{case} for {seconds:.0f} s")
            break
    return ", ".join(told)
