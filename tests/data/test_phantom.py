"""The phantom: exact, reproducible, an abdomen at any resolution, and no task for a threshold."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from medseg.data.manifest import Manifest
from medseg.data.phantom import LABELS, Phantom, ct_case, make_cases, picture, scanner
from medseg.data.phantom.atlas import ORGANS
from medseg.data.phantom.solids import SmoothField, bent_tube, ellipsoid, trunk, tube
from medseg.data.volume_io import read_label, read_volume
from medseg.errors import DataError

MANIFEST = Path(__file__).parents[2] / "data_manifests" / "liver.json"
SMALL = (48, 48, 32)
SPEC = {"kind": "ct", "seed": 7, "cases": 2, "shape": [20, 20, 16], "labels": "liver"}


@pytest.fixture(scope="module")
def abdomens() -> list[Phantom]:
    return [ct_case(seed, (64, 64, 44), labels="abdomen") for seed in range(6)]


def ras(case: Phantom) -> tuple[np.ndarray, np.ndarray]:
    return case.image.oriented("RAS").array[0], case.label.oriented("RAS").array[0]


def center(case: Phantom, organ: str) -> np.ndarray:
    """Centroid in RAS mm."""
    index = ndimage.center_of_mass(case.label.array[0] == ORGANS.index(organ))
    return (case.label.geometry.affine @ [*index, 1])[:3]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def test_the_same_seed_gives_the_same_bits_in_another_process() -> None:
    code = (
        "import hashlib; from medseg.data.phantom import ct_case; case = ct_case(3, (40, 36, 24));"
        "print(hashlib.sha256(case.image.array.tobytes() + case.label.array.tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            check=True,
            capture_output=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(digests) == 1


def test_different_seeds_give_different_patients_and_scans(abdomens: list[Phantom]) -> None:
    livers = [ras(case)[1] == 1 for case in abdomens]
    assert max(dice(a, b) for a, b in combinations(livers, 2)) < 0.92
    assert len({case.image.geometry.spacing_mm for case in abdomens}) == len(abdomens)
    volumes_ml = [np.count_nonzero(case.label.array == 1) * case.label.geometry.voxel_ml for case in abdomens]
    assert 700 < min(volumes_ml) < 0.85 * max(volumes_ml) < 2500


def test_slabs_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ct_case(4, SMALL)
    monkeypatch.setattr(scanner, "_SLAB_VOXELS", 5 * SMALL[0] * SMALL[1])
    slabs = ct_case(4, SMALL)
    assert np.array_equal(whole.image.array, slabs.image.array)
    assert np.array_equal(whole.label.array, slabs.label.array)


def test_a_voxel_has_the_label_of_its_center_at_any_resolution() -> None:
    coarse = ct_case(2, (32, 32, 20), spacing_mm=(12, 12, 12), labels="abdomen").label
    fine = ct_case(2, (96, 96, 60), spacing_mm=(4, 4, 4), labels="abdomen").label
    at_centers = fine.array[0, 1::3, 1::3, 1::3]  # the middle one of 3 × 3 × 3 shares the coarse voxel's center
    assert (coarse.array[0] == at_centers).mean() > 0.9995  # coordinates are rounded to float32
    blocks = fine.array[0].reshape(32, 3, 32, 3, 20, 3).transpose(0, 2, 4, 1, 3, 5).reshape(32, 32, 20, 27)
    undivided = (blocks == blocks[..., :1]).all(axis=-1)
    assert (coarse.array[0] == blocks[..., 0])[undivided].mean() > 0.9995


def test_half_the_resolution_agrees_with_the_downsampled_label() -> None:
    half = ct_case(2, (48, 48, 32), spacing_mm=(8, 8, 7)).label.array[0] > 0
    full = ct_case(2, (96, 96, 64), spacing_mm=(4, 4, 3.5)).label.array[0] > 0
    share = full.reshape(48, 2, 48, 2, 32, 2).mean(axis=(1, 3, 5))
    assert dice(half, share >= 0.5) > 0.95


def test_thick_slices_average_thin_ones() -> None:
    thick = ct_case(2, (96, 96, 12), spacing_mm=(4, 4, 20)).image.array[0].astype(float)
    thin = ct_case(2, (96, 96, 60), spacing_mm=(4, 4, 4)).image.array[0].astype(float)
    difference = thick - thin.reshape(96, 96, 12, 5).mean(axis=-1)
    assert np.abs(difference.mean()) < 2
    assert difference.std() < 18  # noise alone; the patient varies by hundreds of HU


def test_files_are_stored_as_scanners_do(abdomens: list[Phantom]) -> None:
    assert {case.image.geometry.orientation for case in abdomens} == {"LPS", "LAS"}
    for case in abdomens:
        assert case.image.array.dtype == np.int16
        assert case.label.array.dtype == np.uint8
        assert case.label.geometry.matches(case.image.geometry)
        assert np.abs(case.image.geometry.affine[:3, 3]).min() > 20
        assert case.image.geometry.spacing_mm[0] != pytest.approx(case.image.geometry.spacing_mm[2], rel=1e-3)


def test_organs_lie_where_they_do_in_people(abdomens: list[Phantom]) -> None:
    for case in abdomens:
        centers = {organ: center(case, organ) for organ in ORGANS if organ != "tumour"}
        right, anterior, superior = ({organ: c[axis] for organ, c in centers.items()} for axis in range(3))
        assert right["liver"] > right["spine"] > right["spleen"]
        assert right["right kidney"] > right["spine"] > right["left kidney"]
        assert right["right lung"] > right["left lung"]
        assert right["vena cava"] > right["aorta"]
        assert right["stomach"] < right["liver"]
        assert anterior["spine"] == min(anterior.values())
        assert superior["right lung"] > superior["liver"] > superior["right kidney"]
        assert superior["left kidney"] > superior["right kidney"]


def test_every_organ_is_there(abdomens: list[Phantom]) -> None:
    for case in abdomens:
        assert set(range(len(ORGANS))) - {ORGANS.index("tumour")} <= set(np.unique(case.label.array))


def test_both_label_maps_agree() -> None:
    liver, abdomen = (ct_case(1, SMALL, labels=labels) for labels in LABELS)
    assert np.array_equal(liver.image.array, abdomen.image.array)
    assert np.array_equal(liver.label.array, np.where(abdomen.label.array <= 2, abdomen.label.array, 0))


def test_tissues_have_the_hu_they_have_in_people(abdomens: list[Phantom]) -> None:
    for case in abdomens:
        image, label = case.image.array, case.label.array
        median = {organ: np.median(image[label == n]) for n, organ in enumerate(ORGANS) if (label == n).any()}
        assert 40 < median["liver"] < 110
        assert median["right lung"] < -700
        assert median["spine"] > 100
        assert -10 < median["gallbladder"] < 30
        assert image.min() < -950 and image.max() > 500


def test_organs_overlap_in_hu(abdomens: list[Phantom]) -> None:
    for case in abdomens:
        image, label = case.image.array, case.label.array
        low, high = np.percentile(image[label == 1], (5, 95))
        for organ in ("spleen", "stomach", "pancreas"):  # and muscle, which has no label
            values = image[label == ORGANS.index(organ)]
            assert ((low < values) & (values < high)).mean() > 0.2, organ


def test_some_patients_have_tumors_darker_or_brighter_than_the_liver() -> None:
    contrasts = []
    for seed in range(16):
        case = ct_case(seed, SMALL)
        image, label = case.image.array[0], case.label.array[0]
        tumor = ndimage.binary_erosion(label == 2)
        if np.count_nonzero(tumor) > 5:
            contrasts.append(image[tumor].mean() - np.median(image[label == 1]))
        elif not (label == 2).any():
            contrasts.append(0.0)
    signs = Counter(np.sign(contrasts))
    assert min(signs[0], signs[-1], signs[1]) >= 1, contrasts
    assert max(np.abs(contrasts)) < 80


def test_surfaces_have_partial_volume(abdomens: list[Phantom]) -> None:
    for case in abdomens:
        between = (case.image.array[0] > -600) & (case.image.array[0] < -250)  # neither lung nor soft tissue
        lung = np.isin(case.label.array[0], [ORGANS.index("right lung"), ORGANS.index("left lung")])
        surface = ndimage.binary_dilation(lung) & ~ndimage.binary_erosion(lung)
        assert between[surface].mean() > 0.1


def best_threshold(image: np.ndarray, liver: np.ndarray) -> float:
    """Best Dice of the largest component over all windows on a grid of 5 HU."""
    best, size = 0.0, np.count_nonzero(liver)
    for low, width in product(range(0, 130, 5), (*range(10, 105, 5), 150, 3000)):
        window = (image >= low) & (image <= low + width)
        hits = np.count_nonzero(window & liver)
        if 2 * hits / (hits + size) <= best:
            continue  # not even with every voxel outside the liver dropped
        components, count = ndimage.label(window)
        if count:
            largest = components == 1 + np.argmax(np.bincount(components.ravel())[1:])
            best = max(best, dice(largest, liver))
    return best


def test_no_threshold_solves_it() -> None:
    raw, smoothed = [], []
    for seed in range(100, 104):
        case = ct_case(seed, (64, 64, 44))
        image, liver = case.image.array[0].astype(np.float32), case.label.array[0] > 0
        raw.append(best_threshold(image, liver))
        smoothed.append(best_threshold(ndimage.gaussian_filter(image, 0.7), liver))
    assert np.mean(raw) <= 0.70, raw
    assert np.mean(smoothed) <= 0.75, smoothed  # even if the window is chosen anew for every scan


def test_cases_are_made_once_and_completed_after_a_kill(tmp_path: Path) -> None:
    calls: list[int] = []
    make_cases(tmp_path, spec=SPEC, on_case=lambda: calls.append(1))
    files = sorted(tmp_path.rglob("*.nii.gz"))
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        f"{kind}/case_{n:03d}.nii.gz" for kind in ("images", "labels") for n in range(2)
    ]
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}

    files[3].unlink()  # as if killed between a case's image and its label
    leftover = files[3].with_name(".0123abcd.nowhere.1.tmp")
    leftover.write_bytes(files[2].read_bytes()[:100])
    make_cases(tmp_path, spec=SPEC, on_case=lambda: calls.append(1))
    assert len(calls) == 4
    assert {file: file.read_bytes() for file in files} == {file: content for file, (content, _) in before.items()}
    assert [file.stat().st_mtime_ns == before[file][1] for file in files] == [True, False, True, False]


def test_written_cases_read_back_as_they_were_made(tmp_path: Path) -> None:
    make_cases(tmp_path, spec={**SPEC, "cases": 1})
    case = ct_case(7, (20, 20, 16))
    image = read_volume(tmp_path / "images" / "case_000.nii.gz")
    assert np.array_equal(image.array, case.image.array)
    assert np.array_equal(read_label(tmp_path / "labels" / "case_000.nii.gz").array, case.label.array)
    assert image.geometry.matches(case.image.geometry)


def test_two_processes_can_make_the_same_cases(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from medseg.data.phantom import make_cases; make_cases(Path({str(tmp_path)!r}), spec={SPEC})"
    workers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    for n in range(2):
        written = read_volume(tmp_path / "images" / f"case_{n:03d}.nii.gz").array
        assert np.array_equal(written, ct_case(7 + n, (20, 20, 16)).image.array)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "change", [{"kind": "mr"}, {"shape": [96, 96]}, {"cases": 0}, {"labels": "brain"}, {"seed": -1}]
)
def test_a_wrong_phantom_entry_is_refused_with_an_example(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r'E-PHANTOM.*expected the form \{"kind": "ct"'):
        make_cases(tmp_path, spec={**SPEC, **change})


def test_an_unknown_label_map_is_refused() -> None:
    with pytest.raises(DataError, match="E-PHANTOM no label map is called 'brain'; known: liver, abdomen"):
        ct_case(0, SMALL, labels="brain")


def test_the_default_manifest_lists_the_cases_its_phantom_makes() -> None:
    manifest = Manifest.load(MANIFEST)
    assert manifest.phantom is not None
    assert manifest.labels.names == LABELS[manifest.phantom["labels"]]
    cases = [*manifest.training, *manifest.test]
    expected = [f"images/case_{n:03d}.nii.gz" for n in range(manifest.phantom["cases"])]
    assert [case.images[0].relative_to(manifest.root).as_posix() for case in cases] == expected
    assert all(case.label is not None and case.label.name == case.images[0].name for case in cases)
    assert Counter(case.fold for case in manifest.training) == dict.fromkeys(range(5), 4)


def test_pictures_have_labeled_nuclei_that_stain_alone_does_not_tell() -> None:
    for seed in range(3):
        case = picture(seed, (96, 120))
        image, label = case.image.array, case.label.array[0]
        assert (image.shape, image.dtype, label.shape, label.dtype) == ((3, 96, 120), np.uint8, (96, 120), np.uint8)
        assert set(np.unique(label)) == {0, 1}
        assert 0.05 < label.mean() < 0.8
        red = image[0].astype(float)
        assert red[label == 1].mean() < red[label == 0].mean() - 30
        assert (red[label == 0] < np.median(red[label == 1])).any()  # specks of the same stain
        assert np.array_equal(image, picture(seed, (96, 120)).image.array)


def test_depth_is_the_distance_to_the_surface() -> None:
    x, y, z = (np.float32(a) for a in np.meshgrid(*[np.linspace(-30, 30, 13)] * 3, indexing="ij"))
    radius = np.sqrt(x**2 + y**2 + z**2)
    np.testing.assert_allclose(
        ellipsoid((0, 0, 0), (20, 20, 20)).depth(x, y, z)[radius > 1], (20 - radius)[radius > 1], atol=1e-2
    )
    straight = tube([(0, 0, -10), (0, 0, 10)], [5, 5]).depth(x, y, z)
    np.testing.assert_allclose(straight, 5 - np.sqrt(x**2 + y**2 + np.maximum(np.abs(z) - 10, 0) ** 2), atol=1e-4)


def test_boxes_hold_their_solids() -> None:
    x, y, z = (np.float32(a) for a in np.meshgrid(*[np.linspace(-60, 60, 41)] * 3, indexing="ij"))
    for solid in (
        ellipsoid((5, 0, 9), (30, 12, 20), turn_degrees=33),
        bent_tube([(-20, 0, 0), (0, 30, 5), (20, -10, 20)], [4, 8, 3]),
        trunk(40, 25, y=3).within(ellipsoid((0, 0, 0), (50, 50, 10))),
        ellipsoid((0, 0, 0), (20, 10, 10)).grown(5),
    ):
        inside = solid.depth(x, y, z) > 0
        assert inside.any()
        for axis, low, high in zip((x, y, z), solid.low, solid.high, strict=True):
            assert low <= axis[inside].min() and axis[inside].max() <= high


def test_smooth_fields_are_standardized_bounded_and_the_same_on_any_grid() -> None:
    field = SmoothField.random(np.random.default_rng(0), 10.0)
    line = np.arange(-200, 200, 5, dtype=np.float32)
    values = field.on_grid(line, line, line)
    assert abs(values.mean()) < 0.05
    assert values.std() == pytest.approx(1, abs=0.1)
    np.testing.assert_array_equal(field.on_grid(line[3:9], line, line[::7]), values[3:9, :, ::7])
    across_the_seam = field.on_grid(np.float32([479.99, 480.01]), line, line)  # where its 48 nodes begin again
    np.testing.assert_allclose(across_the_seam[0], across_the_seam[1], atol=0.02)
