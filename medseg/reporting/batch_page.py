"""The page of segmentations without references: what failed, what stands out, and what it looks like."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from medseg.data.manifest import Case
from medseg.files import write_atomically
from medseg.labels import Labels
from medseg.model import Preprocessing
from medseg.reporting.batch import (
    MIN_CASES,
    OUTLIER,
    Batch,
    Measured,
    Told,
    busy_seconds,
    measure_batch,
    number_told,
)
from medseg.reporting.figures import num_dots, organs_figure, wants_log
from medseg.reporting.page import asset, definitions, figure_svg, html_page, section
from medseg.reporting.pictures import (
    Missing,
    drawn,
    load_scenes,
    missing_notice,
    picture_anchors,
    pictures_section,
)
from medseg.reporting.prediction import fault_told
from medseg.reporting.scene import CaseFiles
from medseg.reporting.tables import MAX_ORGAN_COLUMNS, Column, number, sortable_table
from medseg.reporting.viewer import Shown, inline_script, shown, viewer_section
from medseg.wording import counted, duration, listed

NUM_PICTURES = 6
"""Of the cases to look at first; two ordinary ones follow."""

NUM_IN_VIEWER = 2
MAX_TILES = 6
MAX_VOLUMES = 40_000
"""In the table; of more, only the first organs have columns: a browser takes seconds to lay out so many cells."""

LIMITS = (
    "For research only: not a medical device, and no ground for a decision about a patient. Nobody has drawn references "
    "for these scans, so this page cannot say how good the segmentations are. A volume that stands out may be a "
    "fault or a patient’s own; one that does not may be wrong all the same."
)


def write_batch_page(
    predictions: Sequence[Case],
    output: Path,
    *,
    name: str,
    scans: Mapping[str, Case],
    labels: Labels | None,
    preprocessing: Preprocessing,
    told: Mapping[str, Told] | None = None,
    most_read: int | None = None,
) -> dict[str, Any]:
    """Make the page of a folder of segmentations.

    Args:
        predictions: The label maps; each stands where a scan's image does.
        output: The file to write.
        name: What the page is called.
        scans: By case the scans that were segmented, as far as they are known.
        labels: What the values mean; None: each is called after its number.
        preprocessing: Says how to read the scans.
        told: By case what the list of the batch says, of those too that have no segmentation; None: there is no list.
        most_read: How many label maps may be read for their volumes, where the list does not tell them; None: all.

    Returns:
        ``cases``, ``outliers``, ``pictures`` and ``viewer_cases``: how many of each are in it; ``mostly_absent``: the
        organs that most cases lack, and how many lack each; ``failed``: what could not be read; ``refused``: how many
        scans could not be segmented, as far as there is a list.

    Raises:
        Problems: If no label map can be read, and no list tells of anything else.
        DataError: If one holds what the labels do not declare.
    """
    batch = measure_batch(predictions, name, labels, told or {}, most_read=most_read)
    files = {
        case.id: CaseFiles(case.id, scans[case.id].images, None, case.images[0])
        for case in predictions
        if case.id in scans
    }
    wanted = _pictured(batch.cases) if scans else ()
    pictures, in_viewer, missing = _looks(wanted, files, preprocessing, batch.labels)
    parts = [
        _opening(batch, told or {}),
        _refused(batch),
        _spread(batch),
        viewer_section(
            in_viewer,
            batch.labels,
            explanation="Those to look at first." if len(batch.cases) >= MIN_CASES else "",
        ),
        _pictures(batch, pictures, missing, of_volumes="ml" in batch.unit),
        _table(batch, picture_anchors(pictures)),
        f"<footer><p>{LIMITS}</p></footer>",
        f"<script>{inline_script(asset('page.js'))}</script>",
    ]
    write_atomically(output, html_page(f"{name}: report", "\n".join(part for part in parts if part)).encode())
    return {
        "cases": len(batch.cases),
        "outliers": len(batch.outliers),
        "mostly_absent": batch.mostly_absent,
        "pictures": len(pictures),
        "viewer_cases": len(in_viewer),
        "failed": [{"case": c, "error_id": e.error_id, "message": str(e)} for c, e in batch.failed.items()],
        "refused": len(batch.refused),
    }


def _pictured(cases: Sequence[Measured]) -> list[str]:
    """Those to look at first, and of the others two ordinary ones: the middle of the ranking and its end."""
    first, others = cases[:NUM_PICTURES], cases[NUM_PICTURES:]
    ordinary = [others[(len(others) - 1) // 2], others[-1]] if others else []
    return list(dict.fromkeys(case.case for case in [*first, *ordinary]))


def _looks(
    cases: Sequence[str], files: Mapping[str, CaseFiles], preprocessing: Preprocessing, labels: Labels
) -> tuple[dict[str, str], list[Shown], Missing]:
    """Pictures by case, the first volumes for the viewer, and why others are not shown; one scan at a time in memory."""
    pictures: dict[str, str] = {}
    in_viewer: list[Shown] = []
    missing: Missing = {}
    for case in cases:
        scenes, reasons = load_scenes([case], files, preprocessing, labels, unknown="no scan is called like them")
        for reason, names in reasons.items():
            missing.setdefault(reason, []).extend(names)
        for scene in scenes.values():
            pictures[case] = drawn(scene, labels)
            if scene.image.ndim == 3 and len(in_viewer) < NUM_IN_VIEWER:
                in_viewer.append(shown(scene, labels, case))
    return pictures, in_viewer, missing


def _opening(batch: Batch, told: Mapping[str, Told]) -> str:
    eyebrow = "medseg report · segmentations without references · for research only"
    return (
        f'<header><p class="eyebrow">{eyebrow}</p><h1>{escape(batch.name)}</h1>'
        f'<p class="lede">{_lede(batch)}</p>{_findings(batch)}{_course(list(told.values()))}'
        f'<dl class="tiles">{"".join(_tiles(batch))}</dl></header>'
    )


def _lede(batch: Batch) -> str:
    refused = batch.refused
    waiting = len(batch.lacking) - len(refused)
    segmented = len(batch.cases) + len(batch.failed) + batch.unread
    of_all = f" of {segmented + len(batch.lacking):,}" if batch.lacking else ""
    sentences = [f"{segmented:,}{of_all} {'scan' if segmented == 1 and not of_all else 'scans'} segmented."]
    if refused:
        given_up = sum(told["state"] == "quarantined" for told in refused)
        why = f", {given_up} of them as they ended their processes" if given_up else ""
        sentences.append(f'<b><a href="#refused">{counted(len(refused), "scan")} failed</a></b>{why}.')
    if waiting:
        sentences.append(f"<b>{waiting:,} {'is' if waiting == 1 else 'are'} still to be done.</b>")
    return " ".join([*sentences, _verdict(batch)])


def _verdict(batch: Batch) -> str:
    if len(batch.cases) < MIN_CASES:
        return f"That is too few to say which volumes are unusual; it takes {MIN_CASES}."
    has_doubts = _is_known(batch, "uncertainty")
    if count := len(batch.outliers):
        number_of = f"{count:,} of those segmented have" if count > 1 else "One of those segmented has"
        what = "a volume or an uncertainty" if has_doubts else "a volume"
        return f"<b>{number_of} {what} that stands out</b> and should be looked at first."
    return f"No volume{' and no uncertainty' if has_doubts else ''} stands out among the others."


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
    if batch.unread:
        files = counted(batch.unread, "segmentation")
        notices.append(
            f"<b>Not measured: {files}</b> of an earlier call, not in these numbers. <code>medseg report FOLDER</code> "
            "reads them all."
        )
    return "".join(f'<p class="notice">{notice}</p>' for notice in notices)


def _course(told: Sequence[Told]) -> str:
    """How the work went: pace, time and memory."""
    done = [row for row in told if row["state"] == "done" and row.get("seconds") is not None]
    if not done:
        return ""
    busy = busy_seconds(done)
    seconds = {row["case"]: row["seconds"] for row in done}
    slowest = max(seconds, key=lambda case: seconds[case])
    sums = {name: _sum(done, name) for name in ("network_seconds", "seconds", "windows", "windows_in_air")}
    windows = sums["windows"] + sums["windows_in_air"]
    share = 100 * sums["windows_in_air"] / windows if windows else 0.0
    spared = f", of which {share:.0f} % were passed over, as they lie in the air" if share else ""
    peaks = [row["peak_mb"] for row in told if row.get("peak_mb")]
    died = sum(bool(row.get("attempts") or row.get("kills")) for row in told)
    each = (
        f"{_seconds(float(np.median(list(seconds.values()))))} each (median), at the most {_seconds(seconds[slowest])}"
    )
    entries = {
        "pace": f"{60 * len(done) / busy:,.1f} scans a minute, {duration(busy)} in all" if busy else None,
        "time": f"{each} ({slowest})" if len(done) > 1 else each,
        "in the network": f"{100 * sums['network_seconds'] / sums['seconds']:.0f} % of that" if sums["seconds"] else None,
        "windows": f"{windows:,.0f}{spared}" if windows else None,
        "memory": f"{max(peaks) / 1000:.1f} GB in a process, at the most" if peaks else None,
        "processes lost": f"over {counted(died, 'scan')}; the table says which" if died else None,
    }  # fmt: skip
    return f'<details class="course"><summary>How the work went</summary>{definitions(entries)}</details>'


def _sum(rows: Sequence[Told], name: str) -> float:
    return sum(row.get(name) or 0 for row in rows)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def _tiles(batch: Batch) -> list[str]:
    tiles = []
    for organ in list(batch.labels.organ_values)[:MAX_TILES] if batch.cases else ():
        found = np.array([case.volumes[organ] for case in batch.cases])
        middle, low, high = (number(ml, batch.digits[organ]) for ml in np.percentile(found, [50, 25, 75]))
        absent = f"<br>not found in {int((found == 0).sum())} of {len(found)}" if (found == 0).any() else ""
        tiles.append(
            f'<div class="tile"><dt>{escape(organ)}</dt><dd><div class="number">{middle}</div>'
            f'<div class="detail">{batch.unit}, median; middle half {low} to {high}{absent}</div></dd></div>'
        )
    return tiles


def _refused(batch: Batch) -> str:
    """The scans that have no segmentation, and why."""
    refused = batch.refused
    if not refused:
        return ""
    faults = [fault_told(told) for told in refused]
    columns = [
        Column("fault", [fault.error_id for fault in faults]),
        Column("what is wrong, and what to do", [fault.message for fault in faults]),
    ]
    columns += _known_columns(refused, {"attempts": "processes lost", "peak_mb": "memory (MB)"})
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in Counter(fault.error_id for fault in faults).most_common())
    table = sortable_table(
        [(told["case"], f"refused-{n}") for n, told in enumerate(refused)], columns, {}, caption="Scans that failed"
    )
    return section(
        "Scans without a segmentation",
        f'<div id="refused">{table}</div>',
        explanation=f"{escape(kinds)}. The same command with <code>--resume</code> tries them again, and nothing else.",
    )


def _spread(batch: Batch) -> str:
    if not batch.cases:
        return ""
    volumes = {organ: [case.volumes[organ] for case in batch.cases] for organ in batch.labels.organ_values}
    anchors = [case.anchor for case in batch.cases]
    values = {organ: list(zip(anchors, found, strict=True)) for organ, found in volumes.items()}
    is_log = wants_log(volumes)
    figure = organs_figure(values, across=f"volume ({batch.unit})", limits=None, is_log=is_log)
    dots = "Each dot is a case, and leads to its row in the table."
    if len(anchors) > (most := num_dots(len(volumes))):
        dots = f"Dots are cases, of each organ the {most:,} smallest and largest, and lead to their rows in the table."
    return section(
        "Volumes, organ by organ",
        f'<figure class="figure">{figure_svg(figure, "Volume of each organ, a dot for each case")}</figure>',
        explanation=f"{dots} The box holds the middle half of the cases, the line in it is the median."
        + " Each step of the axis is ten times the one before." * is_log,
    )


def _pictures(batch: Batch, pictures: Mapping[str, str], missing: Missing, *, of_volumes: bool) -> str:
    notice = missing_notice(missing)
    if not batch.cases:
        return ""
    if not pictures and not notice:
        notice = (
            '<p class="notice">The scans are not known here, so there are no pictures. Name them to have some: '
            "<code>medseg report FOLDER --scans SCANS</code>.</p>"
        )
    has_ranks = len(batch.cases) >= MIN_CASES
    captions = {case.case: _caption(case, has_ranks=has_ranks) for case in batch.cases if case.case in pictures}
    has_ordinary = has_ranks and len(batch.cases) > NUM_PICTURES
    return pictures_section(
        "Those to look at first, in pictures" if has_ranks else "Cases in pictures",
        pictures,
        captions,
        of_volumes=of_volumes,
        notice=notice,
        explanation="Colored lines: what the network drew."
        + " The last ones are ordinary: one from the middle of the table, one from its end." * has_ordinary,
    )


def _caption(case: Measured, *, has_ranks: bool) -> str:
    told = [f'<a href="#{case.anchor}">its row</a>']
    told += [f"uncertainty {number(case.uncertainty, 2)}"] if not math.isnan(case.uncertainty) else []
    told += [f"robust z {number(case.outlying, 1)}"] if has_ranks else []
    return " · ".join([*told, escape(case.note) or "nothing unusual"])


def _table(batch: Batch, pictured: Mapping[str, str]) -> str:
    cases = batch.cases
    if not cases:
        return ""
    columns = []
    explanation = "A click on a heading sorts by it." + " A linked case is pictured above." * bool(pictured)
    if any(case.note for case in cases):
        columns.append(Column("what stands out", [case.note for case in cases]))
    if len(cases) >= MIN_CASES:
        columns.append(Column("robust z", [case.outlying for case in cases], digits=1))
        explanation += (
            " The robust z says by how many typical deviations a case’s most unusual volume, or its uncertainty, differs "
            f"from the median of all; beyond {OUTLIER} it stands out."
        )
    told = [case.told for case in cases]
    columns += _known_columns(told, {"uncertainty": "uncertainty", "agreement": "agreement"}, digits=2)
    if _is_known(batch, "uncertainty"):
        explanation += " Uncertainty goes from 0 to 1: the higher, the less the network stands by what it drew."
    organs = list(batch.labels.organ_values)
    if len(organs) * len(cases) > MAX_VOLUMES and len(organs) > MAX_ORGAN_COLUMNS:
        explanation += f" Of {len(organs)} organs the first {MAX_ORGAN_COLUMNS} have columns."
        organs = organs[:MAX_ORGAN_COLUMNS]
    for organ in organs:
        columns.append(Column(f"{organ} ({batch.unit})", [case.volumes[organ] for case in cases], batch.digits[organ]))
    columns += _known_columns(told, {"seconds": "seconds"}, digits=1)
    work = {
        "windows": "windows", "windows_in_air": "passed over", "peak_mb": "memory (MB)", "attempts": "processes lost",
    }  # fmt: skip
    columns += _known_columns(told, work)
    table = sortable_table([(case.case, case.anchor) for case in cases], columns, pictured)
    heading = "Every case, what stands out first"
    heading += ", then the least sure" if _is_known(batch, "uncertainty") else ""
    return section(heading, table, explanation=explanation)


def _known_columns(told: Sequence[Told], headings: Mapping[str, str], *, digits: int = 0) -> list[Column]:
    """Columns for what is known of some cases, and is not 0 of all."""
    found = {heading: [number_told(row, name) for row in told] for name, heading in headings.items()}
    return [
        Column(heading, cells, digits)
        for heading, cells in found.items()
        if any(cell and not math.isnan(cell) for cell in cells)
    ]


def _is_known(batch: Batch, name: str) -> bool:
    return any(case.told.get(name) is not None for case in batch.cases)
