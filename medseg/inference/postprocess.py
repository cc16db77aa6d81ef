"""Steps on a finished label map, named in the workflow: ``{keep_largest: [liver]}``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.errors import WorkflowError
from medseg.labels import Labels
from medseg.registry import Registry

LabelMap = npt.NDArray[np.integer[Any]]
Step = Callable[[LabelMap, Sequence[int]], LabelMap]


def keep_largest(label: LabelMap, values: Sequence[int]) -> LabelMap:
    """Set to background all but the largest piece of an organ; voxels that touch at a corner are one piece.

    Args:
        label: (I, J, K).
        values: Label values that make up the organ.

    Returns:
        A new label map; of pieces of equal size the first in memory stays.
    """
    result = label.copy()
    organ = np.isin(label, values)
    found = ndimage.find_objects(organ.astype(np.uint8))
    if not found:
        return result
    box = found[0]  # most organs fill a small part of the scan
    pieces, _ = ndimage.label(organ[box], structure=np.ones((3,) * label.ndim))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    result[box][organ[box] & (pieces != sizes.argmax())] = 0
    return result


POSTPROCESS: Registry[Step] = Registry("post-processing step", {"keep_largest": keep_largest})


def check_steps(steps: Mapping[str, Any], labels: Labels) -> list[tuple[Step, tuple[int, ...]]]:
    """What to do, in order, before anything is done.

    Args:
        steps: Name of a step to the organs it is for.
        labels: Which organs there are.

    Returns:
        Each step with the label values of one organ.

    Raises:
        WorkflowError: If a step or an organ is unknown.
    """
    organs = Registry("organ", labels.organ_values)
    resolved = []
    for name, chosen in steps.items():
        step = POSTPROCESS[name]
        if isinstance(chosen, str) or not isinstance(chosen, Sequence):
            raise WorkflowError(
                "E-POSTPROCESS", f"{name}: {chosen!r} is not a list of organs; write {name}: [{', '.join(organs)}]"
            )
        resolved += [(step, organs[organ]) for organ in chosen]
    return resolved
