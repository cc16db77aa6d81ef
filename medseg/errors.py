"""The errors a user can cause, each with a stable id and the exit code it leads to.

A message says where, what was found, what was expected and what to do. Anything that is not a
`MedsegError` is a fault of ours and may show a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from medseg.wording import listed

SHOWN_ALIKE = 3
"""Places that are named of faults that differ in nothing else, or in numbers only."""

_NUMBER = r"-?\d[\d.e+-]*"
_NUMBERS = re.compile(f"{_NUMBER}(, {_NUMBER})*")


class MedsegError(Exception):
    """A fault that the user can mend.

    Args:
        error_id: Stable identifier, e.g. ``"E-SPACING"``; scripts may rely on it.
        message: What was found, what was expected, and what to do.
        where: File with line, case or run that the message is about.
    """

    exit_code = 2

    def __init__(self, error_id: str, message: str, where: str | None = None) -> None:
        super().__init__(error_id, message, where)
        self.error_id = error_id
        self.message = message
        self.where = where

    def __str__(self) -> str:
        place = f" {self.where}:" if self.where else ""
        return f"{self.error_id}{place} {self.message}"


class WorkflowError(MedsegError):
    """A workflow, an override or an argument that cannot be used."""


class DataError(MedsegError):
    """A file, case or manifest that cannot be used."""


class GeometryError(DataError):
    """Volumes whose grids cannot be interpreted or do not fit each other."""


class ModelError(MedsegError):
    """A model folder, checkpoint or run that cannot be used."""


class TrainingError(MedsegError):
    """A training that cannot go on."""

    exit_code = 4


class WorkerError(MedsegError):
    """A process that works for this one and cannot go on."""

    exit_code = 4


class Interrupted(MedsegError):
    """Work stopped by a signal, after its state was saved."""

    exit_code = 130


class Problems(MedsegError):
    """Several faults reported at once, so that one look mends them all."""

    def __init__(self, errors: Sequence[MedsegError]) -> None:
        self.errors = tuple(errors)
        first = self.errors[0]
        super().__init__(first.error_id, first.message, first.where)
        self.args = (self.errors,)  # what makes it again where it is sent to another process

    def __str__(self) -> str:
        """A line for each fault, however many cases have it."""
        alike: dict[tuple[bool, str], list[MedsegError]] = {}
        for error in self.errors:
            for one in error.errors if isinstance(error, Problems) else (error,):
                alike.setdefault(_but_for_place_and_numbers(one), []).append(one)
        return "\n".join(_in_one(group) for group in alike.values())


def _but_for_place_and_numbers(error: MedsegError) -> tuple[bool, str]:
    """What has no place is alike only if all of it is."""
    return bool(error.where), _NUMBERS.sub("#", f"{error.error_id} {error.message}") if error.where else str(error)


def _in_one(alike: Sequence[MedsegError]) -> str:
    """Faults that differ in their places and numbers only."""
    first = alike[0]
    places = list(dict.fromkeys(error.where for error in alike))
    if all(error.message == first.message for error in alike):
        return str(MedsegError(first.error_id, first.message, listed(places, SHOWN_ALIKE) if first.where else None))
    if len(alike) <= SHOWN_ALIKE:
        return "\n".join(map(str, alike))
    return f"{first}; likewise {listed(places[1:], SHOWN_ALIKE)}"
