"""The journeys that begin with DICOM: listed, converted, trained on, segmented."""

import json
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from medseg.check import check
from medseg.data.volume_io import read_label, read_volume
from medseg.data_tools import convert, list_scans
from medseg.errors import DataError
from medseg.evaluate import evaluate
from medseg.predict import predict
from medseg.train import train

pytestmark = pytest.mark.real_data

WORKFLOW = """\
name: tiny
data:
  manifest: dataset.json
  spacing_mm: [6.0, 6.0, 8.0]
  intensity: {clip: [-160, 240], normalize: foreground}
network: {name: unet, args: {channels: [4, 8]}}
train: {patch_size: [16, 16, 8], batch_size: 1, iterations: 2, precision: fp32, workers: 0}
validate: {fold: 1}
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_a_series_with_its_masks_and_a_file_of_the_same_patient_hold_the_same_liver(data_dir):
    """The file was made from the series by another tool, at 1.5 mm in the plane."""
    series = data_dir / "dicom_ct_liver" / "DICOM_anon"
    masks = read_label(data_dir / "dicom_ct_liver" / "Ground", image=series)
    (other,) = (data_dir / "liver_ct" / "labelsTr").glob("*.nii.gz")
    reference = read_label(other)
    (ml, centre), (other_ml, other_centre) = (_volume_and_centre(label) for label in (masks, reference))
    assert ml == pytest.approx(other_ml, rel=0.02)
    assert np.linalg.norm(centre - other_centre) < 1
    assert 120 < read_volume(series).array[masks.array == 1].mean() < 160


def seg_of_the_masks(liver: Path, target: Path) -> Path:
    """The drawn masks as a SEG, by highdicom; slices and masks count alike."""
    slices = sorted(map(pydicom.dcmread, (liver / "DICOM_anon").iterdir()), key=lambda one: int(one.InstanceNumber))
    masks = np.stack([np.array(Image.open(file)) > 0 for file in sorted((liver / "Ground").glob("*.png"))])
    organ, manual = codes.SCT.Organ, hd.seg.SegmentAlgorithmTypeValues.MANUAL
    described = [hd.seg.SegmentDescription(1, "Liver", organ, codes.SCT.Liver, manual)]
    uids = (generate_uid(), 1, generate_uid(), 1)
    hd.seg.Segmentation(slices, masks, "BINARY", described, *uids, "maker", "model", "1", "serial").save_as(target)
    return target


@pytest.mark.parametrize("kind", ["masks", "SEG"])
def test_training_and_prediction_take_dicom_folders(home, data_dir, kind):
    liver = data_dir / "dicom_ct_liver"
    drawn = liver / "Ground" if kind == "masks" else seg_of_the_masks(liver, home / "liver.dcm")
    (image,), (label,) = ((data_dir / "liver_ct" / f"{kind}Tr").glob("*.nii.gz") for kind in ("images", "labels"))
    cases = [
        {"image": str(liver / "DICOM_anon"), "label": str(drawn), "id": "series", "patient": "A", "fold": 0},
        {"image": str(image), "label": str(label), "id": "file", "patient": "B", "fold": 1},
    ]
    labels = {"labels": {"0": "background", "1": "liver"}, "structures": {"Liver": 1}}
    Path("dataset.json").write_text(json.dumps({**labels, "training": cases}))
    Path("tiny.yaml").write_text(WORKFLOW)
    run = train(Path("tiny.yaml"), fold="0")["run_dir"]
    (done,) = predict(run, [liver / "DICOM_anon"], output=Path("out"))["done"]
    assert done["case"] == "DICOM_anon"
    written, scan = read_label(Path(done["output"])), read_volume(liver / "DICOM_anon")
    assert written.geometry.matches(scan.geometry, tolerance=1e-4)
    predict(run, [Path("dataset.json")], split="fold_0", output=Path("held_out"))
    assert evaluate(Path("held_out"), Path("dataset.json"))["cases"] == 1
    found = check(Path("dataset.json"))
    assert (found["checked"], found["errors"]) == (2, 0), found["rows"]


def test_every_series_of_a_folder_is_a_case_of_its_own(home, data_dir):
    found = list_scans(data_dir / "dicom_sarcoma" / "STS_008")["rows"]
    series = [row for row in found if row["kind"] == "series"]
    assert sorted(row["modality"] for row in series) == ["CT", "MR", "PT"]
    assert {row["reason"] for row in found if row["kind"] == "skipped"} == {"not DICOM"}
    drawings = [row for row in found if row["kind"] == "drawing"]
    assert [row["modality"] for row in drawings] == ["RTSTRUCT"] * 3
    assert sorted(uid for row in drawings for uid in row["series"]) == sorted(row["series"] for row in series)


def test_an_rtstruct_is_converted_on_the_grid_of_its_series(home, data_dir):
    patient = data_dir / "dicom_sarcoma" / "STS_008"
    result = convert(patient / "CT" / "mask", Path("gtv.nii.gz"), image=patient / "CT" / "image")
    assert set(result["labels"]) == {0, 1}
    reference = sitk.ReadImage(str(patient / "nifti_reference" / "CT_mask.nii.gz"))
    found = sitk.Resample(sitk.ReadImage("gtv.nii.gz"), reference, sitk.Transform(), sitk.sitkNearestNeighbor)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(found == 1, sitk.Cast(reference, found.GetPixelID()) == 1)
    assert overlap.GetDiceCoefficient() > 0.99
    with pytest.raises(DataError, match="E-OUTPUT-EXISTS"):
        convert(patient / "CT" / "image", Path("gtv.nii.gz"))


def _volume_and_centre(label) -> tuple[float, np.ndarray]:
    index = np.argwhere(label.array[0] == 1)
    affine = label.geometry.affine
    return len(index) * label.geometry.voxel_ml, affine[:3, :3] @ index.mean(axis=0) + affine[:3, 3]
