"""Random deformations: each draws a displacement field, and one resampling serves image and label.

MONAI dictionary transforms for pictures and volumes. Displacements are in voxels, along the axes that may be
mixed (`draws.resampled_axes`): slices and the long side of anisotropic voxels stay as they are, and all
slices are deformed alike. Points outside the patch repeat its border.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable
from torch import Tensor

from medseg.data.draws import check_factors, check_interval, check_probability, draw_factor, plain, resampled_axes
from medseg.errors import DataError, WorkflowError

UNFOLDED_SPLINE = 0.4
"""Control points that move no further than this share of their distance fold nothing, in 2D and 3D (Choi and Lee)."""


class RandDeformd(MapTransform, Randomizable, abc.ABC):
    """A deformation that happens by chance.

    Args:
        keys: What is deformed, each (C, I, J[, K]) of `patch_size`; images become float32.
        patch_size: Voxels along each spatial axis.
        label_keys: Those of `keys` that hold labels: nearest neighbor, dtype kept.
        spacing_mm: Voxel size along each axis; None: isotropic.
        prob: Probability that a sample is deformed.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        *,
        patch_size: Sequence[int],
        label_keys: KeysCollection = ("label",),
        spacing_mm: Sequence[float] | None = None,
        prob: float,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.patch_size = tuple(int(n) for n in patch_size)
        self.label_keys = frozenset([label_keys] if isinstance(label_keys, str) else label_keys)
        self.spacing_mm = tuple(spacing_mm or [1.0] * len(self.patch_size))[: len(self.patch_size)]
        self.prob = check_probability("prob", prob)
        axes = resampled_axes(self.patch_size, self.spacing_mm)
        self.axes = axes if len(axes) > 1 else ()  # a rod has nothing to bend
        self.size = tuple(self.patch_size[axis] for axis in self.axes)

    @abc.abstractmethod
    def draw_field(self) -> Tensor:
        """Draw from ``self.R`` where in the source each voxel's value comes from.

        Returns:
            (D, *size) for the D of `axes`: the way to that place, in voxels.
        """

    def randomize(self, data: Any = None) -> Tensor | None:
        """Draw a field; None: the sample stays as it is."""
        if self.R.random_sample() >= self.prob or not self.axes:
            return None
        return self.draw_field()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        field = self.randomize()
        for key in self.key_iterator(result):
            is_label = key in self.label_keys
            array = plain(result[key])
            result[key] = array if is_label else array.float()
            if field is not None:
                result[key] = deform(result[key], field, axes=self.axes, is_label=is_label)
        return result


class Deformationsd(RandDeformd):
    """Several deformations at once: their displacements add up, so that nothing is interpolated twice.

    Args:
        parts: All for the same keys, patch and spacing. They draw in turn from this transform's stream.
    """

    def __init__(self, parts: Sequence[RandDeformd]) -> None:
        first = parts[0]
        super().__init__(
            first.keys,
            patch_size=first.patch_size,
            label_keys=tuple(first.label_keys),
            spacing_mm=first.spacing_mm,
            prob=1.0,
        )
        self.parts = tuple(parts)

    def randomize(self, data: Any = None) -> Tensor | None:
        fields = [part.set_random_state(state=self.R).randomize() for part in self.parts]
        drawn = [field for field in fields if field is not None]
        return torch.stack(drawn).sum(dim=0) if drawn else None

    def draw_field(self) -> Tensor:
        field = self.randomize()
        return torch.zeros(len(self.axes), *self.size) if field is None else field


class RandShiftScaleRotated(RandDeformd):
    """Shift, scale and rotate about the centre, rigidly in millimetres.

    Args:
        keys: As in `RandDeformd`, and so are `patch_size`, `label_keys`, `spacing_mm` and `prob`.
        patch_size: Voxels along each spatial axis.
        label_keys: Those that hold labels.
        spacing_mm: Voxel size along each axis; None: isotropic.
        prob: Probability that a sample is changed.
        shift: Largest shift along each axis, either way, as a share of the patch.
        scale: Least and largest magnification.
        rotation_deg: Largest angle in each plane, either way.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        *,
        patch_size: Sequence[int],
        label_keys: KeysCollection = ("label",),
        spacing_mm: Sequence[float] | None = None,
        prob: float = 0.5,
        shift: float = 0.0625,
        scale: Sequence[float] = (0.9, 1.1),
        rotation_deg: float = 45.0,
    ) -> None:
        super().__init__(keys, patch_size=patch_size, label_keys=label_keys, spacing_mm=spacing_mm, prob=prob)
        self.shift = check_interval("shift", (0.0, shift), within=(0.0, 1.0))[1]
        self.scale = check_factors("scale", scale)
        self.rotation_deg = check_interval("rotation_deg", (0.0, rotation_deg), within=(0.0, 180.0))[1]

    def draw_field(self) -> Tensor:
        dims = len(self.axes)
        matrix = np.eye(dims) / draw_factor(self.R, self.scale)
        for a, b in itertools.combinations(range(dims), 2):
            angle = math.radians(self.R.uniform(-self.rotation_deg, self.rotation_deg))
            turn = np.eye(dims)
            turn[a, a] = turn[b, b] = math.cos(angle)
            turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
            matrix = matrix @ turn
        mm = np.array([self.spacing_mm[axis] for axis in self.axes])
        step = torch.from_numpy(matrix * mm / mm[:, None] - np.eye(dims)).float()
        shift = torch.tensor([self.R.uniform(-self.shift, self.shift) * n for n in self.size])
        field = torch.einsum("ab,b...->a...", step, _from_centre(self.size))
        return field - shift.float().view(-1, *[1] * dims)


class RandElasticd(RandDeformd):
    """Bend smoothly: cubic B-splines between control points that each move by chance.

    Nothing folds or tears, for `magnitude` is held below what could.

    Args:
        keys: As in `RandDeformd`, and so are `patch_size`, `label_keys`, `spacing_mm` and `prob`.
        patch_size: Voxels along each spatial axis.
        label_keys: Those that hold labels.
        spacing_mm: Voxel size along each axis; None: isotropic.
        prob: Probability that a sample is bent.
        distance: Voxels between control points; fewer bend in smaller waves.
        magnitude: Least and largest value of how far, in voxels, control points move at most along each axis;
            up to `UNFOLDED_SPLINE` of `distance`.

    Reference:
        Rueckert et al. 1999, doi:10.1109/42.796284 (the deformation). Choi and Lee 2000, "Injectivity
        conditions of 2D and 3D uniform cubic B-spline functions" (the limit).
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        *,
        patch_size: Sequence[int],
        label_keys: KeysCollection = ("label",),
        spacing_mm: Sequence[float] | None = None,
        prob: float = 0.2,
        distance: float = 32.0,
        magnitude: Sequence[float] = (0.0, 8.0),
    ) -> None:
        super().__init__(keys, patch_size=patch_size, label_keys=label_keys, spacing_mm=spacing_mm, prob=prob)
        self.distance = check_interval("distance", (distance, distance), within=(1.0, 1e6))[0]
        self.magnitude = check_interval("magnitude", magnitude, within=(0.0, UNFOLDED_SPLINE * self.distance))

    def draw_field(self) -> Tensor:
        magnitude = self.R.uniform(*self.magnitude)
        weights = [_spline_weights(n, self.distance) for n in self.size]  # (voxels, control points) along each axis
        points = self.R.uniform(-magnitude, magnitude, (len(self.size), *(w.shape[1] for w in weights)))
        field = torch.from_numpy(points).float()
        for axis, weight in enumerate(weights, start=1):
            field = torch.tensordot(field, weight, dims=([axis], [1])).movedim(-1, axis)
        return field


class RandGridDistortiond(RandDeformd):
    """Stretch and squeeze the bands between the lines of a grid, each by chance; the patch's border stays.

    Args:
        keys: As in `RandDeformd`, and so are `patch_size`, `label_keys`, `spacing_mm` and `prob`.
        patch_size: Voxels along each spatial axis.
        label_keys: Those that hold labels.
        spacing_mm: Voxel size along each axis; None: isotropic.
        prob: Probability that a sample is distorted.
        bands: How many along each axis.
        limit: Largest change of a band's width in the source, as a share of it.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        *,
        patch_size: Sequence[int],
        label_keys: KeysCollection = ("label",),
        spacing_mm: Sequence[float] | None = None,
        prob: float = 0.2,
        bands: int = 5,
        limit: float = 0.3,
    ) -> None:
        super().__init__(keys, patch_size=patch_size, label_keys=label_keys, spacing_mm=spacing_mm, prob=prob)
        self.bands = int(check_interval("bands", (bands, bands), within=(1, 1000))[0])
        self.limit = check_interval("limit", (0.0, limit), within=(0.0, 0.99))[1]

    def draw_field(self) -> Tensor:
        along = []
        for n in self.size:
            widths = 1 + self.R.uniform(-self.limit, self.limit, self.bands)
            lines = np.concatenate([[0.0], np.cumsum(widths)]) / widths.sum() * (n - 1)
            voxels = np.arange(n)
            along.append(np.interp(voxels, np.linspace(0, n - 1, self.bands + 1), lines) - voxels)
        return torch.from_numpy(np.stack(np.meshgrid(*along, indexing="ij"))).float()


class RandOpticalDistortiond(RandDeformd):
    """Distort as a lens does, growing with the third power of the distance from the centre.

    Args:
        keys: As in `RandDeformd`, and so are `patch_size`, `label_keys`, `spacing_mm` and `prob`.
        patch_size: Voxels along each spatial axis.
        label_keys: Those that hold labels.
        spacing_mm: Voxel size along each axis; None: isotropic.
        prob: Probability that a sample is distorted.
        distortion: Least and largest displacement at the corners, as a share of their distance from the centre:
            above 0 the outer parts shrink (barrel), below 0 they grow (pincushion).
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        *,
        patch_size: Sequence[int],
        label_keys: KeysCollection = ("label",),
        spacing_mm: Sequence[float] | None = None,
        prob: float = 0.2,
        distortion: Sequence[float] = (-0.2, 0.2),
    ) -> None:
        super().__init__(keys, patch_size=patch_size, label_keys=label_keys, spacing_mm=spacing_mm, prob=prob)
        self.distortion = check_interval("distortion", distortion, within=(-0.33, 1.0))  # below -1/3 it folds

    def draw_field(self) -> Tensor:
        mm = torch.tensor([self.spacing_mm[axis] for axis in self.axes]).float().view(-1, *[1] * len(self.axes))
        away = _from_centre(self.size)
        squared = (away * mm).square().sum(dim=0)
        return away * (self.R.uniform(*self.distortion) * squared / squared.max())


class RandPiecewiseAffined(RandDeformd):
    """Move the nodes of a grid, each by chance, and the triangles (tetrahedra) between them linearly along.

    Args:
        keys: As in `RandDeformd`, and so are `patch_size`, `label_keys`, `spacing_mm` and `prob`.
        patch_size: Voxels along each spatial axis.
        label_keys: Those that hold labels.
        spacing_mm: Voxel size along each axis; None: isotropic.
        prob: Probability that a sample is changed.
        cells: How many along each axis.
        magnitude: Least and largest value of how far nodes move at most along each axis, as a share of a cell;
            up to 1/4 in 2D and 1/6 in 3D, beyond which triangles may fold.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        *,
        patch_size: Sequence[int],
        label_keys: KeysCollection = ("label",),
        spacing_mm: Sequence[float] | None = None,
        prob: float = 0.2,
        cells: int = 4,
        magnitude: Sequence[float] = (0.0, 0.15),
    ) -> None:
        super().__init__(keys, patch_size=patch_size, label_keys=label_keys, spacing_mm=spacing_mm, prob=prob)
        self.cells = int(check_interval("cells", (cells, cells), within=(1, 1000))[0])
        self.magnitude = check_interval("magnitude", magnitude, within=(0.0, 1 / (2 * max(2, len(self.axes)))))

    def draw_field(self) -> Tensor:
        dims, magnitude = len(self.size), self.R.uniform(*self.magnitude)
        nodes = self.R.uniform(-magnitude, magnitude, (dims, *[self.cells + 1] * dims))
        cell = np.array([(n - 1) / self.cells for n in self.size]).reshape(-1, *[1] * dims)
        return _between_nodes(torch.from_numpy(nodes * cell).float(), self.size)


def deform(array: Tensor, field: Tensor, *, axes: Sequence[int], is_label: bool) -> Tensor:
    """Take each voxel's value from where the field says.

    Args:
        array: (C, I, J[, K]); float32 unless it is a label map.
        field: (D, *size of `axes`), in voxels; the same for all positions along the other axes.
        axes: Two or three spatial axes, ascending.
        is_label: Nearest neighbor instead of linear interpolation.

    Returns:
        Of the same shape and type, contiguous; points outside the array repeat its border.
    """
    size = tuple(array.shape[1 + axis] for axis in axes)
    if field.shape != (len(axes), *size):
        raise DataError("E-PATCH", f"an array of {tuple(array.shape)} for a field of {tuple(field.shape)}")
    last = torch.tensor(size).view(-1, *[1] * len(axes)) - 1
    place = field + torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in size], indexing="ij"))
    grid = (2 * place / last - 1).flip(0).movedim(0, -1)  # grid_sample: -1 to 1, and the last axis first
    ends = range(-len(axes), 0)
    stack = array.movedim([1 + axis for axis in axes], list(ends))  # what is not deformed stands in front, as channels
    flat = stack.reshape(1, -1, *size)
    mode = "nearest" if is_label else "bilinear"
    found = F.grid_sample(flat.float(), grid[None], mode=mode, padding_mode="border", align_corners=True)
    return found.to(array.dtype).reshape(stack.shape).movedim(list(ends), [1 + axis for axis in axes]).contiguous()


def merged(parts: Sequence[Randomizable]) -> list[Randomizable]:
    """The same transforms, deformations that follow one another joined to one.

    Raises:
        WorkflowError: If such neighbors are for different keys.
    """
    joined: list[Randomizable] = []
    for is_deformation, group in itertools.groupby(parts, lambda part: isinstance(part, RandDeformd)):
        run: list[Any] = list(group)
        if not is_deformation or len(run) == 1:
            joined += run
            continue
        if len({(part.keys, part.label_keys) for part in run}) > 1:
            raise WorkflowError("E-AUGMENT-ORDER", "deformations in a row must be for the same keys")
        joined.append(Deformationsd(run))
    return joined


def _from_centre(size: Sequence[int]) -> Tensor:
    """(D, *size): each voxel's place, counted from the middle of the patch."""
    return torch.stack(torch.meshgrid(*[torch.arange(float(n)) - (n - 1) / 2 for n in size], indexing="ij"))


def _spline_weights(num_voxels: int, distance: float) -> Tensor:
    """What each control point adds to each voxel, (voxels, points); the first point lies outside, the second at 0."""
    num_points = math.floor((num_voxels - 1) / distance) + 4
    away = (torch.arange(float(num_voxels))[:, None] / distance - (torch.arange(float(num_points)) - 1)).abs()
    near = 2 / 3 - away**2 + away**3 / 2
    far = (2 - away).clamp(min=0) ** 3 / 6
    return torch.where(away < 1, near, far)


def _between_nodes(nodes: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation within the simplices that a cell's main diagonal and its edges span (Kuhn's).

    Args:
        nodes: Value of each node, (D, *[cells + 1] * D), the outer ones on the patch's border.
        size: Voxels along each axis.
    """
    cells = nodes.shape[1] - 1
    along = [torch.arange(float(n)) * (cells / max(1, n - 1)) for n in size]
    place = torch.stack(torch.meshgrid(*along, indexing="ij"))
    corner = place.floor().clamp(max=cells - 1)
    within, order = (place - corner).sort(dim=0, descending=True)  # from the corner first along the longest way
    strides = torch.tensor([(cells + 1) ** (len(size) - 1 - axis) for axis in range(len(size))])
    index = torch.einsum("a...,a->...", corner.long(), strides)
    values = nodes.flatten(1)
    here = values[:, index]
    result = here.clone()
    for way, axis in zip(within, order, strict=True):
        index = index + strides[axis]
        there = values[:, index]
        result += way * (there - here)
        here = there
    return result
