"""Where voxels lie in the patient: grids in RAS millimetres, and arrays that carry one.

Voxel (i, j, k) of a volume lies at ``affine @ (i, j, k, 1)`` millimetres towards the patient's
Right, Anterior and Superior being positive (RAS+, as NIfTI and MONAI have it). ITK and DICOM use
LPS+; `Geometry.lps` and `Geometry.from_lps` are the only places that cross over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from medseg.errors import GeometryError

Array = npt.NDArray[np.float64]

RAS_FROM_LPS: Array = np.diag([-1.0, -1.0, 1.0])
"""ITK and DICOM point x to the Left and y to the Posterior; both turn round in RAS."""

AFFINE_TOLERANCE = 1e-3
"""Largest difference between affine entries (mm per voxel, mm) that still counts as the same grid."""

SHEAR_TOLERANCE = 1e-3
"""Largest cosine between two voxel axes that still counts as a right angle."""

FACE_TOLERANCE_MM = 1e-3
"""Largest distance between two grids' outer corners that still counts as the same field of view."""

_CODES = (("L", "R"), ("P", "A"), ("I", "S"))


@dataclass(frozen=True, eq=False)
class Geometry:
    """A voxel grid.

    Args:
        shape: Voxels along each axis, (I, J, K) or (I, J).
        affine: (4, 4), voxel index to RAS millimetres. A 2D grid keeps its third axis for the
            thickness, which nothing reads.

    Raises:
        GeometryError: If the affine is not finite or is singular.
    """

    shape: tuple[int, ...]
    affine: Array

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)  # a copy: a frozen object owns its numbers
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError("E-AFFINE", f"affine {affine.tolist()}; it must be 4 × 4 and finite")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise GeometryError(
                "E-AFFINE", f"affine {affine.tolist()} is singular: two axes coincide or a spacing is 0"
            )
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @classmethod
    def from_spacing(cls, shape: Sequence[int], spacing_mm: Sequence[float]) -> Geometry:
        """An axis-aligned RAS grid whose first voxel lies at the origin."""
        return cls(tuple(shape), np.diag([*spacing_mm, *[1.0] * (4 - len(spacing_mm))]))

    @classmethod
    def from_lps(
        cls, shape: Sequence[int], *, origin: Sequence[float], spacing: Sequence[float], direction: Sequence[float]
    ) -> Geometry:
        """From ITK's terms: origin and direction (row-major, 9 or 4 numbers) in LPS."""
        n = len(spacing)
        affine = np.eye(4)
        affine[:n, :n] = np.reshape(direction, (n, n)) * np.asarray(spacing)
        affine[:n, 3] = origin
        affine[:3] = RAS_FROM_LPS @ affine[:3]
        return cls(tuple(shape), affine)

    def lps(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """Origin, spacing and direction (row-major) as ITK wants them.

        Raises:
            GeometryError: If a 2D grid lies where ITK's two coordinates cannot say it does.
        """
        n = self.spatial_dims
        out_of_plane = self.affine[2, [0, 1, 3]]
        if n == 2 and np.abs(out_of_plane).max() > AFFINE_TOLERANCE:
            raise GeometryError(
                "E-PLANE",
                f"a picture whose axes and origin lie {', '.join(f'{mm:g}' for mm in out_of_plane)} mm out of the plane "
                "z = 0, where two coordinates cannot say so; write .nii.gz, or a volume of one slice",
            )
        lps = RAS_FROM_LPS @ self.affine[:3]
        spacing = np.asarray(self.spacing_mm)
        return tuple(lps[:n, 3]), tuple(spacing), tuple((lps[:n, :n] / spacing).ravel())

    @property
    def spatial_dims(self) -> int:
        return len(self.shape)

    @cached_property
    def spacing_mm(self) -> tuple[float, ...]:
        """Voxel size along each axis."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0)[: self.spatial_dims])

    @property
    def num_voxels(self) -> int:
        return math.prod(self.shape)

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel; the determinant, so that sheared grids are right too."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    @cached_property
    def orientation(self) -> str:
        """Direction in which each axis grows, e.g. ``"LPS"``: the closest anatomical one."""
        axes, signs = self._anatomical_axes()
        return "".join(_CODES[axis][sign > 0] for axis, sign in zip(axes, signs, strict=True))

    @property
    def is_orthogonal(self) -> bool:
        """Whether the voxel axes stand at right angles (a gantry tilt does not)."""
        return self._largest_cosine < SHEAR_TOLERANCE

    @property
    def tilt_deg(self) -> float:
        """How far the voxel axes are off the right angle, at most."""
        return math.degrees(math.asin(min(1.0, self._largest_cosine)))

    @property
    def _largest_cosine(self) -> float:
        """Between two voxel axes."""
        unit = self._axes / self.spacing_mm
        return float(np.abs(unit.T @ unit - np.eye(self.spatial_dims)).max())

    def matches(self, other: Geometry, tolerance: float = AFFINE_TOLERANCE) -> bool:
        """Whether both are the same grid."""
        return self.shape == other.shape and bool(np.abs(self.affine - other.affine).max() <= tolerance)

    def shares_field_of_view(self, other: Geometry) -> bool:
        """Whether both grids have parallel axes and the same outer faces, whatever their voxels."""
        if self.spatial_dims != other.spatial_dims:
            return False
        distance = np.linalg.norm(self._corners_mm() - other._corners_mm(), axis=1)
        return bool(distance.max() <= FACE_TOLERANCE_MM)

    def share_covered_by(self, other: Geometry) -> float:
        """Share of this grid's field of view that lies within another's, told from a few thousand points."""
        steps = [np.linspace(0, n - 1, min(n, 16)) for n in self.shape]
        index = np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, self.spatial_dims)
        world = index @ self._axes.T + self.affine[:3, 3]
        if self.spatial_dims != other.spatial_dims:
            return 0.0
        place = (world - other.affine[:3, 3]) @ np.linalg.pinv(other._axes).T
        inside = (place > -0.5 - 1e-6) & (place < np.array(other.shape) - 0.5 + 1e-6)
        return float(inside.all(axis=1).mean())

    def axes_to(self, orientation: str) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """How to transpose and then flip an array of this grid to bring it to an orientation.

        Returns:
            The axes of this grid in their new order, and for each new axis whether it is reversed.
        """
        if self.spatial_dims == 2:
            return (0, 1), (False, False)  # a picture has no patient axes to turn
        axes, signs = self._anatomical_axes()
        order, flips = [], []
        for letter in orientation:
            wanted = next(a for a, pair in enumerate(_CODES) if letter in pair)
            order.append(axes.index(wanted))
            flips.append((signs[order[-1]] > 0) != (letter == _CODES[wanted][1]))
        return tuple(order), tuple(flips)

    def oriented(self, orientation: str) -> Geometry:
        """This grid with its axes permuted and flipped to the closest orientation; voxels stay where they are."""
        order, flips = self.axes_to(orientation)
        move = np.eye(4)
        for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
            move[:3, new] = 0
            move[old, new] = -1 if flip else 1
            if flip:
                move[old, 3] = self.shape[old] - 1
        return Geometry(tuple(self.shape[old] for old in order), self.affine @ move)

    def resampled(self, spacing_mm: Sequence[float]) -> Geometry:
        """A grid over the same field of view with (almost) another spacing.

        The outer faces of the volume stay; the number of voxels is rounded, and the spacing is what
        then fills the field of view exactly, so nothing is cropped and nothing hangs over.
        """
        old = np.asarray(self.spacing_mm)
        shape = [max(1, round(n * o / s)) for n, o, s in zip(self.shape, old, spacing_mm, strict=True)]
        scale = np.ones(3)
        scale[: self.spatial_dims] = np.asarray(self.shape) / shape
        affine = self.affine.copy()
        affine[:3, :3] *= scale
        affine[:3, 3] += self.affine[:3, :3] @ ((scale - 1) / 2)
        return Geometry(tuple(shape), affine)

    def straightened(self) -> Geometry:
        """The smallest orthogonal grid of the same spacing that covers this one (for sheared scans)."""
        spacing = np.asarray(self.spacing_mm)
        u, _, vt = np.linalg.svd(self._axes / spacing, full_matrices=False)
        unit = u @ vt  # the closest orthogonal axes; of a picture, in its own plane
        index = (self._corners_mm() - self.affine[:3, 3]) @ unit / spacing
        low, high = index.min(0), index.max(0)
        affine = self.affine.copy()
        affine[:3, : self.spatial_dims] = unit * spacing
        affine[:3, 3] += unit * spacing @ (low + 0.5)
        return Geometry(tuple(math.ceil(n - 1e-6) for n in high - low), affine)

    def to_dict(self) -> dict[str, list[float] | list[list[float]]]:
        return {"shape": list(self.shape), "affine": self.affine.tolist()}

    @property
    def _axes(self) -> Array:
        """Millimetres from voxel to voxel along each axis, (3, D)."""
        return self.affine[:3, : self.spatial_dims]

    def _corners_mm(self) -> Array:
        """The outer corners of the outer voxels, (2 ** D, 3)."""
        corners = np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in self.shape], indexing="ij"), -1)
        return corners.reshape(-1, self.spatial_dims) @ self._axes.T + self.affine[:3, 3]

    def _anatomical_axes(self) -> tuple[list[int], list[int]]:
        """For each voxel axis the anatomical axis closest to it, none twice, and its sign."""
        direction = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        axes, signs = [-1] * 3, [0] * 3
        left = np.abs(direction)
        for _ in range(3):  # the clearest axis first, so that oblique scans resolve without a clash
            anatomical, voxel = np.unravel_index(int(np.argmax(left)), left.shape)
            axes[voxel] = int(anatomical)
            signs[voxel] = 1 if direction[anatomical, voxel] > 0 else -1
            left[anatomical, :] = -1
            left[:, voxel] = -1
        n = self.spatial_dims
        return axes[:n], signs[:n]


@dataclass(frozen=True, eq=False)
class Volume:
    """An image or a label map with its grid.

    Args:
        array: (C, I, J[, K]), in the order of the grid's axes.
        geometry: The grid.
        modalities: What made each channel, in DICOM's words (``"CT"``), where the file says it.
        shows_text: The file says that its picture itself names the patient (BurnedInAnnotation).
        frame_of_reference_uid: What its place refers to, in DICOM's words, where the file says it.
    """

    array: npt.NDArray[np.generic]
    geometry: Geometry
    modalities: tuple[str | None, ...] = ()
    shows_text: bool = False
    frame_of_reference_uid: str | None = None

    def __post_init__(self) -> None:
        if self.array.shape[1:] != self.geometry.shape:
            raise GeometryError("E-SHAPE", f"array {self.array.shape} (C, I, J, K) on a grid of {self.geometry.shape}")

    def oriented(self, orientation: str) -> Volume:
        """The same voxels in another axis order (a view, no resampling)."""
        order, flips = self.geometry.axes_to(orientation)
        array = self.array.transpose(0, *[axis + 1 for axis in order])
        array = array[(slice(None), *[slice(None, None, -1 if flip else 1) for flip in flips])]
        return replace(self, array=array, geometry=self.geometry.oriented(orientation))
