"""A DICOM file that must be of a certain kind, opened and decoded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.data.dicom.painting import Kind
from medseg.data.dicom.values import tolerant
from medseg.errors import DataError, MedsegError

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_COORDINATE_MM = 1e6
"""No patient, nor any scanner, has a point farther from its origin: a kilometre."""

_UNDEFINED_LENGTH = 0xFFFFFFFF


@contextmanager
def decoding(kind: Kind, where: str) -> Iterator[None]:
    """Around all that reads values: silences pydicom, and refuses what its parser stumbles over.

    Raises:
        DataError: If the file is damaged.
    """
    try:
        with tolerant():
            yield
    except MedsegError:
        raise
    except Exception as error:  # damaged bytes fail anywhere in the parser; its message may quote a patient's name
        raise DataError(
            f"E-{kind}-FILE", f"cannot be read as DICOM ({type(error).__name__}); copy it again", where=where
        ) from error


def open_object(path: Path, sop_classes: Collection[str], *, kind: Kind, where: str) -> Dataset:
    """Read a file, all but its pixels.

    Args:
        path: The file.
        sop_classes: What it may be.
        kind: What people call these.
        where: Case or file, for messages.

    Raises:
        DataError: If it cannot be read, ends too early, or is something else.
    """
    from pydicom import dcmread

    with decoding(kind, where):
        data = dcmread(path, stop_before_pixels=True)
        if any(_is_cut_off(element) for element in data.values()):  # pydicom takes what there is
            raise DataError(f"E-{kind}-FILE", "ends in the middle of its header; copy it again", where=where)
        if data.get("SOPClassUID") not in sop_classes:
            modality = data.get("Modality", "unknown")
            raise DataError(
                f"E-{kind}-FILE", f"is no {kind} (its modality is {modality}); give a DICOM {kind}", where=where
            )
    return data


def _is_cut_off(element: Any) -> bool:
    """Whether an element as read is shorter than it says."""
    length = getattr(element, "length", None)  # only of what is not decoded yet
    return length not in (None, _UNDEFINED_LENGTH) and len(element.value or b"") < length
