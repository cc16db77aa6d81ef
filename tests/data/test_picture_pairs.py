"""Pictures and masks paired by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medseg.data.manifest import Manifest
from medseg.data.picture_pairs import compact_json, picture_manifest
from medseg.errors import DataError

LABELS = {0: "background", 1: "nucleus"}
MANIFEST = Path(__file__).parents[2] / "data_manifests" / "nuclei.json"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def test_each_picture_finds_the_mask_of_its_name(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "images/b.jpg",
        "images/a.PNG",
        "masks/a_mask.png",
        "masks/b_mask.tif",
        "images/.DS_Store",
        "images/x.txt",
    )
    made = picture_manifest(tmp_path, name="set", labels=LABELS, mask_ending="_mask")
    assert made["training"] == [
        {"image": "images/a.PNG", "label": "masks/a_mask.png"},
        {"image": "images/b.jpg", "label": "masks/b_mask.tif"},
    ]
    (tmp_path / "set.json").write_text(compact_json(made))
    assert json.loads((tmp_path / "set.json").read_text()) == made
    manifest = Manifest.load(tmp_path / "set.json")
    manifest.check_files()
    assert [case.id for case in manifest.training] == ["a", "b"] and manifest.channels == ("R", "G", "B")


def test_what_has_no_counterpart_is_refused_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "images/b.png", "masks/a.png", "masks/c.png")
    with pytest.raises(DataError, match=r"E-PICTURE-PAIRS.*: b, c"):
        picture_manifest(tmp_path, name="set", labels=LABELS)
    with pytest.raises(DataError, match=r"E-PICTURE-PAIRS.*0 pictures"):
        picture_manifest(tmp_path, name="set", labels=LABELS, images="none", masks="none")


def test_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "images/a.jpg", "masks/a.png")
    with pytest.raises(DataError, match="E-DUPLICATE-CASE"):
        picture_manifest(tmp_path, name="set", labels=LABELS)


@pytest.mark.real_data
def test_the_manifest_of_the_nuclei_lists_the_files_that_are_there(data_dir: Path) -> None:
    written = json.loads(MANIFEST.read_text())
    made = picture_manifest(data_dir / "nuclei", name="nuclei", labels=LABELS, root="${MEDSEG_DATA}/nuclei")
    assert len(made["training"]) == 450
    assert {key: written[key] for key in made} == made
