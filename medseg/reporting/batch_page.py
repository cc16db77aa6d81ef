"""The page of segmentations that nobody has drawn references for: their volumes, what stands out, and what it looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.data.checks import check_label_values
from medseg.data.manifest import Case
from medseg.data.volume_io import read_label
from medseg.display import track
from medseg.errors import DataError, MedsegError, Problems
from medseg.files import write_atomically
from medseg.labels import Labels
from medseg.model import Preprocessing
from medseg.reporting.figures import organs_figure
from medseg.reporting.page import asset, figure_svg, html_page, section
from medseg.reporting.pictures import (
    Missing,
    load_scenes,
    missing_notice,
    numbered_labels,
    picture_anchors,
    pictures_section,
)
from medseg.reporting.scene import CaseFiles, Scene
from medseg.reporting.tables import Column, number, sortable_table
from medseg.reporting.viewer import Shown, inline_script, viewer_section
from medseg.reporting.words import significant_digits
from medseg.wording import counted, listed

NUM_PICTURES = 6
NUM_IN_VIEWER = 2
MAX_TILES = 6
OUTLIER = 3.5
"""Robust z beyond which a volume stands out (Iglewicz and Hoaglin 1993, "How to detect and handle outliers")."""

NORMAL_MAD = 0.6745
"""Median absolute deviation of the standard normal distribution."""

MIN_CASES = 5
"""With fewer, no volume can stand out."""

LIMITS = (
    "For research only: not a medical device, and no ground for a decision about a patient. Nobody has drawn references "
    "for these scans, so this page cannot say how good the segmentations are. A volume that stands out may be a "
    "fault or a patient’s own; one that does not may be wrong all the same."
)


@dataclass(frozen=True)
class Measured:
    """A segmentation.

    Args:
        case: Its id.
        anchor: Its row's id in the page.
        volumes: Of each organ, in the batch's unit.
        z: How far each volume stands out among the others, see `robust_z`.
    """

    case: str
    anchor: str
    volumes: Mapping[str, float]
    z: Mapping[str, float]

    @property
    def outlying(self) -> float:
        """Of the organ that stands out most."""
        return max((abs(z) for z in self.z.values()), default=0.0)

    @property
    def not_found(self) -> list[str]:
        return [organ for organ, volume in self.volumes.items() if not volume]

    @property
    def note(self) -> str:
        """Every organ that is not there, and every one whose volume stands out."""
        unusual = {organ: "large" if z > 0 else "small" for organ, z in self.z.items() if abs(z) > OUTLIER}
        said = {organ: f"unusually {size}" for organ, size in unusual.items()} | dict.fromkeys(
            self.not_found, "not found"
        )
        return "; ".join(f"{organ}: {said[organ]}" for organ in self.volumes if organ in said)


@dataclass(frozen=True)
class Batch:
    """All segmentations of a folder.

    Args:
        name: What the page is called.
        cases: What stands out most first.
        failed: By case why it could not be read.
        labels: What is drawn.
        unit: Of the volumes: ml, or pixels of pictures.
        digits: By organ, that its volumes are shown with.
    """

    name: str
    cases: Sequence[Measured]
    failed: Mapping[str, MedsegError]
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


def write_batch_page(
    predictions: Sequence[Case],
    output: Path,
    *,
    name: str,
    scans: Mapping[str, Case],
    labels: Labels | None,
    preprocessing: Preprocessing,
) -> dict[str, Any]:
    """Make the page of a folder of segmentations.

    Args:
        predictions: The label maps; each stands where a scan's image does.
        output: The file to write.
        name: What the page is called.
        scans: By case the scans that were segmented, as far as they are known.
        labels: What the values mean; None: each is called after its number.
        preprocessing: Says how to read the scans.

    Returns:
        ``cases``, ``outliers``, ``pictures`` and ``viewer_cases``: how many of each are in it; ``mostly_absent``: the
        organs that most cases lack, and how many lack each; ``failed``: what could not be read.

    Raises:
        Problems: If no label map can be read.
        DataError: If one holds what the labels do not declare.
    """
    batch = _measure(predictions, name, labels)
    files = {
        case.id: CaseFiles(case.id, scans[case.id].images, None, case.images[0])
        for case in predictions
        if case.id in scans
    }
    wanted = dict.fromkeys(case.case for case in [*batch.cases[: NUM_PICTURES - 1], batch.cases[-1]])
    scenes, missing = load_scenes(
        wanted if scans else (), files, preprocessing, batch.labels, unknown="no scan is called like them"
    )
    volumes = [scene for scene in scenes.values() if scene.image.ndim == 3][:NUM_IN_VIEWER]
    parts = [
        _opening(batch),
        _spread(batch),
        viewer_section(
            [Shown(scene, scene.case) for scene in volumes],
            batch.labels,
            explanation="The most unusual ones." if len(batch.cases) >= MIN_CASES else "",
        ),
        _pictures(batch, scenes, missing),
        _table(batch, picture_anchors(scenes)),
        f"<footer><p>{LIMITS}</p></footer>",
        f"<script>{inline_script(asset('page.js'))}</script>",
    ]
    write_atomically(output, html_page(f"{name}: report", "\n".join(part for part in parts if part)).encode())
    return {
        "cases": len(batch.cases),
        "outliers": len(batch.outliers),
        "mostly_absent": batch.mostly_absent,
        "pictures": len(scenes),
        "viewer_cases": len(volumes),
        "failed": [{"case": c, "error_id": e.error_id, "message": str(e)} for c, e in batch.failed.items()],
    }


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


def _measure(predictions: Sequence[Case], name: str, labels: Labels | None) -> Batch:
    counts: dict[str, dict[int, float]] = {}
    failed: dict[str, MedsegError] = {}
    units = set()
    for case in track(predictions, "measuring"):
        try:
            counts[case.id], unit = _volumes_by_value(case.images[0])
        except MedsegError as error:
            failed[case.id] = error
        except OSError as error:
            message = f"cannot be read ({error.strerror or error})"
            failed[case.id] = DataError("E-FILE", message, where=str(case.images[0]))
        else:
            units.add(unit)
    if not counts:
        raise Problems(list(failed.values()))
    labels = labels or numbered_labels(value for found in counts.values() for value in found)
    for case in predictions:
        check_label_values(np.array(list(counts.get(case.id, ())), dtype=np.int64), labels, str(case.images[0]))
    volumes = {
        case: {organ: sum(found.get(value, 0.0) for value in values) for organ, values in labels.organ_values.items()}
        for case, found in counts.items()
    }
    digits = {
        organ: significant_digits([found[organ] for found in volumes.values()]) if "ml" in units else 0
        for organ in labels.organ_values
    }
    return Batch(name, _ranked(volumes, labels), failed, labels, " and ".join(sorted(units)), digits)


def _volumes_by_value(path: Path) -> tuple[dict[int, float], str]:
    """In ml, or in pixels where a picture says nothing of its size; and which of them."""
    label = read_label(path)
    values, counts = np.unique(label.array, return_counts=True)
    is_volume = label.geometry.spatial_dims == 3
    size, unit = (label.geometry.voxel_ml, "ml") if is_volume else (1.0, "pixels")
    return {int(value): float(count * size) for value, count in zip(values, counts, strict=True)}, unit


def _ranked(volumes: Mapping[str, Mapping[str, float]], labels: Labels) -> list[Measured]:
    """What stands out most first, and of the others what lacks most organs."""
    z = {organ: _z_of(np.array([found[organ] for found in volumes.values()])) for organ in labels.organ_values}
    cases = [
        Measured(case, f"case-{n}", found, {organ: float(z[organ][n]) for organ in z})
        for n, (case, found) in enumerate(volumes.items())
    ]
    return sorted(cases, key=lambda case: (-case.outlying, -len(case.not_found)))


def _z_of(volumes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Robust z of an organ's volumes; where most cases lack it, its absence is the rule, and only the others compare."""
    compared = volumes > 0 if 2 * np.count_nonzero(volumes) < len(volumes) else np.ones(len(volumes), bool)
    z = np.zeros(len(volumes))
    if np.count_nonzero(compared) >= MIN_CASES:
        z[compared] = robust_z(volumes[compared])
    return z


def _opening(batch: Batch) -> str:
    tiles = []
    for organ in list(batch.labels.organ_values)[:MAX_TILES]:
        found = np.array([case.volumes[organ] for case in batch.cases])
        middle, low, high = (number(ml, batch.digits[organ]) for ml in np.percentile(found, [50, 25, 75]))
        absent = f"<br>not found in {int((found == 0).sum())} of {len(found)}" if (found == 0).any() else ""
        tiles.append(
            f'<div class="tile"><dt>{escape(organ)}</dt><dd><div class="number">{middle}</div>'
            f'<div class="detail">{batch.unit}, median; middle half {low} to {high}{absent}</div></dd></div>'
        )
    return (
        '<header><p class="eyebrow">medseg report · segmentations without references · for research only</p>'
        f'<h1>{escape(batch.name)}</h1><p class="lede">{counted(len(batch.cases), "scan")} segmented. '
        f"{_verdict(batch)}</p>{_findings(batch)}"
        f'<dl class="tiles">{"".join(tiles)}</dl></header>'
    )


def _verdict(batch: Batch) -> str:
    if len(batch.cases) < MIN_CASES:
        return f"That is too few to say which volumes are unusual; it takes {MIN_CASES}."
    if count := len(batch.outliers):
        number_of = f"{count} of them have" if count > 1 else "One of them has"
        return f"<b>{number_of} a volume that stands out</b> and should be looked at first."
    return "No volume stands out among the others."


def _findings(batch: Batch) -> str:
    """What is wrong with the batch as a whole, and what is not in it."""
    total = len(batch.cases)
    told = []
    for organ, count in batch.mostly_absent.items():
        where = "in none of the scans" if count == total else f"in only {total - count} of {total} scans"
        told.append(f"<b>{escape(organ)} was found {where}.</b>")
    if batch.mostly_absent:
        told.append("Do the scans show it, was the network trained for it, and are these the right labels?")
    if batch.empty:
        told.append(f"<b>Nothing at all was found in {len(batch.empty)} of {total}:</b> {escape(listed(batch.empty))}.")
    notices = [" ".join(told)] if told else []
    if batch.failed:
        reasons = "; ".join(f"{escape(c)}: {e.error_id} {escape(e.message)}" for c, e in batch.failed.items())
        files = counted(len(batch.failed), "file")
        notices.append(f"<b>Not readable: {files}</b>, not in these numbers. {reasons}")
    return "".join(f'<p class="notice">{notice}</p>' for notice in notices)


def _spread(batch: Batch) -> str:
    values = {
        organ: [(case.anchor, case.volumes[organ]) for case in batch.cases] for organ in batch.labels.organ_values
    }
    figure = organs_figure(values, across=f"volume ({batch.unit})", limits=None)
    return section(
        "Volumes, organ by organ",
        f'<figure class="figure">{figure_svg(figure, "Volume of each organ, a dot for each case")}</figure>',
        explanation="Each dot is a case, and leads to its row in the table. The box holds the middle half of the cases, the "
        "line in it is the median.",
    )


def _pictures(batch: Batch, scenes: Mapping[str, Scene], missing: Missing) -> str:
    notice = missing_notice(missing)
    if not scenes and not notice:
        notice = (
            '<p class="notice">The scans are not known here, so there are no pictures. Name them to have some: '
            "<code>medseg report FOLDER --scans SCANS</code>.</p>"
        )
    ranks = "robust z {} · " if len(batch.cases) >= MIN_CASES else ""
    captions = {
        case.case: f'<a href="#{case.anchor}">its row</a> · {ranks.format(number(case.outlying, 1))}'
        f"{escape(case.note) or 'nothing unusual'}"
        for case in batch.cases
    }
    return pictures_section(
        "The most unusual cases in pictures" if ranks else "Cases in pictures",
        scenes,
        batch.labels,
        captions,
        notice=notice,
        explanation="Colored lines: what the network drew." + " The last one is the most usual of all." * bool(ranks),
    )


def _table(batch: Batch, pictured: Mapping[str, str]) -> str:
    cases = batch.cases
    columns = []
    explanation = "A click on a heading sorts by it."
    if len(cases) >= MIN_CASES:
        columns.append(Column("robust z", [case.outlying for case in cases], digits=1))
        explanation += (
            " The robust z says by how many typical deviations a case’s most unusual volume differs from the median of "
            f"all; beyond {OUTLIER} it stands out."
        )
    for organ in batch.labels.organ_values:
        columns.append(Column(f"{organ} ({batch.unit})", [case.volumes[organ] for case in cases], batch.digits[organ]))
    if any(case.note for case in cases):
        columns.append(Column("what stands out", [case.note for case in cases]))
    table = sortable_table([(case.case, case.anchor) for case in cases], columns, pictured)
    return section("Every case, what stands out first", table, explanation=explanation)
