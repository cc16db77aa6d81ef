"""How messages tell numbers and names."""

from __future__ import annotations

from collections.abc import Iterable


def counted(number: int, what: str) -> str:
    """``1 case``, ``3 cases``: for words whose plural ends in s."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """``90 s``, ``5 minutes``, ``2.5 hours``."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first few names, and how many more there are: ``a, b and 3 more``."""
    told = [str(name) for name in names]
    return ", ".join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")
