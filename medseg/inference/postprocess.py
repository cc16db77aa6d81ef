"""Steps on a finished label map, named in the workflow: ``{keep_largest: [liver], min_volume_ml: {tumour: 0.1}}``.

``crf: {theta_beta: 0.3}`` beside them is for `medseg.inference.refine`: it works on logits, and so always comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.errors import WorkflowError
from medseg.labels import Labels
from medseg.nets.crf import CRF
from medseg.registry import Registry, check_arguments

LabelMap = npt.NDArray[np.integer[Any]]
Mask = npt.NDArray[np.bool_]
Box = tuple[slice, ...]

TOUCHING_AT_CORNERS = 3
"""Pieces of an organ: voxels that share a face, an edge or a corner are one."""


@dataclass(frozen=True)
class Organ:
    """What a step works on.

    Args:
        values: Label values that make the organ up.
        own: The value that says organ and nothing more specific; holes are filled with it.
        below: What is there where the organ is not: the background, or of a region that lies in a larger one the
            value of that.
    """

    values: tuple[int, ...]
    own: int
    below: int = 0


Step = Callable[[LabelMap, Organ, float, float], None]
"""Changes a label map (I, J[, K]) in place; takes an organ, the volume of a voxel in ml, and the step's own amount."""


def keep_largest(label: LabelMap, organ: Organ, voxel_ml: float, amount: float) -> None:
    """Remove all but the largest piece; of pieces of equal size the first in memory stays."""
    mask = np.isin(label, organ.values)
    pieces, sizes = pieces_of(mask)
    if len(sizes) > 1:
        label[mask & (pieces != 1 + sizes.argmax())] = organ.below


def min_volume_ml(label: LabelMap, organ: Organ, voxel_ml: float, amount: float) -> None:
    """Remove the pieces that are smaller than `amount` ml."""
    pieces, sizes = pieces_of(np.isin(label, organ.values))
    small = is_smaller(sizes, amount, voxel_ml)
    if small.any():
        label[np.concatenate([[False], small])[pieces]] = organ.below


def fill_holes(label: LabelMap, organ: Organ, voxel_ml: float, amount: float) -> None:
    """Give the organ the background that it encloses on all sides, through faces; other organs in a hole stay."""
    holes, count = ndimage.label(~np.isin(label, organ.values))
    enclosed = np.ones(count + 1, bool)
    enclosed[0] = False
    for axis in range(label.ndim):
        for end in (0, -1):
            enclosed[holes.take(end, axis)] = False
    label[enclosed[holes] & (label == 0)] = organ.own


def pieces_of(mask: Mask) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The pieces of a mask, numbered from 1 (0: none), and how many voxels each has."""
    pieces, count = ndimage.label(mask, structure=ndimage.generate_binary_structure(mask.ndim, TOUCHING_AT_CORNERS))
    return pieces, np.bincount(pieces.ravel(), minlength=count + 1)[1:]


def is_smaller(sizes: npt.NDArray[np.int64], least_ml: float, voxel_ml: float) -> Mask:
    """Which pieces are smaller than a volume, but for rounding; none where a voxel has no volume (NaN)."""
    return sizes * voxel_ml < least_ml * (1 - 1e-9)


@dataclass(frozen=True)
class StepKind:
    """A step that a workflow can name.

    Args:
        step: What it does.
        takes: What the amount given for each organ is, e.g. ``"ml"``; empty: it takes a list of organs and no amounts.
    """

    step: Step
    takes: str = ""


POSTPROCESS: Registry[StepKind] = Registry(
    "post-processing step",
    {
        "keep_largest": StepKind(keep_largest),
        "min_volume_ml": StepKind(min_volume_ml, takes="ml"),
        "fill_holes": StepKind(fill_holes),
    },
)

CRF_STEP = "crf"
"""Not one of them, as it needs the image; written beside them."""


@dataclass(frozen=True)
class Resolved:
    """A step for one organ."""

    name: str
    organ: Organ
    amount: float = 0.0


def check_steps(steps: Mapping[str, Any], labels: Labels, *, num_channels: int | None = None) -> list[Resolved]:
    """What to do, in order, before anything is done.

    Args:
        steps: Name of a step to the organs it is for, with an amount each where the step takes one.
        labels: Which organs there are.
        num_channels: Of the image; None: any.

    Raises:
        WorkflowError: If a step or an organ is unknown, an amount is none, or `crf_of` refuses the CRF.
    """
    crf_of(steps, labels, num_channels=num_channels)
    known = Registry("post-processing step", {**POSTPROCESS, CRF_STEP: None})
    organs = Registry("organ", organs_of(labels))
    resolved = []
    for name, chosen in steps.items():
        if kind := known[name]:
            amounts = _amounts(name, chosen, kind.takes, organs)
            resolved += [Resolved(name, organs[organ], amount) for organ, amount in amounts.items()]
    return resolved


def crf_of(steps: Mapping[str, Any], labels: Labels, *, num_channels: int | None = None) -> CRF | None:
    """The CRF that logits go through before there is a label map, if there is one.

    Args:
        steps: With its arguments, where they are not to be the usual ones, under the name ``crf``.
        labels: Which organs there are.
        num_channels: Of the image; None: any.

    Raises:
        WorkflowError: If it has no such argument, or one that makes no sense or does not fit the labels or the image.
    """
    if CRF_STEP not in steps:
        return None
    args = steps[CRF_STEP]
    if not isinstance(args, Mapping):
        message = (
            f"crf: {args!r} does not say its arguments; write crf: {{}} for the usual ones, or crf: {{theta_beta: 0.3}}"
        )
        raise WorkflowError("E-POSTPROCESS", message)
    check_arguments("post-processing step 'crf'", CRF, args)
    try:
        crf = CRF(**args)
        crf.check(num_channels=num_channels, num_labels=labels.num_outputs, regions=bool(labels.regions))
    except ValueError as error:
        raise WorkflowError("E-POSTPROCESS", f"crf: {error}") from None
    return crf


def _amounts(name: str, chosen: Any, takes: str, organs: Iterable[str]) -> dict[str, float]:
    if not takes:
        if isinstance(chosen, str) or not isinstance(chosen, Sequence):
            message = f"{name}: {chosen!r} is not a list of organs; write {name}: [{', '.join(organs)}]"
            raise WorkflowError("E-POSTPROCESS", message)
        return dict.fromkeys(chosen, 0.0)
    example = ", ".join(f"{organ}: 1" for organ in organs)
    if not isinstance(chosen, Mapping):
        message = f"{name}: {chosen!r} does not give {takes} for each organ; write {name}: {{{example}}}"
        raise WorkflowError("E-POSTPROCESS", message)
    for organ, amount in chosen.items():
        if isinstance(amount, bool) or not isinstance(amount, Real) or not 0 < float(amount) < np.inf:
            message = f"{name}: {organ} has {amount!r}; it must be a number of {takes} above 0"
            raise WorkflowError("E-POSTPROCESS", message)
    return {organ: float(amount) for organ, amount in chosen.items()}


def organs_of(labels: Labels) -> dict[str, Organ]:
    """What each organ or region is to a step.

    Where regions lie in one another, what is removed from the inner one becomes the next larger one: what is no tumour
    is still liver. Removed from the outermost, all its values become background.
    """
    if not labels.regions:
        return {name: Organ(values, values[0]) for name, values in labels.organ_values.items()}
    values_of = dict(zip(labels.regions, labels.region_order, strict=True))
    organs = {}
    for name, values in labels.regions.items():
        around = [
            other
            for other, united in labels.regions.items()
            if set(united) > set(values) and values_of[other] not in values
        ]
        smallest = min(around, key=lambda other: len(labels.regions[other]), default=None)
        below = values_of[smallest] if smallest else 0
        organs[name] = Organ(tuple(values), values_of[name], below)
    return organs


def postprocess(label: LabelMap, steps: Sequence[Resolved], voxel_ml: float) -> None:
    """Take the steps, in order and in place.

    Each works on the organ's bounding box alone, beyond which no step makes it larger.

    Args:
        label: (I, J[, K]).
        steps: See `check_steps`.
        voxel_ml: Volume of a voxel; NaN for pictures, whose pieces have none and stay.
    """
    boxes: dict[int, Box] = {n: box for n, box in enumerate(ndimage.find_objects(label) if steps else [], 1) if box}
    for step in steps:
        organ = step.organ
        found = [boxes[value] for value in organ.values if value in boxes]
        if not found:
            continue
        box = _around(found)
        POSTPROCESS[step.name].step(label[box], organ, voxel_ml, step.amount)
        for value in {organ.own, organ.below} - {0}:
            boxes[value] = _around([box, boxes.get(value, box)])


def _around(boxes: Sequence[Box]) -> Box:
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*boxes, strict=True)
    )
