from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medseg.data.intensity import RunningStatistics, normalize_
from medseg.errors import DataError
from medseg.model import Intensity

HU = np.array([[-1000.0, -175, 0], [50, 250, 3000]], np.float32)[..., None]


def normalized(intensity: Intensity, values: np.ndarray = HU) -> np.ndarray:
    channel = torch.from_numpy(values.copy())
    normalize_(channel, intensity)
    return channel.numpy()


def test_each_way_to_normalize_gives_what_numpy_gives() -> None:
    clipped = HU.clip(-175, 250)
    clip = (-175.0, 250.0)
    np.testing.assert_array_equal(normalized(Intensity(None, "none")), HU)
    np.testing.assert_array_equal(normalized(Intensity(clip, "none")), clipped)
    np.testing.assert_allclose(normalized(Intensity(None, "zscore")), (HU - HU.mean()) / HU.std(), rtol=1e-6)
    zscore = (clipped - clipped.mean()) / clipped.std()
    np.testing.assert_allclose(normalized(Intensity(clip, "zscore")), zscore, rtol=1e-5)
    np.testing.assert_allclose(normalized(Intensity(None, "minmax")), (HU + 1000) / 4000, rtol=1e-6)
    np.testing.assert_allclose(normalized(Intensity(clip, "foreground", 80.0, 40.0)), (clipped - 80) / 40, rtol=1e-6)


def test_minmax_with_a_clip_maps_the_clip_even_where_the_scan_does_not_reach_it() -> None:
    values = np.array([[0.0, 50.0]], np.float32)
    np.testing.assert_allclose(normalized(Intensity((-100, 100), "minmax"), values), [[0.5, 0.75]])


@pytest.mark.parametrize("normalize", ["zscore", "minmax"])
def test_a_constant_channel_becomes_zero(normalize: str) -> None:
    result = normalized(Intensity(None, normalize), np.full((2, 2, 2), 7, np.float32))  # type: ignore[arg-type]
    np.testing.assert_array_equal(result, np.zeros((2, 2, 2)))


def test_foreground_without_its_numbers_is_refused() -> None:
    with pytest.raises(DataError, match="E-INTENSITY"):
        normalized(Intensity(None, "foreground"))


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    values = (np.random.default_rng(0).normal(size=1000) * 50 + 1e6).astype(np.float32)
    running = RunningStatistics()
    for part in np.split(values, [1, 1, 10, 500]):  # the second is empty
        running.add(part)
    assert running.count == 1000
    assert running.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-12)
    assert running.std == pytest.approx(values.std(dtype=np.float64), rel=1e-9)


def test_statistics_are_of_clipped_values() -> None:
    running = RunningStatistics((-175, 250))
    running.add(HU.astype(np.int16))
    assert running.mean == pytest.approx(HU.clip(-175, 250).mean())
    assert running.std == pytest.approx(HU.clip(-175, 250).std())


def test_statistics_of_nothing_are_no_number() -> None:
    assert math.isnan(RunningStatistics().std)
