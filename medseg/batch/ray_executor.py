"""A batch on a Ray cluster: actors that keep the model loaded and pull their cases from the ledger.

The output folder, the scans and the model must lie under the same paths on all machines, with medseg installed there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from medseg.batch.ledger import Death, Ledger, worker_name
from medseg.batch.local import EarlyDeaths
from medseg.batch.worker import Load, Place, work_elsewhere
from medseg.errors import WorkflowError

_LOOK_EVERY_S = 0.5

log = logging.getLogger("medseg")


def run_ray(ledger: Ledger, load: Load, device: str, *, num_workers: int, address: str | None = None) -> None:
    """Work through a ledger with actors; one that dies is replaced.

    Args:
        ledger: Of the batch.
        load: Makes the segmenter.
        device: ``auto``, ``cpu`` or ``cuda``. An actor is given a GPU of its own, unless there are none or none is
            wanted; else a core.
        num_workers: How many actors.
        address: Of a cluster that is there, e.g. ``ray://host:10001`` or ``auto``; None: one on this machine, for now.

    Raises:
        WorkflowError: If Ray is not installed, or its cluster cannot be reached.
        MedsegError: What stopped an actor other than a fault of a case; OSError: of a full disk.
    """
    ray = _ray()
    with _cluster(ray, address, num_workers):
        on_gpu = device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
        place = Place("cuda") if on_gpu else Place("cpu", num_threads=1)
        actor_class = ray.remote(max_restarts=0, num_cpus=1, num_gpus=int(on_gpu))(_Actor)
        deaths = EarlyDeaths()
        crew: dict[Any, tuple[Any, Any]] = {}

        def start() -> None:
            actor = actor_class.remote()
            name = actor.name.remote()  # not waited for: there may be no place for it yet
            crew[actor.work.remote(ledger, load, name, place, os.getcwd())] = (actor, name)

        try:
            for _ in range(num_workers):
                start()
            heard = 0
            while crew:
                ready, _ = ray.wait(list(crew), timeout=_LOOK_EVERY_S)
                heard = tell(ledger, heard)
                for task in ready:
                    _, name = crew.pop(task)
                    try:
                        fault = ray.get(task)
                    except ray.exceptions.RayError as error:  # the actor is dead
                        death = Death(str(error).splitlines()[0].strip())
                        deaths.add(death, had_work=ledger.bury(_known(ray, name), death))
                        log.warning("W-WORKER an actor was ended: %s", death.ending)
                        if ledger.progress().is_open:
                            start()
                        continue
                    if fault is not None:
                        raise fault
            tell(ledger, heard)
        finally:
            for actor, name in crew.values():
                ray.kill(actor)
                ledger.release(_known(ray, name))


def _known(ray: Any, name: Any) -> str:
    """An actor's name; nothing if it had no time to tell it, and so to claim a case."""
    try:
        return str(ray.get(name, timeout=1))
    except ray.exceptions.RayError:
        return ""


class _Actor:
    """A worker in one of Ray's processes."""

    def name(self) -> str:
        return worker_name()

    def work(self, ledger: Ledger, load: Load, name: str, place: Place, folder: str) -> Exception | None:
        return work_elsewhere(ledger, load, worker=name, place=place, folder=folder)


def tell(ledger: Ledger, heard: int) -> int:
    """Log here what workers have said in the ledger since; the number of the last of it."""
    for number, level, message in ledger.heard(heard):
        log.log(level, "%s", message)
        heard = number
    return heard


def _ray() -> Any:
    try:
        return import_module("ray")
    except ImportError:
        message = "needs Ray, which is not installed: pip install 'medseg[ray]'"
        raise WorkflowError("E-EXTRA", message, where="--executor ray") from None


@contextmanager
def _cluster(ray: Any, address: str | None, num_cpus: int) -> Iterator[None]:
    """Connect, unless somebody has; of a cluster that is made for this, nothing remains."""
    if ray.is_initialized():
        yield
        return
    size = {"num_cpus": num_cpus, "include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **size)
    except (ConnectionError, RuntimeError, ValueError) as error:
        message = f"no Ray cluster is reached: {str(error).splitlines()[0]}"
        raise WorkflowError("E-RAY", message, where=f"--address {address}") from None
    try:
        yield
    finally:
        ray.shutdown()
