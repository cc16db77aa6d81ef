"""One problem of a data set, and how the readers' warnings become such rows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from medseg.data.manifest import Case


@dataclass(frozen=True)
class Row:
    """One problem.

    Args:
        error_id: ``E-…`` for what a training would refuse or would be wrong with, ``W-…`` for the rest.
        message: What was found, what was expected, what to do.
        case: Whose; None: of the whole data set.
        file: Which file or line it is about.
        fixable: Whether ``medseg check --fix`` corrects it.
    """

    error_id: str
    message: str
    case: str | None = None
    file: str | None = None
    fixable: bool = False

    @property
    def severity(self) -> str:
        return "error" if self.error_id.startswith("E-") else "warning"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "severity": self.severity}


class WarningLog(logging.Handler):
    """Keeps what the readers warn of, apart for each thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._own = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        vars(self._own).setdefault("messages", []).append(record.getMessage())

    def take(self) -> list[str]:
        """What this thread was warned of since it last asked, each warning once."""
        return list(dict.fromkeys(vars(self._own).pop("messages", [])))


@contextmanager
def warnings_kept() -> Iterator[WarningLog]:
    """Keep the warnings of medseg's readers instead of printing them."""
    log, kept = logging.getLogger("medseg"), WarningLog()
    log.addHandler(kept)
    try:
        yield kept
    finally:
        log.removeHandler(kept)


def row_of(message: str, case: Case | None = None) -> Row:
    """A reader's ``W-ID where: text``."""
    error_id, _, text = message.partition(" ")
    if not error_id.startswith("W-"):
        error_id, text = "W-OTHER", message
    place, _, rest = text.partition(": ")
    for file in map(str, case.files if case else ()):
        if place == file or place.startswith((f"{file}#", f"{file}/")):  # a series of a folder, a file in it
            return Row(error_id, rest, case.id if case else None, place)
    return Row(error_id, text, case.id if case else None)
