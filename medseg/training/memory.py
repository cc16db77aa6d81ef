"""Memory that runs out, told in words instead of by whatever asked for it last."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from medseg.errors import TrainingError

SIGNS = ("out of memory", "allocate memory", "MemoryError", "bad_alloc", "ALLOC_FAILED")
"""In what torch, NumPy and CUDA say, also of a worker process, whose errors arrive as text."""

ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ([KMGTPE]i?B|bytes)", re.IGNORECASE)
BYTES_PER_GB = 1e9

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
        if not _is_of_memory(error):
            raise
        place = " of the GPU" if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error) else ""
        raise TrainingError(
            "E-MEMORY", f"the memory{place} is not enough{_asked(str(error))}; {remedy}", where=where
        ) from error


def _is_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def _asked(text: str) -> str:
    """How much more was wanted, where the error says so."""
    found = ASKED.search(text)
    if found is None:
        return ""
    amount, unit = found.groups()
    if unit == "bytes":
        amount, unit = f"{float(amount) / BYTES_PER_GB:.3g}", "GB"
    return f": {amount} {unit} more were asked for"
