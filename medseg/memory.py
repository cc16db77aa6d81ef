"""What running out of memory looks like."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: the host's, or a GPU's.

    torch has an error of its own for a GPU; for the host it raises a plain RuntimeError.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
