"""How workers end, and when a case, or a batch, is given up for that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medseg.errors import DataError, WorkerError

MAX_ATTEMPTS = 2
"""Workers that a case may take with it, before it is given up."""

MAX_KILLS = 5
"""Workers that somebody else may end while they have a case in hand, before it is given up."""


@dataclass(frozen=True)
class Death:
    """How a worker ended.

    Args:
        ending: E.g. ``"SIGKILL"``, or ``"exit code 1"``.
        peak_bytes: The most memory that was seen in use; 0: not known.
        from_elsewhere: Whether somebody else ended it, so that its cases are not to blame.
    """

    ending: str
    peak_bytes: int = 0
    from_elsewhere: bool = False


def given_up(scan: Path, attempts: int, kills: int, death: Death) -> DataError | None:
    """What to say of a case that is given up; None if it is to be tried again.

    Args:
        scan: What it is read from.
        attempts: Workers that it took with it.
        kills: Workers that somebody else ended while they had it in hand.
        death: How the last of them ended.
    """
    memory = f"; it held {death.peak_bytes / 1e9:.1f} GB" if death.peak_bytes else ""
    if attempts >= MAX_ATTEMPTS:
        lack = ", as the kernel does for lack of memory" if death.ending == "SIGKILL" else ""
        found = f"its process was ended {attempts} times, the last time alone, by {death.ending}{lack}{memory}"
        remedy = "look at this scan, or give the job more memory"
    elif kills >= MAX_KILLS:
        found = f"its process was ended {kills} times by somebody else, the last time by {death.ending}{memory}"
        remedy = "find out who ends processes here (a limit of memory or time?), then --resume"
    else:
        return None
    return DataError("E-WORKER", f"{found}; {remedy}", where=str(scan))


class EarlyDeaths:
    """Counts workers that died before they began a case, so that they are not replaced for ever."""

    def __init__(self) -> None:
        self.counts = {True: 0, False: 0}

    def add(self, death: Death, *, had_work: bool) -> None:
        """Count a death.

        Raises:
            WorkerError: If there are too many in a row.
        """
        if had_work:
            self.counts = {True: 0, False: 0}
            return
        self.counts[death.from_elsewhere] += 1
        if self.counts[True] > MAX_KILLS or self.counts[False] >= MAX_ATTEMPTS:
            message = f"the processes that do the work are ended by {death.ending} before they begin a scan"
            raise WorkerError("E-WORKER", f"{message}; have fewer --workers, or more memory")
