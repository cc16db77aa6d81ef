"""Values of DICOM files, many of which break the rules: what cannot be read is absent, never a crash."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian


@contextmanager
def tolerant() -> Iterator[None]:
    """Silence pydicom: real files break many rules, and what matters of them becomes a message of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def transfer_syntax(header: Dataset) -> UID:
    """How the file is encoded; where it does not say, as pydicom found it to be."""
    stated = str(header.file_meta.get("TransferSyntaxUID") or "")
    if stated:
        return UID(stated)
    is_implicit, is_little = header.original_encoding
    return ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian


def text_of(item: Dataset, keyword: str) -> str:
    """A value as text, numbers without trailing zeros; empty where there is none."""
    try:
        value = item.get(keyword)
    except (ValueError, TypeError):  # what a damaged element says, nobody knows
        return ""
    if value is None:
        return ""
    parts = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return "\\".join(_text(part) for part in parts)


def number_of(item: Dataset, keyword: str) -> float | None:
    """A finite number, or None."""
    numbers = numbers_of(item, keyword, 1)
    return numbers[0] if numbers else None


def numbers_of(item: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """That many finite numbers, or None."""
    try:
        value = item.get(keyword)
        parts = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        numbers = tuple(float(part) for part in parts)
    except (ValueError, TypeError):
        return None
    return numbers if len(numbers) == count and all(math.isfinite(number) for number in numbers) else None


def _text(part: object) -> str:
    if isinstance(part, int):
        return f"{part:d}"
    return f"{part:.7g}" if isinstance(part, float) else str(part).strip()  # 7: what single precision holds
