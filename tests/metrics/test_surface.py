"""Distances between surfaces. Oracles are brute force in float64, MONAI, SimpleITK and surface-distance."""

import itertools
import math

import numpy as np
import pytest
import SimpleITK as sitk
import surface_distance as deepmind
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from medseg.errors import GeometryError
from medseg.metrics import nearest, stretches
from medseg.metrics.surface import bounding_boxes, surface_distances

MANY = settings(
    max_examples=50,
    derandomize=True,  # the same examples everywhere
    deadline=None,  # a busy machine is not a defect
    suppress_health_check=[HealthCheck.too_slow],
)
SPACINGS = {2: [(1.0, 1.0), (0.7, 2.5)], 3: [(1.0, 1.0, 1.0), (0.8, 0.8, 3.0), (5.0, 0.5, 1.25)]}
KINDS = [(dims, spacing) for dims, spacings in SPACINGS.items() for spacing in spacings]
EVERY_SPACING = pytest.mark.parametrize(("dims", "spacing"), KINDS)
SURFACE_DISTANCE_IS_OLD = pytest.mark.filterwarnings("ignore:Please import `:DeprecationWarning")


def blobs(seed: int, dims: int):
    """Two shapes that mostly agree, of many parts, some of them at the border of the image."""
    random, shape = np.random.default_rng(seed), (14, 17, 12)[:dims]
    field, other = (ndimage.gaussian_filter(random.normal(size=shape), 1.5, mode="constant") for _ in range(2))
    return field > 0.02, field + 0.5 * other > 0.02


def far_apart(dims: int):
    """A hollow shape, and a small one in the middle of it."""
    distance = np.abs(np.indices((25, 23, 27)[:dims]).T - np.array([12, 11, 13])[:dims]).max(axis=-1).T
    return (distance > 8) & (distance < 11), distance < 2


def pairs(dims: int):
    return [*(blobs(seed, dims) for seed in range(3)), far_apart(dims)]


def brute_force(reference, prediction, spacing):
    """From each surface voxel of either mask to the nearest of the other, over all pairs."""
    first, second = (np.argwhere(surface(mask)) * np.array(spacing, float) for mask in (reference, prediction))
    all_pairs = np.sqrt(((first[:, None] - second[None]) ** 2).sum(axis=-1))
    return all_pairs.min(axis=1), all_pairs.min(axis=0)


def surface(mask):
    """Voxel by voxel: in the mask, with a neighbor that is not, or that the image does not have."""
    padded, found = np.pad(mask, 1), np.zeros_like(mask)
    for place in np.argwhere(mask):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            neighbor = place + 1
            neighbor[axis] += step
            found[tuple(place)] |= not padded[tuple(neighbor)]
    return found


def everything(distances, tolerance=2.0):
    return [
        distances.hausdorff(),
        distances.hausdorff(95),
        distances.average(),
        distances.surface_dice(tolerance),
        distances.surface_dice(tolerance, by_area=False),
    ]


@EVERY_SPACING
def test_distances_between_voxels_are_those_of_brute_force(dims, spacing):
    for reference, prediction in pairs(dims):
        found = surface_distances(reference, prediction, spacing)
        there, back = brute_force(reference, prediction, spacing)
        both = np.concatenate([there, back])
        assert found.hausdorff() == pytest.approx(both.max(), abs=1e-5)
        for percentile in (50, 95):
            expected = max(np.percentile(there, percentile), np.percentile(back, percentile))
            assert found.hausdorff(percentile) == pytest.approx(expected, abs=1e-5)
        assert found.average() == pytest.approx(both.mean(), abs=1e-5)
        for tolerance in (0, 1, 2.1, 5):
            expected = (both <= tolerance + 1e-9).mean()
            assert found.surface_dice(tolerance, by_area=False) == pytest.approx(expected)


@EVERY_SPACING
def test_by_a_distance_transform_they_are_the_same(dims, spacing, monkeypatch):
    for reference, prediction in pairs(dims):
        by_tree = everything(surface_distances(reference, prediction, spacing))
        with monkeypatch.context() as patched:
            patched.setattr(nearest, "_VOXELS_PER_QUERY", 10**6)
            by_transform = everything(surface_distances(reference, prediction, spacing))
        assert by_transform == pytest.approx(by_tree, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@EVERY_SPACING
def test_all_is_as_in_monai(dims, spacing):
    for reference, prediction in pairs(dims):
        found = surface_distances(reference, prediction, spacing)
        theirs = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]
        same = {"include_background": True, "spacing": spacing}
        assert found.hausdorff() == pytest.approx(float(compute_hausdorff_distance(*theirs, **same)), abs=1e-4)
        expected = float(compute_hausdorff_distance(*theirs, percentile=95, **same))
        assert found.hausdorff(95) == pytest.approx(expected, abs=1e-4)
        expected = float(compute_average_surface_distance(*theirs, symmetric=True, **same))
        assert found.average() == pytest.approx(expected, abs=1e-4)
        for tolerance, by_area in itertools.product((0.1, 2.05), (True, False)):
            expected = compute_surface_dice(*theirs, [tolerance], use_subvoxels=by_area, **same)
            assert found.surface_dice(tolerance, by_area=by_area) == pytest.approx(float(expected), abs=1e-5)


def as_image(mask, spacing):
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    return image


def contour(mask, spacing):
    """SimpleITK's surface: voxels with a neighbor outside, of those that share a side; none at the image's border."""
    return sitk.BinaryContour(as_image(mask, spacing), fullyConnected=False, foregroundValue=1)


def hausdorff_and_average_of_simpleitk(reference, prediction):
    measure = sitk.HausdorffDistanceImageFilter()
    measure.Execute(reference, prediction)
    return measure.GetHausdorffDistance(), measure.GetAverageHausdorffDistance()


def distances_of_simpleitk(reference, prediction, spacing):
    """From each contour voxel of either mask to the other contour, as its users read them off distance maps."""
    contours = [contour(mask, spacing) for mask in (reference, prediction)]
    far = [sitk.Abs(sitk.SignedMaurerDistanceMap(c, squaredDistance=False, useImageSpacing=True)) for c in contours]
    at, to = ([sitk.GetArrayFromImage(image) for image in images] for images in (contours, far))
    return to[1][at[0] > 0], to[0][at[1] > 0]


@EVERY_SPACING
def test_distances_between_voxels_are_those_of_simpleitk_s_contours(dims, spacing):
    for pair in pairs(dims):
        reference, prediction = (np.pad(mask, 2) for mask in pair)  # its contours leave out the border
        found = surface_distances(reference, prediction, spacing)
        there, back = distances_of_simpleitk(reference, prediction, spacing)
        largest, mean_of_means = hausdorff_and_average_of_simpleitk(
            contour(reference, spacing), contour(prediction, spacing)
        )
        assert found.hausdorff() == pytest.approx(largest, abs=1e-4)
        assert found.hausdorff(95) == pytest.approx(max(np.percentile(d, 95) for d in (there, back)), abs=1e-4)
        assert found.average() == pytest.approx(np.concatenate([there, back]).mean(), abs=1e-4)
        assert (there.mean() + back.mean()) / 2 == pytest.approx(mean_of_means, abs=1e-4)


def blocks():
    """A block of 6 voxels in the middle of an image of 15, moved by 2, and grown by 1 on every side."""
    block, grown = np.zeros((2, 15, 15, 15), bool)
    block[4:10, 4:10, 4:10] = grown[3:11, 3:11, 3:11] = True
    return block, np.roll(block, 2, axis=0), grown


def test_the_average_is_simpleitk_s_where_both_surfaces_are_as_large_and_else_not():
    block, moved, grown = blocks()
    for other, ours, theirs in ((moved, 0.7368, 0.7368), (grown, 1.0796, 1.0603)):
        found = surface_distances(block, other, (1, 1, 1)).average()
        contours = (contour(mask, (1, 1, 1)) for mask in (block, other))
        expected = pytest.approx((ours, theirs), abs=1e-4)
        assert (found, hausdorff_and_average_of_simpleitk(*contours)[1]) == expected


@SURFACE_DISTANCE_IS_OLD
def test_simpleitk_s_distances_of_masks_are_not_those_of_their_surfaces():
    reference = np.zeros((15, 15, 15), bool)
    reference[2:13, 2:13, 2:13] = True
    prediction = reference.copy()
    prediction[7, 7, 7] = False
    masks = (as_image(mask, (1, 1, 1)) for mask in (reference, prediction))
    found = surface_distances(reference, prediction, (1, 1, 1))
    theirs = deepmind.compute_robust_hausdorff(
        deepmind.compute_surface_distances(reference, prediction, (1, 1, 1)), 100
    )
    assert (found.hausdorff(), hausdorff_and_average_of_simpleitk(*masks)[0], theirs) == (4, 1, 5)


def test_a_mask_that_fills_the_image_has_a_surface_here_and_in_simpleitk_none():
    full, inner = np.ones((5, 5, 5), bool), np.zeros((5, 5, 5), bool)
    inner[2, 2, 2] = True
    assert surface_distances(full, inner, (1, 1, 1)).hausdorff() == pytest.approx(math.sqrt(12))
    assert not sitk.GetArrayFromImage(contour(full, (1, 1, 1))).any()


@SURFACE_DISTANCE_IS_OLD
@EVERY_SPACING
def test_surface_dice_is_that_of_surface_distance(dims, spacing):
    for reference, prediction in pairs(dims):
        found = surface_distances(reference, prediction, spacing)
        theirs = deepmind.compute_surface_distances(reference, prediction, spacing)
        for tolerance in (0.1, 1.3, 2.05, 6):
            expected = deepmind.compute_surface_dice_at_tolerance(theirs, tolerance)
            assert found.surface_dice(tolerance) == pytest.approx(expected, abs=1e-6)


@SURFACE_DISTANCE_IS_OLD
def test_hausdorff_distances_of_blocks_are_those_of_surface_distance_and_averages_are_not():
    block, *others = blocks()
    for other, by_area in zip(others, (0.7048, (1 + 1.0728) / 2), strict=True):
        found = surface_distances(block, other, (1, 1, 1))
        theirs = deepmind.compute_surface_distances(block, other, (1, 1, 1))
        for percentile in (95, 100):
            assert found.hausdorff(percentile) == pytest.approx(deepmind.compute_robust_hausdorff(theirs, percentile))
        assert np.mean(deepmind.compute_average_surface_distance(theirs)) == pytest.approx(by_area, abs=1e-4)
        assert found.average() > by_area + 0.03


def test_two_voxels_three_steps_apart_are_three_spacings_apart():
    mask = np.zeros((9, 9, 9), bool)
    mask[2, 4, 4] = True
    found = surface_distances(mask, np.roll(mask, 3, axis=0), (0.7, 1, 1))
    assert found.hausdorff() == found.hausdorff(95) == found.average() == pytest.approx(2.1)


def test_a_distance_equal_to_the_tolerance_is_within_it_whatever_was_rounded():
    mask = np.zeros((9, 9), bool)
    mask[2, 4] = True
    for steps, mm in itertools.product((1, 2, 3), (0.1, 0.7, 1.1)):
        found = surface_distances(mask, np.roll(mask, steps, axis=0), (mm, 30))
        assert found.surface_dice(steps * mm, by_area=False) == 1
        assert found.surface_dice(steps * mm * 0.999, by_area=False) == 0


def test_surface_dice_counts_elements_by_their_length():
    reference = np.zeros((40, 12), bool)
    reference[10:30, 3:5] = True
    prediction = reference.copy()
    prediction[10:30, 5:9] = True  # one long side moves by 4 mm
    corner = math.sqrt(0.5)
    # Of both the other long side, the short sides, and the ends of the side that moved, which lie on a short side.
    agreed = (19 + 2 * 1 + 4 * corner) + (19 + 2 * 2 + 2 * corner)
    lengths = (2 * 19 + 2 * 1 + 4 * corner) + (2 * 19 + 2 * 5 + 4 * corner)
    assert surface_distances(reference, prediction, (1, 1)).surface_dice(0.5) == pytest.approx(agreed / lengths)


@pytest.mark.parametrize("dims", [2, 3])
def test_surfaces_of_an_empty_mask_have_no_distance(dims):
    empty, full = np.zeros((5, 6, 7)[:dims], bool), np.ones((5, 6, 7)[:dims], bool)
    spacing = (1, 1, 1)[:dims]
    for reference, prediction, dice in ((empty, full, 0), (full, empty, 0), (empty, empty, math.nan)):
        found = surface_distances(reference, prediction, spacing)
        assert everything(found) == pytest.approx([math.nan, math.nan, math.nan, dice, dice], nan_ok=True)
    nowhere = np.zeros((0, 0, 0)[:dims], bool)
    assert all(math.isnan(value) for value in everything(surface_distances(nowhere, nowhere, spacing)))


def test_a_mask_has_a_surface_at_the_border_of_the_image():
    full = np.ones((5, 5), bool)
    inner = np.zeros((5, 5), bool)
    inner[1:-1, 1:-1] = True
    found = surface_distances(full, inner, (1, 1))
    assert found.hausdorff() == pytest.approx(math.sqrt(2))  # from the corners
    assert found.average() == pytest.approx((12 + 4 * math.sqrt(2) + 8) / (16 + 8))


masks = st.tuples(*[arrays(bool, (5, 4, 6))] * 2)
spacings = st.tuples(*[st.sampled_from([0.5, 1.0, 1.7, 4.0])] * 3)


@MANY
@given(masks, spacings)
def test_distances_are_symmetric(pair, spacing):
    there, back = surface_distances(*pair, spacing), surface_distances(*pair[::-1], spacing)
    assert everything(there) == pytest.approx(everything(back), nan_ok=True)


@MANY
@given(masks, spacings)
def test_a_mask_does_not_differ_from_itself(pair, spacing):
    expected = [0, 0, 0, 1, 1] if pair[0].any() else [math.nan] * 5
    assert everything(surface_distances(pair[0], pair[0], spacing), 0) == pytest.approx(expected, nan_ok=True)


@MANY
@given(masks, spacings, st.tuples(*[st.integers(0, 5)] * 3))
def test_where_the_masks_lie_in_the_image_does_not_matter(pair, spacing, place):
    """Cropped to the organ or not, at the border or not."""
    around = [(before, after) for before, after in zip(place, place[::-1], strict=True)]
    moved = [np.pad(mask, around) for mask in pair]
    expected = everything(surface_distances(*pair, spacing))
    assert everything(surface_distances(*moved, spacing)) == pytest.approx(expected, nan_ok=True)
    (box,) = bounding_boxes(*(mask.astype(np.uint8) for mask in moved), {"organ": [1]}).values()
    cropped = [mask[box] for mask in moved]
    assert everything(surface_distances(*cropped, spacing)) == pytest.approx(expected, nan_ok=True)


@MANY
@given(masks, spacings, st.sampled_from([0.25, 2.0, 10.0]))
def test_distances_grow_with_the_spacing_and_surface_dice_with_both_does_not(pair, spacing, factor):
    *distances, by_area, by_voxels = everything(surface_distances(*pair, spacing), 2.05)
    expected = [*(mm * factor for mm in distances), by_area, by_voxels]
    larger = surface_distances(*pair, [mm * factor for mm in spacing])
    assert everything(larger, 2.05 * factor) == pytest.approx(expected, nan_ok=True)


@MANY
@given(masks, spacings, st.permutations(range(3)), st.sampled_from("CF"))
def test_the_order_of_axes_and_memory_does_not_matter(pair, spacing, axes, order):
    turned = [np.asarray(mask.transpose(axes), order=order) for mask in pair]
    expected = everything(surface_distances(*pair, spacing))
    found = surface_distances(*turned, [spacing[axis] for axis in axes])
    assert everything(found) == pytest.approx(expected, nan_ok=True)


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(GeometryError, match=r"E-PAIR-SHAPE.*\(3, 4\).*\(4, 3\)"):
        surface_distances(np.ones((4, 3), bool), np.ones((3, 4), bool), (1, 1))
    for spacing in ((1, 1, 1), (1, 0), (1, math.nan)):
        with pytest.raises(GeometryError, match="E-SPACING"):
            surface_distances(np.ones((4, 3), bool), np.ones((4, 3), bool), spacing)


def box_by_hand(reference, prediction, values):
    places = np.argwhere(np.isin(reference, values) | np.isin(prediction, values))
    if not len(places):
        return (slice(0, 0),) * reference.ndim
    return tuple(
        slice(max(0, low - 1), min(size, high + 2))
        for low, high, size in zip(places.min(0).tolist(), places.max(0).tolist(), reference.shape, strict=True)
    )


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
@pytest.mark.parametrize("orders", ["CC", "FF", "CF"])
@pytest.mark.parametrize("shape", [(7, 9), (1, 9), (6, 7, 8)])
def test_boxes_are_those_of_each_organ_by_itself(shape, orders, chunk, monkeypatch):
    monkeypatch.setattr(stretches, "_CHUNK", chunk)
    organs = {"both": (3, 1), "one": (1,), "none": (77,), "negative": (-2, 3), "background": (0,)}
    for seed in range(4):
        random = np.random.default_rng(seed)
        reference, prediction = (
            np.asarray(random.choice([0, 1, 3, kind], shape, p=[0.9, 0.04, 0.03, 0.03]), dtype, order=order)
            for kind, dtype, order in ((5, np.uint8, orders[0]), (-2, np.int16, orders[1]))
        )
        boxes = bounding_boxes(reference, prediction, organs)
        assert boxes == {organ: box_by_hand(reference, prediction, values) for organ, values in organs.items()}


def test_an_organ_that_fills_rows_and_planes_has_its_whole_box():
    label = np.zeros((6, 5, 4), np.uint8)
    label[2:4] = 1
    label[5, 2, 3] = 2
    label[5, 3, 0] = 2  # goes on in the next row
    boxes = bounding_boxes(label, label, {"planes": (1,), "rows": (2,)})
    assert boxes == {"planes": np.s_[1:5, 0:5, 0:4], "rows": np.s_[4:6, 1:5, 0:4]}
