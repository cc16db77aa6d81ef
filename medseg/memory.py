"""What running out of memory looks like: the host's or a GPU's, here or in another process."""

from __future__ import annotations

import errno
import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIGNS = ("out of memory", "allocate memory", "MemoryError", "bad_alloc", "ALLOC_FAILED")
"""In what torch, NumPy and CUDA say, also of a worker process, whose errors arrive as text."""

_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ([KMGTPE]i?B|bytes)", re.IGNORECASE)
_BYTES_PER_GB = 1e9


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
