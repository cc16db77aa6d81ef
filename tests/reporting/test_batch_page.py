"""Segmentations without references: volumes, and what stands out among them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from medseg.reporting.batch import robust_z


def test_robust_z_is_iglewicz_and_hoaglins() -> None:
    values = np.array([10.0, 11, 12, 13, 14, 100])
    median = 12.5
    mad = np.median([2.5, 1.5, 0.5, 0.5, 1.5, 87.5])
    np.testing.assert_allclose(robust_z(values), 0.6745 * (values - median) / mad)


def test_robust_z_of_equal_values_is_0() -> None:
    np.testing.assert_array_equal(robust_z(np.full(6, 3.0)), np.zeros(6))


def test_robust_z_tells_one_case_among_equal_ones() -> None:
    z = robust_z(np.array([5.0] * 9 + [50.0]))
    assert np.abs(z[:9]).max() == 0
    assert z[9] > 3.5


def test_robust_z_of_normal_values_is_the_usual_one() -> None:
    values = np.random.default_rng(0).normal(100, 10, 20_000)
    np.testing.assert_allclose(robust_z(values), (values - values.mean()) / values.std(), atol=0.1)


@pytest.fixture
def segmentations(tmp_path: Path) -> Path:
    from medseg.data.volume_io import write_volume
    from medseg.geometry import Geometry, Volume

    from .run_folders import LPS, right_sided, write_case

    (tmp_path / "out").mkdir()
    for n in range(8):
        found = right_sided()
        found[:, 6 : 6 + n % 3] = 0
        if n == 4:
            found[found == 2] = 0
        write_case(tmp_path / "data", f"p{n}", right_sided())
        write_volume(tmp_path / "out" / f"p{n}.nii.gz", Volume(found, Geometry(found.shape[1:], LPS)))
    return tmp_path / "out"


def test_what_stands_out_comes_first_with_its_volume(segmentations: Path) -> None:
    from medseg.report import report

    result = report(str(segmentations))
    assert (result["cases"], result["outliers"], result["pictures"]) == (8, 1, 0)
    html = (segmentations / "report.html").read_text()
    assert re.findall(r'<th scope="row" data-value="(p\d)"', html)[0] == "p4"
    assert "label 2: not found" in html
    assert f'data-value="{12 * 14 * 10 * 12 / 1000:.6g}"' in html, "a whole liver, of voxels of 12 mm³, in ml"
    assert "--scans" in html


def test_with_its_scans_it_shows_them_and_names_the_organs(segmentations: Path, tmp_path: Path) -> None:
    from medseg.report import report

    from .run_folders import write_spec

    write_spec(tmp_path / "model", fold=0)
    result = report(str(segmentations), scans=tmp_path / "data" / "images", labels=tmp_path / "model")
    assert (result["pictures"], result["viewer_cases"]) == (8, 2), "six and two ordinary ones"
    html = (segmentations / "report.html").read_text()
    assert "spleen: not found" in html
    assert 'name="reference"' not in html, "there is none to show"
    assert result["megabytes"] < 20


def test_values_that_the_labels_do_not_declare_are_refused(segmentations: Path, tmp_path: Path) -> None:
    from medseg.data.volume_io import read_label, write_volume
    from medseg.errors import DataError
    from medseg.geometry import Volume
    from medseg.report import report

    from .run_folders import write_spec

    write_spec(tmp_path / "model", fold=0)
    label = read_label(segmentations / "p3.nii.gz")
    label.array[label.array == 1] = 9
    write_volume(segmentations / "p3.nii.gz", Volume(label.array, label.geometry))
    with pytest.raises(DataError, match=r"E-LABEL-UNDECLARED .*p3\.nii\.gz: holds label 9"):
        report(str(segmentations), labels=tmp_path / "model")


def without_spleen(folder: Path, cases: range) -> None:
    from medseg.data.volume_io import read_label, write_volume
    from medseg.geometry import Volume

    for n in cases:
        label = read_label(folder / f"p{n}.nii.gz")
        label.array[label.array == 2] = 0
        write_volume(folder / f"p{n}.nii.gz", Volume(label.array, label.geometry))


@pytest.mark.parametrize(
    ("lacking", "said"),
    [(8, "spleen was found in none of the scans"), (6, "spleen was found in only 2 of 8 scans"), (4, None)],
)
def test_an_organ_that_most_cases_lack_is_the_headline(
    segmentations: Path, tmp_path: Path, lacking: int, said: str | None
) -> None:
    from medseg.report import report, report_summary

    from .run_folders import write_spec

    without_spleen(segmentations, range(4, 4 + lacking) if lacking <= 4 else range(lacking))
    write_spec(tmp_path / "model", fold=0)
    result = report(str(segmentations), labels=tmp_path / "model")
    html = (segmentations / "report.html").read_text()
    headline = html[: html.index("</header>")]
    assert result["mostly_absent"] == ({"spleen": lacking} if said else {})
    assert ("was found in" in headline) == bool(said)
    assert ("spleen was found in" in str(report_summary(result))) == bool(said)
    if said:
        assert f"<b>{said}.</b>" in headline
        assert "are these the right labels?" in headline
        assert "unusually" not in html, "the two that have it are not the odd ones"
    assert html.count("spleen: not found") == lacking


def test_a_scan_in_which_nothing_was_found_is_named_however_few_there_are(segmentations: Path) -> None:
    from medseg.data.volume_io import read_label, write_volume
    from medseg.geometry import Volume
    from medseg.report import report

    for n in range(3, 8):
        (segmentations / f"p{n}.nii.gz").unlink()
    label = read_label(segmentations / "p1.nii.gz")
    write_volume(segmentations / "p1.nii.gz", Volume(np.zeros_like(label.array), label.geometry))
    report(str(segmentations))
    html = (segmentations / "report.html").read_text()
    assert "<b>Nothing at all was found in 1 of 3:</b> p1." in html
    assert "robust z" not in html, "three cases are too few for it"


def test_files_that_cannot_be_read_are_listed_and_the_others_shown(segmentations: Path) -> None:
    from medseg.report import report

    whole = (segmentations / "p2.nii.gz").read_bytes()
    (segmentations / "p2.nii.gz").write_bytes(whole[: len(whole) // 2])
    (segmentations / "p6.nii.gz").write_bytes(b"")
    result = report(str(segmentations))
    assert result["cases"] == 6
    assert [(entry["case"], entry["error_id"]) for entry in result["failed"]] == [
        ("p2", "E-NIFTI-TRUNCATED"),
        ("p6", "E-NIFTI-EMPTY"),
    ]
    html = (segmentations / "report.html").read_text()
    assert "<b>Not readable: 2 files</b>" in html
    assert "p2: E-NIFTI-TRUNCATED expected" in html
    assert str(segmentations) not in html
    rows = re.findall(r'<th scope="row" data-value="(p\d)"', html)
    assert sorted(rows) == ["p0", "p1", "p3", "p4", "p5", "p7"]


def test_where_no_file_can_be_read_there_is_no_page(segmentations: Path) -> None:
    from medseg.errors import Problems
    from medseg.report import report

    for path in segmentations.iterdir():
        path.write_bytes(b"")
    with pytest.raises(Problems, match="E-NIFTI-EMPTY"):
        report(str(segmentations))
    assert not (segmentations / "report.html").exists()


def test_without_names_only_the_values_that_occur_are_organs(segmentations: Path) -> None:
    from medseg.data.volume_io import read_label, write_volume
    from medseg.geometry import Volume
    from medseg.report import report

    for path in segmentations.iterdir():
        label = read_label(path)
        write_volume(path, Volume(np.where(label.array == 2, 52, label.array).astype(np.uint8), label.geometry))
    report(str(segmentations))
    html = (segmentations / "report.html").read_text()
    assert set(re.findall(r"label \d+", html)) == {"label 1", "label 52"}


def test_a_picture_is_counted_in_pixels(tmp_path: Path) -> None:
    from PIL import Image

    from medseg.report import report

    drawn = np.zeros((20, 30), np.uint8)
    drawn[2:7, 3:9] = 1
    Image.fromarray(drawn).save(tmp_path / "a.png")
    report(str(tmp_path))
    html = (tmp_path / "report.html").read_text()
    assert "label 1 (pixels)" in html
    assert f'<td data-value="{5 * 6}">30</td>' in html


def test_the_scans_of_a_whole_manifest_are_known(segmentations: Path, tmp_path: Path) -> None:
    import json

    from medseg.report import report

    from .run_folders import LABELS

    listed = [
        {"id": f"p{n}", "image": f"data/images/p{n}.nii.gz", "label": f"data/labels/p{n}.nii.gz"} for n in range(8)
    ]
    described = {"name": "toy", **LABELS.to_dict(), "modality": {"0": "CT"}, "training": listed[:4], "test": listed[4:]}
    (tmp_path / "set.json").write_text(json.dumps(described))
    result = report(str(segmentations), scans=tmp_path / "set.json")
    assert result["pictures"] == 8
    assert "no scan is called like them" not in (segmentations / "report.html").read_text()
