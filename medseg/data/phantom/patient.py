"""Patients: everything that makes up an individual, in the order in which it is painted.

The last is on top, so a part needs no hole for its neighbor.
"""

from __future__ import annotations

from dataclasses import dataclass

from medseg.data.phantom import tissues, trunk, viscera
from medseg.data.phantom.atlas import CAVITY, MUSCLE_HALF_DEPTH, MUSCLE_HALF_WIDTH, ORGANS, Part, keyed_rng
from medseg.data.phantom.tissues import PHASES, Enhancement


@dataclass(frozen=True, eq=False)
class Patient:
    """One individual.

    Args:
        parts: In painting order.
        half_width: Of the body with its fat and skin, in mm of the atlas.
        half_depth: Likewise, from the middle to the back.
        phase: Time of the scan after contrast agent, a key of `PHASES`.
    """

    parts: tuple[Part, ...]
    half_width: float
    half_depth: float
    phase: str


def patient(seed: int) -> Patient:
    """The individual of a seed."""
    rng = keyed_rng(seed, "habitus")
    phase = str(rng.choice(list(PHASES), p=(0.25, 0.2, 0.55)))
    level = rng.normal(1, 0.04)
    means = {name: hu * level * rng.normal(1, 0.015) for name, hu in vars(PHASES[phase]).items()}
    hu = Enhancement(**means)
    fat_mm = rng.uniform(8, 28)
    wide, deep = MUSCLE_HALF_WIDTH + fat_mm, MUSCLE_HALF_DEPTH + 0.8 * fat_mm
    thorax = trunk.above_diaphragm(seed)
    liver = viscera.liver(seed, thorax)
    covers = [*viscera.kidneys(seed, hu), *viscera.stomach(seed, hu), *viscera.gallbladder(seed)]
    parts = [
        *trunk.wall(wide, deep, hu),
        Part(CAVITY.within(thorax.grown(3)), tissues.muscle(hu.muscle)),  # the diaphragm: what the next leaves of it
        Part(CAVITY.within(thorax), tissues.fat()),
        Part(liver, tissues.parenchyma(hu.liver, coarse=8), ORGANS.index("liver")),
        *viscera.liver_vessels(seed, hu),
        *viscera.tumors(seed, hu, liver.without(thorax, *[part.solid for part in covers])),
        *viscera.spleen(seed, hu, thorax),
        *covers,
        *viscera.pancreas(hu),
        *viscera.bowel(seed, hu),
        *trunk.back(hu),
        *trunk.great_vessels(hu),
        *trunk.chest(hu, thorax),
        *trunk.ribs(),
    ]
    return Patient(tuple(parts), wide, deep, phase)
