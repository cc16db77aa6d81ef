"""Losses of distances: how far from an organ's border its voxels are mistaken.

The distance maps are made on the fly, on the CPU, and are constants to the gradient. Losses see plain tensors, so that
distances are in voxels of the network's grid (under deep supervision of each output's grid) unless a spacing is given;
that is the finest output's, and the coarser ones' follow from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import edt
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medseg.losses.probabilities import compared


class Boundary(nn.Module):
    """The mean over voxels and organs of probability times signed distance to the organ's border.

    The distance is positive outside the organ, 0 in its outermost voxels and negative further in, so the best value is
    negative. An organ that is absent, or fills the patch, has no border there and adds 0. Nothing else is normalized:
    the distances reach half a patch or more, and with them the loss. So it wants a small weight that grows, beside a
    loss of overlap, e.g. ``weight: {from: 0, to: 0.05, over: 10000}``.

    Args:
        include_background: Whether class 0 counts as an organ. Regions have none.
        spacing_mm: Voxel size along I, J[, K], for distances in mm; None: in voxels. A workflow's patches have three
            axes, of which a 2D network's slices have one of length 1.

    Reference:
        Kervadec et al. 2019, arXiv:1812.07032; 0 in the outermost voxels as in the authors' program, where the paper's
        border runs between voxels. Theirs takes 1 off the distances inside also where they are in mm, here it is the
        smallest spacing: a voxel beside the border along a coarser axis lies deeper.
    """

    title: ClassVar[str] = "boundary"
    paper: ClassVar[str] = "Kervadec et al. 2019, arXiv:1812.07032"
    good_for: ClassVar[str] = "small structures, beside a loss of overlap and with a weight that ramps up"

    def __init__(self, *, include_background: bool = False, spacing_mm: Sequence[float] | None = None) -> None:
        super().__init__()
        self.include_background = include_background
        self.spacing_mm = _checked_spacing(spacing_mm)

    def forward(
        self, logits: Tensor, target: Tensor, mask: Tensor | None = None, stride: Sequence[float] | None = None
    ) -> Tensor:
        """The loss, a float32 scalar, negative at best; 0 if no voxel counts.

        Args:
            logits: (B, R, I, J[, K]).
            target: Class indices (B, I, J[, K]), or for regions floats (B, R, I, J[, K]).
            mask: Boolean (B, 1, I, J[, K]), the voxels that count; None: all.
            stride: How many times `spacing_mm` these voxels measure along I, J[, K]; None: once.

        Raises:
            ValueError: If the spacing has not one entry for each axis.
        """
        spacing_mm = _strided(self.spacing_mm, stride)
        probs, reference = compared(logits, target, mask, include_background=self.include_background)
        inside = reference > 0
        distance = squared_distances(inside, mask, spacing_mm).to(probs).sqrt()
        outermost = min(spacing_mm or (1.0,))
        signed = distance.where(~inside, (outermost - distance).clamp(max=0))
        return _mean_of_counted(probs * signed, mask)


class Hausdorff(nn.Module):
    """The mean over voxels and organs of the squared error times both distances to the border, each to the power alpha.

    One distance is to the border of the reference, the other to that of the prediction (where the probability passes
    a half). A mask without a border, because it is empty or full, has distance 0 throughout. Nothing is normalized:
    with alpha 2 the loss is in squared voxels, and the paper brings it to the size of the Dice loss beside it.

    Args:
        alpha: How much the distant errors prevail.
        include_background: Whether class 0 counts as an organ. Regions have none.
        spacing_mm: As in `Boundary`.

    Reference:
        Karimi and Salcudean 2019, arXiv:1904.10030, the loss by distance transforms.
    """

    title: ClassVar[str] = "Hausdorff distance"
    paper: ClassVar[str] = "Karimi and Salcudean 2019, arXiv:1904.10030"
    good_for: ClassVar[str] = "false islands and far outliers, beside a loss of overlap and with a small weight"

    def __init__(
        self, *, alpha: float = 2.0, include_background: bool = False, spacing_mm: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"alpha is {alpha}; it must be positive")
        self.alpha = alpha
        self.include_background = include_background
        self.spacing_mm = _checked_spacing(spacing_mm)

    def forward(
        self, logits: Tensor, target: Tensor, mask: Tensor | None = None, stride: Sequence[float] | None = None
    ) -> Tensor:
        """The loss, a float32 scalar; 0 if no voxel counts. Arguments and errors as `Boundary.forward`."""
        spacing_mm = _strided(self.spacing_mm, stride)
        probs, reference = compared(logits, target, mask, include_background=self.include_background)
        squared = [squared_distances(part > 0.5, mask, spacing_mm).to(probs) for part in (probs, reference)]
        far = sum((part ** (self.alpha / 2) for part in squared), start=torch.zeros_like(probs))
        return _mean_of_counted((probs - reference).square() * far, mask)


def squared_distances(inside: Tensor, mask: Tensor | None = None, spacing_mm: Sequence[float] | None = None) -> Tensor:
    """From each voxel of an organ to the nearest one outside, and from those outside to the nearest one of the organ.

    Voxels that do not count are neither: an organ has no border where annotation ends.

    Args:
        inside: The organs' voxels, boolean (B, organs, I, J[, K]).
        mask: Boolean (B, 1, I, J[, K]), the voxels that count; None: all.
        spacing_mm: Voxel size; None: 1.

    Returns:
        Squared distances between centers, float32 on the CPU, in the shape of `inside`; 0 where there is no such voxel.

    Raises:
        ValueError: If the spacing has not one entry for each axis.
    """
    spacing = tuple(spacing_mm or (1.0,) * (inside.dim() - 2))
    if len(spacing) != inside.dim() - 2:
        raise ValueError(f"spacing_mm has {len(spacing)} entries, the patches {inside.dim() - 2} axes; give one each")
    organs, counted = (None if part is None else part.cpu().numpy() for part in (inside, mask))
    assert organs is not None
    squared = np.empty(organs.shape, np.float32)
    for b, organ in np.ndindex(*organs.shape[:2]):
        squared[b, organ] = _to_the_other_kind(organs[b, organ], None if counted is None else counted[b, 0], spacing)
    squared[np.isinf(squared)] = 0
    return torch.from_numpy(squared)


def _to_the_other_kind(
    inside: npt.NDArray[np.bool_], counted: npt.NDArray[np.bool_] | None, spacing: tuple[float, ...]
) -> npt.NDArray[np.float32]:
    options = {"anisotropy": spacing, "black_border": False, "parallel": torch.get_num_threads()}
    if counted is None:
        return edt.edtsq(inside + np.uint8(1), **options)  # two labels: to the nearest voxel of the other
    to_outside, to_inside = (edt.edtsq(~(kind & counted), **options) for kind in (~inside, inside))
    return np.where(inside, to_outside, to_inside)


def _strided(spacing_mm: Sequence[float] | None, stride: Sequence[float] | None) -> Sequence[float] | None:
    if spacing_mm is None or stride is None:
        return spacing_mm
    return tuple(mm * times for mm, times in zip(spacing_mm, stride, strict=True))


def _mean_of_counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of what is 0 already where it does not count, (B, organs, I, J[, K])."""
    if mask is None:
        return values.mean()
    return values.sum() / (mask.sum() * values.shape[1]).clamp(min=1)


def _checked_spacing(spacing_mm: Sequence[float] | None) -> tuple[float, ...] | None:
    if spacing_mm is None:
        return None
    if min(spacing_mm) <= 0:
        raise ValueError(f"spacing_mm {list(spacing_mm)}; all must be positive")
    return tuple(float(size) for size in spacing_mm)
