"""The page of segmentations that nobody has drawn references for: their volumes, what stands out, and what it looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medseg.data.checks import check_label_values
from medseg.data.manifest import Case
from medseg.data.volume_io import read_label
from medseg.display import track
from medseg.errors import MedsegError
from medseg.files import write_atomically
from medseg.labels import Labels
from medseg.model import Preprocessing
from medseg.reporting.figures import organs_figure
from medseg.reporting.page import asset, figure_svg, html_page, picture_html, section
from medseg.reporting.run_page import missing_notice, why_missing
from medseg.reporting.scene import CaseFiles, Scene, load_scene
from medseg.reporting.tables import Column, number, sortable_table
from medseg.reporting.viewer import Shown, inline_script, viewer_html

NUM_PICTURES = 6
NUM_IN_VIEWER = 2
OUTLIER = 3.5
"""Robust z beyond which a volume stands out (Iglewicz and Hoaglin 1993, "How to detect and handle outliers")."""

NORMAL_MAD = 0.6745
"""Median absolute deviation of the standard normal distribution."""

MIN_CASES = 5
"""With fewer, nothing can stand out."""

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
        volumes_ml: Of each organ.
        z: How far each volume stands out among the others, see `robust_z`.
    """

    case: str
    anchor: str
    volumes_ml: Mapping[str, float]
    z: Mapping[str, float]

    @property
    def outlying(self) -> float:
        """Of the organ that stands out most."""
        return max((abs(z) for z in self.z.values()), default=0.0)

    @property
    def note(self) -> str:
        found = [
            f"{organ}: {'not found' if not self.volumes_ml[organ] else 'unusually large' if z > 0 else 'unusually small'}"
            for organ, z in self.z.items()
            if abs(z) > OUTLIER
        ]
        return "; ".join(found)


def write_batch_page(
    predictions: Sequence[Case],
    output: Path,
    *,
    name: str,
    labels: Labels | None,
    scans: Mapping[str, Case],
    preprocessing: Preprocessing,
) -> dict[str, int]:
    """Make the page of a folder of segmentations.

    Args:
        predictions: The label maps; each stands where a scan's image does.
        output: The file to write.
        name: What the page is called.
        labels: What the values mean; None: each is called after its number.
        scans: By case the scans that were segmented, as far as they are known.
        preprocessing: Says how to read them.

    Returns:
        ``cases``, ``outliers``, ``pictures`` and ``viewer_cases``: how many of each are in it.

    Raises:
        DataError: If a label map cannot be read, or holds what the labels do not declare.
    """
    counts = {case.id: _volumes_by_value(case.images[0]) for case in track(predictions, "measuring")}
    labels = labels or _numbered_labels(counts)
    for case in predictions:
        check_label_values(np.array(list(counts[case.id]), dtype=np.int64), labels, str(case.images[0]))
    volumes = {
        case: {organ: sum(found.get(value, 0.0) for value in values) for organ, values in labels.organ_values.items()}
        for case, found in counts.items()
    }
    cases = _ranked(volumes, labels)
    scenes, missing = _scenes(cases, {case.id: case.images[0] for case in predictions}, scans, preprocessing, labels)
    pictured = {case: f"picture-{n}" for n, case in enumerate(scenes)}
    outliers = [case for case in cases if case.outlying > OUTLIER]
    in_viewer = [scene for scene in scenes.values() if scene.image.ndim == 3][:NUM_IN_VIEWER]
    parts = [
        _opening(name, cases, outliers, labels),
        _spread(cases, labels),
        _viewer(in_viewer, labels),
        _pictures(cases, scenes, pictured, missing, labels),
        section(
            "Every case, what stands out first",
            _table(cases, labels, pictured),
            explanation="A click on a heading sorts by it. The robust z says by how many typical deviations a case’s most "
            f"unusual volume differs from the median of all; beyond {OUTLIER} it stands out.",
        ),
        f"<footer><p>{LIMITS}</p></footer>",
        f"<script>{inline_script(asset('page.js'))}</script>",
    ]
    write_atomically(output, html_page(f"{name}: report", "\n".join(part for part in parts if part)).encode())
    return {"cases": len(cases), "outliers": len(outliers), "pictures": len(scenes), "viewer_cases": len(in_viewer)}


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


def _volumes_by_value(path: Path) -> dict[int, float]:
    label = read_label(path)
    values, counts = np.unique(label.array, return_counts=True)
    voxel_ml = label.geometry.voxel_ml if label.geometry.spatial_dims == 3 else math.prod(label.geometry.spacing_mm)
    return {int(value): float(count * voxel_ml) for value, count in zip(values, counts, strict=True)}


def _numbered_labels(counts: Mapping[str, Mapping[int, float]]) -> Labels:
    largest = max((value for found in counts.values() for value in found), default=0)
    return Labels({0: "background", **{value: f"label {value}" for value in range(1, max(largest, 1) + 1)}})


def _ranked(volumes: Mapping[str, Mapping[str, float]], labels: Labels) -> list[Measured]:
    """What stands out most first."""
    z: dict[str, npt.NDArray[np.float64]] = {}
    for organ in labels.organ_values:
        column = np.array([found[organ] for found in volumes.values()])
        z[organ] = robust_z(column) if len(column) >= MIN_CASES else np.zeros(len(column))
    cases = [
        Measured(case, f"case-{n}", found, {organ: float(z[organ][n]) for organ in z})
        for n, (case, found) in enumerate(volumes.items())
    ]
    return sorted(cases, key=lambda case: -case.outlying)


def _scenes(
    cases: Sequence[Measured],
    predictions: Mapping[str, Path],
    scans: Mapping[str, Case],
    preprocessing: Preprocessing,
    labels: Labels,
) -> tuple[dict[str, Scene], dict[str, list[str]]]:
    """Those that stand out most and the most usual one, as far as their scans are there."""
    wanted = list(dict.fromkeys(case.case for case in [*cases[: NUM_PICTURES - 1], cases[-1]]))
    scenes: dict[str, Scene] = {}
    missing: dict[str, list[str]] = {}
    for case in wanted if scans else ():
        if case not in scans:
            missing.setdefault("no scan is called like them", []).append(case)
            continue
        try:
            scenes[case] = load_scene(
                CaseFiles(case, scans[case].images, None, predictions[case]), preprocessing, labels
            )
        except (MedsegError, OSError) as error:
            missing.setdefault(why_missing(error), []).append(case)
    return scenes, missing


def _opening(name: str, cases: Sequence[Measured], outliers: Sequence[Measured], labels: Labels) -> str:
    if len(cases) < MIN_CASES:
        verdict = f"That is too few to say which volumes are unusual; it takes {MIN_CASES}."
    elif outliers:
        number_of = f"{len(outliers)} of them have" if len(outliers) > 1 else "One of them has"
        verdict = f"<b>{number_of} a volume that stands out</b> and should be looked at first."
    else:
        verdict = "No volume stands out among the others."
    tiles = []
    for organ in list(labels.organ_values)[:6]:
        found = np.array([case.volumes_ml[organ] for case in cases])
        low, high = np.percentile(found, [25, 75])
        absent = f"<br>not found in {int((found == 0).sum())}" if (found == 0).any() else ""
        tiles.append(
            f'<div class="tile"><dt>{escape(organ)}</dt><dd><div class="number">{_volume(float(np.median(found)))}</div>'
            f'<div class="detail">ml, median; middle half {_volume(low)} to {_volume(high)}{absent}</div></dd></div>'
        )
    return (
        '<header><p class="eyebrow">medseg report · segmentations without references · for research only</p>'
        f'<h1>{escape(name)}</h1><p class="lede">{len(cases)} scans were segmented. {verdict}</p>'
        f'<dl class="tiles">{"".join(tiles)}</dl></header>'
    )


def _spread(cases: Sequence[Measured], labels: Labels) -> str:
    values = {organ: [(case.anchor, case.volumes_ml[organ]) for case in cases] for organ in labels.organ_values}
    svg = figure_svg(
        organs_figure(values, across="volume (ml)", limits=None), "Volume of each organ, a dot for each case"
    )
    return section(
        "Volumes, organ by organ",
        f'<figure class="figure">{svg}</figure>',
        explanation="Each dot is a case, and leads to its row in the table. The box holds the middle half of the cases, the "
        "line in it is the median.",
    )


def _viewer(scenes: Sequence[Scene], labels: Labels) -> str:
    if not scenes:
        return ""
    return section(
        "Look at the scans",
        viewer_html([Shown(scene, scene.case) for scene in scenes], labels),
        explanation="What stands out most. As radiologists look: the patient’s right is at the left of the picture. A click "
        "moves the cross, the wheel goes through the slices. The scans are cropped around the organs and simplified, for "
        "this page only.",
    )


def _pictures(
    cases: Sequence[Measured],
    scenes: Mapping[str, Scene],
    pictured: Mapping[str, str],
    missing: Mapping[str, Sequence[str]],
    labels: Labels,
) -> str:
    notice = missing_notice(missing)
    if not scenes and not notice:
        notice = (
            '<p class="notice">The scans are not known here, so there are no pictures. Name them to have some: '
            "<code>medseg report FOLDER --scans SCANS</code>.</p>"
        )
    figures = []
    for case in (case for case in cases if case.case in scenes):
        picture = picture_html(scenes[case.case].picture(labels), f"Contours of {case.case} in the scan")
        told = escape(case.note) or "nothing unusual"
        caption = f"<strong>{escape(case.case)}</strong> · robust z {number(case.outlying, 1)} · {told}"
        figures.append(f'<figure id="{pictured[case.case]}">{picture}<figcaption>{caption}</figcaption></figure>')
    return section("What stands out, in pictures", f'<div class="pictures">{"".join(figures)}</div>{notice}')


def _table(cases: Sequence[Measured], labels: Labels, pictured: Mapping[str, str]) -> str:
    columns = [Column("robust z", [case.outlying for case in cases], digits=1)]
    for organ in labels.organ_values:
        columns.append(Column(f"{organ} (ml)", [case.volumes_ml[organ] for case in cases], digits=1))
    columns.append(Column("what stands out", [case.note for case in cases]))
    return sortable_table([(case.case, case.anchor) for case in cases], columns, pictured)


def _volume(ml: float) -> str:
    return f"{ml:.0f}" if ml >= 100 else f"{ml:.1f}"
