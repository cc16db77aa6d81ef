import itertools
import math

import numpy as np
import pytest
from monai.metrics.utils import get_code_to_measure_table

from medseg.metrics.marching_cubes import element_sizes


def test_a_corner_cut_off_a_cell_is_a_triangle_between_the_middles_of_three_edges():
    assert element_sizes((1, 1, 1))[1] == pytest.approx(math.sqrt(3) / 8)


def test_a_surface_along_a_face_has_the_area_of_that_face():
    inside = 0b01010101  # i = 0
    assert element_sizes((5, 2, 3))[inside] == pytest.approx(2 * 3)


def test_in_2d_a_corner_is_cut_off_at_half_the_diagonal():
    assert element_sizes((3, 4))[1] == pytest.approx(2.5)
    assert element_sizes((3, 4))[0b0110] == pytest.approx(5)


def test_a_cell_that_is_all_inside_or_all_outside_holds_no_surface():
    for spacing in ((1, 2), (1, 2, 3)):
        sizes = element_sizes(spacing)
        assert sizes[0] == sizes[-1] == 0
        assert (sizes[1:-1] > 0).all()


@pytest.mark.parametrize("spacing", [(1, 1), (0.7, 3.1), (1, 1, 1), (0.8, 0.7, 5), (2.9, 1, 1.7)])
def test_sizes_of_all_cells_are_those_of_surface_distance_as_monai_has_them(spacing):
    table, kernel = get_code_to_measure_table(spacing)
    weights = kernel.numpy().reshape((2,) * len(spacing))
    corners = [corner[::-1] for corner in itertools.product((0, 1), repeat=len(spacing))]
    sizes = element_sizes(spacing)
    for code, size in enumerate(sizes):
        theirs = sum(int(weights[corner]) for number, corner in enumerate(corners) if code >> number & 1)
        assert size == pytest.approx(float(table[theirs]), rel=1e-6)
    assert np.isfinite(sizes).all()
