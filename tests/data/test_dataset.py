"""The cache, and patches whose index alone decides them."""

import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medseg.data.dataset import (
    VOXELS_PER_CLASS,
    CaseCache,
    PatchDataset,
    StepSampler,
    absent_labels,
    file_hash,
    patch_loader,
    read_patch,
)
from medseg.data.manifest import Case
from medseg.data.volume_io import write_volume
from medseg.errors import MedsegError
from medseg.geometry import Geometry, Volume
from medseg.labels import Labels
from medseg.model import Intensity, Preprocessing

from ..dicom_files import make_slice, save

LABELS = Labels({0: "background", 1: "liver", 2: "tumour"})
PLAIN = Preprocessing(intensity=(Intensity(normalize="none"),))


class NoAugment:
    def __init__(self, size):
        self.patch_size = size

    def source_size_for(self, seed):
        return self.patch_size

    def __call__(self, sample, seed):
        return {key: torch.from_numpy(value) for key, value in sample.items()} | {"seed": seed % 1000}


def make_case(folder: Path, name: str, *, shape=(12, 10, 8), values=(1, 2)) -> Case:
    rng = np.random.default_rng(len(name))
    label = np.zeros((1, *shape), np.uint8)
    for value in values:
        label[0, 2 * value : 2 * value + 2, 3:6, 2:5] = value
    image = rng.integers(-1000, 1000, (1, *shape)).astype(np.int16)
    geometry = Geometry.from_spacing(shape, (1, 1, 2))
    paths = [folder / f"{name}_{kind}.nii.gz" for kind in ("image", "label")]
    for path, array in zip(paths, (image, label), strict=True):
        write_volume(path, Volume(array, geometry))
    return Case(name, (paths[0],), paths[1], name)


def cache_in(folder: Path, **options) -> CaseCache:
    return CaseCache(folder / "cache", PLAIN, LABELS, **options)


def test_a_cached_case_holds_the_scan_its_label_and_its_voxels(tmp_path):
    (case,) = cache_in(tmp_path).prepare([make_case(tmp_path, "a")])
    assert case.image.dtype == np.float16
    assert case.label.dtype == np.uint8
    assert case.description["voxels"]["1"] == 18
    for value, voxels in case.voxels.items():
        assert (case.label[0][tuple(voxels.T)] == value).all()
        assert len(voxels) == 18
    assert case.geometry.spacing_mm == (1, 1, 2)


def test_only_so_many_voxels_a_class_are_indexed(tmp_path):
    shape = (40, 40, 20)
    label = np.ones((1, *shape), np.uint8)
    geometry = Geometry.from_spacing(shape, (1, 1, 1))
    write_volume(tmp_path / "i.nii", Volume(np.arange(label.size).reshape(label.shape).astype(np.int32), geometry))
    write_volume(tmp_path / "l.nii", Volume(label, geometry))
    case = cache_in(tmp_path).case(Case("a", (tmp_path / "i.nii",), tmp_path / "l.nii", "a"))
    assert case.voxels[1].shape == (VOXELS_PER_CLASS, 3)


def test_values_that_float16_cannot_hold_stay_float32(tmp_path):
    source = make_case(tmp_path, "a")
    image = np.full((1, 12, 10, 8), 1.7e6, np.float32)
    image[0, 0] = 3
    write_volume(source.images[0], Volume(image, Geometry.from_spacing((12, 10, 8), (1, 1, 2))))
    case = cache_in(tmp_path).case(source)
    assert case.image.dtype == np.float32
    assert np.array_equal(case.image, image)


def test_a_second_run_reads_what_the_first_one_wrote(tmp_path):
    source = make_case(tmp_path, "a")
    first = cache_in(tmp_path).case(source)
    stamp = (first.folder / "image.npy").stat().st_mtime_ns
    again = cache_in(tmp_path, in_memory=False).case(source)
    assert again.folder == first.folder
    assert (again.folder / "image.npy").stat().st_mtime_ns == stamp
    assert isinstance(again.image, np.memmap)


def test_another_preprocessing_or_a_changed_file_is_another_entry(tmp_path):
    source = make_case(tmp_path, "a")
    first = cache_in(tmp_path).case(source)
    clipped = Preprocessing(intensity=(Intensity(clip=(-100.0, 100.0), normalize="none"),))
    assert CaseCache(tmp_path / "cache", clipped, LABELS).case(source).folder != first.folder
    make_case(tmp_path, "a", values=(1,))
    assert cache_in(tmp_path).case(source).folder != first.folder


def masks_on_a_series(folder: Path) -> Case:
    """A series of four files, and masks numbered 1 to 4 in the values of their pixels."""
    for k in range(4):
        save(make_slice(2.0 * k), folder / "series" / f"{k}.dcm")
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(np.full((3, 4), 1 + k % 2, np.uint8)).save(folder / "masks" / f"{k}.png")
    return Case("a", (folder / "series",), folder / "masks", "a")


def test_whatever_decides_a_drawn_label_is_another_entry(tmp_path):
    source = masks_on_a_series(tmp_path)
    first = cache_in(tmp_path).case(source)
    assert first.label[0, 0, 0].tolist() == [1, 2, 1, 2]
    changes = ({"region_order": (2, 1)}, {"seg_threshold": 0.3}, {"structures": {"GTV": 2}})
    folders = {
        CaseCache(tmp_path / "cache", PLAIN, replace(LABELS, **change)).case(source).folder for change in changes
    }
    assert len({first.folder, *folders}) == 4


@pytest.mark.parametrize(("folder", "suffix"), [("series", ".dcm"), ("masks", ".png")])
def test_other_names_pair_other_masks_with_slices(tmp_path, folder, suffix):
    source = masks_on_a_series(tmp_path)
    assert cache_in(tmp_path).case(source).label[0, 0, 0].tolist() == [1, 2, 1, 2]
    (tmp_path / folder / f"0{suffix}").rename(tmp_path / folder / f"9{suffix}")
    assert cache_in(tmp_path).case(source).label[0, 0, 0].tolist() == [2, 1, 2, 1]


def test_all_faulty_cases_are_reported_at_once(tmp_path):
    cases = [make_case(tmp_path, "good"), make_case(tmp_path, "bad", values=(1, 3)), make_case(tmp_path, "torn")]
    torn = cases[2].images[0]
    torn.write_bytes(torn.read_bytes()[:200])
    with pytest.raises(MedsegError) as caught:
        cache_in(tmp_path).prepare(cases)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "case bad" in lines[0]
    assert "torn_image.nii.gz" in lines[1]


def test_labels_that_no_case_has_are_named(tmp_path):
    cases = cache_in(tmp_path).prepare([make_case(tmp_path, "a", values=(1,)), make_case(tmp_path, "b", values=())])
    assert absent_labels(cases, LABELS) == ["tumour"]


def test_a_hash_is_remembered_until_the_file_changes(tmp_path):
    path, memory = tmp_path / "x", tmp_path / "memory"
    memory.mkdir()
    path.write_bytes(b"one")
    before = file_hash(path, memory)
    (note,) = memory.iterdir()
    note.write_text("remembered")
    assert file_hash(path, memory) == "remembered"
    path.write_bytes(b"other")
    assert file_hash(path, memory) not in (before, "remembered")


def test_a_patch_over_the_edge_is_filled_with_zeros():
    array = np.arange(1, 28).reshape(1, 3, 3, 3)
    patch = read_patch(array, (0, 1, 1), (3, 3, 3))
    assert (patch[0, 0] == 0).all()
    assert (patch[0, 1:] == array[0, :2]).all()


def test_the_index_alone_decides_a_sample_whatever_the_workers(tmp_path):
    cases = cache_in(tmp_path).prepare([make_case(tmp_path, n) for n in "abc"])
    dataset = PatchDataset(cases, NoAugment((6, 6, 6)), foreground_ratio=0.5, seed=3)
    runs = [
        [batch for batch in patch_loader(dataset, StepSampler(first, 6, batch_size=2), workers=workers)]
        for first, workers in ((0, 0), (0, 1), (4, 0))
    ]
    for ours, theirs in ((runs[0], runs[1]), (runs[0][4:], runs[2])):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["seed"], b["seed"])
            assert a["case"] == b["case"]
    assert runs[0][0]["image"].shape == (2, 1, 6, 6, 6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_slice_is_drawn_and_the_outermost_stand_in_for_the_neighbours_they_lack(tmp_path, axis):
    (case,) = cache_in(tmp_path).prepare([make_case(tmp_path, "a")])
    size = [6, 6, 6]
    size[axis] = 3
    dataset = PatchDataset([case], NoAugment(tuple(size)), foreground_ratio=0.0, seed=0, slice_axis=axis)
    drawn = set()
    for index in range(200):
        before, middle, after = dataset[index]["image"][0].movedim(axis, 0)
        scan = np.moveaxis(np.asarray(case.image[0]), axis, 0)
        (n,) = [k for k in range(len(scan)) if _holds(scan[k], middle)]
        assert _holds(scan[max(n - 1, 0)], before)
        assert _holds(scan[min(n + 1, len(scan) - 1)], after)
        drawn.add(n)
    assert drawn == set(range(case.image.shape[axis + 1]))


def _holds(plane: np.ndarray, part: torch.Tensor) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(plane, tuple(part.shape))
    return bool((windows == part.numpy()).all(axis=(2, 3)).any())


def test_every_second_patch_holds_an_organ_and_classes_come_equally_often(tmp_path):
    shape = (40, 40, 40)
    label = np.zeros((1, *shape), np.uint8)
    label[0, 5:25, 5:25, 5:25] = 1
    label[0, 33, 33, 33] = 2  # one voxel among 8000
    geometry = Geometry.from_spacing(shape, (1, 1, 1))
    image = np.random.default_rng(0).normal(size=label.shape).astype(np.float32)
    write_volume(tmp_path / "i.nii", Volume(image, geometry))
    write_volume(tmp_path / "l.nii", Volume(label, geometry))
    case = cache_in(tmp_path).case(Case("a", (tmp_path / "i.nii",), tmp_path / "l.nii", "a"))
    dataset = PatchDataset([case], NoAugment((5, 5, 5)), foreground_ratio=0.5, seed=0)
    centers = [int(dataset[n]["label"][0, 2, 2, 2]) for n in range(1, 400, 2)]  # the foreground turns
    assert 0 not in centers
    assert 70 < centers.count(2) < 130


def _keep_caching(folder: str, source: Case) -> None:
    while True:
        cache = CaseCache(Path(folder) / "cache", PLAIN, LABELS)
        shutil.rmtree(cache.case(source).folder.rename(Path(folder) / "gone"))


def test_a_file_that_is_not_the_one_the_manifest_states_is_refused(tmp_path):
    case = make_case(tmp_path, "a")
    cache = cache_in(tmp_path)
    image, label = case.images[0], case.label
    cache.case(replace(case, sha256={image: cache.hash_of(image), label: cache.hash_of(label)}))
    with pytest.raises(MedsegError, match=r"E-SHA256 case a: .*a_label\.nii\.gz is not the file that the manifest"):
        cache.case(replace(case, sha256={label: "0" * 64}))


def test_a_kill_leaves_a_whole_case_or_none(tmp_path):
    source = make_case(tmp_path, "a", shape=(60, 60, 40))
    context = multiprocessing.get_context("fork")
    for delay in (0.02, 0.05, 0.11):
        child = context.Process(target=_keep_caching, args=(str(tmp_path), source))
        child.start()
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)
        case = cache_in(tmp_path).case(source)
        assert case.image.shape == (1, 60, 60, 40)
        assert set(case.voxels) == {1, 2}
        assert not list((tmp_path / "cache").glob(".*.tmp"))
