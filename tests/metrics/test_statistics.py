from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from medseg.metrics.statistics import (
    MAX_EXACT,
    bland_altman,
    bootstrap_ci,
    holm,
    patient_means,
    rank_biserial,
    wilcoxon,
)


@pytest.mark.parametrize("n", [6, 7, 20, 50, 120])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_wilcoxon_is_scipys_exact_one_where_nothing_is_tied(n: int, shift: float) -> None:
    differences = np.random.default_rng(n).normal(shift, 1, n)
    assert wilcoxon(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_wilcoxon_is_exact_with_ties_and_zeros_too(seed: int) -> None:
    differences = np.random.default_rng(seed).integers(-3, 5, 12) / 10
    nonzero = differences[differences != 0]
    ranks = stats.rankdata(np.abs(nonzero))
    found = ranks[nonzero > 0].sum()
    all_sums = np.array([ranks[np.array(signs)].sum() for signs in product([False, True], repeat=len(ranks))])
    expected = min(1, 2 * min((all_sums >= found).mean(), (all_sums <= found).mean()))
    assert wilcoxon(differences) == pytest.approx(expected, rel=1e-12)


def test_wilcoxon_of_many_is_scipys_normal_approximation() -> None:
    differences = np.round(np.random.default_rng(0).normal(0.1, 1, MAX_EXACT + 100), 1)
    differences = differences[differences != 0]
    assert len(differences) > MAX_EXACT
    expected = stats.wilcoxon(differences, correction=True, method="asymptotic").pvalue
    assert wilcoxon(differences) == pytest.approx(expected, rel=1e-9)


def test_exact_and_approximate_p_meet_where_one_gives_way_to_the_other() -> None:
    differences = np.random.default_rng(1).normal(0.1, 1, MAX_EXACT)
    assert wilcoxon(differences) == pytest.approx(
        stats.wilcoxon(differences, correction=True, method="asymptotic").pvalue, abs=1e-3
    )


def test_differences_that_only_rounding_tells_apart_are_tied() -> None:
    differences = [0.9 - 0.8, 0.8 - 0.7, 0.3 - 0.4, 0.2, 0.3, 0.4, 0.5, -0.6]
    assert wilcoxon(differences) == wilcoxon([1, 1, -1, 2, 3, 4, 5, -6])


def test_five_patients_are_too_few_for_a_test_and_six_are_not() -> None:
    assert math.isnan(wilcoxon([1, 2, 3, 4, 5]))
    assert wilcoxon([1, 2, 3, 4, 5, 6]) == pytest.approx(2 / 2**6)
    assert math.isnan(wilcoxon([1, 2, 3, 4, 5, 6], patients=list("aabcde")))


def test_nothing_speaks_against_chance_where_nothing_differs() -> None:
    assert wilcoxon([0.0] * 10) == 1
    assert rank_biserial([0.0] * 10) == 0


def test_scans_of_one_patient_count_as_one() -> None:
    differences = [0.1, 0.3, -0.1, 0.5, 0.6, 0.7, 0.8, math.nan]
    assert list(patient_means(differences, list("aabcdefg"))) == pytest.approx([0.2, -0.1, 0.5, 0.6, 0.7, 0.8])
    assert wilcoxon(differences, patients=list("aabcdefg")) == wilcoxon([0.2, -0.1, 0.5, 0.6, 0.7, 0.8])


def test_holm_by_hand() -> None:
    assert list(holm([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert list(holm([0.6, 0.7])) == [1, 1]
    assert list(holm([])) == []


def test_holm_does_not_count_what_was_not_tested() -> None:
    assert list(holm([math.nan, 0.01, 0.04])) == pytest.approx([math.nan, 0.02, 0.04], nan_ok=True)


def test_rank_biserial_by_hand() -> None:
    # Ranks of 1, 2, 3, 4 with one zero dropped: positive 1 + 3 + 4, negative 2.
    assert rank_biserial([1, -2, 3, 4, 0]) == pytest.approx((8 - 2) / 10)
    assert rank_biserial([-1, -2]) == -1
    assert math.isnan(rank_biserial([]))


def test_rank_biserial_is_what_scipys_statistics_say() -> None:
    differences = np.random.default_rng(3).normal(0.2, 1, 30)
    more = stats.wilcoxon(differences, alternative="greater").statistic
    total = 30 * 31 / 2
    assert rank_biserial(differences) == pytest.approx((more - (total - more)) / total)


def test_bland_altman_by_hand() -> None:
    bias, (low, high) = bland_altman([10, 20, 30, math.nan], [11, 19, 33, 5])
    assert bias == pytest.approx(1)
    assert (low, high) == pytest.approx((1 - 1.96 * 2, 1 + 1.96 * 2))  # differences 1, -1, 3: SD 2
    bias, limits = bland_altman([1], [2])
    assert bias == 1
    assert all(map(math.isnan, limits))


def test_the_interval_is_near_students_for_normal_differences() -> None:
    values = np.random.default_rng(0).normal(0.1, 1, 30)
    t = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
    assert bootstrap_ci(values, num_resamples=50_000) == pytest.approx(t, abs=0.03)


def test_the_interval_is_hesterbergs_percentiles_of_plain_resampling() -> None:
    values = np.random.default_rng(0).gamma(2, 1, 15)
    drawn = np.random.default_rng(9).integers(15, size=(200_000, 15))
    tail = stats.norm.cdf(-math.sqrt(15 / 14) * stats.t.ppf(0.975, 14))
    expected = np.quantile(values[drawn].mean(axis=1), [tail, 1 - tail])
    assert bootstrap_ci(values, num_resamples=200_000) == pytest.approx(tuple(expected), abs=0.02)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(0, 1, 10)
    assert bootstrap_ci(values) == bootstrap_ci(list(values), patients=list("abcdefghij"))
    assert bootstrap_ci(values) != bootstrap_ci(values, seed=1)


def test_scans_of_the_same_patients_tell_less_than_scans_of_others() -> None:
    per_patient = np.random.default_rng(5).normal(0, 1, 12)
    values, patients = np.repeat(per_patient, 4), np.repeat([f"p{i}" for i in range(12)], 4)
    low, high = bootstrap_ci(values, patients=list(patients))
    naive_low, naive_high = bootstrap_ci(values)
    assert (high - low) / (naive_high - naive_low) == pytest.approx(2, rel=0.25)  # four scans for one: √4
    assert (low, high) == pytest.approx(bootstrap_ci(per_patient), abs=1e-9)


def test_the_mean_of_organs_is_resampled_as_a_whole() -> None:
    organs = np.random.default_rng(2).normal(0, 1, (20, 3))
    assert bootstrap_ci(organs) == pytest.approx(bootstrap_ci(organs.mean(axis=1)), abs=1e-9)
    organs[4:, 2] = math.nan  # an organ that few cases have weighs as much as another
    low, high = bootstrap_ci(organs)
    assert low < np.nanmean(organs, axis=0).mean() < high


def test_one_patient_has_no_interval() -> None:
    for values, patients in (([], None), ([1.0], None), ([math.nan, 2.0], None), ([1.0, 2.0], ["a", "a"])):
        assert all(map(math.isnan, bootstrap_ci(values, patients=patients)))


@pytest.mark.parametrize("n", [10, 20, 44])
@pytest.mark.parametrize("noise", ["normal", "skewed"])
def test_nineteen_of_twenty_intervals_hold_the_truth(n: int, noise: str) -> None:
    random = np.random.default_rng(n)
    samples = random.normal(0, 1, (600, n)) if noise == "normal" else random.exponential(1, (600, n)) - 1
    intervals = [bootstrap_ci(sample, num_resamples=1000) for sample in samples]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    print(f"{noise}, {n} patients: {covered:.3f}")
    assert (0.93 if noise == "normal" else 0.885) < covered < 0.975


def test_the_interval_by_patient_holds_the_truth_where_patients_were_scanned_more_than_once() -> None:
    random = np.random.default_rng(0)
    patients = [f"p{i}" for i in range(20) for _ in range(1 + i % 3)]
    covered = {"patients": 0, "scans": 0}
    for _ in range(400):
        effect = dict(zip(dict.fromkeys(patients), random.normal(0, 1, 20), strict=True))
        values = [effect[patient] + random.normal(0, 0.3) for patient in patients]
        for name, given in (("patients", patients), ("scans", None)):
            low, high = bootstrap_ci(values, patients=given, num_resamples=1000)
            covered[name] += low <= 0 <= high
    print({name: count / 400 for name, count in covered.items()})
    assert 0.92 < covered["patients"] / 400 < 0.98
    assert covered["scans"] / 400 < 0.9


def test_two_runs_of_the_same_quality_differ_significantly_as_often_as_promised() -> None:
    """A thousand pairs of runs: 20 cases, 5 organs whose noise goes together, as a badly segmented scan's does."""
    random = np.random.default_rng(0)
    covariance = 0.5 + 0.5 * np.eye(5)
    raw, corrected = [], []
    for _ in range(1000):
        difficulty = random.normal(0.85, 0.05, (20, 5))
        runs = [difficulty + 0.02 * random.multivariate_normal(np.zeros(5), covariance, 20) for _ in range(2)]
        differences = np.round(runs[1], 6) - np.round(runs[0], 6)
        p = [wilcoxon(organ) for organ in differences.T]
        raw.append(np.mean(np.array(p) < 0.05))
        corrected.append((holm(p) < 0.05).any())
    print(f"raw p < 0.05: {np.mean(raw):.4f}; any organ by Holm: {np.mean(corrected):.4f}")
    assert 0.035 <= np.mean(raw) <= 0.065
    assert np.mean(corrected) <= 0.065
