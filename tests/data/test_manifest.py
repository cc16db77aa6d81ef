import json
from pathlib import Path

import pytest
from monai.data import load_decathlon_datalist
from sklearn.model_selection import KFold

from medseg.data.manifest import Manifest, assign_folds
from medseg.errors import MedsegError

LABELS = {"0": "background", "1": "liver"}


def write(folder: Path, training, **more) -> Path:
    path = folder / "dataset.json"
    path.write_text(json.dumps({"labels": LABELS, "training": training, **more}))
    return path


def pair(name: str, **more) -> dict:
    return {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz", **more}


def test_folds_are_scikit_learns_with_nnunets_seed():
    names = [f"case_{n:03d}" for n in range(37)]
    expected = {
        names[index]: fold
        for fold, (_, held_out) in enumerate(KFold(5, shuffle=True, random_state=12345).split(names))
        for index in held_out
    }
    assert assign_folds(names) == expected


def test_cases_of_a_patient_share_a_fold(tmp_path):
    manifest = Manifest.load(write(tmp_path, [pair(f"c{n}", patient=f"p{n // 2}") for n in range(20)]))
    for fold in range(5):
        training, validation = manifest.split(fold)
        assert not {c.patient for c in training} & {c.patient for c in validation}
        assert len(validation) == 4


def test_given_folds_are_kept(tmp_path):
    manifest = Manifest.load(write(tmp_path, [pair("a", fold=0), pair("b", fold=1), pair("c", fold=1)]))
    assert [case.id for case in manifest.split(0)[1]] == ["a"]


def test_a_patient_on_both_sides_of_a_given_fold_is_refused(tmp_path):
    manifest = Manifest.load(write(tmp_path, [pair("a", fold=0, patient="x"), pair("b", fold=1, patient="x")]))
    with pytest.raises(MedsegError, match="E-LEAKAGE"):
        manifest.split(0)


@pytest.mark.parametrize(
    ("training", "more", "expected"),
    [
        ([pair("a"), pair("a")], {}, "E-DUPLICATE-CASE"),
        ([{"img": "a.nii"}], {}, "E-MANIFEST .*training\\[0\\]"),
        ([pair("a", fold=0), pair("b")], {}, "E-FOLD"),
        ([pair("a")], {"labels": {"0": "background", "3": "x"}}, "E-LABELS"),
        ([pair("a")], {"root": "${NOT_SET_ANYWHERE}/x"}, "E-VARIABLE"),
        ([pair("a")], {"allow_outside_root": "yes"}, "E-MANIFEST .*must be true or false, found 'yes'"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path, training, more, expected):
    with pytest.raises(MedsegError, match=expected):
        Manifest.load(write(tmp_path, training, **more)).split(0)


OUTSIDE = [  # root, image, whether it may be named
    (None, "../other/a.nii.gz", False),
    (None, "scans/../../other/a.nii.gz", False),
    (None, "${DATA}/../other/a.nii.gz", False),
    (None, "scans/../a.nii.gz", True),
    (None, "{home}/other/a.nii.gz", True),
    (".", "{home}/other/a.nii.gz", False),
    (".", "{home}/set/a.nii.gz", True),
    ("../other", "a.nii.gz", True),
    ("../other", "../other2/a.nii.gz", False),
    ("../other", "../set/a.nii.gz", False),
    ("..", "other/a.nii.gz", True),
]


@pytest.mark.parametrize(("root", "image", "is_allowed"), OUTSIDE)
def test_files_stay_below_the_root_unless_the_manifest_says_otherwise(tmp_path, monkeypatch, root, image, is_allowed):
    monkeypatch.setenv("DATA", ".")
    (tmp_path / "set").mkdir()
    more = {} if root is None else {"root": root}
    cases = [{"image": image.replace("{home}", str(tmp_path))}]
    path = write(tmp_path / "set", cases, **more)
    if is_allowed:
        assert Manifest.load(path).training[0].images[0].is_relative_to(tmp_path)
        return
    with pytest.raises(MedsegError, match=r"E-OUTSIDE-ROOT case a: .*a\.nii\.gz lies outside .*allow_outside_root"):
        Manifest.load(path)
    path = write(tmp_path / "set", cases, allow_outside_root=True, **more)
    assert Manifest.load(path).training[0].images[0].is_relative_to(tmp_path)


def test_all_files_outside_the_root_are_told_at_once(tmp_path):
    with pytest.raises(MedsegError) as caught:
        Manifest.load(write(tmp_path, [pair("a"), {"image": "../b.nii", "label": "../c.nii"}], test=["../d.nii"]))
    told = [Path(line.split()[3]).name for line in str(caught.value).splitlines()]
    assert told == ["b.nii", "c.nii", "d.nii"]


def test_links_lead_wherever_they_like_and_are_known_by_either_name(tmp_path):
    for folder in ("real", "store", "set"):
        (tmp_path / folder).mkdir()
    (tmp_path / "set" / "scans").symlink_to(tmp_path / "store")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    Manifest.load(write(tmp_path / "set", [{"image": "scans/a.nii.gz"}], root="."))
    Manifest.load(write(tmp_path / "set", [{"image": f"{tmp_path}/real/a.nii.gz"}], root=f"{tmp_path}/link"))


def test_all_missing_files_are_reported_at_once(tmp_path):
    manifest = Manifest.load(write(tmp_path, [pair("a"), pair("b")]))
    with pytest.raises(MedsegError) as caught:
        manifest.check_files()
    assert str(caught.value).count("E-MISSING-FILE") == 4


def test_a_missing_manifest_suggests_one_beside_it(tmp_path):
    write(tmp_path, [])
    with pytest.raises(MedsegError, match=r"did you mean 'dataset.json'\?"):
        Manifest.load(tmp_path / "datset.json")


def test_a_key_that_is_nearly_one_of_ours_is_told_and_others_are_not(tmp_path, caplog):
    Manifest.load(write(tmp_path, [], pars=[[1, 2]], tensorImageSize="3D", release="1.0"))
    (record,) = caplog.records
    assert "'pars' is ignored; did you mean 'pairs'?" in record.getMessage()


def test_stated_hashes_belong_to_their_files(tmp_path):
    entries = [pair("a") | {"sha256": "AB"}, pair("b") | {"sha256": {"image": ["cd"], "label": "ef"}}, pair("c")]
    a, b, c = Manifest.load(write(tmp_path, entries)).training
    assert a.sha256 == {a.images[0]: "ab"}
    assert b.sha256 == {b.images[0]: "cd", b.label: "ef"}
    assert c.sha256 == {}


def test_what_a_run_writes_down_loads_again_and_in_monai(tmp_path):
    manifest = Manifest.load(write(tmp_path, [pair(f"c{n}") for n in range(5)]))
    again = tmp_path / "written.json"
    again.write_text(json.dumps(manifest.to_dict()))
    loaded = Manifest.load(again)
    assert loaded.folds() == manifest.folds()
    assert [c.images for c in loaded.training] == [c.images for c in manifest.training]
    listed = load_decathlon_datalist(str(again), is_segmentation=True, data_list_key="training")
    assert [Path(entry["image"]) for entry in listed] == [c.images[0] for c in manifest.training]


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "cases"), [("hippocampus", 220), ("liver_lits11", 11)])
def test_published_decathlon_files_load_as_they_are(data_dir, name, cases):
    manifest = Manifest.load(data_dir / name / "dataset.json")
    manifest.check_files()
    assert len(manifest.training) == cases
