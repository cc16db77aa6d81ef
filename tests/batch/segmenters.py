"""A stand-in for a model, which does to a case what its file says: a word, and what belongs to it."""

import ctypes
import errno
import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.batch.ledger import Job
from medseg.batch.worker import Place
from medseg.errors import DataError, ModelError
from medseg.files import write_atomically


def jobs(folder: Path, contents: list[str]) -> list[Job]:
    made = []
    for number, content in enumerate(contents):
        source = folder / f"c{number}.txt"
        source.write_text(content)
        made.append(Job(f"c{number}", (source,), (folder / f"out_c{number}.txt",)))
    return made


def acted(content: str, stage: str) -> str:
    """Do what is asked for at this stage: ``stage:word argument``; anything else is done in no time."""
    when, _, what = content.partition(":")
    if when != stage:
        return content
    word, _, rest = what.partition(" ")
    if word == "crash":
        time.sleep(float(rest or 0))
        ctypes.string_at(0)
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "once" and not Path(rest).exists():
        Path(rest).touch()
        ctypes.string_at(0)
    if word == "refuse":
        raise DataError("E-TEST", "is wrong", where=rest)
    if word == "break":
        raise ZeroDivisionError(rest)
    if word == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), rest)
    if word == "memory" and not Path(rest).exists():
        Path(rest).touch()
        raise MemoryError("Unable to allocate 9 GiB")
    if word == "sleep":
        time.sleep(float(rest))
    if word == "log":
        logging.getLogger("medseg").warning("W-TEST %s", rest)
    if word == "hold":
        bytearray(os.urandom(1)) * int(rest)
    return content


@dataclass(frozen=True)
class Echo:
    """Writes what a case's file says, with who did it, and notes when each stage began and ended."""

    place: Place
    journal: Path | None = None

    def prepare(self, job: Job) -> str:
        return self._noted(job, "read", lambda: acted(job.images[0].read_text(), "read"))

    def segment(self, job: Job, prepared: str) -> str:
        return self._noted(job, "segment", lambda: acted(prepared, "segment"))

    def write(self, job: Job, found: str) -> dict[str, Any]:
        def written() -> dict[str, Any]:
            acted(found, "write")
            write_atomically(job.files[0], found.encode())
            acted(found, "after")
            return {"pid": os.getpid(), "device": self.place.device}

        return self._noted(job, "write", written)

    def _noted(self, job: Job, stage: str, function: Any) -> Any:
        begun = time.time()
        try:
            return function()
        finally:
            if self.journal:
                with self.journal.open("a") as stream:
                    stream.write(f"{job.id} {stage} {begun} {time.time()}\n")


@dataclass(frozen=True)
class Loading:
    """Makes an `Echo`, where loading does what `does` says."""

    does: str = ""
    journal: Path | None = None

    def __call__(self, place: Place) -> Echo:
        if self.does == "refuse":
            raise ModelError("E-MODEL", "is none", where="model")
        if self.does == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.does == "crash":
            ctypes.string_at(0)
        return Echo(place, self.journal)
