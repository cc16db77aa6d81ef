"""A function tried on every case: what fails is kept, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from medseg.batch.isolated import Killed
from medseg.batch.parallel import parallel
from medseg.display import track
from medseg.errors import DataError, MedsegError, WorkerError

J = TypeVar("J")
T = TypeVar("T")


def attempted(
    function: Callable[[J], T],
    jobs: Mapping[str, J],
    failed: dict[str, MedsegError],
    *,
    doing: str,
    num_processes: int,
    preload: Sequence[str] = (),
) -> Iterator[T]:
    """A function's values of the jobs as they come, with a progress bar.

    Args:
        function: What to do, see `parallel`.
        jobs: By case.
        failed: Faults by case; those that are found are added.
        doing: What people read at the bar.
        num_processes: How many at once; up to 1: in this process.
        preload: Modules to import once for all processes.
    """
    names = list(jobs)
    found = parallel(
        partial(_attempt, function), list(jobs.items()), num_processes=num_processes, preload=[*preload, __name__]
    )
    for number, outcome in track(found, doing, total=len(jobs)):
        if isinstance(outcome, Killed):
            where = f"case {names[number]}"
            failed[names[number]] = WorkerError("E-KILLED", f"{outcome}; have fewer --workers", where=where)
        elif isinstance(outcome, MedsegError):
            failed[names[number]] = outcome
        else:
            yield outcome


def _attempt(function: Callable[[J], T], job: tuple[str, J]) -> T | MedsegError:
    try:
        return function(job[1])
    except MedsegError as error:
        return error
    except OSError as error:
        where = str(error.filename or f"case {job[0]}")
        return DataError("E-FILE", f"cannot be read ({error.strerror or error})", where=where)
