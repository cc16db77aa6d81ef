from __future__ import annotations

import numpy as np
import pytest

from medseg.data.dicom.painting import Piece, indices_of, masks_of, paint, plane_distances_mm, values_of
from medseg.errors import DataError
from medseg.geometry import Geometry

SHAPE = (6, 5, 4)
NAMES = {1: "body", 2: "lung", 3: "node"}


def boxes() -> dict[int, np.ndarray]:
    """Body around lung around node, and a lung that leaves the body."""
    masks = {number: np.zeros(SHAPE, bool) for number in NAMES}
    masks[1][:4] = True
    masks[2][2:6, 1:4] = True
    masks[3][3:5, 2] = True
    return masks


def pieces(masks: dict[int, np.ndarray], seed: int) -> list[Piece]:
    """Slice by slice along K, in a random order."""
    cut = [
        Piece(number, (slice(None), slice(None), k), mask[:, :, k]) for number, mask in masks.items() for k in range(4)
    ]
    return [cut[n] for n in np.random.default_rng(seed).permutation(len(cut))]


def painted(paint_order: tuple[int, ...], values: dict[int, int], seed: int = 0) -> np.ndarray:
    return paint(
        SHAPE,
        pieces(boxes(), seed),
        names=NAMES,
        values=values,
        paint_order=paint_order,
        kind="RTSTRUCT",
        where="case a",
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", [(10, 20, 30), (30, 20, 10), (20, 30, 10)])
def test_the_last_in_the_order_lies_on_top_whatever_comes_first(order: tuple[int, ...], seed: int) -> None:
    expected = np.zeros(SHAPE, int)
    for value in order:  # one after the other, over what is there
        expected[boxes()[value // 10]] = value
    np.testing.assert_array_equal(painted(order, {1: 10, 2: 20, 3: 30}, seed), expected)


@pytest.mark.parametrize("seed", range(3))
def test_overlaps_without_an_order_are_refused_with_every_pair(seed: int) -> None:
    masks = boxes()
    del masks[3]
    with pytest.raises(DataError, match="E-RTSTRUCT-OVERLAP case a: structures overlap") as caught:
        paint(
            SHAPE,
            pieces(masks, seed),
            names=NAMES,
            values={1: 1, 2: 2, 3: 0},
            paint_order=(2,),
            kind="RTSTRUCT",
            where="case a",
        )
    assert 'add to the manifest, the value on top last, "region_order": [1, 2], or train on regions' in str(
        caught.value
    )
    assert f"'body' and 'lung': {np.count_nonzero(masks[1] & masks[2])} voxels" in str(caught.value)


def test_structures_of_value_0_are_left_out() -> None:
    np.testing.assert_array_equal(painted((), {1: 0, 2: 4, 3: 0}), 4 * boxes()[2])


@pytest.mark.parametrize(("value", "dtype"), [(255, np.uint8), (256, np.int16), (40000, np.int32)])
def test_the_smallest_type_that_torch_knows_is_taken(value: int, dtype: type) -> None:
    array = painted((), {1: 0, 2: value, 3: value})
    assert array.dtype == dtype
    assert array.max() == value


def test_masks_keep_overlaps() -> None:
    masks = masks_of(SHAPE, pieces(boxes(), 0), NAMES)
    for number, name in NAMES.items():
        np.testing.assert_array_equal(masks[name], boxes()[number])


def test_names_match_whatever_case_blanks_and_punctuation() -> None:
    names = {4: "Kidney, left", 7: "GTV-1 ", 9: "Körper"}
    values = {"kidney_LEFT": 1, "gtv 1": 2, "KÖRPER": 3}
    assert values_of(names, values, kind="SEG", where="a") == {4: 1, 7: 2, 9: 3}
    assert values_of(names, None, kind="SEG", where="a") == {4: 4, 7: 7, 9: 9}


def test_a_name_that_is_there_to_the_letter_is_meant_and_only_the_rest_is_matched_loosely() -> None:
    values = {"PTV 6.6": 1, "PTV-66": 2, "gtv-1": 3, "gtv 1": 4}
    assert values_of({1: "PTV-66", 2: "PTV 6.6", 3: "gtv 1"}, values, kind="SEG", where="a") == {1: 2, 2: 1, 3: 4}
    assert values_of({1: "gtv 1", 2: "GTV 1"}, values, kind="SEG", where="a") == {1: 4, 2: 3}
    with pytest.raises(DataError, match=r"E-SEG-LABELS a: structure 'GTV-1' may be 'gtv 1' \(4\), 'gtv-1' \(3\)"):
        values_of({1: "GTV-1"}, values, kind="SEG", where="a")
    assert values_of({1: "GTV-1"}, {"gtv-1": 1, "gtv 1": 1}, kind="SEG", where="a") == {1: 1}


@pytest.mark.parametrize(("name", "label"), [("PTV 66", "PTV 6.6"), ("PTV 6 6", "PTV66"), ("PTV+3", "PTV-3")])
def test_names_whose_numbers_differ_are_not_the_same(name: str, label: str) -> None:
    with pytest.raises(DataError, match="E-SEG-LABELS a: 1 of 2 structures have no label value"):
        values_of({1: name, 2: "liver"}, {label: 1, "liver": 2}, kind="SEG", where="a")


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["GTV_Mass_CT"], '{"GTV_Mass_CT": 1}'),  # one structure, one label
        (["Tumours", "Körper"], '{"Tumours": 1, "Körper": 0}'),
        (["tumour", "PTV 66"], '{"PTV 66": 0}'),
    ],
)
def test_what_lacks_a_value_comes_with_the_line_to_add_to_the_manifest(names: list[str], line: str) -> None:
    with pytest.raises(DataError, match="E-RTSTRUCT-LABELS") as caught:
        values_of(dict(enumerate(names, 1)), {"background": 0, "tumour": 1}, kind="RTSTRUCT", where="a")
    assert f'manifest, with the value of each (0 leaves it out): "structures": {line}' in str(caught.value)


def sheared() -> Geometry:
    affine = np.array([[-0.7, 0.1, 0, 5], [0, -0.8, 0.9, -7], [0, 0, 2.4, 9], [0, 0, 0, 1.0]])
    return Geometry(SHAPE, affine)


def test_points_of_the_patient_become_voxel_indices() -> None:
    indices = np.random.default_rng(0).uniform(-3, 8, (20, 3))
    ras = indices @ sheared().affine[:3, :3].T + sheared().affine[:3, 3]
    np.testing.assert_allclose(indices_of(ras * (-1, -1, 1), sheared()), indices, atol=1e-9)


def test_planes_of_a_sheared_grid_are_closer_than_its_voxels_are_long() -> None:
    affine = sheared().affine
    for axis, distance in enumerate(plane_distances_mm(sheared())):
        a, b = (affine[:3, other] for other in range(3) if other != axis)
        normal = np.cross(a, b) / np.linalg.norm(np.cross(a, b))
        assert distance == pytest.approx(abs(normal @ affine[:3, axis]))
    assert plane_distances_mm(sheared())[2] < sheared().spacing_mm[2]
