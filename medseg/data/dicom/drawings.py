"""What the SEGs and RTSTRUCTs of a folder hold, and on which series they are drawn, from their headers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydicom import Dataset, dcmread

from medseg.data.dicom.rtstruct import rois_of
from medseg.data.dicom.seg import segments_of
from medseg.data.dicom.values import text_of, tolerant
from medseg.errors import MedsegError
from medseg.wording import counted

_READ = ["Modality", "ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"]


@dataclass(frozen=True)
class Drawing:
    """A SEG or an RTSTRUCT.

    Args:
        kind: ``"SEG"`` or ``"RTSTRUCT"``.
        structures: Each name with what there is of it, e.g. ``"GTV-1 (26 contours)"``.
        series_uids: Of the series that it says it is drawn on.
        problem: Why it cannot be read.
    """

    kind: str
    structures: tuple[str, ...] = ()
    series_uids: tuple[str, ...] = ()
    problem: str = ""


def read_drawing(path: Path) -> Drawing | None:
    """What a file holds that is no scan; None if nothing is drawn in it.

    Args:
        path: A DICOM file.
    """
    try:
        with tolerant():
            header = dcmread(path, stop_before_pixels=True, force=True, specific_tags=_READ)
            kind, uids = text_of(header, "Modality"), tuple(dict.fromkeys(_series_uids(header)))
    except Exception:  # damaged bytes fail anywhere in the parser: the file stays what it was, no scan
        return None
    try:
        if kind == "SEG":
            names = [f"{one.label} ({counted(one.num_frames, 'frame')})" for one in segments_of(path)]
        elif kind == "RTSTRUCT":
            names = [f"{one.name} ({counted(one.num_contours, 'contour')})" for one in rois_of(path)]
        else:
            return None
    except MedsegError as error:
        return Drawing(kind, series_uids=uids, problem=f"{error.error_id} {error.message}")
    return Drawing(kind, tuple(names), uids)


def _series_uids(header: Dataset) -> Iterator[str]:
    """A SEG names them at the top, an RTSTRUCT below frame of reference and study."""
    for series in header.get("ReferencedSeriesSequence") or []:
        yield text_of(series, "SeriesInstanceUID")
    for frame in header.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            for series in study.get("RTReferencedSeriesSequence") or []:
                yield text_of(series, "SeriesInstanceUID")
