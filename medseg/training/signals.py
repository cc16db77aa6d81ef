"""SIGTERM and Ctrl-C, turned into an orderly end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from medseg.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let a function answer SIGTERM and Ctrl-C for a while."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def ending_work(message: str) -> Iterator[None]:
    """End at once with `Interrupted`: for work that can simply be done again."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted("E-INTERRUPTED", f"{signal.Signals(number).name}: {message}")

    with handled_by(stop):
        yield


def leave_to_parent(worker: int) -> None:
    """For data-loading workers: a signal to the whole group is the parent's to answer."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
