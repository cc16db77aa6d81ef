from __future__ import annotations

import numpy as np
import pytest
from matplotlib.path import Path as MatplotlibPath
from scipy import ndimage

from medseg.data.dicom.polygons import crossing_voxels, fill, without_repeats

SHAPE = (13, 17)
CENTRES = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), axis=-1).astype(float)


def filled(*polygons: object, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    window, mask = fill([np.asarray(p, dtype=float) for p in polygons], shape)
    plane = np.zeros(shape, bool)
    plane[window] = mask
    return plane


def brute_force(polygon: np.ndarray) -> np.ndarray:
    """Voxel by voxel: on an edge, or an odd number of edges to the right."""
    mask = np.zeros(SHAPE, bool)
    for i, j in np.ndindex(SHAPE):
        crossings, on_edge = 0, False
        for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            along = np.array([x1 - x0, y1 - y0])
            share = np.clip(np.dot([i - x0, j - y0], along) / max(np.dot(along, along), 1e-12), 0, 1)
            on_edge |= bool(np.hypot(*([x0, y0] + share * along - [i, j])) < 1e-7)
            if (y0 > j) != (y1 > j) and x0 + (j - y0) * (x1 - x0) / (y1 - y0) > i:
                crossings += 1
        mask[i, j] = on_edge or crossings % 2 == 1
    return mask


@pytest.mark.parametrize("seed", range(12))
def test_random_polygons_equal_a_test_of_each_voxel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    polygon = rng.uniform(-3, 18, (rng.integers(3, 12), 2))  # self-crossing, and partly beyond the plane
    np.testing.assert_array_equal(filled(polygon), brute_force(polygon))


@pytest.mark.parametrize("seed", range(12))
def test_polygons_through_voxel_centres_equal_a_test_of_each_voxel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    polygon = rng.integers(-2, 16, (rng.integers(3, 9), 2)).astype(float)
    np.testing.assert_array_equal(filled(polygon), brute_force(polygon))


def test_a_smooth_outline_equals_what_matplotlib_says() -> None:
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    polygon = np.stack([6.1 + 5.3 * np.cos(angle), 8.2 + 6.7 * np.sin(angle) * (1 + 0.2 * np.cos(5 * angle))], axis=1)
    expected = MatplotlibPath(polygon).contains_points(CENTRES.reshape(-1, 2)).reshape(SHAPE)
    np.testing.assert_array_equal(filled(polygon), expected)


BOX = [(1.5, 2.5), (10.5, 2.5), (10.5, 13.5), (1.5, 13.5)]  # voxels 2-10 × 3-13
HOLE = [(4.5, 5.5), (7.5, 5.5), (7.5, 9.5), (4.5, 9.5)]  # voxels 5-7 × 6-9


def test_an_inner_polygon_is_a_hole_and_one_within_it_is_an_island() -> None:
    expected = np.zeros(SHAPE, bool)
    expected[2:11, 3:14] = True
    np.testing.assert_array_equal(filled(BOX), expected)
    expected[5:8, 6:10] = False
    np.testing.assert_array_equal(filled(BOX, HOLE), expected)
    np.testing.assert_array_equal(filled(BOX, HOLE[::-1]), expected)
    expected[6, 7] = True
    np.testing.assert_array_equal(filled(BOX, HOLE, [(5.6, 6.6), (6.4, 6.6), (6.4, 7.4), (5.6, 7.4)]), expected)


@pytest.mark.parametrize("bridge_at", [5.5, 7.0, 6.3])
@pytest.mark.parametrize("same_direction", [True, False])
def test_a_keyhole_keeps_its_hole_and_nothing_of_the_bridge(bridge_at: float, same_direction: bool) -> None:
    inner = [(4.5, bridge_at), (4.5, 9.5), (7.5, 9.5), (7.5, 5.5), (4.5, 5.5), (4.5, bridge_at)]
    inner = inner[::-1] if same_direction else inner
    keyhole = [(1.5, 2.5), (10.5, 2.5), (10.5, 13.5), (1.5, 13.5), (1.5, bridge_at), *inner, (1.5, bridge_at)]
    np.testing.assert_array_equal(filled(keyhole), filled(BOX, HOLE))


def test_a_centre_on_an_edge_is_inside_on_every_side() -> None:
    expected = np.zeros(SHAPE, bool)
    expected[2:6, 3:9] = True
    square = np.array([(2, 3), (5, 3), (5, 8), (2, 8)])
    np.testing.assert_array_equal(filled(square), expected)
    np.testing.assert_array_equal(filled(square + 1e-7), expected)  # what decimal text and an affine leave


@pytest.mark.parametrize("seed", range(4))
def test_the_mask_does_not_depend_on_the_direction_of_the_axes(seed: int) -> None:
    polygon = np.random.default_rng(seed).integers(0, 13, (7, 2)).astype(float)
    mirrored = (np.array(SHAPE) - 1) - polygon
    np.testing.assert_array_equal(filled(mirrored)[::-1, ::-1], filled(polygon))
    np.testing.assert_array_equal(filled(polygon[:, ::-1], shape=SHAPE[::-1]).T, filled(polygon))
    np.testing.assert_array_equal(filled(polygon[::-1]), filled(polygon))


def test_neighbours_that_share_a_border_between_centres_share_no_voxel() -> None:
    border = np.stack([6 + 0.37 * np.sin(np.arange(16)) + 0.013, np.arange(-0.5, 15.5)], axis=1)
    left = filled([*border, (-5, 14.5), (-5, -0.5)])
    right = filled([*border, (20, 14.5), (20, -0.5)])
    assert not (left & right).any()
    assert (left | right)[:, :15].all()


def test_a_polygon_wholly_outside_has_no_voxel() -> None:
    for offset in [(-30, 0), (30, 0), (0, -30), (0, 30), (-30, 30)]:
        assert not filled(np.array(BOX) + offset).any()


def test_a_polygon_around_the_plane_fills_it() -> None:
    assert filled([(-5, -5), (50, -5), (50, 50), (-5, 50)]).all()


def test_crossing_polygons_are_counted_and_others_are_not() -> None:
    box = np.array(BOX)
    beside = box + np.array([0, 11])  # shares an edge
    assert crossing_voxels([box, np.array(HOLE)], SHAPE) == 0
    assert crossing_voxels([box, beside], SHAPE) == 0
    shifted = box + np.array([5, 0])  # voxels 7-12 (of 15) × 3-13
    assert crossing_voxels([box, shifted], SHAPE) == 4 * 11
    np.testing.assert_array_equal(filled(box, shifted), filled(box) ^ filled(shifted))


def test_a_circle_drawn_again_with_other_points_is_one_and_another_circle_is_not() -> None:
    def circle(radius: float, num_points: int) -> np.ndarray:
        angle = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
        return np.stack([6 + radius * np.cos(angle), 8 + radius * np.sin(angle)], axis=1)

    drawn = [circle(4.7, 90), circle(4.7, 61)[::-1], circle(3.2, 90), circle(4.7, 90) + np.array([5, 0])]
    kept = without_repeats(drawn, SHAPE)
    assert [next(k for k, one in enumerate(drawn) if one is polygon) for polygon in kept] == [0, 2, 3]
    speck = [np.array([(0.1, 0.1), (0.4, 0.1), (0.4, 0.4)]) + shift for shift in (0, 3)]  # neither holds a voxel
    assert len(without_repeats(speck, SHAPE)) == 2


def test_outlines_traced_through_border_voxels_give_back_their_mask() -> None:
    rng = np.random.default_rng(3)
    mask = ndimage.gaussian_filter(rng.random((40, 40)), 4) > 0.5
    mask = ndimage.binary_opening(mask, np.ones((3, 3)))
    parts, num_parts = ndimage.label(ndimage.binary_fill_holes(mask))
    assert num_parts > 1
    for number in range(1, num_parts + 1):
        part = parts == number
        np.testing.assert_array_equal(filled(traced(part), shape=part.shape), part)


def traced(mask: np.ndarray) -> np.ndarray:
    """The closed chain of border voxels of a mask without holes (Moore's neighbour tracing)."""
    steps = [(0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1)]
    start = tuple(np.argwhere(mask)[0])
    chain, at, came_from = [start], start, 0
    while True:
        for turn in range(8):
            way = (came_from + 1 + turn) % 8
            there = (at[0] + steps[way][0], at[1] + steps[way][1])
            if all(0 <= x < n for x, n in zip(there, mask.shape, strict=True)) and mask[there]:
                break
        came_from = (way + 4) % 8
        at = there
        if at == start and len(chain) > 2:
            return np.array(chain)
        chain.append(at)
