"""The viscera: liver with vessels and tumors, spleen, kidneys, stomach, gallbladder, pancreas and bowel."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from medseg.data.phantom import tissues
from medseg.data.phantom.atlas import CAVITY, ORGANS, Part, keyed_rng, near
from medseg.data.phantom.solids import Array, Solid, bent_tube, ellipsoid, merged, tube
from medseg.data.phantom.tissues import Enhancement


def liver(seed: int, thorax: Solid) -> Solid:
    """Both lobes, under the diaphragm."""
    rng = keyed_rng(seed, "liver")
    size = rng.normal(1, 0.05)
    tip = rng.uniform(-75, -40)
    lobes = merged(
        ellipsoid(near(rng, (66, 0, 42), 3), np.multiply((74, 90, 76), size)),
        ellipsoid(near(rng, (4, 48, 62), 4), np.multiply((rng.uniform(58, 78), 38, 32), size), turn_degrees=-8),
        tube([(88, -8, 10), (100, -6, tip)], [40, 21]),
        blend_mm=14,
    )
    porta = ellipsoid(near(rng, (4, -8, -12), 3), (48, 50, 52))  # the hollow under which the gut lies
    fissure = tube([(10, 95, 10), (16, 78, 22), (14, 36, 34)], [9, 5, 3])  # ligamentum teres in its fat
    return lobes.within(CAVITY.grown(2.5)).without(porta, fissure, thorax.grown(-1))


def liver_vessels(seed: int, hu: Enhancement) -> Iterator[Part]:
    """Hepatic and portal veins; within the liver they are labeled as liver."""
    rng = keyed_rng(seed, "liver vessels")
    hepatic = [((24, -14, 82), end, 5.0) for end in ((108, -8, 40), (62, 52, 44), (-28, 52, 62))]
    portal = [
        ((40, 0, 26), (88, 40, 34), 5.5),
        ((44, -2, 26), (96, -40, 18), 5.0),
        ((92, -10, 14), (100, -6, -30), 3.5),
        ((36, 6, 26), (4, 44, 56), 4.5),
        ((4, 44, 56), (-42, 50, 60), 3.5),
    ]
    organ = ORGANS.index("liver")
    for trunks, blood in ((hepatic, hu.veins), (portal, hu.portal_vein)):
        for start, end, radius in trunks:
            for branch in _branches(rng, np.asarray(start), np.asarray(end), radius, generations=2):
                yield Part(branch, tissues.parenchyma(blood, coarse=1, fine=2), organ, inside=organ)


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


def tumors(seed: int, hu: Enhancement, room: Solid) -> Iterator[Part]:
    """None in about a third of the patients, else up to four, darker or brighter than the liver; placed in `room`."""
    rng = keyed_rng(seed, "tumors")
    count = int(rng.choice([0, 1, 2, 3, 4], p=(0.35, 0.25, 0.2, 0.1, 0.1)))
    for _ in range(count):
        radius = float(np.exp(rng.uniform(np.log(9), np.log(26))))
        center = _place(rng, room, radius)
        lobules = [ellipsoid(near(rng, center, 0.35 * radius), radius * rng.uniform(0.7, 1, 3)) for _ in range(3)]
        contrast = rng.uniform(28, 48) if rng.random() < 0.3 else -rng.uniform(34, 60)
        look = tissues.lesion(hu.liver + contrast, rim=rng.uniform(-8, 14), core=rng.uniform(-20, 0), radius_mm=radius)
        shape = merged(*lobules, blend_mm=3)
        yield Part(shape, look, ORGANS.index("tumour"), inside=ORGANS.index("liver"))


def _place(rng: np.random.Generator, room: Solid, radius: float) -> tuple[float, ...]:
    """A random point so deep in a solid that most of a ball around it fits; the deepest if no other is."""
    x, y, z = rng.uniform((-60, -75, -60), (130, 90, 100), (2000, 3)).astype(np.float32).T
    deep = room.depth(x, y, z)
    chosen = int(np.argmax(deep >= min(0.6 * radius, deep.max())))  # the first that is deep enough
    return float(x[chosen]), float(y[chosen]), float(z[chosen])


def spleen(seed: int, hu: Enhancement, thorax: Solid) -> Iterator[Part]:
    """The spleen, under the diaphragm."""
    rng = keyed_rng(seed, "spleen")
    size = rng.normal(1, 0.1)
    body = ellipsoid(near(rng, (-103, -26, 34), 4), np.multiply((27, 50, 48), size), turn_degrees=22)
    hilum = ellipsoid((-58, 2, 36), (32, 44, 60))
    solid = body.within(CAVITY.grown(2.5)).without(hilum, thorax.grown(-1))
    yield Part(solid, tissues.parenchyma(hu.spleen, coarse=6), ORGANS.index("spleen"))


def kidneys(seed: int, hu: Enhancement) -> Iterator[Part]:
    """Both kidneys in their fat, with pelvis and vessels."""
    rng = keyed_rng(seed, "kidneys")
    for side, name, height in ((1, "right kidney", -28.0), (-1, "left kidney", -10.0)):
        x, y, z = near(rng, (62 * side, -40, height), 4)
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
        pelvis = tube([(x, y, z - 14), hilum, (x, y, z + 14)], [5, 7, 5])
        yield Part(pelvis, tissues.parenchyma(12), organ, inside=organ)
        for blood, start, radius in ((hu.veins, (10 * side + 8, -20, z + 4), 5), (hu.arteries, (-6, -24, z + 8), 3)):
            yield Part(tube([start, hilum, (x, y, z)], [radius, radius, 2]), tissues.parenchyma(blood))


def _leaning(solid: Solid, lean: float, z0: float) -> Solid:
    reach = abs(lean) * (solid.high[2] - z0)
    return Solid(
        lambda x, y, z: solid.depth(x + lean * (z - z0), y, z),
        (solid.low[0] - reach, *solid.low[1:]),
        (solid.high[0] + reach, *solid.high[1:]),
    )


def stomach(seed: int, hu: Enhancement) -> Iterator[Part]:
    """Stomach with gas over a meal."""
    rng = keyed_rng(seed, "stomach")
    fullness = rng.uniform(0.7, 1.08)
    course = ((-60, -26, 60), (-72, 2, 44), (-66, 36, 18), (-32, 54, -6), (8, 48, -10), (30, 34, -4))
    points = [near(rng, point, 3) for point in course]
    radii = np.multiply((33, 34, 29, 21, 16, 10), fullness)
    outer = bent_tube(points, radii).within(CAVITY.grown(1.5))
    organ = ORGANS.index("stomach")
    yield Part(outer, tissues.parenchyma(hu.gut_wall, coarse=6), organ)
    meal = float(rng.choice([15, hu.gut_wall - 8])) + rng.uniform(-5, 15)  # water, or food like the flesh around it
    content = tissues.filled(meal, level=rng.uniform(28, 55), chyme=rng.uniform(2, 14))
    yield Part(bent_tube(points, radii - rng.uniform(4, 6)).within(CAVITY.grown(-3)), content, organ)


def gallbladder(seed: int) -> Iterator[Part]:
    """The gallbladder, full of bile."""
    rng = keyed_rng(seed, "gallbladder")
    neck, fundus = near(rng, (44, 22, 8), 3), near(rng, (62, 50, -26), 5)
    size = rng.uniform(0.6, 1.15)
    bile = tissues.parenchyma(rng.uniform(4, 18), coarse=2)
    yield Part(tube([neck, fundus], [8 * size, 17 * size]), bile, ORGANS.index("gallbladder"))


def pancreas(hu: Enhancement) -> Iterator[Part]:
    """Pancreas, the duodenum around its head, and the veins behind it."""
    loop = ((32, 34, -4), (50, 14, -12), (48, 4, -48), (10, -2, -60), (-20, 6, -48))
    duodenum = bent_tube(loop, (11, 13, 13, 12, 11))
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


def bowel(seed: int, hu: Enhancement) -> Iterator[Part]:
    """Small bowel in random loops, and colon in its usual frame around them."""
    rng = keyed_rng(seed, "bowel")
    wall = tissues.parenchyma(hu.gut_wall, coarse=8, fine=6)
    liquid = float(rng.choice([18.0, 60.0, 130.0], p=(0.6, 0.25, 0.15)))  # water, porridge, oral contrast agent
    low, high = (-88, 8, -150), (74, 78, -28)
    for _ in range(rng.integers(9, 16)):
        course = [rng.uniform(low, high)]
        for _ in range(5):
            course.append((course[-1] + rng.normal(0, 28, 3)).clip(low, high))
        loop = bent_tube(course, rng.uniform(9, 15, 6)).within(CAVITY.grown(1))
        yield Part(loop, wall)
        yield Part(loop.grown(-2.5), tissues.filled(liquid, level=rng.uniform(55, 90), chyme=12))
    colon = (
        ([(106, 0, -170), (102, 6, -84), (84, 40, -62), (46, 66, -52)], [25, 25, 20, 17]),
        ([(46, 66, -52), (0, 74, -60), (-58, 66, -34), (-106, 22, -2)], [17, 16, 17, 18]),
        ([(-106, 22, -2), (-117, -18, -30), (-114, -16, -170)], [18, 14, 14]),
    )
    for points, radii in colon:
        section = bent_tube([*(near(rng, point, 3) for point in points[:-1]), points[-1]], radii)
        yield Part(section.within(CAVITY.grown(1)), wall)
        yield Part(section.grown(-3).within(CAVITY.grown(-2)), tissues.stool())
