"""What a sample of patients says about all of them: intervals, paired tests, effect sizes and agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

Array = npt.NDArray[np.float64]
Values = npt.ArrayLike
Patients = Sequence[str] | None
Interval = tuple[float, float]

NUM_RESAMPLES = 5000
"""Bootstrap resamples behind an interval."""

TIE = 1e-6
"""Values closer than this are equal: the tables have six decimals."""

MIN_PATIENTS = 6
"""With fewer, no outcome of a two-sided signed-rank test has p < 0.05: the smallest is 2 / 2**n."""

MAX_EXACT = 200
"""Up to so many differences p is exact; beyond, the normal approximation agrees in three digits."""

_BLOCK = 1 << 21
_DECIMALS = 9  # 0.9 - 0.8 and 0.8 - 0.7 are a tie


def bootstrap_ci(
    values: Values, *, patients: Patients = None, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Where the mean lies, with 95 % confidence.

    Patients are resampled, not values: two scans of one patient tell less than one each of two. The plain
    percentile interval is too narrow for few patients; its percentiles are widened as a t interval would be.

    Args:
        values: (N,), or (N, M) with a column an organ, of which the mean of the columns' means is taken; NaN is
            left out.
        patients: Whose each row is; None: each another's.
        seed: Of the resampling.
        num_resamples: How many samples are drawn.

    Returns:
        Low and high end; NaN for fewer than two patients.

    Reference:
        Hesterberg 2015, doi:10.1080/00031305.2015.1089789 (the expanded percentile interval).
    """
    means, num_patients = resampled_means(values, patients=patients, seed=seed, num_resamples=num_resamples)
    return interval(mean_of_known(means, 1), num_patients)


def resampled_means(
    values: Values, *, patients: Patients = None, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> tuple[Array, int]:
    """The means of samples of patients, drawn with replacement.

    Args:
        values: (N,) or (N, M); NaN is left out. All columns are of the same samples, so that they can be compared.
        patients: Whose each row is; None: each another's.
        seed: Of the resampling.
        num_resamples: How many samples are drawn.

    Returns:
        Means (num_resamples, M), NaN where a sample has no value of a column; and how many patients have a value.
    """
    rows, owners = _known_rows(values, patients)
    num_patients = int(owners.max()) + 1 if len(owners) else 0
    sums, counts = (np.zeros((num_patients, rows.shape[1])) for _ in range(2))
    np.add.at(sums, owners, np.nan_to_num(rows))
    np.add.at(counts, owners, ~np.isnan(rows))
    means = np.full((num_resamples, rows.shape[1]), np.nan)
    random, block = np.random.default_rng(seed), max(1, _BLOCK // max(num_patients, 1))
    for start in range(0, num_resamples if num_patients else 0, block):
        size = min(block, num_resamples - start)
        drawn = random.integers(num_patients, size=(size, num_patients))
        drawn += num_patients * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * num_patients).reshape(size, num_patients).astype(float)
        total = times @ counts
        np.divide(times @ sums, total, out=means[start : start + size], where=total > 0)
    return means, num_patients


def interval(means: Array, num_patients: int) -> Interval:
    """The middle 95 % of resampled means (R,), widened for few patients; see `bootstrap_ci`."""
    if num_patients < 2:
        return math.nan, math.nan
    widened = math.sqrt(num_patients / (num_patients - 1)) * stdtrit(num_patients - 1, 0.975)
    tail = float(ndtr(-widened))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def wilcoxon(differences: Values, *, patients: Patients = None) -> float:
    """Two-sided p of the signed-rank test: how often chance alone would favor one side as clearly as this.

    Differences of zero (within `TIE`) are dropped, as by Wilcoxon. The distribution is exact, ties included, for up to
    `MAX_EXACT` differences; beyond, it is the normal one with corrections for ties and continuity.

    Args:
        differences: (N,), one a pair; NaN is left out.
        patients: Whose each is: a patient's differences are averaged first, as the test needs independent ones.

    Returns:
        p; 1 if nothing differs; NaN for fewer than `MIN_PATIENTS` patients, as it could not be below 0.05.

    Reference:
        Wilcoxon 1945, doi:10.2307/3001968.
    """
    per_patient = patient_means(differences, patients)
    if len(per_patient) < MIN_PATIENTS:
        return math.nan
    ranks, positive = _doubled_ranks(per_patient)
    found, total = int(ranks[positive].sum()), int(ranks.sum())
    extreme = max(found, total - found)
    if len(ranks) > MAX_EXACT:
        z = (extreme - total / 2 - 1) / math.sqrt(
            float((ranks.astype(float) ** 2).sum()) / 4
        )  # 1: half a rank, doubled
        return math.erfc(max(z, 0.0) / math.sqrt(2))
    return min(1.0, 2 * float(_null_distribution(ranks)[extreme:].sum()))


def holm(p_values: Values) -> Array:
    """The p values (N,) corrected so that among all of them a chance finding below 0.05 is as rare as one in twenty.

    NaN stays NaN and does not count as a test.

    Reference:
        Holm 1979, https://www.jstor.org/stable/4615733.
    """
    p = np.asarray(p_values, float)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted


def rank_biserial(differences: Values, *, patients: Patients = None) -> float:
    """Matched-pairs rank-biserial correlation: the effect size that belongs to `wilcoxon`.

    Args:
        differences: (N,), one a pair; NaN is left out, and zeros count for neither side.
        patients: Whose each is: a patient's differences are averaged first.

    Returns:
        From -1 (every difference is negative) to 1 (every one positive); 0 if nothing differs, NaN without a pair.

    Reference:
        Kerby 2014, doi:10.2466/11.IT.3.1.
    """
    per_patient = patient_means(differences, patients)
    if not len(per_patient):
        return math.nan
    ranks, positive = _doubled_ranks(per_patient)
    return float(ranks[positive].sum() - ranks[~positive].sum()) / float(ranks.sum()) if len(ranks) else 0.0


def bland_altman(reference: Values, prediction: Values) -> tuple[float, Interval]:
    """How far measurements lie apart.

    Args:
        reference: (N,), e.g. volumes in ml; NaN in either leaves the pair out.
        prediction: (N,), of the same scans.

    Returns:
        Bias (the mean of prediction − reference), and the limits of agreement, bias ± 1.96 standard deviations: 95 %
        of normally distributed differences lie between them. NaN where there are too few pairs.

    Reference:
        Bland and Altman 1986, doi:10.1016/S0140-6736(86)90837-8.
    """
    differences = np.asarray(prediction, float) - np.asarray(reference, float)
    differences = differences[~np.isnan(differences)]
    bias = float(differences.mean()) if len(differences) else math.nan
    spread = 1.96 * float(differences.std(ddof=1)) if len(differences) > 1 else math.nan
    return bias, (bias - spread, bias + spread)


def patient_means(values: Values, patients: Patients = None) -> Array:
    """One mean a patient of values (N,), NaN left out."""
    rows, owners = _known_rows(values, patients)
    return np.bincount(owners, weights=rows[:, 0]) / np.bincount(owners) if len(owners) else np.empty(0)


def mean_of_known(values: Values, axis: int = 0) -> Array:
    """The mean along an axis, NaN left out, and NaN where there is nothing else."""
    found = np.asarray(values, float)
    count = (~np.isnan(found)).sum(axis=axis)
    total = np.nansum(found, axis=axis)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _known_rows(values: Values, patients: Patients) -> tuple[Array, npt.NDArray[np.intp]]:
    """The rows (N, M) that have a value, and the number of the patient that each belongs to."""
    rows = np.asarray(values, float)
    rows = rows[:, None] if rows.ndim == 1 else rows
    known = ~np.isnan(rows).all(axis=1)
    owners = np.arange(len(rows))[known] if patients is None else np.asarray(patients, str)[known]
    number = {patient: i for i, patient in enumerate(dict.fromkeys(owners.tolist()))}
    return rows[known], np.array([number[patient] for patient in owners.tolist()], np.intp)


def _doubled_ranks(differences: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Twice the ranks by size of what is not zero, which are whole numbers whatever is tied; and which are positive."""
    nonzero = differences[np.abs(differences) > TIE]
    _, place, counts = np.unique(np.round(np.abs(nonzero), _DECIMALS), return_inverse=True, return_counts=True)
    return (2 * np.cumsum(counts) - counts + 1)[place].astype(np.int64), nonzero > 0


def _null_distribution(ranks: npt.NDArray[np.int64]) -> Array:
    """Probability of each sum of the positive ranks where every sign is a coin's."""
    chances = np.zeros(int(ranks.sum()) + 1)
    chances[0] = 1
    for rank in ranks:
        chances /= 2
        chances[rank:] += chances[: len(chances) - rank].copy()
    return chances
