"""What somebody drew on a DICOM series (SEG, RTSTRUCT, a folder of pictures) as its label map.

===================== ==================================================================
E-LABEL-KIND          a DICOM file that is neither, or a folder with several such files
===================== ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydicom import dcmread

from medseg.data.dicom.folder import Series, find_one, find_series, is_dicom, split_series_path
from medseg.data.dicom.mask_stack import read_mask_stack
from medseg.data.dicom.rtstruct import read_rtstruct
from medseg.data.dicom.seg import read_seg
from medseg.data.dicom.values import tolerant
from medseg.errors import DataError
from medseg.geometry import Geometry, Volume
from medseg.labels import SEG_THRESHOLD, Labels


def read_drawn(path: Path, image: Path, grid: Geometry, *, labels: Labels | None = None) -> Volume:
    """Read a label map that is drawn on a series.

    Args:
        path: A SEG or an RTSTRUCT, a folder that holds one of them, or a folder of pictures, one a slice.
        image: The scan: the DICOM series; of a SEG or an RTSTRUCT also a file made from that series, where only
            the place of what is drawn says that it belongs there.
        grid: The image's.
        labels: Its names and structures say which value each structure gets, its region order which one lies
            on top where they overlap, its threshold what counts of a fractional SEG; None: the structure's number.

    Returns:
        Label values (1, I, J, K) on the grid.

    Raises:
        DataError: See the tables of `seg`, `rtstruct` and `mask_stack`.
        GeometryError: If it does not lie on the grid.
    """
    series = find_one(image) if is_dicom(split_series_path(image)[0]) else None
    if path.is_dir() and not is_dicom(path):
        if series is None:
            raise DataError(
                "E-LABEL-IMAGE", f"pictures, one a slice, need a DICOM series; {image} is none", where=str(path)
            )
        return read_mask_stack(path, series)
    file = _only_drawing(path) if path.is_dir() else path
    uid = series.frame_of_reference_uid if series else None
    values, order = _values(labels), labels.region_order if labels else ()
    if _modality(file) == "SEG":
        threshold = labels.seg_threshold if labels else SEG_THRESHOLD
        return read_seg(file, grid, values=values, paint_order=order, threshold=threshold, frame_of_reference_uid=uid)
    if _modality(file) != "RTSTRUCT":
        raise DataError(
            "E-LABEL-KIND", "is neither a SEG nor an RTSTRUCT; give the file that was drawn", where=str(file)
        )
    return read_rtstruct(
        file, grid, sop_uids=_sop_uids(series), frame_of_reference_uid=uid, values=values, paint_order=order
    )


def _values(labels: Labels | None) -> Mapping[str, int] | None:
    if labels is None:
        return None
    return {name: value for value, name in labels.names.items()} | dict(labels.structures)


def _sop_uids(series: Series | None) -> tuple[str, ...]:
    return series.sop_uids if series else ()


def _modality(file: Path) -> str:
    with tolerant():
        return str(dcmread(file, force=True, specific_tags=["Modality"], stop_before_pixels=True).get("Modality", ""))


def _only_drawing(folder: Path) -> Path:
    drawings = [one.path for one in find_series(folder).skipped if one.path.is_file() and is_dicom(one.path)]
    drawings = [path for path in drawings if _modality(path) in ("SEG", "RTSTRUCT")]
    if len(drawings) != 1:
        raise DataError(
            "E-LABEL-KIND", f"holds {len(drawings)} SEG and RTSTRUCT files; name the one to use", where=str(folder)
        )
    return drawings[0]
