"""Cases in pictures: which can be shown, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np

from medseg.errors import MedsegError
from medseg.labels import Labels
from medseg.model import Preprocessing
from medseg.reporting.page import picture_html, section
from medseg.reporting.scene import CaseFiles, Scene, load_scene

TOLD = ("E-MISSING-FILE", "E-SHOWS-TEXT", "E-PAIR-SHAPE")
"""Errors whose messages name no file."""

LEFT_AND_RIGHT = (
    "R and L mark the patient’s right and left, as radiologists look: the right is at the left of the picture; A and P "
    "are front and back. The slices are those that show most of every organ."
)

Missing = dict[str, list[str]]
"""Why cases are not shown, and which."""


def load_scenes(
    cases: Iterable[str],
    files: Mapping[str, CaseFiles],
    preprocessing: Preprocessing,
    labels: Labels | None,
    *,
    unknown: str,
) -> tuple[dict[str, Scene], Missing]:
    """Read the cases that can be shown, in their order, and tell why the others cannot.

    Args:
        cases: Their ids.
        files: By case; those whose files are not known are not in it.
        preprocessing: Says how to read scans.
        labels: Says what structures drawn on a DICOM series are called.
        unknown: Why a case has no files.
    """
    scenes: dict[str, Scene] = {}
    missing: Missing = {}
    for case in cases:
        if case not in files:
            missing.setdefault(unknown, []).append(case)
            continue
        try:
            scenes[case] = load_scene(files[case], preprocessing, labels)
        except (MedsegError, OSError) as error:
            missing.setdefault(_why(error), []).append(case)
    return scenes, missing


def numbered_labels(values: Iterable[int]) -> Labels:
    """Labels called after their numbers, for label maps that nothing describes.

    Args:
        values: That occur; the background may be among them.
    """
    found = sorted({*values} - {0})
    if not found:
        return Labels({0: "background", 1: "label 1"})
    names = {0: "background", **{value: f"label {value}" for value in range(1, found[-1] + 1)}}
    return Labels(names, regions={names[value]: (value,) for value in found}, region_order=tuple(found))


def labels_of(scenes: Iterable[Scene]) -> Labels:
    """Of the values that are drawn in them, see `numbered_labels`."""
    maps = [label_map for scene in scenes for label_map in (scene.prediction, scene.reference) if label_map is not None]
    return numbered_labels(int(value) for label_map in maps for value in np.unique(label_map))


def drawn(scene: Scene, labels: Labels) -> str:
    """The contours of a scene, as HTML.

    Args:
        scene: What is shown.
        labels: What is drawn in it.
    """
    return picture_html(scene.picture(labels), f"Contours of {scene.case} in the scan")


def pictures_section(
    heading: str,
    pictures: Mapping[str, str],
    captions: Mapping[str, str],
    *,
    of_volumes: bool,
    notice: str,
    explanation: str = "",
) -> str:
    """The contours of some cases; empty where there is neither a picture nor a notice.

    Args:
        heading: Plain text.
        pictures: By case, see `drawn`.
        captions: HTML by case; the case's name comes before it.
        of_volumes: Whether they show planes of volumes.
        notice: HTML about those that are not shown.
        explanation: HTML that says whose lines these are.
    """
    if not pictures and not notice:
        return ""
    anchors = picture_anchors(pictures)
    figures = [
        f'<figure id="{anchors[case]}">{picture}'
        f"<figcaption><strong>{escape(case)}</strong> · {captions[case]}</figcaption></figure>"
        for case, picture in pictures.items()
    ]
    told = f"{explanation} {LEFT_AND_RIGHT if of_volumes else ''}".strip()
    content = f'<div class="pictures">{"".join(figures)}</div>{notice}'
    return section(heading, content, explanation=told if pictures else "")


def picture_anchors(scenes: Iterable[str]) -> dict[str, str]:
    """What links lead to, by case."""
    return {case: f"picture-{n}" for n, case in enumerate(scenes)}


def missing_notice(missing: Mapping[str, Sequence[str]]) -> str:
    """What is not shown, and why."""
    if not missing:
        return ""
    reasons = "; ".join(f"{escape(reason)} ({escape(', '.join(cases))})" for reason, cases in missing.items())
    return f'<p class="notice">Not shown in pictures: {reasons}. The numbers are not touched by this.</p>'


def _why(error: MedsegError | OSError) -> str:
    """In words that name no file, as a file's name may be a patient's."""
    if isinstance(error, MedsegError):
        return error.message if error.error_id in TOLD else f"a file cannot be used ({error.error_id})"
    return f"a file cannot be read ({error.strerror})"
