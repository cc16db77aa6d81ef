"""The trunk: its wall, bones and great vessels, the diaphragm, and what lies above it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from medseg.data.phantom import tissues
from medseg.data.phantom.atlas import CAVITY, CAVITY_Y, MUSCLE_HALF_DEPTH, MUSCLE_HALF_WIDTH, ORGANS, Part, keyed_rng
from medseg.data.phantom.solids import EVERYWHERE, Array, Solid, ellipsoid, merged, trunk, tube
from medseg.data.phantom.tissues import Enhancement

SKIN_MM = 2.0
VERTEBRA_PITCH_MM = 34.0
RIB_PITCH_MM = 27.0


def wall(wide: float, deep: float, hu: Enhancement) -> Iterator[Part]:
    """Skin, fat and muscles around the cavity, for a body of some half width and half depth in mm."""
    body = trunk(wide, deep).without(ellipsoid((0, -deep - 8, 0), (34, 12, math.inf)))  # the groove of the back
    furrow = ellipsoid((0, -MUSCLE_HALF_DEPTH - 3, 0), (13, 9, math.inf))  # between the muscles of the back
    muscles = trunk(MUSCLE_HALF_WIDTH, MUSCLE_HALF_DEPTH).without(furrow)
    yield Part(body, tissues.parenchyma(15, coarse=10))  # skin
    yield Part(body.grown(-SKIN_MM), tissues.fat(strands=50))
    yield Part(muscles, tissues.muscle(hu.muscle, layers_mm=(4.0, 8.5)))
    yield Part(CAVITY, tissues.fat(strands=130))


def above_diaphragm(seed: int) -> Solid:
    """What lies over the two domes of the diaphragm and its central tendon."""
    rng = keyed_rng(seed, "diaphragm")
    right, left = rng.normal(93, 5), rng.normal(83, 5)
    domes = ((60.0, right, 76.0), (-60.0, left, 74.0), (0.0, min(right, left) - 8, 90.0))

    def depth(x: Array, y: Array, z: Array) -> Array:
        front = np.maximum(y - 5, 0) / 118
        back = np.minimum(y - 5, 0) / 76
        lowest: Array | None = None
        for x0, top, half_width in domes:
            square = np.square((x - x0) / half_width) + np.square(front) + np.square(back)
            fall = square * (22 + 48 * square)
            slope = np.sqrt(square) * (44 + 192 * square) / half_width
            above = (z - top + fall) / np.sqrt(1 + slope * slope)
            lowest = above if lowest is None else np.minimum(lowest, above)
        assert lowest is not None
        return lowest

    return Solid(depth, (-math.inf, -math.inf, -60.0), EVERYWHERE)


def back(hu: Enhancement) -> Iterator[Part]:
    """Spine, psoas and the muscles beside them."""
    flesh = tissues.muscle(hu.muscle)
    for side in (1, -1):
        yield Part(tube([(side * 18, -46, 26), (side * 30, -44, -40), (side * 50, -40, -150)], [6, 16, 27]), flesh)
        yield Part(tube([(side * 46, -68, 12), (side * 66, -66, -120)], [8, 14]), flesh)
        yield Part(tube([(side * 13, -28, 70), (side * 12, -32, 0), (side * 10, -36, -40)], [6, 8, 4]), flesh)  # crus
        lamina = ellipsoid((side * 5, -76, 0), (14, 11, math.inf))
        yield Part(_repeated(lamina, height=26), tissues.bone(cortex_mm=3))
        transverse = tube([(side * 14, -72, 2), (side * 36, -80, 4)], [4, 3])
        yield Part(_repeated(transverse), tissues.bone())
    spine = ORGANS.index("spine")
    yield Part(ellipsoid((0, -49, 0), (22, 17, math.inf)), tissues.parenchyma(82, coarse=4), spine)  # discs
    vertebra = ellipsoid((0, -49, 0), (23, 18, math.inf))
    yield Part(_repeated(vertebra, height=27), tissues.bone(), spine)
    yield Part(_repeated(tube([(0, -84, -2), (0, -93, -8)], [3.5, 4])), tissues.bone(), spine)
    yield Part(ellipsoid((0, -74, 0), (10, 8.5, math.inf)), tissues.parenchyma(32, coarse=2), spine)  # canal


def _repeated(solid: Solid, *, height: float = VERTEBRA_PITCH_MM) -> Solid:
    """The same at every vertebra, cut to a height in mm."""

    def depth(x: Array, y: Array, z: Array) -> Array:
        above = z - VERTEBRA_PITCH_MM * np.round(z / VERTEBRA_PITCH_MM)  # the middle of the nearest vertebra
        return np.minimum(solid.depth(x, y, above), height / 2 - np.abs(above))

    return Solid(depth, (*solid.low[:2], -math.inf), (*solid.high[:2], math.inf))


def great_vessels(hu: Enhancement) -> Iterator[Part]:
    """Aorta with its branches to the viscera and legs, and the vena cava."""
    artery, vein = tissues.parenchyma(hu.arteries, coarse=2), tissues.parenchyma(hu.veins, coarse=2)
    aorta = tube([(-14, -26, 220), (-9, -20, 60), (-6, -22, -108)], [12.5, 11.5, 10])
    legs = [tube([(-6, -22, -106), (side * 26, -20, -180)], [8, 7]) for side in (1, -1)]
    yield Part(merged(aorta, *legs), artery, ORGANS.index("aorta"))
    yield Part(tube([(-7, -16, 20), (-5, -4, 6), (-6, 10, -100)], [4.5, 4.5, 3.5]), artery)  # to the gut
    yield Part(tube([(-8, -14, 30), (-8, 2, 30), (-60, -12, 26)], [4, 3.5, 2.5]), artery)  # to the spleen
    cava = tube([(22, -2, 112), (24, -12, 84), (22, -22, 20), (17, -24, -120)], [13, 13, 12, 11])
    yield Part(cava, vein, ORGANS.index("vena cava"))


def chest(hu: Enhancement, thorax: Solid) -> Iterator[Part]:
    """Lungs, heart, gullet and breastbone."""
    mediastinum = ellipsoid((-2, -36, 0), (34, 34, math.inf))
    front = ellipsoid((-8, 92, 0), (34, 44, math.inf))
    pleura = CAVITY.grown(-1.5)
    for side, name in ((1, "right lung"), (-1, "left lung")):
        lung = thorax.within(pleura, _half(side)).without(mediastinum, front)
        yield Part(lung, tissues.lung(), ORGANS.index(name))
    heart = ellipsoid((-24, 30, 124), (62, 46, 42), turn_degrees=-30)
    yield Part(heart.grown(5).within(pleura), tissues.fat())
    blood = max(hu.veins, 0.8 * hu.arteries)
    yield Part(heart.within(pleura), tissues.parenchyma(0.8 * hu.muscle + 0.2 * blood, coarse=3))
    for chamber in (ellipsoid((-44, 22, 126), (32, 27, 30), turn_degrees=-35), ellipsoid((6, 38, 122), (30, 28, 32))):
        yield Part(chamber.within(heart.grown(-4)), tissues.parenchyma(blood, coarse=3))
    yield Part(tube([(22, -2, 112), (24, -12, 84)], [13, 13]), tissues.parenchyma(hu.veins), ORGANS.index("vena cava"))
    gullet = tube([(-6, -8, 220), (-10, -6, 92), (-34, -10, 72), (-56, -18, 62)], [9, 9, 9, 9])
    yield Part(gullet, tissues.parenchyma(hu.gut_wall - 20))
    yield Part(ellipsoid((0, 90, 150), (18, 6, 80)), tissues.bone(cortex_mm=2))  # breastbone


def _half(side: int) -> Solid:
    """Everything more than 3 mm to the right (1) or left (-1) of the midline."""
    return Solid(lambda x, y, z: side * x - 3)


def ribs() -> Iterator[Part]:
    """Twelve pairs that fall from the spine towards the front, the lowest ones short, with gristle in front."""

    def course(x: Array, y: Array, z: Array) -> tuple[Array, Array, Array]:
        angle = np.arctan2(np.abs(x), CAVITY_Y - y) / np.float32(np.pi)  # 0 at the spine, 1 in front
        height = z + 78 * np.sin(np.float32(np.pi * 0.8) * angle) - 36
        number = np.round(height / RIB_PITCH_MM)  # 0 for the twelfth rib
        across = np.hypot((CAVITY.depth(x, y, z) + 5.5) / 4, (height - RIB_PITCH_MM * number) / 7)
        return angle, number, (1 - across) * 4

    def rib(x: Array, y: Array, z: Array) -> Array:
        angle, number, depth = course(x, y, z)
        end = np.where(number < 0, -1, (0.48 + 0.12 * number).clip(0, 0.72))
        return np.minimum(depth, (end - angle) * 300)

    def gristle(x: Array, y: Array, z: Array) -> Array:
        angle, number, depth = course(x, y, z)
        return np.minimum(np.minimum(depth, (number - 1.5) * 10), (0.93 - angle) * 300)

    low, high = (-160.0, -100.0, -90.0), (160.0, 115.0, math.inf)
    yield Part(Solid(gristle, low, high), tissues.parenchyma(100, fine=8))
    yield Part(Solid(rib, low, high), tissues.bone(cortex_mm=2))
