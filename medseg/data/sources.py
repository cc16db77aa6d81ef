"""A case's sources, files or volumes in memory, as one image and one label map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medseg.data.nifti import check_pair, read_label, read_volume
from medseg.errors import DataError
from medseg.geometry import Volume
from medseg.model import Preprocessing

Source = Path | str | Volume
"""A file, or a volume that somebody read already."""


def read_image(sources: Sequence[Source], preprocessing: Preprocessing) -> Volume:
    """One image out of its sources, which must stand on one grid.

    Args:
        sources: One with all channels, or one a channel.
        preprocessing: Says how many channels there must be and how to read them.

    Raises:
        DataError: If a file cannot be used, grids differ, or there are more or fewer channels.
    """
    volumes = [_read(source, preprocessing) for source in sources]
    for volume in volumes[1:]:
        check_pair(volumes[0], volume, name_of(sources))
    num_channels, expected = sum(len(volume.array) for volume in volumes), len(preprocessing.intensity)
    if num_channels != expected:
        raise DataError(
            "E-CHANNELS",
            f"{num_channels} channels; expected {expected}. Of a 4D file, select_volume takes one",
            where=name_of(sources),
        )
    array = volumes[0].array if len(volumes) == 1 else np.concatenate([volume.array for volume in volumes])
    return Volume(array, volumes[0].geometry)


def read_label_map(source: Source, preprocessing: Preprocessing) -> Volume:
    """The label map of a case.

    Args:
        source: One label map.
        preprocessing: Says how to read it.

    Raises:
        DataError: If the file cannot be used.
    """
    if isinstance(source, Volume):
        return source
    return read_label(Path(source), assume_spacing_mm=preprocessing.assume_spacing_mm)


def name_of(sources: Sequence[Source]) -> str:
    """What messages call them."""
    return ", ".join("a volume in memory" if isinstance(source, Volume) else str(source) for source in sources)


def _read(source: Source, preprocessing: Preprocessing) -> Volume:
    if isinstance(source, Volume):
        return source
    return read_volume(
        Path(source),
        select_volume=preprocessing.select_volume,
        assume_spacing_mm=preprocessing.assume_spacing_mm,
    )
