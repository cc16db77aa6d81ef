"""A batch on this machine: processes that may die, and one that watches over them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path

from medseg.batch.deaths import Death, EarlyDeaths
from medseg.batch.isolated import ending_of, peak_bytes_of, serving
from medseg.batch.ledger import Ledger, new_token, worker_name
from medseg.batch.parallel import interruption_waits
from medseg.batch.worker import Load, Place, work

_LOOK_EVERY_S = 0.2
_REAP_EVERY_S = 1.0
_SENT_BY_SOMEBODY = ("SIGKILL", "SIGTERM", "SIGUSR1", "SIGUSR2")  # the last are Slurm's warnings of a job's end
_OOM_COUNTERS = (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"))

log = logging.getLogger("medseg")


def run_local(
    ledger: Ledger, load: Load, places: Sequence[Place], *, preload: Sequence[str] = (), part_of: str = ""
) -> None:
    """Work through a ledger in processes of this machine; one that dies is replaced.

    Args:
        ledger: Of the batch.
        load: Makes the segmenter.
        places: Where to compute: a process each.
        preload: Modules to import once for all processes.
        part_of: What the workers' names end with, by which somebody else watches over this process; empty: nobody does.

    Raises:
        MedsegError: What stopped a worker other than a fault of a case; OSError: of a full disk.
        WorkerError: If workers keep dying before they begin a case.
    """
    context = multiprocessing.get_context("forkserver")  # a plain fork of a process with threads may hang
    context.set_forkserver_preload([*preload, __name__])
    deaths = EarlyDeaths()
    crew: dict[int, _Worker] = {}
    with ExitStack() as ending:
        ending.callback(_stop, crew, ledger)
        for number, place in enumerate(places):
            crew[number] = _Worker(context, ledger, load, place, part_of)
        looked = time.monotonic()
        while crew:
            wait([worker.connection for worker in crew.values()], timeout=_LOOK_EVERY_S)
            for number, worker in list(crew.items()):
                if worker.is_at_work():
                    continue
                del crew[number]
                if worker.process.exitcode:
                    deaths.add(worker.death, had_work=ledger.bury(worker.token, worker.death))
                    log.warning("W-WORKER a process that does the work was ended by %s", worker.death.ending)
                    if ledger.progress().is_open:
                        crew[number] = _Worker(context, ledger, load, places[number], part_of)
            if not part_of and time.monotonic() > looked + _REAP_EVERY_S:
                ledger.reap(worker.token for worker in crew.values())
                looked = time.monotonic()


def _stop(crew: Mapping[int, _Worker], ledger: Ledger) -> None:
    for worker in crew.values():
        worker.stop(ledger)


def places(device: str, workers: int, num_jobs: int) -> list[Place]:
    """Where the workers of this machine compute.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        workers: How many; 0: one for each visible GPU, or one on the CPU.
        num_jobs: There are no more workers than cases.
    """
    gpus = _num_gpus() if device in ("auto", "cuda") else 0
    number = max(1, min(workers or gpus or 1, num_jobs))
    if number == 1:
        return [Place(device)]
    if gpus:
        return [Place(f"cuda:{n % gpus}") for n in range(number)]
    return [Place(device, num_threads=max(1, _num_cores() // number))] * number


def _num_gpus() -> int:
    if not any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
        return 0  # without importing torch, which takes seconds
    import torch

    return torch.cuda.device_count()


def _num_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(told)) if told.isdigit() and int(told) else cores


class _Worker:
    """A process at work, and what it says."""

    def __init__(self, context: ForkServerContext, ledger: Ledger, load: Load, place: Place, part_of: str) -> None:
        self.connection, its_end = context.Pipe(duplex=False)
        self.peak_bytes = 0
        self._oom_kills = oom_kills()
        self.token = new_token() + part_of
        arguments = (its_end, ledger, load, self.token, place, os.getcwd(), log.getEffectiveLevel())
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        with interruption_waits():  # which the server that forks them would else die of
            forkserver.ensure_running()
            self.process.start()
        its_end.close()  # so that its death ends the connection

    @property
    def death(self) -> Death:
        """How it ended."""
        ending = ending_of(self.process.exitcode)
        spared = bool(self._oom_kills) and oom_kills() == self._oom_kills
        return Death(ending, self.peak_bytes, from_elsewhere=ending in _SENT_BY_SOMEBODY and spared)

    def is_at_work(self) -> bool:
        """Hear what it says; False once it has ended.

        Raises:
            MedsegError: What stopped it; or OSError.
        """
        self.peak_bytes = max(self.peak_bytes, peak_bytes_of(self.process.pid))
        while self.connection.poll():
            try:
                kind, content = self.connection.recv()
            except (EOFError, OSError):  # it was killed, perhaps in the middle of a word
                self.process.join()
                self.connection.close()
                return False
            if kind == "raised":
                raise content
            logging.getLogger(content.name).handle(content)
        return True

    def stop(self, ledger: Ledger) -> None:
        """End it, wherever it is; what it had in hand goes back."""
        self.process.terminate()
        self.process.join()
        self.connection.close()
        ledger.release(self.token)


def oom_kills() -> Mapping[str, int]:
    """How many processes the kernel has ended for lack of memory, by where it says so; empty: it does not say."""
    found: dict[str, int] = {}
    for counter in _OOM_COUNTERS:
        try:
            lines = counter.read_text().splitlines()
        except OSError:
            continue
        found |= {str(counter): int(line.split()[1]) for line in lines if line.startswith("oom_kill ")}
    return found


def _serve(
    connection: Connection, ledger: Ledger, load: Load, token: str, place: Place, folder: str, level: int
) -> None:
    """What the process does."""
    with serving(connection, folder, level):
        work(ledger, load, worker=worker_name(token), place=place)
