"""`medseg` in a process that ends itself with SIGKILL, and first writes down what it was doing.

    python killed.py MOMENT COUNT medseg-arguments…

MOMENT is a key of `MOMENTS`, and the kill comes when it is reached for the COUNT-th time; or of `WORKER_MOMENTS`, which
only worker processes reach, so that they are what is killed; or it is "after", and the kill comes COUNT seconds after
the imports. What every thread was doing is appended to killed.txt in the working folder.
"""

import functools
import importlib
import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Condition = Callable[..., bool]


def always(*_: Any) -> bool:
    return True


def never_killed(*_: Any) -> bool:
    return not Path("killed.txt").exists()


def into(part: str) -> Condition:
    """Whether an open file (a descriptor), or the last of some paths, has `part` in its name."""

    def matches(*arguments: Any) -> bool:
        last = arguments[-1]
        return part in (os.readlink(f"/proc/self/fd/{last}") if isinstance(last, int) else str(last))

    return matches


# What is about to be called when the kill comes: module, name within it, condition on the arguments.
MOMENTS: dict[str, tuple[str, str, Condition]] = {
    "writing a case into the cache": ("numpy", "save", always),
    "a case is written and not yet in its place": ("pathlib", "Path.rename", always),
    "writing a checkpoint": ("os", "fsync", into("/checkpoints/last/.")),
    "a checkpoint is written and not yet in its place": ("os", "replace", into(".pt")),
    "a checkpoint is in its place without its checksum": ("os", "replace", into(".sha256")),
    "writing the best checkpoint": ("os", "fsync", into("/checkpoints/best/.")),
    "validating": ("medseg.training.validator", "Validator.score", always),
    "writing the validation table": ("medseg.training.run_folder", "csv.writer", always),
    "updating the weights": ("torch.optim", "AdamW.step", always),
    "sending to MLflow": ("mlflow.tracking.client", "MlflowClient.log_batch", always),
    "writing the model": ("os", "replace", into("model.safetensors")),
    "scoring": ("medseg.build.scoring", "score_case", always),
}

WORKER_MOMENTS: dict[str, tuple[str, str, Condition]] = {
    "the first worker reads a sample": ("medseg.data.dataset", "PatchDataset.__getitem__", never_killed),
    "each worker reads a sample": ("medseg.data.dataset", "PatchDataset.__getitem__", always),
}


def die() -> None:
    """Write down what every thread is doing, then end without a chance to clean up."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    with Path("killed.txt").open("a") as stream:
        for ident, frame in sys._current_frames().items():
            ours = [f for f in traceback.extract_stack(frame) if "/medseg/" in f.filename or "/killed.py" in f.filename]
            calls = [f"{Path(f.filename).stem}.{f.name}" for f in ours if f.name != "die"]
            if calls:
                stream.write(f"{names.get(ident, ident)}: {' > '.join(calls)}\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.kill(os.getpid(), signal.SIGKILL)


def kill_when(moment: str, count: int) -> None:
    """Have the function that stands for a moment die at its `count`-th call, instead of doing its work."""
    module, name, condition = {**MOMENTS, **WORKER_MOMENTS}[moment]
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, last)
    calls = itertools.count(1)

    @functools.wraps(original)
    def lethal(*args: Any, **kwargs: Any) -> Any:
        if condition(*args) and next(calls) == count:
            die()
        return original(*args, **kwargs)

    setattr(owner, last, lethal)


def main() -> None:
    moment, count, *arguments = sys.argv[1:]
    importlib.import_module("medseg.train")  # so that seconds count from when the work begins
    from medseg.cli import main as medseg_main

    if moment == "after":
        threading.Timer(float(count), die).start()
    else:
        kill_when(moment, int(count))
    sys.argv = ["medseg", *arguments]
    medseg_main()


if __name__ == "__main__":
    main()
