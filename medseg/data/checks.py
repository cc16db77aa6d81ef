"""Do an image and its label belong together, and hold what they should?

===================== ==================================================================
E-PAIR-SHAPE          image and label of different shapes
E-PAIR-AFFINE         image and label of one shape, at different places
E-CONSTANT            an image that shows nothing
E-LABEL-UNDECLARED    label values that the data set does not declare
===================== ==================================================================
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.data.headers import corner_distance_mm
from medseg.errors import DataError, GeometryError
from medseg.geometry import Volume
from medseg.labels import Labels


def check_pair(image: Volume, label: Volume, where: str) -> None:
    """Refuse an image and a label (or two channels) that do not stand on the same grid.

    Args:
        image: The one that counts.
        label: The one compared with it.
        where: Case or file, for the message.

    Raises:
        GeometryError: If shapes differ, or the affines by more than `AFFINE_TOLERANCE`.
    """
    grid, other = image.geometry, label.geometry
    if grid.shape != other.shape:
        raise GeometryError(
            "E-PAIR-SHAPE",
            f"image {grid.shape} but label {other.shape} voxels; give the label of this image, "
            "or resample it to its grid",
            where=where,
        )
    if not grid.matches(other):
        distance = corner_distance_mm(grid.shape, grid.affine, other.affine)
        raise GeometryError(
            "E-PAIR-AFFINE",
            f"image and label lie up to {distance:.3g} mm apart (image {grid.orientation}, label {other.orientation}); "
            "give the label of this image, or resample it to its grid",
            where=where,
        )


def check_not_constant(image: Volume, where: str) -> None:
    """Refuse a scan with a channel that shows nothing, and a picture that shows nothing in any of its colors.

    Raises:
        DataError: If all voxels of a channel, or of all channels of a picture, are equal.
    """
    constant = [bool(channel.min() == channel.max()) for channel in image.array]
    if image.geometry.spatial_dims == 2 and not all(constant):  # stains and fluorescence leave colors out
        return
    for number, channel in enumerate(image.array):
        if constant[number]:
            raise DataError(
                "E-CONSTANT",
                f"every voxel of channel {number} is {channel.flat[0]:g}; export the scan again or remove the case",
                where=where,
            )


def check_label_values(label: npt.NDArray[Any], labels: Labels, where: str | None = None) -> None:
    """Refuse label values that the data set does not declare.

    Args:
        label: Integer label map of any shape.
        labels: What is declared.
        where: Case or file, for the message.

    Raises:
        DataError: If there are others.
    """
    declared = {*labels.names} | ({labels.ignore_label} if labels.ignore_label is not None else set())
    undeclared = sorted({int(value) for value in np.unique(label)} - declared)
    if undeclared:
        raise DataError(
            "E-LABEL-UNDECLARED",
            f"holds label {', '.join(map(str, undeclared))}, but declared are {', '.join(map(str, sorted(declared)))}; "
            "add them to the manifest's labels, or set ignore_label",
            where=where,
        )
