"""A batch of segmentations in numbers: volumes, doubts, what stands out among them, and which scans have none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.data.checks import check_label_values
from medseg.data.manifest import Case
from medseg.data.volume_io import read_label
from medseg.display import track
from medseg.errors import DataError, MedsegError, Problems
from medseg.labels import Labels
from medseg.metrics.volume import organ_volumes, volumes_by_value
from medseg.reporting.pictures import numbered_labels
from medseg.reporting.words import significant_digits

OUTLIER = 3.5
"""Robust z beyond which a value stands out (Iglewicz and Hoaglin 1993, "How to detect and handle outliers")."""

NORMAL_MAD = 0.6745
"""Median absolute deviation of the standard normal distribution."""

MIN_CASES = 5
"""With fewer, nothing can stand out."""

Told = Mapping[str, Any]
"""What the list of a batch says of a case, in the words of `medseg.reporting.prediction.COLUMNS`; besides, ``volumes`` by
organ in ``unit``, and ``claimed_at``; all as far as it is known."""


@dataclass(frozen=True)
class Measured:
    """A segmentation.

    Args:
        case: Its id.
        anchor: Its row's id in the page.
        volumes: Of each organ, in the batch's unit.
        z: How far each volume stands out among the others, see `robust_z`.
        z_uncertainty: How far its uncertainty stands out.
        told: What else is known of it.
    """

    case: str
    anchor: str
    volumes: Mapping[str, float]
    z: Mapping[str, float]
    z_uncertainty: float
    told: Told

    @property
    def uncertainty(self) -> float:
        """NaN: it is not known."""
        return number_told(self.told, "uncertainty")

    @property
    def outlying(self) -> float:
        """Of the volume that stands out most, or of the uncertainty, if it is high."""
        return max((*map(abs, self.z.values()), self.z_uncertainty), default=0.0)

    @property
    def not_found(self) -> list[str]:
        return [organ for organ, volume in self.volumes.items() if not volume]

    @property
    def note(self) -> str:
        """Whether it is unsure, every organ that is not there, and every one whose volume stands out."""
        unusual = {organ: "large" if z > 0 else "small" for organ, z in self.z.items() if abs(z) > OUTLIER}
        said = {organ: f"unusually {size}" for organ, size in unusual.items()} | dict.fromkeys(
            self.not_found, "not found"
        )
        told = ["unusually unsure"] if self.z_uncertainty > OUTLIER else []
        return "; ".join([*told, *(f"{organ}: {said[organ]}" for organ in self.volumes if organ in said)])


@dataclass(frozen=True)
class Batch:
    """All segmentations of a folder.

    Args:
        name: What the page is called.
        cases: What stands out most first, then the least sure.
        failed: By case why it could not be read.
        unread: Segmentations that nobody has measured.
        lacking: What the batch's list says of the scans that have no segmentation.
        labels: What is drawn.
        unit: Of the volumes: ml, or pixels of pictures.
        digits: By organ, that its volumes are shown with.
    """

    name: str
    cases: Sequence[Measured]
    failed: Mapping[str, MedsegError]
    unread: int
    lacking: Sequence[Told]
    labels: Labels
    unit: str
    digits: Mapping[str, int]

    @property
    def outliers(self) -> list[Measured]:
        return [case for case in self.cases if case.outlying > OUTLIER]

    @property
    def empty(self) -> list[str]:
        """Cases in which nothing was found."""
        return [case.case for case in self.cases if len(case.not_found) == len(case.volumes)]

    @property
    def mostly_absent(self) -> dict[str, int]:
        """Organs that most cases lack, and how many lack each."""
        counts = {organ: sum(not case.volumes[organ] for case in self.cases) for organ in self.labels.organ_values}
        return {organ: count for organ, count in counts.items() if 2 * count > len(self.cases)}

    @property
    def refused(self) -> list[Told]:
        """Scans that could not be segmented; first those that ended their processes, then equal faults together."""
        told = [told for told in self.lacking if told["state"] in ("failed", "quarantined")]
        return sorted(told, key=lambda told: (told["state"] != "quarantined", told["error_id"]))


def measure_batch(
    predictions: Sequence[Case],
    name: str,
    labels: Labels | None,
    told: Mapping[str, Told],
    *,
    most_read: int | None = None,
) -> Batch:
    """Measure segmentations, and rank them.

    Args:
        predictions: The label maps; each stands where a scan's image does.
        name: What the page is called.
        labels: What the values mean; None: each is called after its number.
        told: By case what the list of the batch says. Volumes that it tells are not measured again.
        most_read: How many label maps may be read; None: all that must.

    Raises:
        Problems: If no label map can be read, and no list tells of anything else.
        DataError: If one holds what the labels do not declare.
    """
    known = {case.id: dict(told[case.id]["volumes"]) for case in predictions if told.get(case.id, {}).get("volumes")}
    units = {told[case]["unit"] for case in known}
    to_read = [case for case in predictions if case.id not in known]
    found: dict[str, dict[int, float]] = {}
    failed: dict[str, MedsegError] = {}
    for case in track(to_read[:most_read], "measuring"):
        try:
            found[case.id], unit = volumes_by_value(read_label(case.images[0]))
        except MedsegError as error:
            failed[case.id] = error
        except OSError as error:
            message = f"cannot be read ({error.strerror or error})"
            failed[case.id] = DataError("E-FILE", message, where=str(case.images[0]))
        else:
            units.add(unit)
    lacking = [row for row in told.values() if row["state"] != "done"]
    if not (found or known or lacking):
        raise Problems(list(failed.values()))
    labels = labels or numbered_labels(value for by_value in found.values() for value in by_value)
    for case in to_read:
        check_label_values(np.array(list(found.get(case.id, ())), dtype=np.int64), labels, str(case.images[0]))
    known |= {case: organ_volumes(by_value, labels) for case, by_value in found.items()}
    volumes = {case.id: known[case.id] for case in predictions if case.id in known}
    digits = {
        organ: significant_digits([of[organ] for of in volumes.values()]) if "ml" in units else 0
        for organ in labels.organ_values
    }
    unread = len(to_read) - len(found) - len(failed)
    unit = " and ".join(sorted(units))
    return Batch(name, _ranked(volumes, labels, told), failed, unread, lacking, labels, unit, digits)


def robust_z(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Distance from the median in units of a typical deviation, which a few wild values do not move.

    The typical deviation is the median absolute one, as large as the standard deviation for normal data; where more
    than half of the values are equal, the mean absolute one takes its place.

    Args:
        values: (n,).

    Returns:
        (n,), 0 where all values are equal.

    Reference:
        Iglewicz and Hoaglin 1993, "How to detect and handle outliers".
    """
    deviations = values - np.median(values)
    spread = np.median(np.abs(deviations)) / NORMAL_MAD
    if not spread:
        spread = np.abs(deviations).mean() * math.sqrt(math.pi / 2)  # normal data's too
    return deviations / spread if spread else np.zeros_like(deviations)


def number_told(told: Told, name: str) -> float:
    """A number; NaN where it is not known."""
    value = told.get(name)
    return math.nan if value is None else float(value)


def busy_seconds(told: Sequence[Told]) -> float:
    """How long a batch was worked at, breaks left out: in how many seconds at least one of its cases was in hand.

    Args:
        told: What is known of its cases; those without ``claimed_at`` and ``seconds`` do not count.
    """
    spans = sorted(
        (row["claimed_at"], row["claimed_at"] + row["seconds"])
        for row in told
        if row.get("claimed_at") and row.get("seconds") is not None
    )
    busy, until = 0.0, -math.inf
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy


def _ranked(volumes: Mapping[str, Mapping[str, float]], labels: Labels, told: Mapping[str, Told]) -> list[Measured]:
    """What stands out most first; of the others the least sure, and where that is not known, what lacks most organs."""
    z = {organ: _z_of(np.array([found[organ] for found in volumes.values()])) for organ in labels.organ_values}
    doubts = np.array([number_told(told.get(case, {}), "uncertainty") for case in volumes])
    z_doubts = np.zeros(len(doubts))
    if np.isfinite(doubts).sum() >= MIN_CASES:
        z_doubts[np.isfinite(doubts)] = robust_z(doubts[np.isfinite(doubts)]).clip(min=0)
    cases = [
        Measured(
            case, f"case-{n}", found, {organ: float(z[organ][n]) for organ in z}, float(z_doubts[n]), told.get(case, {})
        )
        for n, (case, found) in enumerate(volumes.items())
    ]
    return sorted(cases, key=_place)


def _place(case: Measured) -> tuple[float, float, float, int]:
    stands_out = case.outlying if case.outlying > OUTLIER else 0.0
    doubt = 0.0 if math.isnan(case.uncertainty) else case.uncertainty
    return -stands_out, -doubt, -case.outlying, -len(case.not_found)


def _z_of(volumes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Robust z of an organ's volumes; where most cases lack it, its absence is the rule, and only the others compare."""
    compared = volumes > 0 if 2 * np.count_nonzero(volumes) < len(volumes) else np.ones(len(volumes), bool)
    z = np.zeros(len(volumes))
    if np.count_nonzero(compared) >= MIN_CASES:
        z[compared] = robust_z(volumes[compared])
    return z
