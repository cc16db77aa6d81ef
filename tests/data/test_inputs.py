import json

import pytest

from medseg.data.inputs import find_cases, manifest_cases
from medseg.data.lint.draft import read_draft
from medseg.data.manifest import Manifest
from medseg.errors import DataError, WorkflowError


def ids(cases) -> list[str]:
    return [case.id for case in cases]


def test_a_folder_is_searched_through_hidden_files_other_kinds_and_loops_of_links(tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for name in ("b.NII.GZ", "deep/a.nrrd", "deep/deeper/c.mha", ".hidden.nii", "notes.txt", "slice.png"):
        (tmp_path / name).touch()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    assert ids(find_cases([tmp_path])) == ["b", "a", "c"]


def test_files_folders_and_manifests_mix(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("one.nii.gz", "folder/two.nii"):
        (tmp_path / name).touch()
    entry = {"image": ["ct.nii.gz", "pet.nii.gz"], "id": "three"}
    (tmp_path / "set.json").write_text(json.dumps({"labels": {"0": "background", "1": "a"}, "training": [entry]}))
    cases = find_cases([tmp_path / "one.nii.gz", tmp_path / "folder", tmp_path / "set.json"])
    assert ids(cases) == ["one", "two", "three"]
    assert cases[2].images == (tmp_path / "ct.nii.gz", tmp_path / "pet.nii.gz")


def test_the_scans_of_a_phantom_are_made_when_they_are_asked_for(tmp_path):
    spec = {"kind": "ct", "seed": 0, "cases": 1, "shape": [16, 16, 8], "labels": "liver"}
    entry = {"image": "images/case_000.nii.gz", "label": "labels/case_000.nii.gz"}
    data = {"labels": {"0": "background", "1": "liver", "2": "tumour"}, "phantom": spec, "training": [entry]}
    (tmp_path / "phantom.json").write_text(json.dumps(data))
    (case,) = find_cases([tmp_path / "phantom.json"])
    assert all(file.exists() for file in case.files)


@pytest.mark.parametrize("split", ["fold_9", "test", "train", ""])
def test_a_part_that_a_manifest_has_not_is_refused(tmp_path, split):
    entries = [{"image": f"{n}.nii"} for n in range(5)]
    (tmp_path / "set.json").write_text(json.dumps({"labels": {"0": "background", "1": "a"}, "training": entries}))
    with pytest.raises(WorkflowError, match="E-SPLIT"):
        manifest_cases(Manifest.load(tmp_path / "set.json"), split)


def test_files_of_one_name_are_told_apart_by_their_folders_wherever_they_are_named(tmp_path):
    for patient in ("P1", "P2"):
        (tmp_path / patient / "CT").mkdir(parents=True)
        (tmp_path / patient / "CT" / "image.nii.gz").touch()
    (tmp_path / "other.nii.gz").touch()
    expected = ["P1_CT_image", "P2_CT_image"]
    assert sorted(ids(find_cases([tmp_path]))) == [*expected, "other"]
    assert ids(find_cases([tmp_path / "P1", tmp_path / "P2" / "CT" / "image.nii.gz"])) == expected
    training = [
        {"image": f"{patient}/CT/image.nii.gz", "label": "l.nii", "patient": patient} for patient in ("P1", "P2")
    ]
    (tmp_path / "set.json").write_text(json.dumps({"labels": {"0": "background", "1": "a"}, "training": training}))
    assert ids(Manifest.load(tmp_path / "set.json").training) == expected
    assert [case.id for case in read_draft(tmp_path / "set.json").manifest.training] == expected
    assert read_draft(tmp_path / "set.json").rows == ()


@pytest.mark.parametrize("labels", [{"liver": "1"}, {"background": "0", "liver": "1"}])
def test_labels_with_numbers_as_text_are_answered_with_what_to_write(tmp_path, labels):
    (tmp_path / "set.json").write_text(json.dumps({"labels": labels, "training": []}))
    name, value = next(iter(labels.items()))
    with pytest.raises(DataError, match=f'write {{"{value}": "{name}"}}'):
        Manifest.load(tmp_path / "set.json")
