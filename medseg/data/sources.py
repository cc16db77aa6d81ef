"""A case's sources, files or volumes in memory, as one image and one label map."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from medseg.data.resample import resample_image
from medseg.data.volume_io import read_label, read_volume
from medseg.errors import DataError, GeometryError
from medseg.geometry import Volume
from medseg.labels import Labels
from medseg.model import Preprocessing

MIN_COVERED = 0.5
"""Share of the first channel's field of view that another must cover; with less, they are hardly one examination."""

log = logging.getLogger("medseg")

Source = Path | str | Volume
"""A file, or a volume that somebody read already."""


def read_image(sources: Sequence[Source], preprocessing: Preprocessing) -> Volume:
    """One image out of its sources; a channel on another grid is resampled to the first one's.

    Args:
        sources: One with all channels, or one a channel.
        preprocessing: Says how many channels there must be and how to read them.

    Raises:
        DataError: If a file cannot be used, or there are more or fewer channels than expected.
        GeometryError: If a channel shows another part of the patient than the first.
    """
    first, *others = [_read(source, preprocessing) for source in sources]
    _compare_frames([first, *others], name_of(sources))
    volumes = [first, *(_on_grid_of(first, other, name_of(sources)) for other in others)]
    num_channels, expected = sum(len(volume.array) for volume in volumes), len(preprocessing.intensity)
    if num_channels != expected:
        raise DataError(
            "E-CHANNELS",
            f"{num_channels} channels; expected {expected}. Of a 4D file, select_volume takes one",
            where=name_of(sources),
        )
    if len(volumes) == 1:
        return first
    return Volume(
        np.concatenate([volume.array for volume in volumes]),
        first.geometry,
        modalities=tuple(chain.from_iterable(v.modalities or [None] * len(v.array) for v in volumes)),
        shows_text=any(volume.shows_text for volume in volumes),
        frame_of_reference_uid=first.frame_of_reference_uid,
    )


def read_label_map(
    source: Source, preprocessing: Preprocessing, *, images: Sequence[Source], labels: Labels | None = None
) -> Volume:
    """The label map of a case.

    Args:
        source: One label map.
        preprocessing: Says how to read it.
        images: The case's, as a label may be drawn on a DICOM series.
        labels: Says what such drawings call which label.

    Raises:
        DataError: If the file cannot be used.
    """
    if isinstance(source, Volume):
        return source
    image = None if isinstance(images[0], Volume) else Path(images[0])
    return read_label(Path(source), image=image, labels=labels, assume_spacing_mm=preprocessing.assume_spacing_mm)


def name_of(sources: Sequence[Source]) -> str:
    """What messages call them."""
    return ", ".join("a volume in memory" if isinstance(source, Volume) else str(source) for source in sources)


def _compare_frames(channels: Sequence[Volume], where: str) -> None:
    """Warn where channels refer to different frames: equal coordinates are then different places."""
    if len({uid for volume in channels if (uid := volume.frame_of_reference_uid)}) > 1:
        log.warning(
            "W-CHANNEL-FRAME %s: channels of different frames of reference, so the same coordinates need not be the "
            "same place; unless they were registered, register them first",
            where,
        )


def _on_grid_of(first: Volume, other: Volume, where: str) -> Volume:
    """A channel on the first channel's grid, as PET and CT of one examination have grids of their own."""
    grid = first.geometry
    if other.geometry.matches(grid):
        return other
    covered = grid.share_covered_by(other.geometry)
    if covered < MIN_COVERED:
        raise GeometryError(
            "E-CHANNEL-GRID",
            f"a channel of {other.geometry.shape} voxels covers {covered:.0%} of the first one's field of view "
            f"{grid.shape}; give channels of one examination, or resample them first",
            where=where,
        )
    log.warning(
        "W-CHANNEL-GRID %s: a channel is resampled to the first one's grid (%.0f%% covered)", where, 100 * covered
    )
    array = resample_image(torch.from_numpy(other.array.astype(np.float32)), other.geometry, grid)
    return replace(other, array=array.numpy(), geometry=grid)


def _read(source: Source, preprocessing: Preprocessing) -> Volume:
    if isinstance(source, Volume):
        return source
    return read_volume(
        Path(source),
        select_volume=preprocessing.select_volume,
        assume_spacing_mm=preprocessing.assume_spacing_mm,
        allow_missing_slices=preprocessing.allow_missing_slices,
    )
