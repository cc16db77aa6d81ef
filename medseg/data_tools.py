"""`medseg data`: what is there, converted, or made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType

from medseg.data import phantom
from medseg.data.manifest import Manifest
from medseg.data.volume_io import read_label, read_volume, write_volume
from medseg.display import progress_bar
from medseg.errors import DataError
from medseg.files import remove_leftovers, write_atomically
from medseg.registry import did_you_mean

Result = dict[str, Any]


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
    force: bool = False,
    allow_missing_slices: bool = False,
) -> Result:
    """Write a scan or a label map, of whatever kind, as NIfTI, NRRD, MetaImage or PNG, on its own grid.

    Args:
        source: A file, or a DICOM folder (``folder#uid`` of several series), SEG, RTSTRUCT or folder of masks.
        target: Its suffix says as what.
        image: The scan that a SEG, an RTSTRUCT or masks are drawn on; makes `source` a label map.
        manifest: Names the labels of a SEG or an RTSTRUCT; None: the numbers of its structures count.
        force: Overwrite `target`, and convert a picture that may name the patient.
        allow_missing_slices: Interpolate slices that a series lacks.

    Returns:
        ``output``, ``shape``, ``spacing_mm``, ``orientation``, and ``labels`` (voxels of each) of a label map.

    Raises:
        DataError: If the source cannot be read or may name the patient, or the target exists.
    """
    if target.exists() and not force:
        raise DataError("E-OUTPUT-EXISTS", "exists; add --force to overwrite it", where=str(target))
    if image is None:
        volume = read_volume(source, allow_missing_slices=allow_missing_slices)
        if volume.shows_text and not force:
            raise DataError(
                "E-BURNED-IN",
                f"says that its picture itself names the patient, and a {target.suffix} file would not say so any more; "
                "blank the text first, or add --force and share nothing made of it",
                where=str(source),
            )
    else:
        labels = Manifest.load(manifest).labels if manifest else None
        volume = read_label(source, image=image, labels=labels)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    write_volume(target, volume)
    grid = volume.geometry
    result: Result = {
        "output": str(target), "shape": list(grid.shape),
        "spacing_mm": [round(s, 6) for s in grid.spacing_mm], "orientation": grid.orientation,
    }  # fmt: skip
    if image is not None:
        values, counts = np.unique(volume.array, return_counts=True)
        result["labels"] = {int(value): int(count) for value, count in zip(values, counts, strict=True)}
    return result


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
