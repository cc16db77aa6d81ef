"""Random changes of place: rotation, scaling and mirroring, image and label from one draw.

MONAI dictionary transforms; they compose with any other of MONAI's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable
from torch import Tensor

from medseg.data.draws import (
    check_factors,
    check_interval,
    check_probability,
    draw_factor,
    plain,
    resampled_axes,
)
from medseg.data.resampling import Matrix, centre_box, resample
from medseg.errors import DataError

STEP_DEG = 5.0
"""Distance of the angles tried to find the largest reach."""


class RandSpatiald(MapTransform, Randomizable):
    """Rotate and scale about the centre and cut the patch out, in one resampling.

    Rotation is in millimetres, so that organs keep their shape on anisotropic grids. When nothing is
    drawn the patch is cut out of the source unchanged. Points outside the source repeat its border;
    with a source of `source_size` voxels there are none.

    Args:
        keys: What is transformed, each (C, I, J[, K]), all of one spatial size.
        patch_size: Voxels of the result along each spatial axis.
        label_keys: Those of `keys` that hold labels: nearest neighbour, dtype kept. Others become float32.
        spacing_mm: Voxel size along each axis; None: isotropic.
        rotate_prob: Probability to rotate.
        rotation_deg: Largest angle about each axis, either way, drawn uniformly.
        scale_prob: Probability to scale.
        scale: Least and largest magnification; above 1 organs appear larger.
        scale_axes_apart: Draw the magnification of each axis for itself.

    Reference:
        The distributions follow nnU-Net: Isensee et al. 2021, doi:10.1038/s41592-020-01008-z.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        *,
        patch_size: Sequence[int],
        label_keys: KeysCollection = ("label",),
        spacing_mm: Sequence[float] | None = None,
        rotate_prob: float = 0.2,
        rotation_deg: float = 30.0,
        scale_prob: float = 0.2,
        scale: Sequence[float] = (0.7, 1.4),
        scale_axes_apart: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.patch_size = tuple(int(n) for n in patch_size)
        self.label_keys = frozenset([label_keys] if isinstance(label_keys, str) else label_keys)
        self.spacing_mm = tuple(spacing_mm or [1.0] * len(self.patch_size))[: len(self.patch_size)]
        self.rotate_prob = check_probability("rotate_prob", rotate_prob)
        self.rotation_deg = check_interval("rotation_deg", (0.0, rotation_deg), within=(0.0, 180.0))[1]
        self.scale_prob = check_probability("scale_prob", scale_prob)
        self.scale = check_factors("scale", scale)
        self.scale_axes_apart = scale_axes_apart
        axes = resampled_axes(self.patch_size, self.spacing_mm)
        self.axes = axes if len(axes) > 1 else ()  # a rod has nothing to turn

    @property
    def source_size(self) -> tuple[int, ...]:
        """The smallest source that covers every possible draw."""
        limit = self.rotation_deg if self.rotate_prob else 0.0
        angles = np.linspace(-limit, limit, 1 + 2 * math.ceil(limit / STEP_DEG))
        turns = (
            np.stack(np.meshgrid(*[angles] * len(self._planes), indexing="ij"), axis=-1) if self.axes else np.zeros(0)
        )
        zoom = self.scale[0] if self.scale_prob else 1.0
        # The reach is a wave in each angle: between those tried it can rise no further than this.
        slack = math.cos(math.radians(STEP_DEG / 2)) ** -len(self._planes) if limit else 1.0
        matrices = slack * self._matrix(turns, [zoom] * len(self.axes))
        margin = self._margin(matrices.reshape(-1, *matrices.shape[-2:]))
        return tuple(
            n + 2 * max(0, m) if d in self.axes else n
            for d, (n, m) in enumerate(zip(self.patch_size, margin, strict=True))
        )

    def randomize(self, data: Any = None) -> Matrix | None:
        """Draw the step in the source, in voxels, for a step of one voxel along each axis of the patch.

        Returns:
            (D, D) for D spatial axes; None: neither rotated nor scaled.
        """
        rotates, scales = self.R.random_sample() < self.rotate_prob, self.R.random_sample() < self.scale_prob
        if not self.axes or not (rotates or scales):
            return None
        turn, zoom = [0.0] * len(self._planes), [1.0] * len(self.axes)
        if rotates:
            turn = [self.R.uniform(-self.rotation_deg, self.rotation_deg) for _ in turn]
        if scales and self.scale_axes_apart:
            zoom = [draw_factor(self.R, self.scale) for _ in zoom]
        elif scales:
            zoom = [draw_factor(self.R, self.scale)] * len(zoom)
        return self._matrix(turn, zoom)

    def drawn_source_size(self) -> tuple[int, ...]:
        """Draw, and tell the source that this draw needs; never less than the patch."""
        matrix = self.randomize()
        if matrix is None:
            return self.patch_size
        return tuple(n + 2 * max(0, m) for n, m in zip(self.patch_size, self._margin(matrix), strict=True))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        sources = {key: plain(result[key]) for key in self.key_iterator(result)}
        matrix = self.randomize()
        margins = (0,) * len(self.patch_size) if matrix is None else self._margin(matrix)
        for key, source in sources.items():
            # Converted after cutting: what lies outside the patch's reach costs nothing.
            cut = centre_box(source, self.patch_size, margins)
            sources[key] = (cut if key in self.label_keys else cut.float()).contiguous()
        if matrix is not None:
            sources = resample(sources, matrix, label_keys=self.label_keys, axes=self.axes, patch_size=self.patch_size)
        return {**result, **sources}

    @property
    def _planes(self) -> list[tuple[int, int]]:
        return list(itertools.combinations(self.axes, 2))

    def _matrix(self, turns: Sequence[float] | Matrix, zoom: Sequence[float]) -> Matrix:
        """Angles in degrees (…, planes) and a magnification for each of `axes` as matrices (…, D, D) in voxels."""
        radians = np.radians(turns)
        cos, sin = np.cos(radians), np.sin(radians)
        identity = np.eye(len(self.patch_size))
        matrix = identity
        for plane, (a, b) in enumerate(self._planes):
            rotation = np.tile(identity, (*radians.shape[:-1], 1, 1))
            rotation[..., a, a] = rotation[..., b, b] = cos[..., plane]
            rotation[..., a, b], rotation[..., b, a] = -sin[..., plane], sin[..., plane]
            matrix = matrix @ rotation
        mm, step = np.array(self.spacing_mm), np.ones(len(identity))
        step[list(self.axes)] /= zoom
        return matrix * (mm * step) / mm[:, None]

    def _margin(self, matrix: Matrix) -> tuple[int, ...]:
        """Voxels by which the source of one or the worst of several matrices extends beyond the patch on either side.

        Negative if it needs less than the patch.
        """
        half = (np.array(self.patch_size) - 1) / 2
        reach = (np.abs(matrix) @ half).reshape(-1, len(half)).max(axis=0) - half
        return tuple(math.ceil(r - 1e-9) for r in reach)


class RandFlipLabelsd(MapTransform, Randomizable):
    """Mirror along each axis by chance; a left-right flip exchanges left and right labels.

    Args:
        keys: What is mirrored, each (C, I, J[, K]).
        label_keys: Those of `keys` that hold labels.
        prob: Probability for each axis.
        axes: Spatial axes that may be mirrored; None: all.
        pairs: Left and right label of each paired organ.
        left_right_axis: The spatial axis from left to right; 0 in RAS.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        *,
        label_keys: KeysCollection = ("label",),
        prob: float = 0.5,
        axes: Sequence[int] | None = None,
        pairs: Sequence[Sequence[int]] = (),
        left_right_axis: int = 0,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.label_keys = frozenset([label_keys] if isinstance(label_keys, str) else label_keys)
        self.prob = check_probability("prob", prob)
        self.axes = None if axes is None else frozenset(axes)
        self.pairs = tuple((int(left), int(right)) for left, right in pairs)
        self.left_right_axis = left_right_axis

    def randomize(self, data: int) -> tuple[int, ...]:
        """Draw which of `data` spatial axes are mirrored."""
        drawn = [axis for axis in range(data) if self.R.random_sample() < self.prob]
        return tuple(axis for axis in drawn if self.axes is None or axis in self.axes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        arrays = {key: plain(result[key]) for key in self.key_iterator(result)}
        flipped = self.randomize(next(iter(arrays.values())).ndim - 1)
        for key, array in arrays.items():
            if flipped:
                array = array.flip([1 + axis for axis in flipped])
            if self.left_right_axis in flipped and self.pairs and key in self.label_keys:
                array = swap_labels(array, self.pairs)
            result[key] = array
        return result


def swap_labels(label: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Exchange the two labels of each pair; every other value stays."""
    top = int(label.max())
    if int(label.min()) < 0 or top > 65_535:
        raise DataError("E-LABELS", f"labels {int(label.min())} to {top}; expected 0 to 65535; renumber them")
    table = torch.arange(max(top, *itertools.chain(*pairs)) + 1)
    for left, right in pairs:
        table[left], table[right] = right, left
    # One look-up a voxel, however many pairs: comparing with each of 20 pairs would cost 40 passes.
    return table.to(label.dtype).index_select(0, label.reshape(-1).int()).view(label.shape)
