"""`medseg data`: data sets made ready, or made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg.data import phantom
from medseg.display import progress_bar
from medseg.errors import DataError
from medseg.files import write_atomically
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
