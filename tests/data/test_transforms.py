from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import ScaleIntensityRanged
from monai.transforms.spatial.array import Orientation, SpatialResample
from monai.transforms.spatial.dictionary import Rotate90d

from medseg.data.transforms import (
    LoadVolumed,
    NormalizeIntensityVolumed,
    OrientVolumed,
    ResampleVolumed,
    foreground_statistics,
    geometry_of,
    meta_tensor,
    preprocess,
    preprocessing_transforms,
)
from medseg.data.volume_io import read_geometry, read_label, read_volume, write_volume
from medseg.errors import DataError, GeometryError
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.model import Intensity, Preprocessing

SHAPE = (24, 22, 16)
MARK = (9, 13, 7)
PLAIN = Preprocessing(intensity=(Intensity(None, "none"),))

LPS = np.array([[-1, 0, 0, 60], [0, -1.25, 0, 40], [0, 0, 2.5, -300], [0, 0, 0, 1.0]])
SAGITTAL = np.array([[0, 0, 3, -30], [-1, 0, 0, 70], [0, -1, 0, 90], [0, 0, 0, 1.0]])
TILTED = np.array([[-1, 0, 0, 60], [0, -1.25, 0.9, 40], [0, 0, 2.5, -300], [0, 0, 0, 1.0]])


def oblique() -> np.ndarray:
    cos, sin = np.cos(np.radians(15)), np.sin(np.radians(15))
    turn = np.array([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return turn @ LPS


def marked(affine: np.ndarray, dtype: type = np.int16) -> Volume:
    """A soft blob around a marked voxel, whole within the volume: its center of mass is the voxel."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    blob = 1000 * np.exp(-(((grid - MARK) ** 2).sum(-1)) / 5)
    return Volume(blob[None].astype(dtype), Geometry(SHAPE, affine))


def center_mm(array: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Center of mass in RAS millimetres."""
    index = np.stack(np.meshgrid(*map(np.arange, array.shape), indexing="ij"), -1).reshape(-1, 3)
    center = (index * array.reshape(-1, 1)).sum(0) / array.sum()
    return (geometry.affine @ [*center, 1])[:3]


def case(folder: Path, affine: np.ndarray) -> tuple[Path, Path]:
    image = marked(affine)
    write_volume(folder / "image.nii.gz", image)
    write_volume(folder / "label.nii.gz", Volume((image.array > 2).astype(np.uint8), image.geometry))
    return folder / "image.nii.gz", folder / "label.nii.gz"


@pytest.mark.parametrize("affine", [LPS, SAGITTAL, oblique(), TILTED], ids=["LPS", "sagittal", "oblique", "tilted"])
@pytest.mark.parametrize("spacing_mm", [None, (1.0, 1.0, 1.0), (2.0, 2.0, 3.0)])
def test_a_marked_voxel_stays_at_its_millimetres(
    tmp_path: Path, affine: np.ndarray, spacing_mm: tuple[float, ...] | None
) -> None:
    image, label = case(tmp_path, affine)
    preprocessing = Preprocessing(spacing_mm=spacing_mm, intensity=PLAIN.intensity)
    prepared = preprocess([image], label, preprocessing)
    where = (affine @ [*MARK, 1])[:3]
    assert prepared.label is not None
    np.testing.assert_allclose(center_mm(prepared.image[0], prepared.geometry), where, atol=0.1)
    np.testing.assert_allclose(center_mm(prepared.label[0], prepared.geometry), where, atol=0.5)
    assert prepared.source.matches(Geometry(SHAPE, affine))
    assert prepared.geometry.matches(preprocessing.geometry(prepared.source), 1e-6)
    assert prepared.geometry.orientation == "RAS"
    assert prepared.geometry.is_orthogonal


def test_types_and_layout_are_what_training_expects(tmp_path: Path) -> None:
    image, label = case(tmp_path, LPS)
    prepared = preprocess([image], label, PLAIN)
    assert prepared.label is not None
    assert (prepared.image.dtype, prepared.label.dtype) == (np.float32, np.uint8)
    assert prepared.image.flags.c_contiguous
    assert prepared.label.flags.c_contiguous
    assert type(prepared.image) is np.ndarray
    assert preprocess([image], None, PLAIN).label is None


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR", "PIL"])
def test_orientation_agrees_with_monai(orientation: str) -> None:
    tensor = meta_tensor(marked(SAGITTAL))
    ours = OrientVolumed(["image"], orientation)({"image": tensor})["image"]
    theirs = Orientation(axcodes=orientation, labels=(("L", "R"), ("P", "A"), ("I", "S")))(tensor)
    assert torch.equal(ours.as_tensor(), theirs.as_tensor())
    torch.testing.assert_close(ours.affine, theirs.affine)


@pytest.mark.parametrize("spacing_mm", [(0.5, 0.6, 1.0), (1.7, 1.7, 4.0)])
def test_resampling_agrees_with_monai_on_our_grid(spacing_mm: tuple[float, ...]) -> None:
    """MONAI's Spacing keeps the center of the first voxel where we keep its outer face; given our grid, it agrees."""
    tensor = meta_tensor(marked(LPS, np.float32))
    ours = ResampleVolumed(["image"], spacing_mm=spacing_mm)({"image": tensor})["image"]
    theirs = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=torch.float64)(
        tensor, dst_affine=ours.affine, spatial_size=ours.shape[1:]
    )
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-3)  # of values up to 1000
    torch.testing.assert_close(ours.affine, theirs.affine)


def test_monai_transforms_may_stand_between_ours(tmp_path: Path) -> None:
    image, label = case(tmp_path, LPS)
    transforms = list(preprocessing_transforms(PLAIN).transforms)
    mixed = Compose(
        [
            *transforms[:3],
            ScaleIntensityRanged("image", 0, 1000, 0, 1),
            Rotate90d(["image", "label"], spatial_axes=(0, 1)),  # turns the affine too
            ResampleVolumed(spacing_mm=(1.0, 1.0, 1.0)),
            *transforms[4:],
        ]
    )({"image": image, "label": label})
    assert isinstance(mixed["image"], MetaTensor)
    assert float(mixed["image"].max()) == pytest.approx(1, abs=0.1)
    where = (LPS @ [*MARK, 1])[:3]
    for key in ("image", "label"):
        np.testing.assert_allclose(center_mm(mixed[key][0].numpy(), geometry_of(mixed[key])), where, atol=0.5)


def test_transforms_leave_their_input_alone() -> None:
    tensor = meta_tensor(marked(LPS, np.float32))
    before = tensor.clone()
    data = {"image": tensor}
    NormalizeIntensityVolumed(["image"], intensity=[Intensity((0, 500), "zscore")])(data)
    ResampleVolumed(["image"], spacing_mm=(2, 2, 2))(data)
    assert data["image"] is tensor
    assert torch.equal(tensor, before)
    torch.testing.assert_close(tensor.affine, before.affine)


def test_one_file_a_channel_becomes_one_image_normalized_channel_by_channel(tmp_path: Path) -> None:
    first, _ = case(tmp_path, LPS)
    doubled = Volume(read_volume(first).array.astype(np.float32) * 2, Geometry(SHAPE, LPS))
    write_volume(tmp_path / "second.nii.gz", doubled)
    both = Preprocessing(intensity=(Intensity((0, 500), "minmax"), Intensity(None, "none")))
    prepared = preprocess([first, tmp_path / "second.nii.gz"], None, both)
    assert prepared.image.shape == (2, *SHAPE)
    assert prepared.image[0].max() == 1
    assert prepared.image[1].max() == doubled.array.max()


def test_volumes_in_memory_are_taken_as_they_are() -> None:
    turned = marked(LPS).oriented("LAS")  # a view with a negative stride, which torch cannot share
    turned.array.setflags(write=False)
    expected = preprocess([marked(LPS)], None, PLAIN)
    np.testing.assert_array_equal(preprocess([turned], None, PLAIN).image, expected.image)


def test_a_four_dimensional_file_for_one_channel_is_refused_and_select_volume_named(tmp_path: Path) -> None:
    array = np.concatenate([marked(LPS).array, 2 * marked(LPS).array])
    write_volume(tmp_path / "a.nii.gz", Volume(array, Geometry(SHAPE, LPS)))
    with pytest.raises(DataError, match="E-CHANNELS") as caught:
        preprocess([tmp_path / "a.nii.gz"], None, PLAIN)
    assert "select_volume" in caught.value.message
    second = Preprocessing(intensity=PLAIN.intensity, select_volume=1)
    assert preprocess([tmp_path / "a.nii.gz"], None, second).image.max() == 2000


def test_a_picture_for_a_volume_model_is_refused() -> None:
    picture = Volume(marked(LPS).array[..., 0], Geometry.from_spacing(SHAPE[:2], (1, 1)))
    with pytest.raises(GeometryError, match=r"E-SPATIAL-DIMS .*: 2D data"):
        preprocess([picture], None, Preprocessing(spacing_mm=(1, 1, 1)))


def test_pictures_are_prepared_in_two_dimensions() -> None:
    picture = Volume(marked(LPS).array[..., MARK[2]], Geometry.from_spacing(SHAPE[:2], (1, 1)))
    prepared = preprocess([picture], None, Preprocessing(spacing_mm=(2, 2)))
    assert prepared.image.shape == (1, 12, 11)


def test_a_label_on_another_grid_is_refused(tmp_path: Path) -> None:
    moved = LPS.copy()
    moved[0, 3] += 2
    with pytest.raises(GeometryError, match="E-PAIR-AFFINE"):
        preprocess([marked(LPS)], marked(moved), PLAIN)


@pytest.mark.parametrize(
    ("frames", "is_told"), [(("1.2", "1.3"), True), (("1.2", "1.2"), False), (("1.2", None), False)]
)
def test_channels_of_different_frames_of_reference_are_warned_of(
    caplog: pytest.LogCaptureFixture, frames: tuple[str | None, ...], is_told: bool
) -> None:
    channels = [replace(marked(LPS), frame_of_reference_uid=uid) for uid in frames]
    preprocess(channels, None, Preprocessing(intensity=PLAIN.intensity * 2))
    assert ("W-CHANNEL-FRAME" in caplog.text) == is_told


def test_a_channel_on_another_grid_is_resampled_to_the_first_ones(caplog: pytest.LogCaptureFixture) -> None:
    """Each voxel of a ramp along the patient's axis holds its own millimetre, on whatever grid it was sampled."""
    fine, coarse = Geometry.from_spacing((40, 6, 6), (1, 1, 1)), Geometry.from_spacing((20, 3, 3), (2, 2, 2))
    ramps = [
        Volume(
            np.broadcast_to(g.affine[0, 0] * np.arange(g.shape[0], dtype=np.float32)[:, None, None], g.shape)[None], g
        )
        for g in (fine, coarse)
    ]
    both = Preprocessing(intensity=PLAIN.intensity * 2)
    image = preprocess(ramps, None, both).image
    assert "W-CHANNEL-GRID" in caplog.text
    np.testing.assert_allclose(image[1, :38, :4, :4], image[0, :38, :4, :4], atol=1e-4)
    elsewhere = fine.affine.copy()
    elsewhere[0, 3] = 30
    with pytest.raises(GeometryError, match=r"E-CHANNEL-GRID .* covers 25% of the first"):
        preprocess([ramps[0], Volume(ramps[0].array, Geometry(fine.shape, elsewhere))], None, both)


def test_a_label_whose_file_rounds_otherwise_is_brought_to_the_very_grid_of_its_image(tmp_path: Path) -> None:
    """10.5 voxels become 10, and 10.5000002 become 11: a label from another program's file would not fit."""
    grid = Geometry.from_spacing((21, 8, 8), (0.8, 1, 1))
    array = np.arange(21 * 64).reshape(1, 21, 8, 8).astype(np.int16)
    write_volume(tmp_path / "image.nii.gz", Volume(array, grid))  # keeps float32
    write_volume(tmp_path / "label.nrrd", Volume(array % 3, grid))  # keeps all digits
    image, label = read_geometry(tmp_path / "image.nii.gz"), read_geometry(tmp_path / "label.nrrd")
    assert image.resampled((1.6, 1, 1)).shape != label.resampled((1.6, 1, 1)).shape
    prepared = preprocess(
        [tmp_path / "image.nii.gz"],
        tmp_path / "label.nrrd",
        Preprocessing(spacing_mm=(1.6, 1, 1), intensity=PLAIN.intensity),
    )
    assert prepared.label is not None
    assert prepared.label.shape == prepared.image.shape


def test_a_constant_image_is_refused_in_training_and_warned_of_in_prediction(caplog: pytest.LogCaptureFixture) -> None:
    constant = Volume(np.full((1, *SHAPE), 3, np.int16), Geometry(SHAPE, LPS))
    with pytest.raises(DataError, match="E-CONSTANT"):
        preprocess([constant], marked(LPS), Preprocessing())
    np.testing.assert_array_equal(preprocess([constant], None, Preprocessing()).image, 0)
    assert "W-CONSTANT" in caplog.text


def test_a_fault_of_ours_is_not_hidden_as_a_fault_of_the_data() -> None:
    with pytest.raises(RuntimeError, match="LoadVolumed"):
        preprocess([None], None, PLAIN)  # type: ignore[list-item]


def test_loading_keeps_integers_that_torch_computes_with_and_turns_others_to_floats() -> None:
    for given, expected in ((np.int16, torch.int16), (np.uint16, torch.float32), (np.float64, torch.float32)):
        loaded = LoadVolumed(["image"], preprocessing=PLAIN)({"image": marked(LPS, given)})
        assert loaded["image"].dtype == expected


def test_foreground_statistics_are_those_of_all_labeled_voxels(tmp_path: Path) -> None:
    cases = []
    for number, affine in enumerate((LPS, SAGITTAL)):
        (tmp_path / str(number)).mkdir()
        image, label = case(tmp_path / str(number), affine)
        cases.append(((image,), label))
    cases.append(((tmp_path / "never_read.nii.gz",), None))
    clipped = Preprocessing(intensity=(Intensity((0, 800), "none"),))
    values = np.concatenate([read_volume(i[0]).array[read_label(m).array > 0] for i, m in cases if m is not None]).clip(
        0, 800
    )
    ((mean, std),) = foreground_statistics(cases, clipped)
    assert mean == pytest.approx(values.mean())
    assert std == pytest.approx(values.std())


def test_ignored_voxels_are_no_foreground() -> None:
    label = np.zeros((1, *SHAPE), np.uint8)
    label[0, :2], label[0, 2:4] = 1, 255
    image = marked(LPS)
    ((mean, _),) = foreground_statistics(
        [([image], Volume(label, image.geometry))],
        PLAIN,
        labels=Labels({0: "background", 1: "organ"}, ignore_label=255),
    )
    assert mean == pytest.approx(image.array[label == 1].mean())


def test_foreground_statistics_without_foreground_are_refused() -> None:
    empty = Volume(np.zeros((1, *SHAPE), np.uint8), Geometry(SHAPE, LPS))
    with pytest.raises(DataError, match="E-NO-FOREGROUND"):
        foreground_statistics([([marked(LPS)], empty)], PLAIN)


@pytest.mark.real_data
@pytest.mark.parametrize("folder", ["hippocampus", "sarcoma_petct", "liver_lits11", "spleen_ct"])
def test_real_cases_keep_their_organs_where_and_as_large_as_they_are(data_dir: Path, folder: str) -> None:
    label_file = sorted((data_dir / folder / "labelsTr").glob("*.nii.gz"))[0]
    image_file = data_dir / folder / "imagesTr" / label_file.name
    num_channels = len(read_volume(image_file).array)
    preprocessing = Preprocessing(spacing_mm=(2.0, 2.0, 4.0), intensity=(Intensity(),) * num_channels)
    prepared = preprocess([image_file], label_file, preprocessing)
    assert prepared.label is not None
    original = read_label(label_file)
    before, after = original.array[0] > 0, prepared.label[0] > 0
    np.testing.assert_allclose(center_mm(after, prepared.geometry), center_mm(before, original.geometry), atol=1.0)
    ratio = after.sum() * prepared.geometry.voxel_ml / (before.sum() * original.geometry.voxel_ml)
    assert ratio == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(prepared.image.mean(axis=(1, 2, 3)), 0, atol=1e-3)
