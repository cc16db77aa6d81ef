"""What the header of a file means, refused where no scan of a patient could have it.

Libraries accept NaN affines, headers without orientation and sizes that no machine holds. Refused
(`DataError`, `GeometryError`) or mended (a warning on the logger ``medseg``):

===================== ==================================================================
E-NIFTI-MAGIC         an Analyze or .hdr/.img pair
E-NIFTI-HEADER        data offset or data type that the format does not know
E-SIZE                larger than `MAX_BYTES`; refused before memory is taken
E-DIMS                an axis without voxels, or more axes than space and channels
E-DTYPE               RGB, complex and other voxels that are not one plain number
E-NO-GEOMETRY         sform_code and qform_code both 0, and no spacing assumed
E-AFFINE              affine with NaN, or singular
E-SPACING             voxels outside `SPACING_RANGE_MM`, or in another unit than mm
W-NIFTI-SLOPE         scl_slope 0 or not finite: values taken as stored, as the standard says
W-NIFTI-TIME          axes of length 1 behind space, dropped
W-NIFTI-FORMS         sform and qform disagree: the sform counts
W-ASSUMED-SPACING     axes taken as RAS with the spacing that was given
W-SHEARED             voxel axes not at right angles: preprocessing resamples
===================== ==================================================================
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from medseg.errors import DataError, GeometryError
from medseg.geometry import Array, Geometry

MAX_BYTES = 16 * 2**30
"""Largest volume that is read; more is a damaged or a hostile header (a whole-body CT has 1 GiB)."""

SPACING_RANGE_MM = (0.05, 20.0)
"""Voxel sizes of medical scans; outside it the unit is probably not the millimetre."""

QFORM_TOLERANCE_MM = 0.2
"""Two statements of one grid differ by this much at its corners, as quaternions are stored in float32."""

_MAX_OFFSET = 2**24  # header extensions are kilobytes
_WRONG_UNITS = {1: "metres", 3: "micrometres"}

log = logging.getLogger("medseg")


@dataclass(frozen=True)
class NiftiHeader:
    """What the bytes behind a header mean.

    Args:
        shape: Voxels along I, J, K (or I, J).
        channels: Length of the axis after space.
        dtype: As stored, with byte order.
        offset: Bytes before the first voxel.
        scaling: Slope and intercept; None where values are taken as stored.
        geometry: The grid.
    """

    shape: tuple[int, ...]
    channels: int
    dtype: np.dtype[np.generic]
    offset: int
    scaling: tuple[float, float] | None
    geometry: Geometry

    @property
    def num_bytes(self) -> int:
        """Voxel bytes."""
        return math.prod(self.shape) * self.channels * self.dtype.itemsize


def parse_nifti(head: bytes, path: Path, assume_spacing_mm: Sequence[float] | None = None) -> NiftiHeader:
    """Header bytes as a checked `NiftiHeader`.

    Args:
        head: The first 348 (NIfTI-1) or 540 (NIfTI-2) bytes.
        path: For messages.
        assume_spacing_mm: Voxel size for a file that states none.

    Raises:
        DataError: See the table above; also `GeometryError`.
    """
    where = str(path)
    kind = nib.Nifti1Header if len(head) == 348 else nib.Nifti2Header
    raw = kind.from_fileobj(BytesIO(head), check=False)
    if not bytes(raw["magic"]).startswith((b"n+1", b"n+2")):
        raise DataError(
            "E-NIFTI-MAGIC",
            f"magic {bytes(raw['magic'])!r}: an Analyze or .hdr/.img pair; convert it to .nii.gz with its orientation",
            where=where,
        )
    shape, channels = _space_and_channels(raw, where)
    dtype = _voxel_type(raw, where)
    check_size(math.prod(shape) * channels * dtype.itemsize, (*shape, channels), where)
    offset = float(raw["vox_offset"])
    if not offset.is_integer() or not len(head) + 4 <= offset <= _MAX_OFFSET:
        raise DataError("E-NIFTI-HEADER", f"voxels begin at byte {offset}; expected {len(head) + 4}", where=where)
    affine = _affine(raw, shape, where, assume_spacing_mm)
    if len(shape) == 2 and not affine[:3, 2].any():  # a picture need not say how thick it is
        affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1]) / np.linalg.norm(affine[:3, 0])
    _check_unit(raw, affine, where)
    geometry = check_geometry(shape, affine, where)
    return NiftiHeader(shape, channels, dtype, int(offset), _scaling(raw, where), geometry)


def check_size(num_bytes: int, shape: Sequence[int], where: str) -> None:
    """Refuse a header whose volume could not be held.

    Raises:
        DataError: If an axis has no voxels, or the volume exceeds `MAX_BYTES`.
    """
    if any(n < 1 for n in shape):
        raise DataError("E-DIMS", f"shape {tuple(shape)}: every axis needs a voxel; export the scan again", where=where)
    if num_bytes > MAX_BYTES:
        raise DataError(
            "E-SIZE",
            f"shape {tuple(shape)} means {num_bytes / 2**30:,.0f} GiB, more than the {MAX_BYTES / 2**30:.0f} GiB "
            "that are read; the header is damaged, or crop the scan",
            where=where,
        )


def check_geometry(shape: Sequence[int], affine: Array, where: str) -> Geometry:
    """The grid of a file, refused if no patient could have it.

    Args:
        shape: Voxels along each axis.
        affine: (4, 4), voxel index to RAS mm.
        where: For the message.

    Raises:
        GeometryError: If the affine is singular or not finite, or a spacing is outside `SPACING_RANGE_MM`.
    """
    try:
        geometry = Geometry(tuple(shape), affine)
    except GeometryError as error:
        raise GeometryError(
            error.error_id, f"{error.message}; fix the header or remove the case", where=where
        ) from None
    low, high = SPACING_RANGE_MM
    if not all(low <= s <= high for s in geometry.spacing_mm):
        spacing = ", ".join(f"{s:g}" for s in geometry.spacing_mm)
        raise GeometryError(
            "E-SPACING",
            f"spacing ({spacing}) mm; expected {low}-{high} mm along each axis: metres or µm instead? Fix the header",
            where=where,
        )
    if not geometry.is_orthogonal:
        log.warning(
            "W-SHEARED %s: voxel axes are not at right angles (tilted gantry?); resampled to a straight grid", where
        )
    return geometry


def corner_distance_mm(shape: Sequence[int], a: Array, b: Array) -> float:
    """How far two affines put the same corner voxel apart, at most."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in (*shape, 1)[:3]], [1], indexing="ij"), -1).reshape(-1, 4)
    return float(np.linalg.norm((corners @ (a - b).T)[:, :3], axis=1).max())


def _space_and_channels(raw: nib.Nifti1Header, where: str) -> tuple[tuple[int, ...], int]:
    num_axes = int(raw["dim"][0])
    if not 2 <= num_axes <= 7:
        raise DataError(
            "E-DIMS", f"{num_axes} axes; expected 2 (picture), 3 (volume) or 4 (with channels)", where=where
        )
    dims = tuple(int(n) for n in raw["dim"][1 : num_axes + 1])
    check_size(0, dims, where)
    shape, extra = dims[:3], [n for n in dims[3:] if n > 1]
    if len(extra) > 1:
        raise DataError("E-DIMS", f"shape {dims}: expected space and one axis of channels; split the file", where=where)
    if num_axes > 3 and not extra:
        log.warning("W-NIFTI-TIME %s: shape %s; axes of length 1 behind space dropped", where, dims)
    return shape, extra[0] if extra else 1


def _voxel_type(raw: nib.Nifti1Header, where: str) -> np.dtype[np.generic]:
    try:
        dtype: np.dtype[np.generic] = raw.get_data_dtype()
    except KeyError:
        raise DataError("E-NIFTI-HEADER", f"unknown data type code {int(raw['datatype'])}", where=where) from None
    if dtype.kind not in "iuf" or dtype.itemsize not in (1, 2, 4, 8):
        name = raw.get_value_label("datatype")
        raise DataError(
            "E-DTYPE", f"voxels are {name}; expected one plain number each: convert to one channel", where=where
        )
    return dtype


def _affine(
    raw: nib.Nifti1Header, shape: tuple[int, ...], where: str, assume_spacing_mm: Sequence[float] | None
) -> Array:
    """The sform, else the qform, else what the user assumes."""
    if raw["sform_code"] > 0:
        sform = np.asarray(raw.get_sform(), np.float64)
        if raw["qform_code"] > 0 and np.isfinite(sform).all():  # else it is refused
            _compare_forms(raw, sform, shape, where)
        return sform
    if raw["qform_code"] > 0:
        return _qform(raw)
    if assume_spacing_mm is None:
        stated = ", ".join(f"{s:g}" for s in raw["pixdim"][1 : len(shape) + 1])
        raise GeometryError(
            "E-NO-GEOMETRY",
            f"sform_code and qform_code are both 0: where the voxels lie is unknown (pixdim says {stated}); "
            "fix the header or set assume_spacing_mm",
            where=where,
        )
    log.warning("W-ASSUMED-SPACING %s: no orientation stated; taken as RAS with %s mm", where, tuple(assume_spacing_mm))
    return Geometry.from_spacing(shape, assume_spacing_mm).affine


def _qform(raw: nib.Nifti1Header) -> Array:
    """The grid that quaternion, offset and voxel size state; NaN where they state none."""
    try:
        return np.asarray(raw.get_qform(), np.float64)
    except (ValueError, HeaderDataError):
        return np.full((4, 4), np.nan)


def _compare_forms(raw: nib.Nifti1Header, sform: Array, shape: tuple[int, ...], where: str) -> None:
    distance = corner_distance_mm(shape, sform, _qform(raw))
    if not distance <= QFORM_TOLERANCE_MM:  # NaN too
        log.warning(
            "W-NIFTI-FORMS %s: sform and qform differ by %.2f mm at a corner; the sform counts", where, distance
        )


def _check_unit(raw: nib.Nifti1Header, affine: Array, where: str) -> None:
    """Refuse another unit than the millimetre: programs that take no notice of it would read another scan."""
    unit = _WRONG_UNITS.get(int(raw["xyzt_units"]) & 7)
    if unit and (raw["sform_code"] > 0 or raw["qform_code"] > 0):  # else the user says in mm where voxels lie
        spacing = ", ".join(f"{s:g}" for s in np.linalg.norm(affine[:3, :3], axis=0))
        raise GeometryError(
            "E-SPACING",
            f"spacing ({spacing}), and the header says {unit}; expected mm: write spacing and position in mm with "
            "xyzt_units 2, or xyzt_units alone if they are in mm already",
            where=where,
        )


def _scaling(raw: nib.Nifti1Header, where: str) -> tuple[float, float] | None:
    slope, inter = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 or not math.isfinite(slope) or not math.isfinite(inter):
        log.warning("W-NIFTI-SLOPE %s: scl_slope %g, scl_inter %g; values taken as stored", where, slope, inter)
        return None
    return None if (slope, inter) == (1, 0) else (slope, inter)
