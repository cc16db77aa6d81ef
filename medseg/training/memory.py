"""Memory that runs out, told in words instead of by whatever asked for it last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from medseg.errors import TrainingError
from medseg.memory import asked_for, is_out_of_memory

LARGE_SCAN = "the scan is large for this machine: use a coarser data.spacing_mm, or more memory"


@contextmanager
def memory_told(remedy: str, *, where: str) -> Iterator[None]:
    """Say of memory that runs out inside how much was asked for, and what to do.

    Args:
        remedy: What needs less.
        where: Field of the workflow, or case, that it hangs on.

    Raises:
        TrainingError: If memory runs out.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        place = " of the GPU" if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error) else ""
        raise TrainingError(
            "E-MEMORY", f"the memory{place} is not enough{asked_for(error)}; {remedy}", where=where
        ) from error
