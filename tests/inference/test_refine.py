"""Logits that go through a CRF on their way to the scan's grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg.data.volume_io import read_label, write_volume
from medseg.geometry import Geometry, Volume
from medseg.inference import refine as refining
from medseg.inference.ensemble import Member, voted
from medseg.inference.predictor import Predictor, Segmentation
from medseg.inference.refine import POSSIBLE, refined
from medseg.inference.sliding_window import slabs
from medseg.inference.windows import Windows
from medseg.labels import Labels
from medseg.model import Intensity, ModelSpec, Preprocessing, Window, load_spec, save_model
from medseg.nets import NETS
from medseg.nets.crf import CRF, refine
from medseg.predict import predict

LABELS = Labels({0: "background", 1: "bright"})
REGIONS = Labels(LABELS.names, regions={"all": (1,)}, region_order=(1,))
SPEC = ModelSpec(
    network="threshold",
    network_args={},
    spatial_dims=3,
    channels=("CT",),
    labels=LABELS,
    preprocessing=Preprocessing(intensity=(Intensity(normalize="none"),)),
    window=Window((16, 16, 16)),
)
FLAT = replace(SPEC, spatial_dims=2, channels=("image",), window=Window((16, 16)))
CRF_ARGS = {"theta_beta": 60.0}


class Threshold(nn.Module):
    """Finds what is brighter than 100; sure at 160."""

    def __init__(self, num_outputs: int = 2) -> None:
        super().__init__()
        self.num_outputs = num_outputs

    def forward(self, x: Tensor) -> Tensor:
        inside = (x[:, :1] - 100) / 20
        return inside if self.num_outputs == 1 else torch.cat([-inside / 2, inside / 2], dim=1)


def noisy(*shape: int, orientation: str = "RAS") -> tuple[np.ndarray, Volume]:
    """A bright ball off the middle, and noise that makes three in a hundred voxels wrong."""
    grid = Geometry.from_spacing(shape, (1.0, 1.0, 2.0)[: len(shape)])
    axes = np.meshgrid(*[np.arange(n) / n - 0.4 for n in shape], indexing="ij")
    truth = sum(x**2 for x in axes) < 0.06
    image = 200 * truth + np.random.default_rng(0).normal(0, 55, shape)
    volume = Volume(image[None].astype(np.float32), grid).oriented(orientation)
    return Volume(truth[None].astype(np.uint8), grid).oriented(orientation).array[0] > 0, volume


def segmented(volume: Volume, spec: ModelSpec, crf: Any, **wanted: bool) -> Segmentation:
    postprocess = {} if crf is None else {"crf": crf}
    net = Threshold(spec.labels.num_outputs)
    return Predictor(replace(spec, postprocess=postprocess), net, precision="fp32").segment([volume], **wanted)


def dice(found: Segmentation, truth: np.ndarray) -> float:
    label = found.label.array[0] > 0
    return 2 * (label & truth).sum() / (label.sum() + truth.sum())


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize(
    ("shape", "spec"), [((36, 30, 26), SPEC), ((48, 40), FLAT), ((30, 26, 24), FLAT)], ids=["3d", "picture", "slices"]
)
def test_a_noisy_scan_is_segmented_better(shape, spec, labels):
    truth, volume = noisy(*shape)
    spec = replace(spec, labels=labels)
    before, after = (segmented(volume, spec, crf) for crf in (None, CRF_ARGS))
    assert dice(after, truth) > max(0.95, dice(before, truth) + 0.05)
    assert before.crf == () and after.label.geometry.matches(volume.geometry)
    (told,) = after.crf
    assert told.endswith(" s") and ("windowed" in told or "exact" in told)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SLA"])
def test_how_a_scan_lies_in_its_file_changes_nothing(orientation):
    truth, volume = noisy(30, 26, 20, orientation=orientation)
    found = segmented(volume, SPEC, CRF_ARGS)
    upright = segmented(noisy(30, 26, 20)[1], SPEC, CRF_ARGS).label
    assert (found.label.oriented("RAS").array != upright.array).mean() < 1e-3  # windows stand elsewhere, sums round
    assert dice(found, truth) > 0.95


def test_it_is_the_crf_of_the_whole_image_where_all_is_uncertain(monkeypatch):
    monkeypatch.setattr(refining, "POSSIBLE", 0.0)
    _, volume = noisy(20, 18, 12)
    image = torch.from_numpy(volume.array)
    windows = Windows.over((20, 18, 12), SPEC.window)
    crf, net = CRF(theta_beta=60.0), Threshold()
    for in_bands in (False, True):
        given = slabs(image, net, windows, background=LABELS.background, in_bands=in_bands)
        told: list[str] = []
        found = list(refined(given, image, crf, LABELS, windows, spacing_mm=(1, 1, 2), told=told))
        assert [slab.first for slab in found] == list(range(windows.box[windows.outer].stop))
        logits = torch.cat([slab.planes for slab in found]).movedim(0, 1 + windows.outer)
        expected = refine(net(image[None])[0], image, (1, 1, 2), crf).logits
        torch.testing.assert_close(logits.softmax(0), expected.softmax(0), atol=1e-3, rtol=0)
        assert told[0].startswith("20 × 18 × 12 voxels")


def test_only_the_box_around_what_may_be_an_organ_is_held():
    image = torch.full((1, 60, 40, 30), -100.0)
    image[:, 20:26, 10:15, 8:20] = 200
    windows = Windows.over(image.shape[1:], SPEC.window)
    told: list[str] = []
    given = slabs(image, Threshold(), windows, background=LABELS.background, in_bands=True)
    crf = CRF(theta_beta=60.0, theta_alpha_mm=2, cutoff=2)
    found = list(refined(given, image, crf, LABELS, windows, spacing_mm=(1, 1, 2), told=told))
    assert told[0].startswith("14 × 13 × 16 voxels")  # 4 mm more on each side
    logits = torch.cat([slab.planes for slab in found])  # (P, R, A, B)
    assert torch.equal(logits.argmax(1), (image[0] > 0).long())
    assert torch.softmax(Threshold()(image[None])[0, :, 0, 0, 0], 0)[1] < POSSIBLE


def test_of_a_scan_with_no_organ_nothing_is_computed():
    image = torch.full((1, 20, 20, 20), -100.0)
    windows = Windows.over(image.shape[1:], SPEC.window)
    told: list[str] = []
    given = slabs(image, Threshold(), windows, background=LABELS.background)
    found = list(refined(given, image, CRF(), LABELS, windows, spacing_mm=(1, 1, 1), told=told))
    assert len(found) == 20 and not told and not any(slab.planes.argmax(1).any() for slab in found)


def test_probabilities_are_those_of_the_crf_and_fit_the_label_map():
    _, volume = noisy(30, 26, 20)
    found = segmented(volume, SPEC, CRF_ARGS, with_probabilities=True, with_entropy=True)
    np.testing.assert_array_equal(found.probabilities.array.argmax(0), found.label.array[0])
    np.testing.assert_allclose(found.probabilities.array.sum(0), 1, atol=1e-5)
    without = segmented(volume, SPEC, None, with_probabilities=True)
    assert np.abs(found.probabilities.array - without.probabilities.array).max() > 0.3


def test_other_steps_come_after_it():
    _, volume = noisy(30, 26, 20)
    spec = replace(SPEC, postprocess={"keep_largest": ["bright"], "crf": {"theta_beta": 60.0}})
    found = Predictor(spec, Threshold(), precision="fp32").segment([volume]).label
    alone = segmented(volume, SPEC, CRF_ARGS)
    expected = Predictor(replace(SPEC, postprocess={"keep_largest": ["bright"]}), Threshold()).postprocessed(
        alone.label
    )
    np.testing.assert_array_equal(found.array, expected.array)


def test_an_ensemble_has_the_crf_that_most_of_its_models_have():
    few, many = {"theta_beta": 1.0}, {"theta_beta": 2.0, "connections": "window"}
    assert voted([{"crf": few}, {"crf": many}, {}]) == {"crf": few}
    assert voted([{"crf": few}, {}]) == {}
    assert voted([{"crf": {}, "keep_largest": ["bright"]}, {"crf": {}}]) == {"crf": {}}
    truth, volume = noisy(30, 26, 20)
    spec = replace(SPEC, postprocess={"crf": CRF_ARGS})
    coarse = replace(spec, preprocessing=replace(SPEC.preprocessing, spacing_mm=(1.5, 1.5, 2.0)))
    others = [Member(spec, Threshold()), Member(coarse, Threshold())]
    found = Predictor(spec, Threshold(), others=others, precision="fp32").segment([volume])
    assert len(found.crf) == 2  # one for each grid
    assert dice(found, truth) > 0.95


def test_predict_tells_of_each_case_how_its_crf_was_computed(tmp_path):
    network = NETS["unet"].network(3, 1, 2, **NETS["unet"].tiny)
    spec = replace(SPEC, network="unet", network_args=NETS["unet"].tiny, postprocess={"crf": {"iterations": 1}})
    save_model(tmp_path / "model", spec, network.state_dict())
    assert load_spec(tmp_path / "model").postprocess == {"crf": {"iterations": 1}}
    _, volume = noisy(18, 17, 16)
    write_volume(tmp_path / "scan.nii.gz", volume)
    result = predict(str(tmp_path / "model"), [tmp_path / "scan.nii.gz"], output=tmp_path / "out")
    (told,) = result["done"][0]["crf"]
    assert "windowed" in told and told.endswith(" s")
    assert read_label(tmp_path / "out" / "scan.nii.gz").geometry.matches(volume.geometry)
