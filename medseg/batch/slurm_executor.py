"""A batch on a Slurm cluster: an array whose tasks pull their cases from the ledger.

The output folder, the scans and the model must lie under the same paths on all nodes, with the same Python. Tasks that
die are noticed and their cases given back, and others are submitted as long as cases are left.

The command waits. Interrupted (Ctrl-C, SIGTERM), it cancels the array, so that nobody writes into a folder that its
owner believes to be at rest. Killed outright, it leaves the array at work, and ``--resume`` joins it: it submits only
as many tasks as are lacking.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from medseg.batch.deaths import Death, EarlyDeaths
from medseg.batch.elsewhere import tell, work_elsewhere
from medseg.batch.ledger import Ledger, new_token
from medseg.batch.worker import Load, Place
from medseg.errors import MedsegError, WorkflowError

FOLDER = "slurm"
"""Below the output folder, for what submitit and the tasks write."""

OPTIONS = {"gpus": "gpus_per_node", "mem_gb": "mem_gb", "timeout_min": "timeout_min", "cpus_per_task": "cpus_per_task"}
"""Options by submitit's names for them; all others are sbatch's own."""

_LOOK_EVERY_S = 1.0

log = logging.getLogger("medseg")


def run_slurm(
    ledger: Ledger,
    load: Load,
    place: Place,
    *,
    num_workers: int,
    options: Mapping[str, str],
    preload: Sequence[str] = (),
) -> None:
    """Work through a ledger with the tasks of an array.

    Args:
        ledger: Of the batch.
        load: Makes the segmenter.
        place: Where a task computes.
        num_workers: Tasks of the array.
        options: ``partition``, ``account`` and whatever else sbatch takes; ``mem_gb``, ``timeout_min``, ``gpus``,
            ``cpus_per_task``; ``cluster=local`` has processes of this machine stand for tasks.
        preload: Modules that each task is to import once for all its processes.

    Raises:
        WorkflowError: If submitit is not installed, or does not take the options.
        MedsegError: What stopped a task other than a fault of a case; OSError: of a full disk.
    """
    executor = _executor(ledger, options)
    deaths = EarlyDeaths()
    heard = 0
    tasks: dict[str, Any] = {}
    try:
        while (progress := ledger.progress()).is_open:
            others = ledger.reap(tasks)  # of an array that a killed command left at work
            if (lacking := min(num_workers - len(tasks) - others, progress.todo)) > 0:
                tokens = [new_token() for _ in range(lacking)]
                arguments = [(ledger, load, token, place, os.getcwd(), preload) for token in tokens]
                tasks |= dict(zip(tokens, executor.map_array(_task, arguments), strict=True))
            time.sleep(_LOOK_EVERY_S)
            heard = tell(ledger, heard)
            for token, task in list(tasks.items()):
                if task.done():
                    del tasks[token]
                    _look_at(token, task, ledger, deaths)
        for task in tasks.values():  # they are about to end
            task.wait()
        tasks = {}
        tell(ledger, heard)
    finally:
        for token, task in tasks.items():
            task.cancel()
            ledger.release(token)


def _task(arguments: tuple[Ledger, Load, str, Place, str, Sequence[str]]) -> Exception | None:
    ledger, load, token, place, folder, preload = arguments
    return work_elsewhere(ledger, load, token=token, place=place, folder=folder, preload=preload)


def _look_at(token: str, task: Any, ledger: Ledger, deaths: EarlyDeaths) -> None:
    """What a task that has ended leaves behind."""
    error = task.exception()
    if error is None:
        if (fault := task.result()) is not None:
            raise fault
        return
    if isinstance(error, MedsegError):
        raise error
    raised = isinstance(error, import_module("submitit.core.utils").FailedJobError)  # e.g. for want of medseg there
    its_own = raised or task.state.startswith("OUT_OF_ME")
    death = Death(f"{task.state}, see {task.paths.stderr}", from_elsewhere=not its_own)
    deaths.add(death, had_work=ledger.bury(token, death))
    log.warning("W-WORKER a task was ended: %s", death.ending)


def _executor(ledger: Ledger, options: Mapping[str, str]) -> Any:
    try:
        submitit = import_module("submitit")
    except ImportError:
        message = "needs submitit, which is not installed: pip install 'medseg[slurm]'"
        raise WorkflowError("E-EXTRA", message, where="--executor slurm") from None
    chosen: dict[str, Any] = {key: int(value) if value.isdigit() else value for key, value in options.items()}
    cluster = chosen.pop("cluster", "slurm")
    named = {OPTIONS.get(key, f"slurm_{key}"): value for key, value in chosen.items()}
    try:
        executor = submitit.AutoExecutor(folder=ledger.path.parent / FOLDER, cluster=cluster)
        executor.update_parameters(name="medseg", **named)
    except (ValueError, NameError, TypeError, RuntimeError) as error:
        raise WorkflowError("E-SLURM", str(error).splitlines()[0], where="--slurm") from None
    return executor
