import logging
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from medseg.data.volume_io import read_label, read_volume, write_volume
from medseg.errors import DataError, WorkflowError
from medseg.geometry import Geometry, Volume
from medseg.inference.predictor import Predictor
from medseg.labels import Labels
from medseg.model import Intensity, ModelSpec, Preprocessing, Window

LABELS = Labels({0: "background", 1: "bright"})
SPEC = ModelSpec(
    network="threshold",
    network_args={},
    spatial_dims=3,
    channels=("CT",),
    labels=LABELS,
    preprocessing=Preprocessing(intensity=(Intensity(normalize="none"),)),
    window=Window((8, 8, 8)),
)


class Threshold(nn.Module):
    """Finds what is brighter than 100."""

    def forward(self, x: Tensor) -> Tensor:
        inside = x[:, :1] - 100
        return torch.cat([-inside, inside], dim=1)


def scan(orientation: str = "LPS", shape=(18, 14, 11)) -> Volume:
    grid = Geometry.from_spacing(shape, (0.9, 1.1, 2.0)).oriented(orientation)
    smooth = np.add.outer(
        np.add.outer(np.arange(grid.shape[0]) * 9, np.arange(grid.shape[1]) ** 1.7), np.arange(grid.shape[2]) * 5
    )
    return Volume(smooth[None].astype(np.float32), grid)


@pytest.fixture
def scan_file(tmp_path):
    path = tmp_path / "scan.nii.gz"
    write_volume(path, scan())
    return path


def test_a_scan_is_segmented_on_its_own_grid(scan_file):
    found = Predictor(SPEC, Threshold(), precision="fp32").segment([scan_file])
    np.testing.assert_array_equal(found.label.array, scan().array > 100)
    assert found.label.geometry.matches(scan().geometry)
    assert found.label.array.dtype == np.uint8
    assert found.probabilities is None


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "IPL"])
def test_resampling_changes_only_voxels_at_the_border(orientation):
    volume = scan(orientation)
    spec = replace(SPEC, preprocessing=replace(SPEC.preprocessing, spacing_mm=(1.3, 1.3, 1.3)))
    label = Predictor(spec, Threshold(), precision="fp32").segment([volume]).label.array
    clear = np.abs(volume.array - 100) > 10
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(label[clear], (volume.array > 100)[clear])


def test_probabilities_come_on_the_scans_grid_too():
    found = Predictor(SPEC, Threshold(), precision="fp32").segment([scan()], with_probabilities=True)
    inside = scan().array[0].astype(np.float64) - 100
    np.testing.assert_allclose(found.probabilities.array[1], 1 / (1 + np.exp(-2 * inside)), atol=1e-4)
    np.testing.assert_allclose(found.probabilities.array.sum(0), 1, atol=1e-6)
    assert found.probabilities.geometry.matches(scan().geometry)


def test_postprocessing_keeps_what_the_model_says():
    volume = scan()
    volume.array[:] = 0
    volume.array[0, 2:6, 2:6, 2:6] = volume.array[0, 10:12, 10, 9] = 200
    spec = replace(SPEC, postprocess={"keep_largest": ["bright"]})
    label = Predictor(spec, Threshold(), precision="fp32").segment([volume]).label.array
    assert label.sum() == 4**3


def test_the_network_is_mirrored_when_the_window_says_so():
    calls = []

    class Spy(Threshold):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            return super().forward(x)

    window = Window((32, 32, 32), mirror_axes=(0, 2))
    label = Predictor(replace(SPEC, window=window), Spy(), precision="fp32").segment([scan()]).label.array
    assert len(calls) == 4
    np.testing.assert_array_equal(label, scan().array > 100)


@pytest.mark.parametrize(
    "labels", [LABELS, Labels(LABELS.names, regions={"all": (1,)}, region_order=(1,))], ids=["labels", "regions"]
)
def test_a_constant_scan_has_an_empty_segmentation_and_a_warning(labels, caplog):
    volume = Volume(np.full_like(scan().array, 500), scan().geometry)
    with caplog.at_level(logging.WARNING, logger="medseg"):
        label = Predictor(replace(SPEC, labels=labels), Threshold()).segment([volume]).label
    assert not label.array.any() and label.geometry.matches(volume.geometry)
    assert "W-CONSTANT" in caplog.text and "W-EMPTY" in caplog.text


def test_a_scan_with_too_many_channels_is_refused():
    volume = Volume(np.repeat(scan().array, 2, axis=0), scan().geometry)
    with pytest.raises(DataError, match="E-CHANNELS"):
        Predictor(SPEC, Threshold()).segment([volume])


def test_a_picture_is_refused_by_a_model_for_volumes():
    picture = Volume(np.eye(9, dtype=np.float32)[None], Geometry.from_spacing((9, 9), (1, 1)))
    with pytest.raises(DataError, match="E-SPATIAL-DIMS"):
        Predictor(SPEC, Threshold()).segment([picture])


def test_unknown_postprocessing_is_refused_before_any_scan_is_read():
    with pytest.raises(WorkflowError, match="did you mean 'keep_largest'"):
        Predictor(replace(SPEC, postprocess={"keep_largst": []}), Threshold())


def test_precision_decides_what_the_network_computes_in():
    kinds = []

    class Spy(nn.Conv3d):
        def forward(self, x: Tensor) -> Tensor:
            result = super().forward(x)
            kinds.append(result.dtype)
            return result

    for precision in ("fp32", "bf16"):
        Predictor(replace(SPEC, window=Window((32, 32, 32))), Spy(1, 2, 1), precision=precision).segment([scan()])
    assert kinds == [torch.float32, torch.bfloat16]


def test_the_network_is_put_into_eval_mode():
    network = nn.Sequential(nn.Dropout(), nn.Conv3d(1, 2, 1))
    Predictor(SPEC, network)
    assert not network.training


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "spacing_mm"),
    [
        ("hippocampus/labelsTr/hippocampus_001.nii.gz", (0.8, 0.8, 0.8)),
        ("liver_ct/labelsTr/chaos_ct_03.nii.gz", (2.0, 2.0, 2.0)),
        ("prostate_mha/10000_1000000_prostate_seg.nii.gz", (1.0, 1.0, 2.0)),  # oblique
    ],
)
def test_a_real_organ_comes_back_where_it_was_drawn(data_dir, name, spacing_mm):
    drawn = read_label(data_dir / name)
    organ = drawn.array > 0
    spec = replace(SPEC, preprocessing=replace(SPEC.preprocessing, spacing_mm=spacing_mm), window=Window((64, 64, 64)))
    found = Predictor(spec, Threshold()).segment([Volume(organ * np.float32(200), drawn.geometry)]).label
    assert found.geometry.matches(drawn.geometry)
    assert 2 * (organ & (found.array > 0)).sum() / (organ.sum() + found.array.sum()) > 0.9
    center, expected = ndimage.center_of_mass(found.array[0]), ndimage.center_of_mass(organ[0])
    np.testing.assert_allclose(center, expected, atol=0.1)


@pytest.mark.parametrize("shape", [(18, 14, 11), (9, 14, 21), (9, 21, 14)])
@pytest.mark.parametrize("regions", [False, True])
def test_probabilities_in_a_file_are_those_in_memory_and_are_written_as_such(tmp_path, shape, regions):
    labels = Labels(LABELS.names, regions={"dark": (1,), "bright": (1,)}, region_order=(1, 1)) if regions else LABELS
    predictor = Predictor(replace(SPEC, labels=labels), Threshold(), precision="fp32")
    image = scan("LPS", shape)
    found = predictor.segment([image], probabilities_to=tmp_path / "raw.tmp")
    expected = predictor.segment([image], with_probabilities=True).probabilities.array
    assert isinstance(found.probabilities.array, np.memmap)
    assert (tmp_path / "raw.tmp").stat().st_size == expected.nbytes
    np.testing.assert_array_equal(found.probabilities.array, expected)
    for suffix in ("nii.gz", "nii", "mha"):
        write_volume(tmp_path / f"written.{suffix}", found.probabilities)
        np.testing.assert_array_equal(read_volume(tmp_path / f"written.{suffix}").array, expected)


def test_planes_of_a_channel_follow_each_other_in_the_file(tmp_path):
    """So that each is written in one go, whatever axis windows come along."""
    for n, shape in enumerate([(21, 14, 9), (14, 21, 9), (9, 14, 21)]):
        found = Predictor(SPEC, Threshold()).segment([scan("LPS", shape)], probabilities_to=tmp_path / f"{n}.tmp")
        strides = found.probabilities.array.strides
        assert max(strides[1:]) == strides[1 + shape.index(21)] and strides[0] == max(strides)


def test_a_disk_without_room_for_probabilities_is_told_before_they_are_computed(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            Predictor(SPEC, Threshold()).segment([scan()], probabilities_to=tmp_path / "raw.tmp")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_picture_has_probabilities_in_a_file_and_uncertainty_too(tmp_path):
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([-x, x], dim=1)

    window = Window((8, 8))
    spec = replace(
        SPEC, spatial_dims=2, channels=("image",), window=window, postprocess={"min_volume_ml": {"bright": 1}}
    )
    picture = Volume(
        np.random.default_rng(0).normal(size=(1, 15, 22)).astype(np.float32), Geometry.from_spacing((15, 22), (1, 1))
    )
    predictor = Predictor(spec, Flat(), precision="fp32")
    found = predictor.segment([picture], probabilities_to=tmp_path / "raw.tmp", with_entropy=True)
    expected = 1 / (1 + np.exp(-2 * picture.array[0].astype(np.float64)))
    np.testing.assert_allclose(found.probabilities.array[1], expected, atol=1e-5)
    np.testing.assert_array_equal(found.label.array[0], picture.array[0] > 0)  # pieces of pictures have no volume
    entropy = -(expected * np.log2(expected) + (1 - expected) * np.log2(1 - expected))
    np.testing.assert_allclose(
        found.entropy.array[0], 100 * entropy, atol=0.5 + 1.2
    )  # rounded, and 0 where all but certain
    assert found.entropy.array.shape == (1, 15, 22) and 0 < found.uncertainty < 1
