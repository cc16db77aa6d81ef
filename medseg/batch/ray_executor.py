"""A batch on a Ray cluster: actors that keep the model loaded and pull their cases from the ledger.

The output folder, the scans and the model must lie under the same paths on all machines, with medseg installed there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from medseg.batch.deaths import Death, EarlyDeaths
from medseg.batch.elsewhere import tell, work_elsewhere
from medseg.batch.ledger import Ledger, new_token
from medseg.batch.worker import Load, Place
from medseg.errors import WorkflowError

_LOOK_EVERY_S = 1.0

log = logging.getLogger("medseg")


def run_ray(
    ledger: Ledger,
    load: Load,
    device: str,
    *,
    num_workers: int,
    address: str | None = None,
    preload: Sequence[str] = (),
) -> None:
    """Work through a ledger with actors; one that dies is replaced.

    Args:
        ledger: Of the batch.
        load: Makes the segmenter.
        device: ``auto``, ``cpu`` or ``cuda``. An actor is given a GPU of its own, unless there are none or none is
            wanted; else a core.
        num_workers: How many actors.
        address: Of a cluster that is there, e.g. ``ray://host:10001`` or ``auto``; None: one on this machine, for now.
        preload: Modules that each actor is to import once for all its processes.

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
        crew: dict[Any, tuple[Any, str]] = {}

        def start() -> None:
            actor, token = actor_class.remote(), new_token()
            crew[actor.work.remote(ledger, load, token, place, os.getcwd(), preload)] = (actor, token)

        try:
            for _ in range(num_workers):
                start()
            heard = 0
            while crew:
                ready, _ = ray.wait(list(crew), timeout=_LOOK_EVERY_S)
                heard = tell(ledger, heard)
                ledger.reap(token for _, token in crew.values())
                for task in ready:
                    _, token = crew.pop(task)
                    try:
                        fault = ray.get(task)
                    except ray.exceptions.RayError as error:  # the actor is dead
                        death = _death(ray, error)
                        deaths.add(death, had_work=ledger.bury(token, death))
                        log.warning("W-WORKER an actor was ended: %s", death.ending)
                        if ledger.progress().is_open:
                            start()
                        continue
                    if fault is not None:
                        raise fault
            tell(ledger, heard)
        finally:
            for actor, token in crew.values():
                ray.kill(actor)
                ledger.release(token)


def _death(ray: Any, error: Exception) -> Death:
    """How an actor ended: by a fault raised there, e.g. for want of medseg, by lack of memory, or by somebody else."""
    raised = isinstance(error, ray.exceptions.RayTaskError)
    lines = str(error).strip().splitlines()
    its_own = raised or isinstance(error, ray.exceptions.OutOfMemoryError)
    return Death(lines[-1 if raised else 0].strip(), from_elsewhere=not its_own)


class _Actor:
    """One of Ray's processes, which watches over a worker."""

    def work(
        self, ledger: Ledger, load: Load, token: str, place: Place, folder: str, preload: Sequence[str]
    ) -> Exception | None:
        return work_elsewhere(ledger, load, token=token, place=place, folder=folder, preload=preload)


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
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray tells its makers of it, from among patients' scans
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **size)
    except (ConnectionError, RuntimeError, ValueError) as error:
        message = f"no Ray cluster is reached: {str(error).splitlines()[0]}"
        raise WorkflowError("E-RAY", message, where=f"--address {address}") from None
    try:
        yield
    finally:
        ray.shutdown()
