"""`medseg data`: what is there, converted, or made up."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType

from medseg.data import phantom
from medseg.data.checks import check_pair
from medseg.data.manifest import Manifest
from medseg.data.volume_io import is_drawn, is_series, read_geometry, read_label, read_volume, write_volume
from medseg.display import progress_bar
from medseg.errors import DataError
from medseg.files import remove_leftovers, write_atomically
from medseg.geometry import Geometry, Volume
from medseg.registry import did_you_mean

Result = dict[str, Any]

log = logging.getLogger("medseg")


def make_phantom(
    folder: Path,
    *,
    num_cases: int = 10,
    seed: int = 0,
    shape: tuple[int, int, int] = (96, 96, 64),
    labels: str = "liver",
) -> Result:
    """Write synthetic abdominal CTs with exact labels, and a manifest that a workflow can name.

    Called again after an interruption with the same arguments, it makes what is missing.

    Args:
        folder: Made if need be; it gets images/, labels/ and dataset.json.
        num_cases: How many.
        seed: Of the first case; the next ones count up from it.
        shape: Voxels of each scan, (I, J, K).
        labels: A key of `medseg.data.phantom.LABELS`.

    Returns:
        ``manifest, cases``.

    Raises:
        DataError: If the arguments are out of range, or the folder holds another data set.
    """
    spec = {"kind": "ct", "seed": seed, "cases": num_cases, "shape": list(shape), "labels": labels}
    if labels not in phantom.LABELS:
        raise DataError("E-PHANTOM", f"no label map is called {labels!r}{did_you_mean(labels, phantom.LABELS)}")
    manifest = folder / "dataset.json"
    content = json.dumps(_manifest(folder.resolve().name, spec), indent=2).encode() + b"\n"
    if manifest.exists():
        if manifest.read_bytes() != content:
            raise DataError("E-OUTPUT-EXISTS", "describes another data set; choose another folder", where=str(manifest))
    elif folder.exists() and any(folder.iterdir()):
        raise DataError("E-OUTPUT-EXISTS", "is not empty; choose another folder", where=str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(manifest, content)  # before the cases, so that a second call knows what the first one began
    with progress_bar() as bar:
        task = bar.add_task("making phantom cases", total=num_cases)
        phantom.make_cases(folder, spec=spec, on_case=lambda: bar.advance(task))
    return {"manifest": manifest, "cases": num_cases}


def list_scans(folder: Path) -> Result:
    """What a folder of DICOM holds: each series with what is wrong with it, and why other files are passed over.

    Args:
        folder: Searched recursively; or one file.

    Returns:
        ``rows``, see `medseg.data.dicom.listing.list_folder`.

    Raises:
        DataError: If it does not exist.
    """
    from medseg.data.dicom.listing import list_folder  # as only this command needs it

    return {"rows": list_folder(folder)}


def scan_table(result: Mapping[str, Any]) -> RenderableType:
    """What `list_scans` found, for people."""
    from medseg.data.dicom.listing import listing

    return listing(result["rows"])


def convert(
    source: Path,
    target: Path,
    *,
    image: Path | None = None,
    manifest: Path | None = None,
    resample: bool = False,
    force: bool = False,
    allow_missing_slices: bool = False,
) -> Result:
    """Write a scan or a label map, of whatever kind, as NIfTI, NRRD, MetaImage or PNG.

    It keeps its own grid, but for a sheared one (a tilted gantry), which other programs cannot open: that is
    straightened, and the label drawn on such a scan alike, so that both still match.

    Args:
        source: A file, or a DICOM folder (``folder#uid`` of several series), SEG, RTSTRUCT or folder of masks.
        target: Its suffix says as what.
        image: The scan that `source` belongs to; makes `source` a label map.
        manifest: Names the labels of a SEG or an RTSTRUCT; None: the numbers of its structures count.
        resample: Bring a label map that stands on another grid to the image's.
        force: Overwrite `target`, and convert a picture that may name the patient.
        allow_missing_slices: Interpolate slices that a series lacks.

    Returns:
        ``output``, ``shape``, ``spacing_mm``, ``orientation``; of a label map also ``labels`` (voxels of each value)
        and ``names`` (of the values that have one).

    Raises:
        DataError: If the source cannot be read or may name the patient, or the target exists.
        GeometryError: If a label map stands on another grid than its image, and may not be resampled.
    """
    if target.is_dir():
        raise DataError("E-OUTPUT-EXISTS", "is a folder; give the file to write", where=str(target))
    if target.exists() and not force:
        raise DataError("E-OUTPUT-EXISTS", "exists; add --force to overwrite it", where=str(target))
    names: dict[int, str] = {}
    if image is None:
        if resample:
            raise DataError("E-LABEL-IMAGE", "whose grid? Name the image with --image", where="--resample")
        volume = read_volume(source, allow_missing_slices=allow_missing_slices)
        if volume.shows_text and not force:
            raise DataError(
                "E-BURNED-IN",
                "says that its picture itself names the patient, and a converted file would not say so any more; "
                "blank the text first, or add --force and share nothing made of it",
                where=str(source),
            )
    else:
        labels = Manifest.load(manifest).labels if manifest else None
        volume = read_label(source, image=image, labels=labels)
        if not is_drawn(source):
            volume = _on_grid_of(image, volume, source, resample=resample)
        names = dict(labels.names) if labels else _structure_names(source)
    if not volume.geometry.is_orthogonal:
        volume = _straightened(volume, source, is_label=image is not None)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    write_volume(target, volume)
    grid = volume.geometry
    result: Result = {
        "output": str(target), "shape": list(grid.shape),
        "spacing_mm": [round(s, 6) for s in grid.spacing_mm], "orientation": grid.orientation,
    }  # fmt: skip
    if image is not None:
        result["labels"] = _voxels(volume)
        result["names"] = {value: names[value] for value in result["labels"] if value in names}
    return result


def conversion_text(result: Mapping[str, Any]) -> str:
    """What `convert` wrote, for people."""
    size, spacing = (" × ".join(f"{n:.4g}" for n in result[key]) for key in ("shape", "spacing_mm"))
    lines = [f"{result['output']}: {size} voxels of {spacing} mm, axes {result['orientation']}"]
    names = result.get("names", {})
    lines += [
        f"  {value} {names.get(value, 'background' if value == 0 else '')}".rstrip() + f"  {voxels:,} voxels"
        for value, voxels in result.get("labels", {}).items()
    ]
    return "\n".join(lines)


def _structure_names(source: Path) -> dict[int, str]:
    """What a SEG or an RTSTRUCT calls its structures; nothing of what has no names."""
    if not is_series(source):
        return {}
    from medseg.data.dicom.drawn import structure_names  # as only DICOM needs it

    return structure_names(source)


def _on_grid_of(image: Path, label: Volume, source: Path, *, resample: bool) -> Volume:
    """A label map on the grid of its image, where it may be brought there."""
    grid = read_geometry(image)
    if not resample:
        check_pair(Volume(np.broadcast_to(np.uint8(0), (1, *grid.shape)), grid), label, str(source))
    if label.geometry.matches(grid):
        return replace(label, geometry=grid)  # to the last digit, so that both are straightened alike
    moved = _resampled(label, grid, is_label=True)
    volumes = [{v: n * one.geometry.voxel_ml for v, n in _voxels(one).items() if v} for one in (label, moved)]
    told = ", ".join(f"label {value} {ml:.4g} → {volumes[1].get(value, 0):.4g} ml" for value, ml in volumes[0].items())
    log.warning("W-RESAMPLED %s: %s → %s voxels; %s", source, label.geometry.shape, grid.shape, told or "no label")
    return moved


def _straightened(volume: Volume, source: Path, *, is_label: bool) -> Volume:
    """On a grid with right angles that covers the sheared one."""
    grid = volume.geometry
    kind = "as a label map" if is_label else "as an image (of a label map, name its scan with --image)"
    log.warning(
        "W-STRAIGHTENED %s: axes %.1f° off the right angle (tilted gantry?); resampled %s to a straight grid, %s → %s voxels",
        source, grid.tilt_deg, kind, grid.shape, grid.straightened().shape,
    )  # fmt: skip
    return _resampled(volume, grid.straightened(), is_label=is_label)


def _resampled(volume: Volume, grid: Geometry, *, is_label: bool) -> Volume:
    """On another grid: images linearly, label maps by the vote of the voxels around; of the same type."""
    import torch  # takes seconds, and few conversions need it

    from medseg.data.resample import resample_image, resample_label

    if is_label:
        array = resample_label(torch.from_numpy(np.ascontiguousarray(volume.array)), volume.geometry, grid).numpy()
    else:
        array = resample_image(torch.from_numpy(volume.array.astype(np.float32)), volume.geometry, grid).numpy()
        array = np.rint(array) if volume.array.dtype.kind in "iu" else array
    return replace(volume, array=array.astype(volume.array.dtype), geometry=grid)


def _voxels(label: Volume) -> dict[int, int]:
    values, counts = np.unique(label.array, return_counts=True)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}


def _manifest(name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    files = [f"case_{n:03d}.nii.gz" for n in range(spec["cases"])]
    return {
        "name": name,
        "format": 1,
        "source": f"medseg phantom {json.dumps(spec)}",
        "labels": {str(value): organ for value, organ in phantom.LABELS[spec["labels"]].items()},
        "modality": {"0": "CT"},
        "training": [{"image": f"images/{file}", "label": f"labels/{file}"} for file in files],
    }
