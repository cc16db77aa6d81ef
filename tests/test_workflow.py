"""Every fault of a workflow is told with its line, its column and what to do."""

import json
from pathlib import Path

import pytest

from medseg.errors import DataError, MedsegError
from medseg.workflow import Workflow, json_schema

GOOD = """\
name: liver
data:
  manifest: cases.json
  spacing_mm: [1.5, 1.5, 2.0]
network: {name: unet, args: {channels: [8, 16]}}
loss:
  - {name: dice, weight: {from: 0, to: 1, over: 100}}
  - cross_entropy
train:
  patch_size: [32, 32, 32]
  optimizer: {name: adamw, lr: 1e-4}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Workflow:
    path = tmp_path / "w.yaml"
    path.write_text(text)
    return Workflow.load(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(MedsegError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_numbers_lists_and_short_names_are_read(tmp_path):
    workflow = load(tmp_path, GOOD)
    assert workflow.train.optimizer.lr == 1e-4
    assert workflow.data.spacing_mm == (1.5, 1.5, 2.0)
    assert [term.name for term in workflow.loss] == ["dice", "cross_entropy"]
    assert workflow.loss[0].weight.over == 100


def test_the_resolved_yaml_loads_to_the_same_workflow(tmp_path):
    workflow = load(tmp_path, GOOD, "augment=none")
    again = load(tmp_path, workflow.to_yaml())
    assert again.model_dump() == workflow.model_dump()


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("  patch_size", "  pach_size", "w.yaml:10:3 train.pach_size: not a field; did you mean 'patch_size'?"),
        (
            "lr: 1e-4",
            "lr: '1e-4'",
            "w.yaml:11:28 train.optimizer.lr: must be a valid number, found '1e-4'; write the number",
        ),
        ("[32, 32, 32]", "32", "w.yaml:10:3 train.patch_size: must be a list, found 32"),
        ("name: liver", "name: liver\nname: spleen", 'w.yaml:2:1: found duplicate key "name"'),
        (
            "name: adamw",
            "name: adam-w",
            "train.optimizer.name: must be 'sgd', 'adam' or 'adamw', found 'adam-w'; did you",
        ),
        ("[32, 32, 32]", "[32, 32, 0]", "w.yaml:10:24 train.patch_size[2]: must be greater than 0, found 0"),
        ("name: liver", "name: !!python/object:os.system liver", "w.yaml:1:1 name: tag:yaml.org,2002:python"),
        ("name: liver", "name: [1, 2", "w.yaml"),
        ("network: {name: unet, args: {channels: [8, 16]}}\n", "", "network: is missing"),
        ("  manifest: cases.json\n", "", "w.yaml:2:1 data.manifest: is missing"),
    ],
)
def test_a_fault_names_line_column_and_remedy(tmp_path, before, after, expected):
    assert before in GOOD
    assert expected in refusal(tmp_path, GOOD.replace(before, after))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("dice", "w.yaml:6:1 loss: must be a list, found 'dice'; write loss: [dice]"),
        ("[]", "w.yaml:6:1 loss: must have at least 1 value, found []; write loss: [dice]"),
        ("[{name: dice, weight: -1}]", "loss[0].weight: must be greater than or equal to 0, found -1"),
        ("[{name: dice, weight: {from: -1, over: 3}}]", "loss[0].weight.from: must be greater than or equal to 0"),
        (
            "[{name: dice, weight: 0}, {name: focal, weight: {from: 0, to: 0, over: 3}}]",
            "w.yaml:6:1 loss: all weights are 0, so nothing would be learned; give one of them more",
        ),
        (
            "[{name: cross_entropy, class_weights: balanced}]",
            "w.yaml:6:30 loss[0].class_weights: not a field (these are name, args, weight); if it is an argument, "
            "write args: {class_weights: …}",
        ),
        ("[{name: dice, wieght: 2}]", "loss[0].wieght: not a field; did you mean 'weight'?"),
    ],
)
def test_a_fault_of_the_losses_is_one_line_with_its_remedy(tmp_path, loss, expected):
    before, after = GOOD[: GOOD.index("loss:")], GOOD[GOOD.index("train:") :]
    told = refusal(tmp_path, f"{before}loss: {loss}\n{after}")
    assert expected in told and "\n" not in told


def test_an_argument_beside_a_networks_name_is_told_where_it_belongs(tmp_path):
    text = GOOD.replace("args: {channels: [8, 16]}", "channels: [8, 16]")
    assert "network.channels: not a field" in (told := refusal(tmp_path, text))
    assert told.endswith("write args: {channels: …}")


def test_all_faults_are_reported_at_once_in_the_order_of_the_file(tmp_path):
    text = GOOD.replace("patch_size", "pach_size").replace("spacing_mm", "spacing")
    lines = refusal(tmp_path, text).splitlines()
    assert ["w.yaml:4:3" in lines[0], "w.yaml:9:1" in lines[1], "w.yaml:10:3" in lines[2]] == [True] * 3


def test_an_override_replaces_a_value_and_is_blamed_for_its_faults(tmp_path):
    assert load(tmp_path, GOOD, "train.patch_size=[16, 16, 16]").train.patch_size == (16, 16, 16)
    assert load(tmp_path, GOOD, "network.args.channels=[4]").network.args == {"channels": [4]}
    assert "--set train.bach_size: not a field; did you mean 'batch_size'?" in refusal(
        tmp_path, GOOD, "train.bach_size=3"
    )
    assert "must look like" in refusal(tmp_path, GOOD, "train.batch_size")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trian.batch_size=3", "--set trian: not a field; did you mean 'train'?"),
        ("name.first=3", "--set name: must be a valid string, found {'name': 'liver', 'first': 3}"),
        ("train.workers=-1", "--set train.workers: must be greater than or equal to 0, found -1"),
        ("train.patch_size.0=3", "E-SET --set train.patch_size: is a list"),
    ],
)
def test_a_slip_in_an_override_is_not_blamed_on_the_file(tmp_path, override, expected):
    told = refusal(tmp_path, GOOD, override)
    assert expected in told
    assert "w.yaml" not in told


def test_what_the_file_says_stays_its_own_beside_an_override(tmp_path):
    text = GOOD.replace("network: {name: unet, args: {channels: [8, 16]}}", "network: unet")
    workflow = load(tmp_path, text, "network.args.channels=[4]")
    assert workflow.network.name == "unet"
    assert "w.yaml:" in workflow.where("network", "name")
    assert workflow.where("network", "args").startswith("--set")


def test_an_alias_bomb_is_refused(tmp_path):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
    )
    assert "aliases count each time" in refusal(tmp_path, bomb)


def test_a_missing_file_suggests_one_beside_it(tmp_path):
    (tmp_path / "liver.yaml").write_text(GOOD)
    with pytest.raises(MedsegError, match=r"did you mean .*liver\.yaml"):
        Workflow.load(tmp_path / "livr.yaml")


def test_errors_of_later_stages_are_blamed_on_their_line(tmp_path):
    workflow = load(tmp_path, GOOD)
    with pytest.raises(DataError) as caught, workflow.blamed("data", "manifest"):
        raise DataError("E-MANIFEST", "cannot be read", where="cases.json")
    assert str(caught.value).endswith("w.yaml:3:3 data.manifest: cases.json: cannot be read")


def test_the_schema_describes_every_field():
    schema = json_schema()
    assert "patch_size" in json.dumps(schema)
    assert schema["additionalProperties"] is False
