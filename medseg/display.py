"""What people see while they wait: one console on stderr, progress bars that vanish off a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def console() -> Console:
    """The console for people; stdout stays free for ``--json``."""
    return Console(stderr=True, highlight=False)


def progress_bar(on: Console | None = None) -> Progress:
    """A progress bar with count, time spent and time left; silent where output is not a terminal."""
    on = on or console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=on,
        disable=not on.is_terminal,
        transient=True,
    )


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar.

    Args:
        items: What to iterate over.
        description: What is being done, e.g. ``"preparing cases"``.
        total: How many there are, if `items` has no length.
    """
    with progress_bar() as bar:
        yield from bar.track(items, description=description, total=total)
