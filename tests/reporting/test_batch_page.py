"""Segmentations without references: volumes, and what stands out among them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from medseg.reporting.batch_page import robust_z


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
    assert (result["pictures"], result["viewer_cases"]) == (6, 2)
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
