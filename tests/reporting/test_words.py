"""Metrics in words: every one has its own, and a number in its name is told."""

from __future__ import annotations

import math

import pytest

from medseg.metrics import METRICS
from medseg.reporting.words import digits_for, is_score, plain_words, short_name


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_a_name_and_a_sentence_that_begins_with_it(metric: str) -> None:
    name, sentence = short_name(metric), plain_words(metric)
    assert sentence.endswith(".")
    assert "{" not in name + sentence
    assert sentence.lower().startswith(name.partition(" (")[0].lower())
    units = [unit for unit in ("mm", "ml") if f"({unit})" in name]
    assert units == (["mm"] if METRICS[metric].is_distance else ["ml"] if metric.endswith("_ml") else [])
    assert all(unit in sentence for unit in units)


@pytest.mark.parametrize(
    ("metric", "name", "told"),
    [
        ("nsd", "surface Dice", "within 1 mm of"),
        ("nsd:2", "surface Dice at 2 mm", "within 2 mm of"),
        ("nsd:0.50", "surface Dice at 0.5 mm", "within 0.5 mm of"),
        ("lesion_f1", "lesion F1", "be it in one voxel"),
        ("lesion_f1:0.1", "lesion F1 at IoU 0.1", "with an IoU above 0.1"),
    ],
)
def test_a_number_in_the_name_is_told(metric: str, name: str, told: str) -> None:
    assert short_name(metric) == name
    assert told in plain_words(metric)


@pytest.mark.parametrize("metric", ["my_score", "dice:2", "nsd:x"])
def test_what_is_no_metric_keeps_its_name_and_has_no_words(metric: str) -> None:
    assert (short_name(metric), plain_words(metric), is_score(metric)) == (metric, "", False)


@pytest.mark.parametrize(
    ("metric", "values", "digits"),
    [
        ("dice", [0.9, 0.95], 3),
        ("hd95", [1.234, math.nan, 1.5], 2),
        ("volume_ml", [1480.0, 1520.0, 0.0], 0),
        ("volume_ml", [38.2, 41.0], 1),
        ("volume_difference_ml", [-0.0123, 0.02], 3),
        ("hd", [math.nan], 1),
    ],
)
def test_numbers_are_shown_with_three_digits(metric: str, values: list[float], digits: int) -> None:
    assert digits_for(metric, values) == digits
