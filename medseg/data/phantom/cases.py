"""Synthetic scans with exact labels: single ones, and the folder of cases that a manifest names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from medseg.data.phantom.atlas import ORGANS, keyed_rng
from medseg.data.phantom.scanner import Scanner
from medseg.data.phantom.solids import Array, ellipsoid
from medseg.data.volume_io import write_volume
from medseg.errors import DataError
from medseg.files import remove_leftovers
from medseg.geometry import Geometry, Volume

LABELS: Mapping[str, Mapping[int, str]] = {
    "liver": {0: "background", 1: "liver", 2: "tumour"},
    "abdomen": dict(enumerate(ORGANS)),
}
"""The label maps that a CT can come with: that of the Decathlon's Task03, or every organ."""


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
    scanner = Scanner.random(seed, shape, spacing_mm)
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
    white, pink, purple = (
        np.array(c, np.float32)[:, None, None] for c in ((244, 240, 244), (226, 150, 190), (84, 48, 130))
    )
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


def _noise_2d(rng: np.random.Generator, shape: tuple[int, int], sigma: tuple[float, float]) -> Array:
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return smooth / np.float32(smooth.std())
