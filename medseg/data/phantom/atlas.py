"""The atlas that patients are described in, and what a description consists of.

Coordinates are RAS+ millimetres; the origin is in the middle of the trunk at the first lumbar vertebra.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medseg.data.phantom.solids import Point, Solid, trunk
from medseg.data.phantom.tissues import Tissue

ORGANS = (
    "background",
    "liver",
    "tumour",
    "spleen",
    "right kidney",
    "left kidney",
    "stomach",
    "gallbladder",
    "pancreas",
    "aorta",
    "vena cava",
    "right lung",
    "left lung",
    "spine",
)
"""What the values of a multi-organ label map mean."""

MUSCLE_HALF_WIDTH = 142.0
MUSCLE_HALF_DEPTH = 98.0
"""Of the trunk without its fat and skin, in mm."""

CAVITY_Y = 8.0
CAVITY = trunk(126.0, 83.0, y=CAVITY_Y)
"""Where the viscera and the lungs are."""


@dataclass(frozen=True, eq=False)
class Part:
    """A solid of one tissue.

    Args:
        solid: Where it is.
        tissue: Its HU.
        organ: Its value in the multi-organ map, an index of `ORGANS`.
        inside: Paint only over this organ.
    """

    solid: Solid
    tissue: Tissue
    organ: int = 0
    inside: int | None = None


def keyed_rng(seed: int, *purpose: str | int) -> np.random.Generator:
    """A generator of its own for each purpose, so that one more draw in one place moves nothing elsewhere."""
    return np.random.default_rng([seed, *"/".join(map(str, purpose)).encode()])


def near(rng: np.random.Generator, point: Point, mm: float) -> tuple[float, ...]:
    """A point moved at random, `mm` being the standard deviation along each axis."""
    return tuple(float(p) for p in np.asarray(point) + mm * rng.standard_normal(3).clip(-2, 2))
