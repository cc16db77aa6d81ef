"""The patients: which solids of which tissue make up the abdomen of a seed, in an atlas frame in millimetres.

The frame is RAS+ with its origin in the middle of the trunk, at the height of the first lumbar vertebra.
Parts are listed in the order in which they are painted, the last on top: a part needs no hole for its neighbor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.data import tissues
from medseg.data.solids import EVERYWHERE, Array, Point, Solid, bent_tube, ellipsoid, merged, trunk, tube
from medseg.data.tissues import PHASES, Enhancement, Tissue

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

SKIN_MM = 2.0
MUSCLE_WALL = (142.0, 98.0)  # semi-axes, along x and y
CAVITY = (126.0, 83.0)
CAVITY_Y = 8.0
VERTEBRA_PITCH_MM = 34.0
RIB_PITCH_MM = 27.0

_CAVITY = trunk(*CAVITY, y=CAVITY_Y)


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


@dataclass(frozen=True, eq=False)
class Patient:
    """One individual.

    Args:
        parts: In painting order.
        half_width: Of the body with its fat, along x, in mm of the atlas; half_depth along y.
        half_depth: See half_width.
        phase: Time of the scan after contrast agent, a key of `PHASES`.
    """

    parts: tuple[Part, ...]
    half_width: float
    half_depth: float
    phase: str


def keyed_rng(seed: int, *purpose: str | int) -> np.random.Generator:
    """A generator of its own for each purpose, so that one more draw in one place moves nothing elsewhere."""
    return np.random.default_rng([seed, *"/".join(map(str, purpose)).encode()])


def patient(seed: int) -> Patient:
    """The individual of a seed."""
    rng = keyed_rng(seed, "habitus")
    phase = str(rng.choice(list(PHASES), p=(0.25, 0.2, 0.55)))
    level = rng.normal(1, 0.04)
    means = {name: hu * level * rng.normal(1, 0.015) for name, hu in vars(PHASES[phase]).items()}
    hu = Enhancement(**means)
    fat_mm = rng.uniform(8, 28)
    wide, deep = MUSCLE_WALL[0] + fat_mm, MUSCLE_WALL[1] + 0.8 * fat_mm
    thorax = _above_diaphragm(seed)
    liver = _liver(seed, thorax)
    covers = [*_kidneys(seed, hu), *_stomach(seed, hu), *_gallbladder(seed)]
    parts = [
        *_trunk_wall(wide, deep, hu),
        Part(_CAVITY.within(thorax.grown(3)), tissues.muscle(hu.muscle)),  # the diaphragm: what the next leaves of it
        Part(_CAVITY.within(thorax), tissues.fat()),
        Part(liver, tissues.parenchyma(hu.liver, coarse=8), ORGANS.index("liver")),
        *_liver_vessels(seed, hu),
        *_tumors(seed, hu, liver.without(thorax, *[part.solid for part in covers])),
        *_spleen(seed, hu, thorax),
        *covers,
        *_pancreas(hu),
        *_bowel(seed, hu),
        *_back(hu),
        *_great_vessels(hu),
        *_chest(hu, thorax),
        *_ribs(),
    ]
    return Patient(tuple(parts), wide, deep, phase)


def _trunk_wall(wide: float, deep: float, hu: Enhancement) -> Iterator[Part]:
    body = trunk(wide, deep).without(ellipsoid((0, -deep - 8, 0), (34, 12, math.inf)))  # the groove of the back
    muscles = trunk(*MUSCLE_WALL).without(ellipsoid((0, -MUSCLE_WALL[1] - 3, 0), (13, 9, math.inf)))
    yield Part(body, tissues.parenchyma(15, coarse=10))  # skin
    yield Part(body.grown(-SKIN_MM), tissues.fat(strands=50))
    yield Part(muscles, tissues.muscle(hu.muscle, layers_mm=(4.0, 8.5)))
    yield Part(_CAVITY, tissues.fat(strands=130))


def _above_diaphragm(seed: int) -> Solid:
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


def _liver(seed: int, thorax: Solid) -> Solid:
    rng = keyed_rng(seed, "liver")
    size = rng.normal(1, 0.05)
    tip = rng.uniform(-75, -40)
    lobes = merged(
        ellipsoid(_near(rng, (66, 0, 42), 3), np.multiply((74, 90, 76), size)),
        ellipsoid(_near(rng, (4, 48, 62), 4), np.multiply((rng.uniform(58, 78), 38, 32), size), turn_degrees=-8),
        tube([(88, -8, 10), (100, -6, tip)], [40, 21]),
        blend_mm=14,
    )
    porta = ellipsoid(_near(rng, (4, -8, -12), 3), (48, 50, 52))  # the hollow under which the gut lies
    fissure = tube([(10, 95, 10), (16, 78, 22), (14, 36, 34)], [9, 5, 3])  # ligamentum teres in its fat
    return lobes.within(_CAVITY.grown(2.5)).without(porta, fissure, thorax.grown(-1))


def _liver_vessels(seed: int, hu: Enhancement) -> Iterator[Part]:
    rng = keyed_rng(seed, "liver vessels")
    hepatic = [((24, -14, 82), end, 5.0) for end in ((108, -8, 40), (62, 52, 44), (-28, 52, 62))]
    portal = [
        ((40, 0, 26), (88, 40, 34), 5.5),
        ((44, -2, 26), (96, -40, 18), 5.0),
        ((92, -10, 14), (100, -6, -30), 3.5),
        ((36, 6, 26), (4, 44, 56), 4.5),
        ((4, 44, 56), (-42, 50, 60), 3.5),
    ]
    liver = ORGANS.index("liver")
    for trunks, blood in ((hepatic, hu.veins), (portal, hu.portal_vein)):
        for start, end, radius in trunks:
            for branch in _branches(rng, np.asarray(start), np.asarray(end), radius, generations=2):
                yield Part(branch, tissues.parenchyma(blood, coarse=1, fine=2), liver, inside=liver)


def _branches(
    rng: np.random.Generator, start: Array, end: Array, radius: float, *, generations: int
) -> Iterator[Solid]:
    """A curved vessel and its children, each thinner and shorter than its parent."""
    along = end - start
    length = float(np.linalg.norm(along))
    points = [start, *[start + f * along + rng.normal(0, 0.07 * length, 3) for f in (0.35, 0.7)], end]
    yield tube(points, [radius, 0.85 * radius, 0.7 * radius, 0.4 * radius])
    if generations:
        for fork in (points[1], points[2], points[2]):
            sideways = rng.normal(0, 0.35, 3) * length + 0.4 * along
            yield from _branches(rng, fork, fork + sideways, 0.6 * radius, generations=generations - 1)


def _tumors(seed: int, hu: Enhancement, room: Solid) -> Iterator[Part]:
    """None in about a third of the patients, else one to four, darker or brighter than the liver."""
    rng = keyed_rng(seed, "tumors")
    count = int(rng.choice([0, 1, 2, 3, 4], p=(0.35, 0.25, 0.2, 0.1, 0.1)))
    liver, tumor = ORGANS.index("liver"), ORGANS.index("tumour")
    for _ in range(count):
        radius = float(np.exp(rng.uniform(np.log(6), np.log(20))))
        center = _place(rng, room, radius)
        lobules = [ellipsoid(_near(rng, center, 0.35 * radius), radius * rng.uniform(0.7, 1, 3)) for _ in range(3)]
        contrast = rng.uniform(16, 34) if rng.random() < 0.3 else -rng.uniform(24, 46)
        look = tissues.lesion(
            hu.liver + contrast, rim=rng.uniform(-8, 14), core=rng.uniform(-20, 0), radius_mm=radius
        )
        yield Part(merged(*lobules, blend_mm=3), look, tumor, inside=liver)


def _place(rng: np.random.Generator, room: Solid, radius: float) -> tuple[float, ...]:
    """A random point so deep in a solid that most of a ball around it fits."""
    x, y, z = rng.uniform((-60, -75, -60), (130, 90, 100), (2000, 3)).astype(np.float32).T
    deep = room.depth(x, y, z)
    chosen = int(np.argmax(deep > min(0.6 * radius, float(deep.max()) - 1e-3)))  # the first that is deep enough
    return float(x[chosen]), float(y[chosen]), float(z[chosen])


def _spleen(seed: int, hu: Enhancement, thorax: Solid) -> Iterator[Part]:
    rng = keyed_rng(seed, "spleen")
    size = rng.normal(1, 0.1)
    body = ellipsoid(_near(rng, (-103, -26, 34), 4), np.multiply((27, 50, 48), size), turn_degrees=22)
    hilum = ellipsoid((-58, 2, 36), (32, 44, 60))
    spleen = body.within(_CAVITY.grown(2.5)).without(hilum, thorax.grown(-1))
    yield Part(spleen, tissues.parenchyma(hu.spleen, coarse=6), ORGANS.index("spleen"))


def _kidneys(seed: int, hu: Enhancement) -> Iterator[Part]:
    rng = keyed_rng(seed, "kidneys")
    for side, name, height in ((1, "right kidney", -28.0), (-1, "left kidney", -10.0)):
        x, y, z = _near(rng, (62 * side, -40, height), 4)
        radii = np.multiply((26, 25, 54), rng.normal(1, 0.06))
        lean = 0.22 * side  # the upper pole lies nearer to the spine
        halo = rng.uniform(-2, 8)  # below 0 the kidney touches the liver or the spleen
        kidney = _leaning(ellipsoid((x, y, z), radii, turn_degrees=-35 * side), lean, z)
        sinus = _leaning(ellipsoid((x - 13 * side, y + 8, z), (15, 9, 25), turn_degrees=-35 * side), lean, z)
        organ = ORGANS.index(name)
        yield Part(kidney.grown(halo), tissues.fat(strands=60))
        yield Part(kidney, tissues.kidney(hu), organ)
        yield Part(sinus, tissues.fat(strands=90))
        hilum = (x - 18 * side, y + 10, z)
        yield Part(tube([(x, y, z - 14), hilum, (x, y, z + 14)], [5, 7, 5]), tissues.parenchyma(12), organ, inside=organ)
        for blood, start, radius in ((hu.veins, (10 * side + 8, -20, z + 4), 5), (hu.arteries, (-6, -24, z + 8), 3)):
            yield Part(tube([start, hilum, (x, y, z)], [radius, radius, 2]), tissues.parenchyma(blood))


def _leaning(solid: Solid, lean: float, z0: float) -> Solid:
    reach = abs(lean) * (solid.high[2] - z0)
    return Solid(
        lambda x, y, z: solid.depth(x + lean * (z - z0), y, z),
        (solid.low[0] - reach, *solid.low[1:]),
        (solid.high[0] + reach, *solid.high[1:]),
    )


def _stomach(seed: int, hu: Enhancement) -> Iterator[Part]:
    rng = keyed_rng(seed, "stomach")
    fullness = rng.uniform(0.7, 1.08)
    points = [(-60, -26, 60), (-72, 2, 44), (-66, 36, 18), (-32, 54, -6), (8, 48, -10), (30, 34, -4)]
    points = [_near(rng, point, 3) for point in points]
    radii = np.multiply((33, 34, 29, 21, 16, 10), fullness)
    outer = bent_tube(points, list(radii)).within(_CAVITY.grown(1.5))
    organ = ORGANS.index("stomach")
    yield Part(outer, tissues.parenchyma(hu.gut_wall, coarse=6), organ)
    content = tissues.filled(float(rng.choice([15, hu.gut_wall - 8])) + rng.uniform(-5, 15), level=rng.uniform(28, 55), chyme=rng.uniform(2, 14))
    yield Part(bent_tube(points, list(radii - rng.uniform(4, 6))).within(_CAVITY.grown(-3)), content, organ)


def _gallbladder(seed: int) -> Iterator[Part]:
    rng = keyed_rng(seed, "gallbladder")
    neck, fundus = _near(rng, (44, 22, 8), 3), _near(rng, (62, 50, -26), 5)
    size = rng.uniform(0.6, 1.15)
    bile = tissues.parenchyma(rng.uniform(4, 18), coarse=2)
    yield Part(tube([neck, fundus], [8 * size, 17 * size]), bile, ORGANS.index("gallbladder"))


def _pancreas(hu: Enhancement) -> Iterator[Part]:
    duodenum = bent_tube([(32, 34, -4), (50, 14, -12), (48, 4, -48), (10, -2, -60), (-20, 6, -48)], [11, 13, 13, 12, 11])
    yield Part(duodenum, tissues.parenchyma(hu.gut_wall, coarse=8, fine=8))
    yield Part(duodenum.grown(-4), tissues.parenchyma(22, coarse=10, fine=8))
    gland = bent_tube([(34, 10, -30), (26, 14, -8), (-4, 24, 4), (-46, 8, 14), (-86, -18, 24)], [12, 13, 8, 9, 8])
    look = tissues.muscle(hu.pancreas)  # lobules with fat in between
    yield Part(gland, look, ORGANS.index("pancreas"))
    for points, radii in (
        ([(44, 0, 26), (24, 8, 8), (6, 10, -12), (8, 14, -90)], [7, 7.5, 6.5, 5]),  # portal and mesenteric vein
        ([(6, 10, -6), (-46, 0, 12), (-86, -24, 28)], [5, 4.5, 3.5]),  # splenic vein
    ):
        yield Part(tube(points, radii), tissues.parenchyma(hu.portal_vein, coarse=1))


def _bowel(seed: int, hu: Enhancement) -> Iterator[Part]:
    rng = keyed_rng(seed, "bowel")
    wall = tissues.parenchyma(hu.gut_wall, coarse=8, fine=6)
    liquid = float(rng.choice([18.0, 60.0, 130.0], p=(0.6, 0.25, 0.15)))  # water, porridge, oral contrast agent
    for _ in range(int(rng.uniform(9, 16))):
        low, high = (-88, 8, -150), (74, 78, -28)
        points = [rng.uniform(low, high)]
        for _ in range(5):
            points.append((points[-1] + rng.normal(0, 28, 3)).clip(low, high))
        loop = bent_tube(points, list(rng.uniform(9, 15, len(points)))).within(_CAVITY.grown(1))
        yield Part(loop, wall)
        yield Part(loop.grown(-2.5), tissues.filled(liquid, level=rng.uniform(55, 90), chyme=12))
    colon = (
        ([(106, 0, -170), (102, 6, -84), (84, 40, -62), (46, 66, -52)], [25, 25, 20, 17]),
        ([(46, 66, -52), (0, 74, -60), (-58, 66, -34), (-106, 22, -2)], [17, 16, 17, 18]),
        ([(-106, 22, -2), (-117, -18, -30), (-114, -16, -170)], [18, 14, 14]),
    )
    for points, radii in colon:
        section = bent_tube([_near(rng, point, 3) for point in points[:-1]] + [points[-1]], radii)
        yield Part(section.within(_CAVITY.grown(1)), wall)
        yield Part(section.grown(-3).within(_CAVITY.grown(-2)), tissues.stool())


def _back(hu: Enhancement) -> Iterator[Part]:
    flesh = tissues.muscle(hu.muscle)
    for side in (1, -1):
        yield Part(tube([(side * 18, -46, 26), (side * 30, -44, -40), (side * 50, -40, -150)], [6, 16, 27]), flesh)
        yield Part(tube([(side * 46, -68, 12), (side * 66, -66, -120)], [8, 14]), flesh)
        yield Part(tube([(side * 13, -28, 70), (side * 12, -32, 0), (side * 10, -36, -40)], [6, 8, 4]), flesh)  # crus
        lamina = ellipsoid((side * 5, -76, 0), (14, 11, math.inf))
        yield Part(_repeated(lamina.within(ellipsoid((0, 0, 0), (400, 400, 13)))), tissues.bone(cortex_mm=3))
        transverse = tube([(side * 14, -72, 2), (side * 36, -80, 4)], [4, 3])
        yield Part(_repeated(transverse), tissues.bone())
    spine = ORGANS.index("spine")
    yield Part(ellipsoid((0, -49, 0), (22, 17, math.inf)), tissues.parenchyma(82, coarse=4), spine)  # discs
    vertebra = ellipsoid((0, -49, 0), (23, 18, math.inf)).within(_slice_of(13.5))
    yield Part(_repeated(vertebra), tissues.bone(), spine)
    yield Part(_repeated(tube([(0, -86, -2), (0, -98, -8)], [3.5, 4])), tissues.bone(), spine)
    yield Part(ellipsoid((0, -74, 0), (10, 8.5, math.inf)), tissues.parenchyma(32, coarse=2), spine)  # canal


def _slice_of(half_height: float) -> Solid:
    return Solid(lambda x, y, z: half_height - np.abs(z) + 0 * x)


def _repeated(solid: Solid) -> Solid:
    """The same at the height of every vertebra."""

    def depth(x: Array, y: Array, z: Array) -> Array:
        return solid.depth(x, y, z - VERTEBRA_PITCH_MM * np.round(z / VERTEBRA_PITCH_MM))

    return Solid(depth, (*solid.low[:2], -math.inf), (*solid.high[:2], math.inf))


def _great_vessels(hu: Enhancement) -> Iterator[Part]:
    artery, vein = tissues.parenchyma(hu.arteries, coarse=2), tissues.parenchyma(hu.veins, coarse=2)
    aorta = tube([(-14, -26, 220), (-9, -20, 60), (-6, -22, -108)], [12.5, 11.5, 10])
    legs = [tube([(-6, -22, -106), (side * 26, -20, -180)], [8, 7]) for side in (1, -1)]
    yield Part(merged(aorta, *legs), artery, ORGANS.index("aorta"))
    yield Part(tube([(-7, -16, 20), (-5, -4, 6), (-6, 10, -100)], [4.5, 4.5, 3.5]), artery)  # to the gut
    yield Part(tube([(-8, -14, 30), (-8, 2, 30), (-60, -12, 26)], [4, 3.5, 2.5]), artery)  # to the spleen
    cava = tube([(22, -2, 112), (24, -12, 84), (22, -22, 20), (17, -24, -120)], [13, 13, 12, 11])
    yield Part(cava, vein, ORGANS.index("vena cava"))


def _chest(hu: Enhancement, thorax: Solid) -> Iterator[Part]:
    mediastinum = ellipsoid((-2, -36, 0), (34, 34, math.inf))
    front = ellipsoid((-8, 92, 0), (34, 44, math.inf))
    pleura = _CAVITY.grown(-1.5)
    for side, name in ((1, "right lung"), (-1, "left lung")):
        half = Solid(lambda x, y, z, side=side: side * x - 3)
        yield Part(thorax.within(pleura, half).without(mediastinum, front), tissues.lung(), ORGANS.index(name))
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


def _ribs() -> Iterator[Part]:
    """Twelve pairs that fall from the spine towards the front, the lowest ones short, with gristle in front."""

    def course(x: Array, y: Array, z: Array) -> tuple[Array, Array, Array]:
        angle = np.arctan2(np.abs(x), CAVITY_Y - y) / np.float32(np.pi)  # 0 at the spine, 1 in front
        height = z + 78 * np.sin(np.float32(np.pi * 0.8) * angle) - 36
        number = np.round(height / RIB_PITCH_MM)  # 0 for the twelfth rib
        across = np.hypot((_CAVITY.depth(x, y, z) + 5.5) / 4, (height - RIB_PITCH_MM * number) / 7)
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


def _near(rng: np.random.Generator, point: Point, mm: float) -> tuple[float, ...]:
    """A point moved at random, `mm` being the standard deviation along each axis."""
    return tuple(float(p) for p in np.asarray(point) + mm * rng.standard_normal(3).clip(-2, 2))
