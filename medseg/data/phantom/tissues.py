"""What tissues look like in CT: the HU of a solid's points, from their depth and from smooth random textures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from medseg.data.phantom.solids import Array

FAT = -104.0
GAS = -960.0
WATER = 8.0


@dataclass(frozen=True, eq=False)
class Block:
    """The points of a box within a slab.

    Args:
        x: Towards the right in mm, in the frame of the anatomical atlas; y (anterior) and z (superior) likewise.
        height: Towards the ceiling in mm, in the frame of the patient: liquids settle by it.
        depth: Below the surface of the solid that is painted, in mm.
        textures: Random fields of mean 0 and standard deviation 1: ``fine``, ``coarse``, ``strands``.
    """

    x: Array
    y: Array
    z: Array
    height: Array
    depth: Array
    textures: Mapping[str, Array]


Tissue: TypeAlias = Callable[[Block], Array | float]


@dataclass(frozen=True)
class Enhancement:
    """Mean HU of the tissues at one time after contrast agent was given; overlapping on purpose.

    Portal values are those of a slightly fatty liver: nearer to muscle than a textbook's.
    """

    liver: float
    muscle: float
    spleen: float
    arteries: float
    veins: float
    portal_vein: float
    cortex: float
    medulla: float
    pancreas: float
    gut_wall: float


PHASES: Mapping[str, Enhancement] = {
    "unenhanced": Enhancement(54, 54, 51, 42, 42, 42, 34, 30, 45, 46),
    "arterial": Enhancement(70, 68, 98, 270, 72, 105, 185, 74, 94, 76),
    "portal": Enhancement(86, 82, 94, 150, 150, 156, 178, 150, 90, 86),
}


def parenchyma(hu: float, *, coarse: float = 5.0, fine: float = 3.0) -> Tissue:
    """An organ's flesh: a mean with slow and quick variation, standard deviations in HU."""

    def values(block: Block) -> Array:
        return hu + coarse * block.textures["coarse"] + fine * block.textures["fine"]

    return values


def muscle(hu: float, *, layers_mm: Sequence[float] = ()) -> Tissue:
    """Muscle with seams of fat between its bundles, and between layers at some depths."""

    def values(block: Block) -> Array:
        seams = np.exp(-np.square(block.textures["fine"] / 0.14))
        for layer_mm in layers_mm:
            seams = np.maximum(seams, np.exp(-np.square((block.depth - layer_mm) / 0.6)))
        return hu + 8 * block.textures["coarse"] + 3 * block.textures["strands"] - 45 * seams

    return values


def fat(*, strands: float = 0.0) -> Tissue:
    """Fat, with threads of vessels as bright as `strands` HU above it."""

    def values(block: Block) -> Array:
        base = FAT + 5 * block.textures["coarse"]
        if strands:
            base = base + strands * _threads(block, width=0.22)
        return base

    return values


def lung() -> Tissue:
    """Air-filled lung with vessels, denser towards the back."""

    def values(block: Block) -> Array:
        return -850 + 25 * block.textures["coarse"] - 0.35 * block.height + 620 * _threads(block, width=0.2)

    return values


def bone(*, cortex_mm: float = 2.5) -> Tissue:
    """A dense shell around marrow."""

    def values(block: Block) -> Array:
        marrow = 165 + 30 * block.textures["fine"]
        return np.where(block.depth < cortex_mm, np.float32(620), marrow)

    return values


def kidney(hu: Enhancement, *, cortex_mm: float = 7.0) -> Tissue:
    """A cortex that sends columns between the pyramids of the medulla."""

    def values(block: Block) -> Array:
        cortex = ((cortex_mm - block.depth) / 2 + 0.8 * block.textures["fine"]).clip(0, 1)
        return hu.medulla + (hu.cortex - hu.medulla) * cortex + 4 * block.textures["coarse"]

    return values


def filled(liquid: float, *, level: float, chyme: float = 0.0) -> Tissue:
    """A hollow organ's content: gas above the level (mm towards the ceiling), liquid with lumps below it."""

    def values(block: Block) -> Array:
        gas = (block.height - level + 0.5).clip(0, 1)
        wet = liquid + chyme * block.textures["fine"]
        return wet + (GAS - wet) * gas

    return values


def stool() -> Tissue:
    """Clumps with gas between them, more gas towards the ceiling."""

    def values(block: Block) -> Array:
        gas = (1.5 * block.textures["fine"] + block.textures["coarse"] + (block.height - 30) / 30 - 1.2).clip(0, 1)
        solid = 38 + 22 * block.textures["strands"]
        return solid + (GAS - solid) * gas

    return values


def lesion(hu: float, *, rim: float, core: float, radius_mm: float) -> Tissue:
    """A tumor whose rim and core differ from its mean by some HU."""

    def values(block: Block) -> Array:
        inwards = (block.depth / radius_mm).clip(0, 1)
        return hu + rim * np.exp(-np.square(block.depth / 2.5)) + core * inwards**2 + 5 * block.textures["coarse"]

    return values


def _threads(block: Block, *, width: float) -> Array:
    """Curved lines: where two random fields are zero at once."""
    squared = np.square(block.textures["fine"]) + np.square(block.textures["strands"])
    return np.exp(squared * np.float32(-1 / width**2))
