"""A run's lines reach its tracking store once each, whatever dies in between, and nobody waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from medseg.tracking.spool import REWIND, Delivery, Line, Record, Spool

SEND_EVERY_SECONDS = 2.0
RETRY_SECONDS = (5.0, 60.0)
"""First and longest pause before a store that did not answer is asked again."""

MAX_BATCH = {"metric": 1000, "param": 100, "tag": 100}
"""How many of a kind go into one request, and 1000 together: MLflow's limits."""

REFUSALS = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "PERMISSION_DENIED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}

NOT_TAKEN = {"BAD_REQUEST", "ENDPOINT_NOT_FOUND", "INVALID_PARAMETER_VALUE"}
"""How a store says that it does not take one line, e.g. a server from before there were data sets."""

log = logging.getLogger("medseg")


class StoreError(Exception):
    """The tracking store did not do what it was asked to.

    Args:
        reason: One line for people.
        code: MLflow's error code, if it gave one.
    """

    def __init__(self, reason: str, code: str | None = None) -> None:
        super().__init__(reason)
        self.code = code

    @property
    def refused(self) -> bool:
        """Whether it answered and said no, so that asking again does not help."""
        return self.code in REFUSALS


class Store(Protocol):
    """A run in a tracking store. Every method may raise StoreError."""

    def prepare(self) -> None:
        """Connect, and make the run unless it is there."""

    def points(self, key: str) -> set[tuple[int, int]]:
        """Step and time of each value of a metric that has arrived."""

    def send(self, records: Sequence[Record]) -> None:
        """Write metrics, parameters and tags, or a single record of another kind."""

    def is_open(self) -> bool:
        """Whether the run takes anything at all; one that a person deleted does not."""


class Sender:
    """Delivers a run folder's lines.

    Before lines are sent, ``tracking.json`` says how far; after they arrived, it says so. Lines between the
    two marks may or may not have arrived (the process was killed, the answer was lost), so the store is asked
    which values it has before they are sent again. What is no metric the store overwrites anyway.

    Args:
        run_dir: The run folder.
        delivery: How far things have come; kept up to date on disk.
        spool: The lines.
        store: Where they go.
    """

    def __init__(self, run_dir: Path, delivery: Delivery, spool: Spool, store: Store) -> None:
        self._run_dir = run_dir
        self._delivery = delivery
        self._spool = spool
        self._store = store
        self._points: dict[str, set[tuple[int, int]]] = {}

    def num_unsent(self) -> int:
        return len(self._spool.read(self._delivery.sent))

    def send(self) -> int:
        """Send all that is not sent yet.

        Returns:
            How many lines.

        Raises:
            StoreError: If the store does not answer, or refuses the run as a whole.
        """
        self._store.prepare()
        delivery = self._delivery
        lines = self._spool.read(delivery.sent)
        if not lines:
            return 0
        doubtful = delivery.attempted
        if doubtful > delivery.sent:
            self._points.clear()  # what is remembered of the store may be older than that attempt
        delivery.note(self._run_dir, attempted=max(doubtful, lines[-1].end))
        for group in _groups(lines):
            self._send_group([line.record for line in group if not self._has_arrived(line, doubtful)])
            delivery.note(self._run_dir, sent=group[-1].end)
        return len(lines)

    def _has_arrived(self, line: Line, doubtful: int) -> bool:
        record = line.record
        if record["kind"] == REWIND:
            return True
        if record["kind"] != "metric" or (line.end > doubtful and not self._delivery.joined):
            return False
        key = record["key"]
        if key not in self._points:
            self._points[key] = self._store.points(key)
        if self._delivery.joined:
            return record["step"] in {step for step, _ in self._points[key]}
        return (record["step"], record["time"]) in self._points[key]  # after a rewind a step has two values

    def _send_group(self, records: Sequence[Record]) -> None:
        if not records:
            return
        try:
            self._store.send(records)
        except StoreError as error:
            if error.code not in NOT_TAKEN or not self._store.is_open():
                raise
            if len(records) > 1:
                for record in records:
                    self._send_group([record])
            else:  # it would block all that come after it
                log.warning(f"W-TRACK-REFUSED {self._delivery.uri}: {error}; left out: {dict(records[0])}")


class BackgroundSender:
    """Sends now and then in a thread of its own, and says in words when that fails.

    Args:
        sender: What sends.
        uri: The store's name for people.
        remedy: What a person can do about unsent lines.
    """

    def __init__(self, sender: Sender, *, uri: str, remedy: str) -> None:
        self._sender = sender
        self._uri = uri
        self._remedy = remedy
        self._trouble: StoreError | None = None
        self._warned = False
        self._abandoned = False
        self._tried = threading.Event()
        self._finishing = threading.Event()
        self._thread = threading.Thread(target=self._keep_sending, name="medseg-tracking", daemon=True)

    def start(self, wait_seconds: float) -> StoreError | None:
        """Begin, and wait until the first attempt succeeded or failed, but no longer than this.

        Returns:
            How it failed. A refusal is not put in words yet, as the caller may rather not begin at all.
        """
        self._thread.start()
        self._tried.wait(wait_seconds)
        return self._trouble

    def finish(self, wait_seconds: float) -> bool:
        """Send what is left; False if the store hangs and the thread is still at it after this time."""
        self._finishing.set()
        self._thread.join(wait_seconds)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """End without sending what is left."""
        self._abandoned = True
        self._finishing.set()
        self._thread.join()

    def _keep_sending(self) -> None:
        pause = 0.0
        while not self._finishing.wait(pause):
            sent = self._send()
            pause = SEND_EVERY_SECONDS if sent else min(max(2 * pause, RETRY_SECONDS[0]), RETRY_SECONDS[1])
            self._tried.set()
        if not self._abandoned:
            self._send()

    def _send(self) -> bool:
        try:
            self._sender.send()
        except StoreError as error:
            self._trouble = error
            if not self._warned and (self._tried.is_set() or not error.refused):
                self._warned = True
                log.warning(
                    f"W-TRACK-DOWN {self._uri}: {error}; the run goes on, what it logs is kept in its folder and sent "
                    f"when the store answers. If it does not before the end: {self._remedy}"
                )
            return False
        if self._warned:
            log.warning(f"W-TRACK-BACK {self._uri} answers again: everything so far is sent")
        self._trouble, self._warned = None, False
        return True


def _groups(lines: Sequence[Line]) -> Iterator[list[Line]]:
    """Lines in order: metrics, parameters and tags together as far as one request holds, the others alone."""
    group: list[Line] = []
    room = dict(MAX_BATCH)
    for line in lines:
        kind = line.record["kind"]
        if group and (room.get(kind, 0) == 0 or len(group) == max(MAX_BATCH.values())):
            yield group
            group, room = [], dict(MAX_BATCH)
        group.append(line)
        if kind in MAX_BATCH:
            room[kind] -= 1
        else:
            yield group
            group = []
    if group:
        yield group
