from __future__ import annotations

from pathlib import Path

import pytest

from medseg.data.manifest import Manifest
from medseg.data.volume_io import read_label, read_volume
from medseg.data_tools import make_phantom
from medseg.errors import DataError

SHAPE = (32, 32, 16)


def test_phantom_folder_is_a_data_set_with_its_manifest(tmp_path: Path) -> None:
    result = make_phantom(tmp_path / "set", num_cases=2, shape=SHAPE)
    manifest = Manifest.load(result["manifest"])
    manifest.check_files()
    assert result["cases"] == len(manifest.training) == 2
    assert manifest.name == "set"
    assert manifest.labels.organs == ("liver", "tumour")
    for case in manifest.training:
        assert case.label
        image, label = read_volume(case.images[0]), read_label(case.label)
        assert image.geometry.shape == SHAPE
        assert image.geometry.matches(label.geometry)


def test_phantom_called_again_makes_only_what_is_missing(tmp_path: Path) -> None:
    make_phantom(tmp_path, num_cases=2, shape=SHAPE)
    kept, lost = (tmp_path / "images" / f"case_00{n}.nii.gz" for n in (0, 1))
    before, content = kept.stat(), lost.read_bytes()
    lost.unlink()
    make_phantom(tmp_path, num_cases=2, shape=SHAPE)
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == before.st_mtime_ns


def test_phantom_refuses_to_mix_with_another_data_set(tmp_path: Path) -> None:
    make_phantom(tmp_path / "set", num_cases=1, shape=SHAPE)
    with pytest.raises(DataError, match=r"dataset\.json: describes another data set"):
        make_phantom(tmp_path / "set", num_cases=1, seed=5, shape=SHAPE)
    with pytest.raises(DataError, match="is not empty"):
        make_phantom(tmp_path, num_cases=1, shape=SHAPE)


def test_phantom_with_unknown_labels_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'liver'"):
        make_phantom(tmp_path / "set", labels="livre")
    assert not (tmp_path / "set").exists()
