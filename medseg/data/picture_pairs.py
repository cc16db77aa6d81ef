"""Pictures and masks in two folders, paired by their names, as a manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg.data.manifest import case_id
from medseg.data.volume_io import PICTURE_SUFFIXES
from medseg.errors import DataError


def picture_manifest(
    folder: Path,
    *,
    name: str,
    labels: Mapping[int, str],
    root: str = ".",
    images: str = "images",
    masks: str = "masks",
    mask_ending: str = "",
    channels: tuple[str, ...] = ("R", "G", "B"),
) -> dict[str, Any]:
    """List every picture with its mask.

    Args:
        folder: Holds both folders.
        name: Of the data set.
        labels: Label value to name.
        root: What the manifest says for `folder`, e.g. ``"${MEDSEG_DATA}/nuclei"``: no path of one machine.
        images: Folder of the pictures.
        masks: Folder of the masks; a mask is called after its picture, whatever its suffix.
        mask_ending: What masks' names have behind the picture's, e.g. ``"_mask"``.
        channels: What each channel of a picture is.

    Returns:
        The manifest; folds are left to `medseg.data.manifest.assign_folds`.

    Raises:
        DataError: If there is no picture, or pictures and masks do not pair one to one.
    """
    pictures, drawn = _by_name(folder / images), _by_name(folder / masks)
    unpaired = sorted({f"{stem}{mask_ending}" for stem in pictures} ^ drawn.keys())
    if unpaired or not pictures:
        raise DataError(
            "E-PICTURE-PAIRS",
            f"{len(pictures)} pictures in {images}, {len(drawn)} masks in {masks}; without counterpart: "
            f"{', '.join(unpaired[:5]) or 'none'}. Give each picture a mask of its name",
            where=str(folder),
        )
    return {
        "name": name,
        "format": 1,
        "labels": {str(value): organ for value, organ in labels.items()},
        "modality": {str(number): channel for number, channel in enumerate(channels)},
        "root": root,
        "training": [
            {"image": f"{images}/{path.name}", "label": f"{masks}/{drawn[f'{stem}{mask_ending}'].name}"}
            for stem, path in sorted(pictures.items())
        ],
    }


def compact_json(manifest: Mapping[str, Any]) -> str:
    """JSON with a line for each key and for each case."""
    lines = []
    for key, value in manifest.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list):
            text = "[\n    " + ",\n    ".join(json.dumps(entry, ensure_ascii=False) for entry in value) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _by_name(folder: Path) -> dict[str, Path]:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found: dict[str, Path] = {}
    for path in files:
        if path.name.startswith(".") or not path.name.lower().endswith(PICTURE_SUFFIXES):
            continue
        if case_id(path) in found:
            raise DataError(
                "E-DUPLICATE-CASE", f"{found[case_id(path)].name} and {path.name} share a name", where=str(folder)
            )
        found[case_id(path)] = path
    return found
