"""A case's sources, files or volumes in memory, as one image and one label map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from medseg.data.checks import check_channel_frames, check_channel_grid
from medseg.data.resample import resample_image
from medseg.data.volume_io import read_label, read_volume
from medseg.errors import DataError
from medseg.geometry import Volume
from medseg.labels import Labels
from medseg.model import Preprocessing

Source = Path | str | Volume
"""A file, or a volume that somebody read already."""

_OF_VOLUMES = "Of a 4D file, select_volume takes one"
_OF_PICTURES = "Convert the pictures, or correct the manifest's modality"


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
    check_channel_frames((volume.frame_of_reference_uid for volume in (first, *others)), name_of(sources))
    volumes = [first, *(_on_grid_of(first, other, name_of(sources)) for other in others)]
    num_channels, expected = sum(len(volume.array) for volume in volumes), len(preprocessing.intensity)
    if num_channels != expected:
        is_picture = first.geometry.spatial_dims == 2
        raise DataError(
            "E-CHANNELS",
            f"{num_channels} channels; expected {expected}. {_OF_PICTURES if is_picture else _OF_VOLUMES}",
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


def _on_grid_of(first: Volume, other: Volume, where: str) -> Volume:
    """A channel on the first channel's grid, as PET and CT of one examination have grids of their own."""
    grid = first.geometry
    if check_channel_grid(grid, other.geometry, where):
        return other
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
