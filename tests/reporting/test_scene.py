"""Cases as they are shown: the right grid, the right side, nothing that names a patient."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.errors import MedsegError
from medseg.geometry import Geometry
from medseg.labels import Labels
from medseg.reporting import viewer
from medseg.reporting.run import Run, read_run
from medseg.reporting.scene import Scene, box_around, load_scene, organ_numbers
from medseg.reporting.viewer import shown, viewer_html

from .run_folders import LABELS, make_run, right_sided


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(make_run(tmp_path / "run", {"a": right_sided()}), {})


def scene_of(run: Run) -> Scene:
    return load_scene(run.cases["a"], run.preprocessing, run.labels)


def volumes_of(html: str, folder: Path) -> list[dict[str, nib.Nifti1Image]]:
    """What the viewer of a page shows, read by another program."""
    found = re.search(r'id="viewer-cases">(.*?)</script>', html)
    assert found
    cases = []
    for n, case in enumerate(json.loads(found.group(1))):
        layers = {}
        for name, content in case["layers"].items():
            path = folder / f"{n}_{name}.nii.gz"
            path.write_bytes(base64.b64decode(content))
            layers[name] = nib.load(path)
        cases.append(layers)
    return cases


def center_mm(image: nib.Nifti1Image, value: int) -> np.ndarray:
    index = np.argwhere(np.asarray(image.dataobj) == value).mean(axis=0)
    return nib.affines.apply_affine(image.affine, index)


def test_a_scene_is_in_ras(run: Run) -> None:
    scene = scene_of(run)
    assert scene.geometry.orientation == "RAS"
    assert scene.reference is not None
    np.testing.assert_array_equal(scene.prediction, right_sided()[0][::-1, ::-1])
    np.testing.assert_array_equal(scene.reference, scene.prediction)
    assert scene.window == (-175, 250), "the window that the network was given"


@pytest.mark.parametrize(("kind", "said"), [("image", "its scan"), ("label", "what the expert drew")])
def test_a_file_that_is_gone_is_told_by_what_it_was(run: Run, kind: str, said: str) -> None:
    case = run.cases["a"]
    gone = case.images[0] if kind == "image" else case.reference
    assert gone
    gone.unlink()
    with pytest.raises(MedsegError, match=said) as caught:
        scene_of(run)
    assert caught.value.error_id == "E-MISSING-FILE"
    assert gone.name not in caught.value.message


def test_a_prediction_on_another_grid_is_not_drawn_on_the_scan(run: Run) -> None:
    path = run.cases["a"].prediction
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine + np.diag([0.5, 0, 0, 0])), path)
    with pytest.raises(MedsegError) as caught:
        scene_of(run)
    assert caught.value.error_id == "E-PAIR-SHAPE"


def test_the_box_around_organs_has_a_margin_where_there_is_room() -> None:
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[1:3, 8:10, 19] = 1
    assert box_around([mask], (1.0, 2.0, 5.0), 4.0) == (slice(0, 7), slice(6, 12), slice(18, 20))


def test_without_an_organ_the_whole_scan_is_shown() -> None:
    assert box_around([np.zeros((4, 5, 6))], (1, 1, 1), 2) == (slice(0, 4), slice(0, 5), slice(0, 6))


def test_of_regions_that_overlap_the_later_lies_on_top() -> None:
    labels = Labels(
        {0: "background", 1: "edema", 2: "core"}, regions={"whole": (1, 2), "core": (2,)}, region_order=(1, 2)
    )
    np.testing.assert_array_equal(organ_numbers(np.array([0, 1, 2]), labels), [0, 1, 2])


def test_the_viewers_volumes_lie_where_the_scan_does(run: Run, tmp_path: Path) -> None:
    (layers,) = volumes_of(viewer_html([shown(scene_of(run), LABELS, "worst: a")], LABELS), tmp_path)
    source = nib.load(run.cases["a"].reference)
    for name in ("prediction", "reference"):
        assert layers[name].get_data_dtype() == np.uint8
        for value in (1, 2):
            np.testing.assert_allclose(center_mm(layers[name], value), center_mm(source, value), atol=0.05)
        np.testing.assert_allclose(layers[name].affine, layers["image"].affine)


def test_the_viewers_scan_keeps_its_gray_values(run: Run, tmp_path: Path) -> None:
    (layers,) = volumes_of(viewer_html([shown(scene_of(run), LABELS, "worst: a")], LABELS), tmp_path)
    hu, organ = layers["image"].get_fdata(), np.asarray(layers["reference"].dataobj)
    assert layers["image"].get_data_dtype() == np.uint8
    assert np.median(hu[organ == 1]) == pytest.approx(80, abs=4), "the rim is mixed with what is around it"
    assert np.median(hu[organ == 2]) == pytest.approx(120, abs=8)
    assert float(layers["image"].header["cal_min"]) == -175


def test_a_large_scan_is_made_coarser_until_it_fits(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    monkeypatch.setattr(viewer, "MAX_BYTES", 12_000)
    html = viewer_html([shown(scene_of(run), LABELS, "worst: a")], LABELS)
    (layers,) = volumes_of(html, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("0_*.nii.gz")) * 4 / 3 <= 12_100
    source = nib.load(run.cases["a"].reference)
    np.testing.assert_allclose(center_mm(layers["reference"], 1), center_mm(source, 1), atol=1.5)


def test_a_patients_scan_of_clinical_size_stays_within_its_share(tmp_path: Path) -> None:
    shape = (300, 260, 220)
    label = np.zeros(shape, np.uint8)
    label[10:290, 10:250, 10:210] = 1
    image = np.random.default_rng(0).normal(0, 60, shape).astype(np.float32)  # noise cannot be compressed
    scene = Scene("a", image, label, label, Geometry.from_spacing(shape, (1.0, 1.0, 1.0)), (-175, 250))
    html = viewer_html([shown(replace(scene, case=str(n)), LABELS, str(n)) for n in range(3)], LABELS)
    assert len(html) < 17_000_000
