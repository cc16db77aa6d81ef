import math

import numpy as np
import pytest

from medseg.errors import GeometryError
from medseg.metrics.calibration import expected_calibration_error, reliability


def error_by_brute_force(probability, reference, num_bins):
    """Bin after bin, as the paper has it."""
    total = 0.0
    for number in range(num_bins):
        low, high = number / num_bins, (number + 1) / num_bins
        inside = (probability >= low) & ((probability < high) | (number == num_bins - 1))
        if inside.any():
            total += inside.mean() * abs(probability[inside].mean() - reference[inside].mean())
    return total


def test_the_error_of_four_voxels_is_that_computed_by_hand():
    probability, reference = np.array([0.9, 0.9, 0.9, 0.2]), np.array([True, True, False, False])
    found = expected_calibration_error(probability, reference, num_bins=2)
    assert found == pytest.approx(3 / 4 * (0.9 - 2 / 3) + 1 / 4 * 0.2)


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_the_error_equals_brute_force(num_bins, monkeypatch):
    monkeypatch.setattr("medseg.metrics.calibration._CHUNK", 1000)
    generator = np.random.default_rng(num_bins)
    probability = generator.random((20, 15, 11))
    reference = generator.random(probability.shape) < probability**2
    found = expected_calibration_error(probability, reference, num_bins=num_bins)
    assert found == pytest.approx(error_by_brute_force(probability, reference, num_bins), abs=1e-12)


def test_probabilities_that_mean_what_they_say_have_almost_no_error():
    generator = np.random.default_rng(0)
    probability = generator.random(200_000, dtype=np.float32)
    assert expected_calibration_error(probability, generator.random(200_000) < probability) < 0.01


def test_certainty_that_is_always_wrong_has_an_error_of_one():
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([True, False])) == 1


def test_voxels_that_do_not_count_are_left_out():
    probability, reference = np.array([0.9, 0.1, 0.4]), np.array([True, False, True])
    counted = np.array([True, True, False])
    found = expected_calibration_error(probability, reference, counted=counted)
    assert found == pytest.approx(expected_calibration_error(probability[:2], reference[:2]))
    assert math.isnan(expected_calibration_error(probability, reference, counted=np.zeros(3, dtype=bool)))


def test_bins_of_two_cases_add_up_to_those_of_both():
    generator = np.random.default_rng(1)
    probability = generator.random((2, 500))
    reference = generator.random((2, 500)) < 0.3
    both = reliability(probability[0], reference[0]) + reliability(probability[1], reference[1])
    assert both.error == pytest.approx(expected_calibration_error(probability, reference))
    assert both.num_voxels.sum() == 1000 and both.num_positive.sum() == reference.sum()


def test_probabilities_of_another_grid_are_refused():
    with pytest.raises(GeometryError) as caught:
        expected_calibration_error(np.zeros((2, 3)), np.zeros((3, 2), dtype=bool))
    assert caught.value.error_id == "E-PAIR-SHAPE"
