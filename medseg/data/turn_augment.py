"""Random changes of the axes' order, which move voxels without resampling: transposing and quarter turns.

MONAI dictionary transforms. The two axes trade places, so they must have one size and one spacing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable

from medseg.data.draws import check_probability, plain
from medseg.errors import WorkflowError


class RandTransposed(MapTransform, Randomizable):
    """Mirror at the diagonal, by chance.

    Args:
        keys: What is transposed, each (C, I, J[, K]) of `patch_size`.
        patch_size: Voxels along each spatial axis.
        spacing_mm: Voxel size along each axis; None: isotropic.
        pairs: Left and right label of each paired organ: there must be none.
        prob: Probability that a sample is transposed.
        axes: The two spatial axes that trade places.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        *,
        patch_size: Sequence[int],
        spacing_mm: Sequence[float] | None = None,
        pairs: Sequence[Sequence[int]] = (),
        prob: float = 0.5,
        axes: Sequence[int] = (0, 1),
    ) -> None:
        MapTransform.__init__(self, keys)
        self.prob = check_probability("prob", prob)
        self.axes = check_plane(axes, patch_size, spacing_mm, pairs)

    def randomize(self, data: Any = None) -> bool:
        """Draw whether."""
        return bool(self.R.random_sample() < self.prob)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        if self.randomize():
            for key in self.key_iterator(result):
                result[key] = plain(result[key]).transpose(*[1 + axis for axis in self.axes]).contiguous()
        return result


class RandQuarterTurnd(MapTransform, Randomizable):
    """Turn by 90°, 180° or 270°, by chance.

    Args:
        keys: What is turned, each (C, I, J[, K]) of `patch_size`.
        patch_size: Voxels along each spatial axis.
        spacing_mm: Voxel size along each axis; None: isotropic.
        pairs: Left and right label of each paired organ: there must be none.
        prob: Probability that a sample is turned; the three angles are equally likely.
        axes: The two spatial axes of the plane, turned from the first to the second.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        *,
        patch_size: Sequence[int],
        spacing_mm: Sequence[float] | None = None,
        pairs: Sequence[Sequence[int]] = (),
        prob: float = 0.75,
        axes: Sequence[int] = (0, 1),
    ) -> None:
        MapTransform.__init__(self, keys)
        self.prob = check_probability("prob", prob)
        self.axes = check_plane(axes, patch_size, spacing_mm, pairs)

    def randomize(self, data: Any = None) -> int:
        """Draw the number of quarter turns; 0: none."""
        turns, quarters = self.R.random_sample() < self.prob, 1 + int(self.R.randint(3))
        return quarters if turns else 0

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        quarters = self.randomize()
        if quarters:
            for key in self.key_iterator(result):
                turned = torch.rot90(plain(result[key]), quarters, [1 + axis for axis in self.axes])
                result[key] = turned.contiguous()
        return result


def check_plane(
    axes: Sequence[int],
    patch_size: Sequence[int],
    spacing_mm: Sequence[float] | None,
    pairs: Sequence[Sequence[int]],
) -> tuple[int, int]:
    """The two axes, if they can trade places.

    Raises:
        WorkflowError: If they are not two of one size and spacing, or labels know left from right.
    """
    dims = len(patch_size)
    if len(axes) != 2 or len({*axes}) != 2 or not {*axes} <= {*range(dims)}:
        raise WorkflowError("E-ARGUMENT", f"axes: {list(axes)}; expected two different ones from 0 to {dims - 1}")
    first, second = axes
    mm = spacing_mm or [1.0] * dims
    if patch_size[first] != patch_size[second] or abs(mm[first] - mm[second]) > 1e-3 * mm[first]:
        raise WorkflowError(
            "E-ARGUMENT",
            f"axes {first} and {second} have {patch_size[first]} and {patch_size[second]} voxels of {mm[first]:g} and "
            f"{mm[second]:g} mm, and would trade places; make the patch square there, choose other axes, or leave it out",
        )
    if pairs:
        raise WorkflowError(
            "E-ARGUMENT", "the labels have left and right pairs, and what is turned has neither; leave it out"
        )
    return first, second
