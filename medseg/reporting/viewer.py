"""NiiVue in a page, with the scans it shows: cropped around the organs, in 256 gray values, so that the page stays small."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.geometry import Geometry
from medseg.labels import Labels
from medseg.reporting.overlay import COLORS
from medseg.reporting.page import asset, section
from medseg.reporting.scene import Scene, box_around, organ_numbers

Voxels = npt.NDArray[Any]

MARGIN_MM = 20.0
MAX_VOXELS = 4_000_000
"""Of a crop; coarser if there are more."""

FINE_VOXELS = 1_500_000
"""A small crop is refined up to this, for the outlines are drawn a voxel wide."""

FINEST = 3
MAX_BYTES = 4_000_000
"""Of one case, as it stands in the page."""

LARGEST_LEGEND = 24


@dataclass(frozen=True)
class Shown:
    """A case of the viewer.

    Args:
        content: What the page's program shows of it.
        name: What its button says.
        detail: More about it.
    """

    content: Mapping[str, Any]
    name: str
    detail: str = ""


def shown(scene: Scene, labels: Labels, name: str, detail: str = "") -> Shown:
    """A scene as the viewer takes it; the scene itself, which is large, is no longer needed.

    Args:
        scene: A volume.
        labels: What is drawn in it.
        name: What its button says.
        detail: More about it.
    """
    return Shown(_content(scene, labels), name, detail)


def viewer_section(cases: Sequence[Shown], labels: Labels, *, explanation: str = "") -> str:
    """The viewer with what one can do in it; empty where there is no case.

    Args:
        cases: Volumes; the first is shown at once.
        labels: What is drawn in them.
        explanation: Plain text, which cases these are.
    """
    if not cases:
        return ""
    how = (
        "As radiologists look: the patient’s right is at the left of the picture. A click moves the cross, the wheel "
        "goes through the slices, dragging with the right button sets the window. The scans are cropped around the "
        "organs and simplified, for this page only."
    )
    return section("Look at the scans", viewer_html(cases, labels), explanation=f"{escape(explanation)} {how}".strip())


def viewer_html(cases: Sequence[Shown], labels: Labels) -> str:
    """The viewer with its cases, its program included.

    Args:
        cases: Volumes; the first is shown at once.
        labels: What is drawn in them.
    """
    colors = [COLORS[n % len(COLORS)] for n in range(len(labels.organ_values))]
    has_reference = any("reference" in case.content["layers"] for case in cases)
    buttons = "".join(
        f'<button type="button" data-case="{n}" aria-pressed="{"true" if n == 0 else "false"}" '
        f'title="{escape(case.detail)}">{escape(case.name)}</button>'
        for n, case in enumerate(cases)
    )
    reference = '<label><input type="checkbox" name="reference" checked> expert (white line)</label>'
    entries = "".join(
        f'<li><span style="background:{color}"></span>{escape(organ)}</li>'
        for color, organ in list(zip(colors, labels.organ_values, strict=True))[:LARGEST_LEGEND]
    )
    if has_reference:
        entries += '<li><span class="outline"></span>expert</li>'
    return f"""<div class="viewer" id="viewer">
<div class="controls">
<fieldset><legend>Case</legend>{buttons}</fieldset>
<fieldset><legend>Show</legend>
<label><input type="checkbox" name="prediction" checked> network (color)</label>
{reference if has_reference else ""}
<label>opacity <input type="range" name="opacity" min="0" max="100" value="35"></label></fieldset>
</div>
<div class="stage">
<canvas tabindex="0" aria-label="Scan in three planes with the segmentation drawn on it"></canvas>
<p class="message" role="status">Starting the viewer …</p>
</div>
<ul class="legend">{entries}</ul>
</div>
<script type="application/json" id="viewer-colors">{json.dumps([_rgb(color) for color in colors])}</script>
<script type="application/json" id="viewer-cases">{json.dumps([case.content for case in cases])}</script>
<script>{inline_script(asset("niivue.umd.js"))}</script>
<script>{inline_script(asset("viewer.js"))}</script>"""


def inline_script(program: str) -> str:
    """A program as it may stand within ``<script>``: nothing in it ends that element."""
    return program.replace("</script", r"<\/script").replace("<!--", r"<\!--")


def _content(scene: Scene, labels: Labels) -> dict[str, Any]:
    """The volumes of a scene in base64, and the place to look at first."""
    maps = {"prediction": organ_numbers(scene.prediction, labels)}
    if scene.reference is not None:
        maps["reference"] = organ_numbers(scene.reference, labels)
    box = box_around(list(maps.values()), scene.geometry.spacing_mm, MARGIN_MM)
    geometry = _cropped(scene.geometry, box)
    image, maps = scene.image[box], {name: label[box] for name, label in maps.items()}
    target = _grid(geometry, math.prod(geometry.shape))
    while True:
        layers = {"image": _encoded(_resampled(image, geometry, target), target, scene.window)}
        for name, label in maps.items():
            layers[name] = _encoded(_nearest(label, target.shape), target)
        size = sum(len(content) for content in layers.values())
        if size <= MAX_BYTES:
            break
        target = _coarser(target, 1.1 * (size / MAX_BYTES) ** (1 / 3))
    return {"layers": layers, "center": _center(maps.get("reference"), maps["prediction"], geometry)}


def _grid(geometry: Geometry, num_voxels: int) -> Geometry:
    """A coarser grid where there are too many voxels, a finer one where there are few."""
    if num_voxels > MAX_VOXELS:
        return _coarser(geometry, (num_voxels / MAX_VOXELS) ** (1 / 3))
    factor = min(FINEST, int((FINE_VOXELS / num_voxels) ** (1 / 3)))
    return geometry.resampled([s / factor for s in geometry.spacing_mm]) if factor > 1 else geometry


def _coarser(geometry: Geometry, factor: float) -> Geometry:
    """Over the same field of view with fewer voxels, the finest axes first: slices are thick enough as they are."""
    spacing = np.array(geometry.spacing_mm)
    wanted = geometry.spacing_mm
    for mm in np.geomspace(spacing.min(), spacing.max() * factor, 200):
        wanted = tuple(np.maximum(spacing, mm))
        if math.prod(wanted) >= math.prod(spacing) * factor**3:
            break
    return geometry.resampled(wanted)


def _resampled(image: Voxels, source: Geometry, target: Geometry) -> Voxels:
    import torch

    from medseg.data.resample import resample_image

    return resample_image(torch.from_numpy(np.ascontiguousarray(image))[None], source, target)[0].numpy()


def _nearest(label: Voxels, shape: Sequence[int]) -> Voxels:
    """A label map with other voxels over the same field of view; each is that of the old one at its center."""
    for axis, (old, new) in enumerate(zip(label.shape, shape, strict=True)):
        label = label.take(((np.arange(new) + 0.5) * old / new).astype(int).clip(0, old - 1), axis)
    return label


def _cropped(geometry: Geometry, box: Sequence[slice]) -> Geometry:
    affine = geometry.affine.copy()
    affine[:3, 3] += affine[:3, : len(box)] @ [part.start for part in box]
    return Geometry(tuple(part.stop - part.start for part in box), affine)


def _encoded(array: Voxels, geometry: Geometry, window: tuple[float, float] | None = None) -> str:
    """A .nii.gz in base64, one byte a voxel; an image in 256 steps that reach a little beyond its window."""
    import nibabel as nib

    if window is None:
        image = nib.Nifti1Image(array.astype(np.uint8), geometry.affine)
        image.header.set_intent("label")  # NiiVue outlines nothing else
    else:
        beyond = (window[1] - window[0]) / 4
        stored = array.clip(window[0] - beyond, window[1] + beyond)
        image = nib.Nifti1Image(stored.astype(np.float32), geometry.affine)
        image.set_data_dtype(np.uint8)
        image.header["cal_min"], image.header["cal_max"] = window
    image.header.set_xyzt_units("mm")
    from isal import igzip

    return base64.b64encode(igzip.compress(image.to_bytes(), compresslevel=3)).decode()


def _center(reference: Voxels | None, prediction: Voxels, geometry: Geometry) -> list[float]:
    """RAS millimetres of the voxel where most of the organs is to be seen along every axis."""
    drawn = prediction if reference is None or not reference.any() else reference
    if not drawn.any():
        index = [n / 2 for n in geometry.shape]
    else:
        where = np.nonzero(drawn)
        index = [_middle_of_most(np.bincount(along)) for along in where]
    return [float(mm) for mm in (geometry.affine @ [*index, 1.0])[:3]]


def _middle_of_most(areas: Voxels) -> float:
    """Not the first of equal slices: that is an organ's border, where an outline covers all of it."""
    most = np.flatnonzero(areas == areas.max())
    return float(most[len(most) // 2])


def _rgb(color: str) -> list[int]:
    return [int(color[n : n + 2], 16) for n in (1, 3, 5)]
