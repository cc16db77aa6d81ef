"""What running out of memory looks like, the host's or a GPU's, here or in another process; and how to be quick with it."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIGNS = ("out of memory", "allocate memory", "MemoryError", "bad_alloc", "ALLOC_FAILED")
"""In what torch, NumPy and CUDA say, also of a worker process, whose errors arrive as text."""

_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ([KMGTPE]i?B|bytes)", re.IGNORECASE)
_BYTES_PER_GB = 1e9

_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1  # glibc's malloc.h
_ASKED_OF_GLIBC = {_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 2**31 - 1}  # its highest ones


def keep_freed_memory() -> None:
    """Have this process use the memory that it freed again, instead of giving it back and getting new.

    The kernel clears each page that it gives, and a network asks for its images anew layer by layer: on a CPU that took a
    twentieth to a third of its time (see `benchmarks/allocation.py`). What is larger than 32 MB still goes back at once, so
    that no large holes are left between what is in use. Up to 2 GB of the rest stay with the process once freed.

    Nothing is done where the C library is not glibc, or where the environment says how it is to allocate.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if told or sys.platform != "linux":
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for number, value in _ASKED_OF_GLIBC.items():
            mallopt(number, value)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out. torch raises a plain RuntimeError for the host's."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


def free_bytes(device: torch.device) -> float:
    """Memory of a GPU that nothing has taken yet, or that torch has but does not use; the host's is not asked for."""
    import torch

    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + kept)


def asked_for(error: BaseException) -> str:
    """``": 1.2 GB more were asked for"`` where the error says how much, else nothing."""
    found = _ASKED.search(str(error))
    if found is None:
        return ""
    amount, unit = found.groups()
    if unit == "bytes":
        amount, unit = f"{float(amount) / _BYTES_PER_GB:.3g}", "GB"
    return f": {amount} {unit} more were asked for"
