"""Run folders as a training leaves them, with exact phantoms and without the training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medseg.data.manifest import Manifest
from medseg.data.volume_io import read_label, write_volume
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.metrics.table import score_case, write_table
from medseg.model import Intensity, ModelSpec, Preprocessing, Window

LABELS = Labels(names={0: "background", 1: "liver", 2: "spleen"})
SHAPE = (48, 40, 24)
SPACING_MM = (2.0, 2.0, 3.0)
LPS = np.array([[-2.0, 0, 0, 48], [0, -2.0, 0, 40], [0, 0, 3.0, -36], [0, 0, 0, 1]])
"""As CTs come: the first voxel lies at the patient's right, in front."""

Voxels = npt.NDArray[np.uint8]


def right_sided() -> Voxels:
    """A liver at the patient's right, a small spleen at the left and behind, (1, I, J, K) in LPS order."""
    label = np.zeros((1, *SHAPE), np.uint8)
    label[0, 6:18, 12:26, 8:18] = 1  # in LPS a low index is the right
    label[0, 34:40, 24:30, 10:15] = 2
    return label


def ct(label: Voxels, seed: int = 0) -> npt.NDArray[np.int16]:
    """A scan in HU in which organs can be told from what is around them."""
    noise = np.random.default_rng(seed).normal(0, 8, label.shape)
    return (np.choose(label, [-60, 80, 120]) + noise).astype(np.int16)


def make_run(
    folder: Path, predictions: Mapping[str, Voxels], *, references: Mapping[str, Voxels] | None = None, fold: int = 0
) -> Path:
    """A finished run.

    Args:
        folder: Made; the scans lie in ``data`` beside it.
        predictions: By case what the network found, (1, I, J, K).
        references: By case what the expert drew; None: `right_sided` in every case.
        fold: The one held out.
    """
    folder.mkdir(parents=True)
    data = folder.parent / "data"
    training = [
        write_case(data, case, (references or {}).get(case, right_sided())) | {"fold": fold, "patient": f"Doe^{case}"}
        for case in predictions
    ]
    training.append({**training[0], "id": "seen", "fold": fold + 1})
    described = {"name": "toy", **LABELS.to_dict(), "modality": {"0": "CT"}, "training": training}
    (folder / "manifest.json").write_text(json.dumps(described))
    manifest = Manifest.load(folder / "manifest.json")
    (folder / "predictions").mkdir()
    scores = []
    for case in manifest.training[:-1]:
        assert case.label
        reference = read_label(case.label)
        found = Volume(predictions[case.id], reference.geometry)
        write_volume(folder / "predictions" / f"{case.id}.nii.gz", found)
        scores += score_case(case.id, reference, found, LABELS)
    write_table(folder / "per_case.csv", scores)
    (folder / "log.jsonl").write_text("".join(f'{{"step": {s}, "train/loss": {2 / s}}}\n' for s in range(10, 60, 10)))
    rows = [f"{step},{next(iter(predictions))},liver,{step / 60}\n" for step in (20, 40)]
    (folder / "validation.csv").write_text("step,case,organ,dice\n" + "".join(rows))
    write_spec(folder / "model", fold=fold)
    result = {"seconds": 150.0, "iterations": 50, "best": {"step": 40}, "mlflow_run_id": "0123456789abcdef"}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_case(data: Path, case: str, reference: Voxels) -> dict[str, str]:
    """A scan and what the expert drew, as an entry of a manifest."""
    entry = {"id": case}
    for kind, array in (("image", ct(reference)), ("label", reference)):
        path = data / f"{kind}s" / f"{case}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_volume(path, Volume(array, Geometry(reference.shape[1:], LPS)))
        entry[kind] = str(path)
    return entry


def write_spec(folder: Path, *, fold: int) -> None:
    """A model without weights: a report needs none."""
    spec = ModelSpec(
        "unet",
        {},
        3,
        ("CT",),
        LABELS,
        Preprocessing(spacing_mm=SPACING_MM, intensity=(Intensity(clip=(-175.0, 250.0)),)),
        Window((16, 16, 16)),
        provenance={
            "fold": fold,
            "medseg.workflow": "toy",
            "medseg.data_hash": "f00dcafe",
            "medseg.versions": "medseg 0",
        },
    )
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(spec.to_dict() | {"format": 1, "weights": {"sha256": ""}}))


def shifted(label: Voxels, by: Sequence[int]) -> Voxels:
    """A prediction that is off by some voxels."""
    return np.roll(label, tuple(by), (1, 2, 3))
