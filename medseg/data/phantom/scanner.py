"""The scanner: a patient's parts painted slab by slab on a grid, deformed, with partial volume and noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.data.phantom.atlas import Part, keyed_rng
from medseg.data.phantom.patient import Patient, patient
from medseg.data.phantom.solids import Array, SmoothField
from medseg.data.phantom.tissues import Block
from medseg.geometry import Geometry

_SLAB_VOXELS = 2**20  # rendered at once, in about 100 MB of working memory
_TEXTURES_MM = {"fine": 7.0, "coarse": 24.0, "strands": 11.0}
_WARPS_MM = ((85.0, 3.2), (38.0, 1.1))  # pitch and standard deviation of displacements: whole body, organs
_AIR_HU = -1000.0
_TABLE_HU = 40.0
_TABLE_MM = 3.0


@dataclass(frozen=True, eq=False)
class Scanner:
    """Renders a patient on a grid.

    Args:
        seed: For the noise.
        person: Whom.
        geometry: The grid; its axes run along the patient's.
        isocenter_mm: Where the middle of the patient's trunk lies, RAS.
        size: Of the patient relative to the atlas, along x, y and z.
        noise_hu: Standard deviation in the middle of the body.
    """

    seed: int
    person: Patient
    geometry: Geometry
    isocenter_mm: Array
    size: Array
    noise_hu: float

    @classmethod
    def random(cls, seed: int, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float] | None) -> Scanner:
        """The patient of a seed, somewhere in the scanner; without a spacing the body fills the field of view."""
        rng = keyed_rng(seed, "scanner")
        person = patient(seed)
        size = rng.normal(1, (0.05, 0.05, 0.03)).clip(0.88, 1.12)
        body_mm = 2 * size[:2] * (person.half_width, person.half_depth)
        zoom, height_mm = rng.uniform(1.08, 1.16), rng.uniform(205, 245)
        if spacing_mm is None:
            pixel_mm = float(zoom * np.max(body_mm / shape[:2]))
            spacing_mm = (pixel_mm, pixel_mm, height_mm / shape[2])
        signs = np.array([-1, rng.choice([-1, 1]), 1])  # LPS or LAS
        isocenter = rng.uniform((-25, -40, -900), (25, 40, -200))
        middle = isocenter + rng.normal((0, -6, 12), (4, 3, 6))
        affine = np.diag([*(signs * spacing_mm), 1.0])
        affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
        return cls(seed, person, Geometry(shape, affine), isocenter, size, rng.uniform(8, 15))

    @cached_property
    def textures(self) -> dict[str, SmoothField]:
        return {name: SmoothField.random(keyed_rng(self.seed, name), mm) for name, mm in _TEXTURES_MM.items()}

    @cached_property
    def warps(self) -> list[list[tuple[float, SmoothField]]]:
        """For each axis, fields and their amplitude in mm."""
        return [
            [
                (mm, SmoothField.random(keyed_rng(self.seed, "warp", axis, n), pitch))
                for n, (pitch, mm) in enumerate(_WARPS_MM)
            ]
            for axis in range(3)
        ]

    @cached_property
    def slices_per_voxel(self) -> int:
        """Thin slices rendered for each slice of the scan: as thin as pixels are wide, and an odd number."""
        width, _, thickness = self.geometry.spacing_mm
        return 2 * round((thickness / width - 1) / 2) + 1 if thickness > 2 * width else 1

    def slabs(self) -> Iterator[slice]:
        """The slices of the scan in runs that fit the working memory."""
        i, j, k = self.geometry.shape
        step = max(1, _SLAB_VOXELS // (i * j * self.slices_per_voxel))
        for start in range(0, k, step):
            yield slice(start, min(start + step, k))

    def scan(self, slab: slice) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
        """HU and organs (I, J, K) of some slices."""
        thin = self.slices_per_voxel
        i, j, _ = self.geometry.shape
        k = np.arange(slab.start * thin, slab.stop * thin) / thin - (thin - 1) / (2 * thin)
        indices = (np.arange(i), np.arange(j), k)
        canvas = _Canvas(self, *(self._position(axis, index) for axis, index in enumerate(indices)))
        canvas.draw_table()
        for part in self.person.parts:
            canvas.paint(part)
        hu = canvas.hu.reshape(i, j, -1, thin).mean(axis=-1)
        hu += self._noise(slab) * np.where(hu > -500, np.float32(1), np.float32(0.5))
        return np.rint(hu).clip(-1024, 3071).astype(np.int16), canvas.organs[:, :, thin // 2 :: thin]

    def _position(self, axis: int, index: npt.NDArray[Any]) -> Array:
        """Coordinates in the patient's frame: RAS mm from the middle of the trunk."""
        mm = index * self.geometry.affine[axis, axis] + self.geometry.affine[axis, 3] - self.isocenter_mm[axis]
        return np.asarray(mm, np.float32)

    def _noise(self, slab: slice) -> Array:
        """Grain as a reconstruction kernel leaves it, the same for a slice whichever slab it is in."""
        i, j, _ = self.geometry.shape
        pixels = 0.8 / self.geometry.spacing_mm[0]
        planes = []
        for k in range(slab.start, slab.stop):
            white = keyed_rng(self.seed, "noise", k).standard_normal((i, j), dtype=np.float32)
            sharp, soft = ndimage.gaussian_filter(white, pixels), ndimage.gaussian_filter(white, 2 * pixels + 0.5)
            grain = sharp - 0.6 * soft
            planes.append(grain * np.float32(self.noise_hu / grain.std()))
        return np.stack(planes, axis=-1)


class _Canvas:
    """A slab being painted.

    Args:
        scanner: Whose patient and textures are used.
        x: Coordinates (I,) in the patient's frame, in mm; y (J,) and z (K,) likewise.
    """

    def __init__(self, scanner: Scanner, x: Array, y: Array, z: Array) -> None:
        self.lines = (x, y, z)
        self.size = scanner.size
        self.table_y = -scanner.person.half_depth * scanner.size[1] - 14
        self.edge_mm = np.float32(scanner.geometry.spacing_mm[0])
        self.textures = {name: field.on_grid(x, y, z) for name, field in scanner.textures.items()}
        warps = [np.sum([mm * f.on_grid(x, y, z) for mm, f in fields], axis=0) for fields in scanner.warps]
        self.reach_mm = [float(np.abs(warp).max()) for warp in warps]
        open_grid = np.meshgrid(x, y, z, indexing="ij", sparse=True)
        self.atlas = [warp + line / np.float32(s) for warp, line, s in zip(warps, open_grid, self.size, strict=True)]
        self.height = open_grid[1]
        self.hu = np.full(warps[0].shape, _AIR_HU, np.float32)
        self.organs = np.zeros(warps[0].shape, np.uint8)

    def draw_table(self) -> None:
        """The curved top that the patient lies on."""
        x, y, _ = self.lines
        below = np.abs(self.table_y + np.square(x)[:, None] / 900 - y[None, :])
        coverage = ((_TABLE_MM / 2 - below) / self.edge_mm + 0.5).clip(0, 1)
        self.hu += ((_TABLE_HU - _AIR_HU) * coverage)[..., None]

    def paint(self, part: Part) -> None:
        """Lay a part over what is there; a voxel that its surface crosses gets its share of both."""
        box = self._box(part)
        if box is None:
            return
        x, y, z = (axis[box] for axis in self.atlas)
        depth = part.solid.depth(x, y, z)
        coverage = (depth / self.edge_mm + 0.5).clip(0, 1)
        organs, hu = self.organs[box], self.hu[box]
        if part.inside is not None:
            coverage *= organs == part.inside
        textures = {name: values[box] for name, values in self.textures.items()}
        height = np.broadcast_to(self.height, self.hu.shape)[box]
        hu += coverage * (part.tissue(Block(x, y, z, height, depth, textures)) - hu)
        organs[coverage > 0.5] = part.organ

    def _box(self, part: Part) -> tuple[slice, ...] | None:
        """The voxels that the part can reach; None if there are none."""
        box = []
        for axis, line in enumerate(self.lines):
            margin = self.reach_mm[axis] + self.edge_mm
            low, high = part.solid.low[axis] - margin, part.solid.high[axis] + margin
            reached = np.flatnonzero((line / self.size[axis] >= low) & (line / self.size[axis] <= high))
            if not len(reached):
                return None
            box.append(slice(int(reached[0]), int(reached[-1]) + 1))
        return tuple(box)
