"""Pictures from end to end: train on PNGs, predict PNGs, evaluate them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medseg.build.model import predictor
from medseg.data.phantom import picture
from medseg.data.volume_io import read_label, write_volume
from medseg.errors import DataError, MedsegError, WorkflowError
from medseg.evaluate import evaluate
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.model import Window
from medseg.predict import predict
from medseg.train import train

from .inference.whole import restore, sliding_window

LABELS = {"0": "background", "1": "nucleus"}
SHAPE = (60, 44)  # wide and low, so that rows and columns cannot be mixed up
WORKFLOW = """\
name: tiny
data:
  manifest: dataset.json
  intensity: {clip: [0, 255], normalize: minmax}
network: {name: unet, args: {channels: [8, 16]}}
augment: [shift_scale_rotate, elastic, transpose, hue, {name: clahe, args: {tiles: 4}}, flip]
train:
  patch_size: [32, 32]
  batch_size: 4
  iterations: 40
  validate_every: 20
  optimizer: {name: adamw, lr: 5e-3}
  precision: fp32
  workers: 0
validate: {fold: 0}
infer: {mirror_axes: [0]}
"""


def write_pictures(folder: Path, num_cases: int = 6) -> None:
    """RGBA pictures and black and white masks, as the public data sets have them."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    training = []
    for n in range(num_cases):
        case = picture(n, SHAPE)
        rgb = np.dstack([*case.image.array.swapaxes(1, 2), np.full(SHAPE[::-1], 255, np.uint8)])
        Image.fromarray(rgb).save(folder / "images" / f"case_{n}.png")
        Image.fromarray(case.label.array[0].T * np.uint8(255)).save(folder / "masks" / f"case_{n}.png")
        training.append({"image": f"images/case_{n}.png", "label": f"masks/case_{n}.png", "fold": n % 3})
    manifest = {"labels": LABELS, "modality": {"0": "R", "1": "G", "2": "B"}, "training": training}
    (folder / "dataset.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    (folder / "tiny.yaml").write_text(WORKFLOW)
    return folder


@pytest.fixture(scope="module")
def run(home: Path) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return train(home / "tiny.yaml", output=home / "run", device="cpu")


def test_a_network_learns_from_pictures(run: dict, home: Path) -> None:
    assert run["best"]["dice"]["nucleus"] > 0.5  # stain alone gives about that
    assert list((home / "run").glob("pictures/step-*/*.png"))


def test_predictions_are_pngs_of_the_pictures_size_that_evaluate_takes(run: dict, home: Path, tmp_path: Path) -> None:
    result = predict(str(home / "run"), [home / "images"], output=tmp_path / "found", format="png", device="cpu")
    assert len(result["done"]) == 6 and result["failed"] == []
    for n in range(6):
        with Image.open(tmp_path / "found" / f"case_{n}.png") as found:
            assert found.size == SHAPE and found.mode == "L"
            assert set(np.unique(np.asarray(found))) <= {0, 1}
    scored = evaluate(tmp_path / "found", home / "dataset.json", split="fold_0", output=tmp_path / "scores")
    assert scored["per_organ"]["nucleus"]["dice"]["mean"] == pytest.approx(run["best"]["dice"]["nucleus"], abs=0.02)
    by_folder = evaluate(tmp_path / "found", home / "masks", labels=home / "run")
    assert by_folder["cases"] == 6 and by_folder["mean"]["dice"] > 0.5


def test_prediction_is_not_turned_or_mirrored(run: dict, home: Path) -> None:
    """Overlap with the truth is far better than with the truth mirrored either way."""
    found = predictor(str(home / "run"), device="cpu").segment([home / "images" / "case_0.png"]).label.array[0] > 0
    truth = read_label(home / "masks" / "case_0.png").array[0] > 0

    def overlap(other: np.ndarray) -> float:
        return 2 * float((found & other).sum()) / float(found.sum() + other.sum())

    assert overlap(truth) > max(overlap(np.flip(truth, axis)) for axis in (0, 1, (0, 1))) + 0.1


def test_a_picture_in_nifti_files_a_channel_each_is_predicted_as_its_png(run: dict, home: Path, tmp_path: Path) -> None:
    image = picture(3, SHAPE).image
    files = [tmp_path / f"{color}.nii.gz" for color in ("red", "green", "blue")]
    for file, channel in zip(files, image.array, strict=True):
        write_volume(file, Volume(channel[None], image.geometry))
    segment = predictor(str(home / "run"), device="cpu")
    from_png = segment.segment([home / "images" / "case_3.png"], with_probabilities=True)
    from_nifti = segment.segment(files)
    np.testing.assert_array_equal(from_png.label.array, from_nifti.label.array)
    assert from_nifti.label.geometry.matches(image.geometry)
    assert from_png.probabilities is not None and from_png.probabilities.array.shape == (2, *SHAPE)
    np.testing.assert_array_equal(from_png.probabilities.array.argmax(axis=0), from_png.label.array[0])


def test_training_on_a_coarser_grid_predicts_on_the_pictures_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    train(
        home / "tiny.yaml",
        overrides=["data.spacing_mm=[2.0,2.0]", "train.iterations=2", "train.validate_every=2"],
        output=home / "coarse",
        device="cpu",
    )
    found = predictor(str(home / "coarse"), device="cpu").segment([home / "images" / "case_0.png"]).label
    assert found.geometry.matches(Geometry.from_spacing(SHAPE, (1.0, 1.0)))


@pytest.mark.parametrize("regions", [False, True])
def test_logits_of_a_coarser_picture_are_decided_on_the_pictures_own_pixels(regions: bool) -> None:
    source = Geometry.from_spacing((33, 20), (1.0, 1.0))
    grid = source.resampled((1.7, 2.1))
    logits = torch.randn((3, *grid.shape), generator=torch.Generator().manual_seed(0))
    names = {0: "background", 1: "a", 2: "b"}
    sets = {"regions": {"all": (1, 2), "b": (2,), "a": (1,)}, "region_order": (1, 2, 1)} if regions else {}
    label, probabilities = restore(
        logits, Labels(names, **sets), grid=grid, source=source, orientation="RAS", with_probabilities=True
    )
    full = torch.nn.functional.interpolate(logits[None], source.shape, mode="bilinear", align_corners=False)
    assert label.geometry is source and probabilities is not None and probabilities.geometry is source
    expected = full.sigmoid() if regions else full.softmax(dim=1)
    np.testing.assert_allclose(probabilities.array, expected[0], atol=1e-5)
    np.testing.assert_array_equal(label.array, Labels(names, **sets).segment(full))


def test_a_picture_of_many_windows_is_predicted_without_seams() -> None:
    class Same(torch.nn.Module):
        """Takes what a 2D network on slices takes: volumes of one slice."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[-1] == 1
            return x.repeat(1, 2, 1, 1, 1)

    image = torch.randn((1, 30, 21), generator=torch.Generator().manual_seed(0))
    logits = sliding_window(image, Same(), Window((8, 8), overlap=0.5), num_outputs=2, batch_size=3)
    torch.testing.assert_close(logits, image.repeat(2, 1, 1))


def test_volumes_are_refused_by_a_model_for_pictures(run: dict, home: Path) -> None:
    volume = Volume(np.random.default_rng(0).random((3, 40, 40, 4)), Geometry.from_spacing((40, 40, 4), (1, 1, 1)))
    with pytest.raises(DataError, match="E-SPATIAL-DIMS"):
        predictor(str(home / "run"), device="cpu").segment([volume])


@pytest.mark.parametrize(
    ("override", "blamed"),
    [
        ("train.patch_size=[32,32,32]", "train.patch_size"),
        ("data.context_slices=1", "data.context_slices"),
        ("augment=[{name: transpose, args: {axes: [0, 2]}}]", "augment"),
        ("data.intensity=[{normalize: zscore}]", "data.intensity"),
    ],
)
def test_workflows_that_do_not_suit_pictures_are_refused(
    home: Path, override: str, blamed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    with pytest.raises(WorkflowError) as caught:
        train(home / "tiny.yaml", overrides=[override], output=home / "refused", device="cpu", dry_run=True)
    assert blamed in str(caught.value)


def test_imagenet_normalization_is_resolved_to_numbers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg.build.data import manifest, preprocessing
    from medseg.data.transforms import preprocess
    from medseg.workflow import Workflow

    monkeypatch.chdir(home)
    plan = Workflow.load(home / "tiny.yaml", ["data.intensity={normalize: imagenet}"])
    source = manifest(plan)
    resolved = preprocessing(plan, source, source.training)
    prepared = preprocess(source.training[0].images, None, resolved)
    pixels = np.asarray(Image.open(home / "images" / "case_0.png"))[..., :3].transpose(2, 1, 0) / 255
    mean, std = (np.array(n)[:, None, None] for n in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    np.testing.assert_allclose(prepared.image, (pixels - mean) / std, atol=1e-5)


def test_pictures_among_volumes_are_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path)
    for kind, dtype in (("images", np.int16), ("masks", np.uint8)):
        array = (np.random.default_rng(0).random((3 if kind == "images" else 1, 40, 40, 4)) > 0.5).astype(dtype)
        write_volume(tmp_path / kind / "ct.nii.gz", Volume(array, Geometry.from_spacing((40, 40, 4), (1, 1, 1))))
    data = json.loads((tmp_path / "dataset.json").read_text())
    data["training"].append({"image": "images/ct.nii.gz", "label": "masks/ct.nii.gz", "fold": 1})
    (tmp_path / "dataset.json").write_text(json.dumps(data))
    (tmp_path / "tiny.yaml").write_text(WORKFLOW.replace("intensity:", "spacing_mm: native\n  intensity:"))
    with pytest.raises(DataError, match=r"6 of 7 cases are pictures|E-SPATIAL-DIMS"):
        train(tmp_path / "tiny.yaml", output=tmp_path / "run", device="cpu", dry_run=True)


def test_pictures_beside_volumes_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from medseg.data.inputs import find_cases

    for name in ("ct.nii.gz", "ct.png", "deep/overlay.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [case.id for case in find_cases([tmp_path])] == ["ct"]
    assert "W-PICTURES" in caplog.text
    assert sorted(case.id for case in find_cases([tmp_path / "deep"])) == ["overlay"]


@pytest.mark.parametrize("arguments", [{"probabilities": True}, {}])
def test_png_is_refused_for_what_it_cannot_hold(home: Path, tmp_path: Path, arguments: dict) -> None:
    with pytest.raises(MedsegError, match=r"a PNG holds no probabilities|E-MODEL"):
        predict(str(tmp_path), [home / "images"], output=tmp_path / "out", format="png", **arguments)
