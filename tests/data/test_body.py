from __future__ import annotations

import numpy as np
import pytest

from medseg.data.body import MARGIN_MM, find_body
from medseg.data.phantom.cases import ct_case


def scan(*, arm: bool = False, noise: float = 30.0) -> np.ndarray:
    """A CT of a water cylinder with a hole of air, in air; 3 mm voxels."""
    i, j, _ = np.indices((80, 70, 40))
    hu = np.full((80, 70, 40), -1000.0)
    hu[np.hypot(i - 40, j - 30) < 18] = 20
    hu[np.hypot(i - 40, j - 30) < 6] = -900
    if arm:
        hu[np.hypot(i - 70, j - 30) < 4] = 40
    return (hu + np.random.default_rng(0).normal(0, noise, hu.shape)).astype(np.float32)[None]


SPACING = (3.0, 3.0, 3.0)


def test_the_body_is_found_with_its_margin_and_what_it_encloses() -> None:
    body = find_body(scan(), SPACING, ("CT",))
    assert body is not None
    margin = MARGIN_MM / 3
    for side, center in zip(body.box, (40, 30), strict=False):
        assert center - 18 - 2 * margin - 2 <= side.start <= center - 18 - margin
        assert center + 18 + margin <= side.stop <= center + 18 + 2 * margin + 2
    assert body.box[2] == slice(0, 40)
    assert body.touches((slice(38, 42), slice(28, 32), slice(10, 12)))  # the air inside
    assert not body.touches((slice(0, 8), slice(0, 5), slice(0, 40)))


def test_arms_beside_the_body_are_kept_and_specks_are_not() -> None:
    body = find_body(scan(arm=True), SPACING, ("CT",))
    assert body is not None and body.box[0].stop > 74
    speckled = scan()
    speckled[0, 75, 60, 20] = 500
    speckled[0, 3, 65, 3] = 500
    body = find_body(speckled, SPACING, ("CT",))
    assert body is not None and body.box[0].stop < 75 and body.box[1].stop < 65


def test_an_mr_is_told_from_the_noise_around_it_whatever_its_scale() -> None:
    random = np.random.default_rng(0)
    i, j, k = np.indices((60, 60, 40))
    inside = (i - 30) ** 2 / 20**2 + (j - 25) ** 2 / 15**2 + (k - 20) ** 2 / 30**2 < 1
    signal = np.where(inside, np.where(i < 30, 60.0, 300.0), 0)  # dark on one side, as far from the coil
    mr = np.hypot(signal + random.normal(0, 5, signal.shape), random.normal(0, 5, signal.shape))
    for scale in (0.01, 1, 40):
        body = find_body((scale * mr).astype(np.float32)[None], (4.0, 4.0, 4.0), ("MR",))
        assert body is not None
        assert all(body.touches(tuple(slice(n, n + 1) for n in voxel)) for voxel in np.argwhere(inside)[::50])
        assert body.box[1].stop < 55


@pytest.mark.parametrize("channels", [("PT",), ("image",)])
def test_other_modalities_are_left_alone(channels: tuple[str, ...]) -> None:
    assert find_body(scan(), SPACING, channels) is None


def test_of_several_channels_the_ct_tells() -> None:
    body = find_body(np.concatenate([0 * scan(), scan()]), SPACING, ("PET", "CT"))
    assert body is not None and body.box[0].start > 0


def test_where_nothing_stands_out_there_is_no_body() -> None:
    assert find_body(np.full((1, 20, 20, 20), -1000.0, np.float32), SPACING, ("CT",)) is None
    assert find_body(np.full((1, 20, 20, 20), 7.0, np.float32), SPACING, ("MR",)) is None


@pytest.mark.parametrize("seed", range(3))
def test_every_organ_of_a_phantom_lies_in_its_body(seed: int) -> None:
    phantom = ct_case(seed, (96, 96, 48), labels="liver")
    body = find_body(phantom.image.array, phantom.image.geometry.spacing_mm, ("CT",))
    assert body is not None
    for axis, side in enumerate(body.box):
        found = np.flatnonzero(phantom.label.array[0].any(tuple(a for a in range(3) if a != axis)))
        assert side.start <= found[0] and found[-1] < side.stop
