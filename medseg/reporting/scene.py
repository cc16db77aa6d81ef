"""A case loaded to be looked at: its scan, what the expert drew and what the network found, on one grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.data.sources import read_image, read_label_map
from medseg.data.volume_io import is_there, read_label
from medseg.errors import DataError
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.model import Preprocessing
from medseg.reporting.overlay import contour_picture

Voxels = npt.NDArray[Any]

WINDOW_PERCENTILES = (0.5, 99.5)
WINDOW_VOXELS = 200_000


@dataclass(frozen=True)
class CaseFiles:
    """Where the files of a case are.

    Args:
        case: Its id.
        images: One file with all channels, or one a channel.
        reference: What the expert drew; None: nobody drew anything.
        prediction: What the network found.
    """

    case: str
    images: tuple[Path, ...]
    reference: Path | None
    prediction: Path


@dataclass(frozen=True)
class Scene:
    """A case in memory, in RAS (a picture in its own axes).

    Args:
        case: Its id.
        image: Gray values, float32 (I, J, K) or (I, J).
        reference: Label map of the same shape; None: there is none.
        prediction: Label map of the same shape.
        geometry: Their grid.
        window: Values shown black and white.
    """

    case: str
    image: Voxels
    reference: Voxels | None
    prediction: Voxels
    geometry: Geometry
    window: tuple[float, float]

    def picture(self, labels: Labels, title: str = "") -> npt.NDArray[np.uint8]:
        """Contours in three planes, RGB (H, W, 3)."""
        return contour_picture(
            self.image,
            self.reference,
            self.prediction,
            labels=labels,
            spacing_mm=self.geometry.spacing_mm,
            title=title,
            window=self.window,
        )


def load_scene(files: CaseFiles, preprocessing: Preprocessing, labels: Labels | None) -> Scene:
    """Read a case.

    Args:
        files: Of the case.
        preprocessing: Says how to read its scan.
        labels: Says what structures drawn on a DICOM series are called; None: nothing says it.

    Raises:
        MedsegError: If a file is not there any more or cannot be used, does not stand on the scan's grid, or says
            that its picture names the patient.
    """
    wanted = {"its scan": files.images, "its segmentation": (files.prediction,)}
    if files.reference:
        wanted["what the expert drew"] = (files.reference,)
    for what, paths in wanted.items():  # by what it is: a file's name may be the patient's
        if not all(map(is_there, paths)):
            raise DataError("E-MISSING-FILE", f"{what} is not where it was", where=f"case {files.case}")
    image = read_image(files.images, preprocessing)
    if image.shows_text:
        raise DataError("E-SHOWS-TEXT", "its file says that the picture names the patient", where=f"case {files.case}")
    maps = [read_label(files.prediction)]
    if files.reference:
        maps.append(read_label_map(files.reference, preprocessing, images=files.images, labels=labels))
    if any(not label.geometry.matches(image.geometry) for label in maps):
        raise DataError("E-PAIR-SHAPE", "a label map does not stand on the scan's grid", where=f"case {files.case}")
    # Of a colored picture its brightness: one of its colors may show nothing.
    is_picture = image.geometry.spatial_dims == 2
    gray = image.array.mean(axis=0, dtype=np.float32) if is_picture else image.array[0].astype(np.float32)
    shown, *drawn = [Volume(a[None], image.geometry).oriented("RAS") for a in (gray, *[m.array[0] for m in maps])]
    return Scene(
        files.case,
        image=shown.array[0],
        reference=drawn[1].array[0] if files.reference else None,
        prediction=drawn[0].array[0],
        geometry=shown.geometry,
        window=_window(gray, preprocessing),
    )


def organ_numbers(label_map: Voxels, labels: Labels) -> npt.NDArray[np.uint8]:
    """A label map with 1 for the first organ, 2 for the second …; of regions that overlap, the later ones on top."""
    numbers = np.zeros(label_map.shape, np.uint8)
    for number, values in enumerate(labels.organ_values.values(), start=1):
        numbers[np.isin(label_map, values)] = number
    return numbers


def box_around(masks: Sequence[Voxels], spacing_mm: Sequence[float], margin_mm: float) -> tuple[slice, ...]:
    """The smallest box around everything that is not 0, with a margin; all of it if everything is 0.

    Args:
        masks: Of one shape, (I, J, K).
        spacing_mm: Voxel size along each axis.
        margin_mm: Left free on every side, as far as there is room.
    """
    found = np.logical_or.reduce([mask != 0 for mask in masks])
    if not found.any():
        return tuple(slice(0, n) for n in found.shape)
    box = []
    for axis, (size, spacing) in enumerate(zip(found.shape, spacing_mm, strict=True)):
        along = np.flatnonzero(found.any(axis=tuple(other for other in range(found.ndim) if other != axis)))
        margin = round(margin_mm / spacing)
        box.append(slice(max(0, int(along[0]) - margin), min(size, int(along[-1]) + 1 + margin)))
    return tuple(box)


def _window(gray: Voxels, preprocessing: Preprocessing) -> tuple[float, float]:
    """What the network was given to see (a window in HU), or else all but the extremes."""
    chosen = preprocessing.intensity[0].clip if preprocessing.intensity else None
    if chosen is not None:
        return float(chosen[0]), float(chosen[1])
    values = gray.ravel()
    low, high = np.percentile(values[:: max(1, values.size // WINDOW_VOXELS)], WINDOW_PERCENTILES)
    return float(low), float(max(high, low + 1e-6))
