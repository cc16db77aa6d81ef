"""Synthetic scans with exact labels: abdominal CT and microscopy-like pictures, made from nothing but a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.data.anatomy import ORGANS, Part, Patient, keyed_rng, patient
from medseg.data.nifti import write_volume
from medseg.data.solids import Array, SmoothField, ellipsoid
from medseg.data.tissues import Block
from medseg.errors import DataError
from medseg.files import remove_leftovers
from medseg.geometry import Geometry, Volume

Bytes = npt.NDArray[np.uint8]

LABELS: Mapping[str, Mapping[int, str]] = {
    "liver": {0: "background", 1: "liver", 2: "tumour"},
    "abdomen": dict(enumerate(ORGANS)),
}
"""The label maps that a CT can come with: that of the Decathlon's Task03, or every organ."""

_SLAB_VOXELS = 2**20  # rendered at once, in about 100 MB of working memory
_TEXTURES_MM = {"fine": 7.0, "coarse": 24.0, "strands": 11.0}
_WARPS_MM = ((85.0, 3.2), (38.0, 1.1))  # pitch and standard deviation of displacements: whole body, organs
_AIR_HU = -1000.0
_TABLE_HU = 40.0
_TABLE_MM = 3.0


@dataclass(frozen=True, eq=False)
class Phantom:
    """A synthetic scan.

    Args:
        image: CT in HU, int16 (1, I, J, K); a picture, uint8 (3, I, J).
        label: The truth at each voxel's center, uint8 (1, I, J[, K]).
        seed: What it was made from.
    """

    image: Volume
    label: Volume
    seed: int


def ct_case(
    seed: int,
    shape: tuple[int, int, int] = (96, 96, 64),
    *,
    spacing_mm: tuple[float, float, float] | None = None,
    labels: str = "liver",
) -> Phantom:
    """An abdominal CT of an individual that depends on the seed alone, whatever the grid.

    Position, contrast phase, noise and on-disk axes (LPS or LAS, the origin far from zero) vary with
    the seed too. Slabs are rendered one after another, so memory is that of the result.

    Args:
        seed: Not negative.
        shape: Voxels along each axis.
        spacing_mm: Voxel size; None: one that varies with the seed and lets the body fill the field of view.
        labels: A key of `LABELS`.

    Raises:
        DataError: If there is no such label map.
    """
    if labels not in LABELS:
        raise DataError("E-PHANTOM", f"no label map is called {labels!r}; known: {', '.join(LABELS)}")
    scanner = _Scanner.random(seed, shape, spacing_mm)
    value_of = np.arange(len(ORGANS), dtype=np.uint8)
    value_of[len(LABELS[labels]) :] = 0  # both maps begin with liver and tumour
    image = np.empty((1, *shape), np.int16, order="F")  # as files have it: slab after slab
    label = np.empty((1, *shape), np.uint8, order="F")
    for slab in scanner.slabs():
        hu, organs = scanner.scan(slab)
        image[0, :, :, slab] = hu
        label[0, :, :, slab] = value_of[organs]
    return Phantom(Volume(image, scanner.geometry), Volume(label, scanner.geometry), seed)


def picture(seed: int, shape: tuple[int, int] = (128, 128)) -> Phantom:
    """A stained tissue section in RGB: purple nuclei (label 1) among pink fibers and specks of the same stain.

    Args:
        seed: Not negative.
        shape: Pixels along each axis.
    """
    rng = keyed_rng(seed, "picture")
    x, y = (a.astype(np.float32)[..., None] for a in np.meshgrid(*map(np.arange, shape), indexing="ij"))
    z = np.zeros_like(x)
    fibers, chromatin = (_noise_2d(rng, shape, sigma) for sigma in ((6, 2.5), (1.2, 1.2)))
    stain = 0.10 + 0.05 * fibers
    label = np.zeros((1, *shape), np.uint8)
    specks, nuclei = (int(rng.uniform(*density) * math.prod(shape)) + 1 for density in ((1e-3, 3e-3), (2e-3, 4e-3)))
    for n in range(specks + nuclei):
        is_nucleus = n >= specks
        radii = rng.uniform(5, 9, 2) if is_nucleus else rng.uniform(1, 3, 2)
        center = (*rng.uniform(0, shape), 0.0)
        depth = ellipsoid(center, (*radii, math.inf), turn_degrees=rng.uniform(0, 180)).depth(x, y, z)[..., 0]
        depth += 0.6 * fibers
        coverage = (depth + 0.5).clip(0, 1)
        color = rng.uniform(0.45, 0.8) + 0.08 * chromatin + 0.12 * np.exp(-np.square(depth / 1.5))
        stain += (color - stain) * coverage
        if is_nucleus:
            label[0][depth > 0] = 1
    white, pink, purple = (np.array(c, np.float32)[:, None, None] for c in ((244, 240, 244), (226, 150, 190), (84, 48, 130)))
    eosin = (0.55 + 0.25 * fibers).clip(0, 1)
    rgb = (white + (pink - white) * eosin) * (1 - stain) + purple * stain
    rgb += rng.normal(0, 4, rgb.shape)
    geometry = Geometry.from_spacing(shape, (1.0, 1.0))
    return Phantom(Volume(rgb.clip(0, 255).astype(np.uint8), geometry), Volume(label, geometry), seed)


def make_cases(folder: Path, *, spec: Mapping[str, Any], on_case: Callable[[], None] | None = None) -> None:
    """Write the cases of a manifest's ``phantom`` entry: images/case_000.nii.gz and labels/case_000.nii.gz onwards.

    Cases that are there are kept. Each file appears whole or not at all and is the same whoever
    writes it, so processes may do this at the same time, and a killed one is simply run again.

    Args:
        folder: Made if need be.
        spec: ``{"kind": "ct", "seed": 0, "cases": 24, "shape": [96, 96, 64], "labels": "liver"}``; case n has
            the seed ``seed + n``.
        on_case: Called once for each case, made or kept.

    Raises:
        DataError: If the entry is not of this form.
    """
    seed, cases, shape, labels = _parse(spec)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder / name)
    for n in range(cases):
        image, label = (folder / name / f"case_{n:03d}.nii.gz" for name in ("images", "labels"))
        if not (image.exists() and label.exists()):
            case = ct_case(seed + n, shape, labels=labels)
            write_volume(image, case.image)
            write_volume(label, case.label)
        if on_case:
            on_case()


def _parse(spec: Mapping[str, Any]) -> tuple[int, int, tuple[int, int, int], str]:
    form = '{"kind": "ct", "seed": 0, "cases": 24, "shape": [96, 96, 64], "labels": "liver"}'
    try:
        i, j, k = map(int, spec["shape"])
        seed, cases, labels = int(spec["seed"]), int(spec["cases"]), spec.get("labels", "liver")
    except (KeyError, TypeError, ValueError):
        raise DataError("E-PHANTOM", f"phantom is {dict(spec)}; expected the form {form}") from None
    if spec.get("kind") != "ct" or labels not in LABELS or min(i, j, k, cases) < 1 or seed < 0:
        raise DataError("E-PHANTOM", f"phantom is {dict(spec)}; expected the form {form}")
    return seed, cases, (i, j, k), labels


@dataclass(frozen=True, eq=False)
class _Scanner:
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
    def random(
        cls, seed: int, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float] | None
    ) -> _Scanner:
        rng = keyed_rng(seed, "scanner")
        person = patient(seed)
        size = rng.normal(1, (0.05, 0.05, 0.03)).clip(0.88, 1.12)
        zoom, height_mm, z_mm = rng.uniform(1.08, 1.16), rng.uniform(205, 245), rng.normal(12, 6)
        if spacing_mm is None:
            pixel_mm = zoom * max(2 * person.half_width * size[0] / shape[0], 2 * person.half_depth * size[1] / shape[1])
            spacing_mm = (pixel_mm, pixel_mm, height_mm / shape[2])
        signs = np.array([-1, rng.choice([-1, 1]), 1])  # LPS or LAS
        isocenter = rng.uniform((-25, -40, -900), (25, 40, -200))
        middle = isocenter + (rng.normal(0, 4), rng.normal(-6, 3), z_mm)
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
            [(mm, SmoothField.random(keyed_rng(self.seed, "warp", axis, n), pitch)) for n, (pitch, mm) in enumerate(_WARPS_MM)]
            for axis in range(3)
        ]

    @property
    def slices_per_voxel(self) -> int:
        """Thin slices rendered for each slice of the scan: as thin as pixels are wide, and an odd number."""
        width, _, thickness = self.geometry.spacing_mm
        return 2 * round((thickness / width - 1) / 2) + 1 if thickness > 2 * width else 1

    def slabs(self) -> Iterator[slice]:
        i, j, k = self.geometry.shape
        step = max(1, _SLAB_VOXELS // (i * j * self.slices_per_voxel))
        for start in range(0, k, step):
            yield slice(start, min(start + step, k))

    def scan(self, slab: slice) -> tuple[npt.NDArray[np.int16], Bytes]:
        """HU and organs (I, J, K) of some slices."""
        thin = self.slices_per_voxel
        k = np.arange(slab.start * thin, slab.stop * thin) / thin - (thin - 1) / (2 * thin)
        x, y, z = (self._position(axis, index) for axis, index in enumerate((*map(np.arange, self.geometry.shape[:2]), k)))
        canvas = _Canvas(self, x, y, z)
        canvas.draw_table()
        for part in self.person.parts:
            canvas.paint(part)
        i, j, _ = canvas.hu.shape
        hu = canvas.hu.reshape(i, j, -1, thin).mean(axis=-1)
        hu += self._noise(slab) * (0.5 + 0.5 * (hu > -500))
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

    def __init__(self, scanner: _Scanner, x: Array, y: Array, z: Array) -> None:
        self.lines = (x, y, z)
        self.size = scanner.size
        self.table_y = -scanner.person.half_depth * scanner.size[1] - 14
        self.edge_mm = np.float32(scanner.geometry.spacing_mm[0])
        self.textures = {name: field.on_grid(x, y, z) for name, field in scanner.textures.items()}
        warps = [sum(np.float32(mm) * field.on_grid(x, y, z) for mm, field in fields) for fields in scanner.warps]
        self.reach_mm = [float(np.abs(warp).max()) for warp in warps]
        open_grid = np.meshgrid(x, y, z, indexing="ij", sparse=True)
        self.atlas = [warp + line / np.float32(s) for warp, line, s in zip(warps, open_grid, self.size, strict=True)]
        self.height = open_grid[1]
        self.hu = np.full(warps[0].shape, _AIR_HU, np.float32)
        self.organs = np.zeros(warps[0].shape, np.uint8)

    def draw_table(self) -> None:
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


def _noise_2d(rng: np.random.Generator, shape: tuple[int, int], sigma: tuple[float, float]) -> Array:
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return smooth / np.float32(smooth.std())
