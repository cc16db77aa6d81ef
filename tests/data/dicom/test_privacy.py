"""What the headers say of a patient must be nowhere in what medseg leaves behind."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medseg.check import check
from medseg.data.dicom.listing import list_folder
from medseg.predict import predict
from medseg.train import train

SECRETS = {
    "PatientName": "Quijano^Alonso",
    "PatientID": "MRN-7781234",
    "PatientBirthDate": "15470929",
    "AccessionNumber": "ACC993311",
    "ReferringPhysicianName": "Carrasco^Sanson",
}
WORKFLOW = """\
name: tiny
data: {manifest: dataset.json}
network: {name: unet, args: {channels: [4, 8]}}
train: {patch_size: [16, 16, 8], batch_size: 1, iterations: 2, precision: fp32, workers: 0}
validate: {fold: 0}
"""


@pytest.mark.parametrize("path", ["name", "folder"])
def test_nothing_that_a_run_leaves_behind_names_a_patient(
    tmp_path: Path,
    write_slice: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    path: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    caplog.set_level(logging.DEBUG, logger="medseg")
    secrets = dict(SECRETS)
    if path == "folder":  # a path that a name would climb out of, were it ever used as one
        secrets["PatientID"] = "../../etc/MRN-7781234"
    for scan in range(3):
        _write_case(tmp_path, write_slice, scan, secrets)
    cases = [
        {"image": f"in/{scan}", "label": f"masks/{scan}", "patient": f"{secrets['PatientID']}-{scan}", "fold": scan}
        for scan in range(3)
    ]
    Path("dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "organ"}, "training": cases}))
    Path("tiny.yaml").write_text(WORKFLOW)
    told = [json.dumps(list_folder(Path("in"))), json.dumps(check(Path("dataset.json")))]
    told.append(json.dumps(result := train(Path("tiny.yaml"))))
    told.append(json.dumps(found := predict(result["run_dir"], [Path("in")], output=Path("out"))))
    assert [entry["case"] for entry in found["done"]] == ["0", "1", "2"]
    told += [caplog.text, *capfd.readouterr()]
    left = {file: _content(file) for file in tmp_path.rglob("*") if file.is_file() and _is_ours(file, tmp_path)}
    assert len(left) > 20
    for secret in (part for value in secrets.values() for part in value.split("^")):
        assert not [text for text in told if secret in text]
        assert not [file for file, content in left.items() if secret.encode() in content or secret in str(file)]


def _write_case(home: Path, write_slice: Callable[..., Path], scan: int, secrets: dict[str, str]) -> None:
    masks = home / "masks" / str(scan)
    masks.mkdir(parents=True)
    generator = np.random.default_rng(scan)
    for k in range(8):
        mask = np.zeros((20, 24), np.uint8)
        mask[5:14, 6:16] = 1
        pixels = (1000 + np.where(mask, 300, 0) + generator.normal(0, 20, mask.shape)).astype(np.uint16)
        uid = f"1.2.826.0.1.3.{scan}"
        write_slice(f"in/{scan}/{k:02d}.dcm", 2.0 * k, pixels, modality="CT", SeriesInstanceUID=uid, **secrets)
        Image.fromarray(mask * 255).save(masks / f"{k:02d}.png")


def _is_ours(file: Path, home: Path) -> bool:
    return file.relative_to(home).parts[0] not in ("in", "masks", "dataset.json")


def _content(file: Path) -> bytes:
    return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
