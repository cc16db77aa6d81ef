import pytest
import torch

from medseg.errors import DataError
from medseg.labels import Labels

PLAIN = Labels({0: "background", 1: "liver", 2: "tumour"})
REGIONS = Labels(
    {0: "background", 1: "liver", 2: "tumour"},
    regions={"whole": (1, 2), "tumour": (2,)},
    region_order=(1, 2),
    ignore_label=255,
)
MAP = torch.tensor([[[[0, 1], [2, 255]]]])  # (B, 1, I, J)


def test_classes_become_indices():
    target, mask = PLAIN.target(torch.tensor([[[[0, 1], [2, 1]]]]))
    assert target.tolist() == [[[0, 1], [2, 1]]]
    assert target.dtype == torch.int64
    assert mask is None


def test_regions_become_channels_and_ignored_voxels_a_mask():
    target, mask = REGIONS.target(MAP)
    assert target.tolist() == [[[[0, 1], [1, 0]], [[0, 0], [1, 0]]]]
    assert mask.tolist() == [[[[True, True], [True, False]]]]


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_each_voxel_gets_the_class_of_its_largest_logit(num_classes):
    labels = Labels({n: f"organ {n}" for n in range(num_classes)})
    logits = torch.randn((2, num_classes, 5, 6, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(labels.segment(logits).long(), logits.argmax(dim=1))


def test_equal_logits_go_to_the_first_class():
    assert PLAIN.segment(torch.ones((1, 3, 2, 2))).eq(0).all()


def test_later_regions_are_written_over_earlier_ones():
    logits = torch.tensor([[[[-1.0, 1.0, 1.0]], [[-1.0, -1.0, 1.0]]]])  # (B, R, I, J)
    assert REGIONS.segment(logits).tolist() == [[[0, 1, 2]]]


def test_what_is_scored_are_organs_or_regions():
    assert PLAIN.organs == ("liver", "tumour")
    assert PLAIN.num_outputs == 3
    assert REGIONS.organs == ("whole", "tumour")
    assert REGIONS.num_outputs == 2


def test_labels_survive_a_manifest():
    assert Labels.from_dict(REGIONS.to_dict()) == REGIONS


def test_nnunets_way_round_is_read_too():
    labels = Labels.from_dict({"labels": {"background": 0, "whole": 1}, "ignore_label": None})
    assert labels.names == {0: "background", 1: "whole"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": {0: "background", 2: "liver"}},
        {"names": {0: "background"}},
        {"names": {0: "background", 1: "liver", 2: "liver"}},
        {"names": {0: "background", 1: "liver"}, "pairs": ((1, 5),)},
        {"names": {0: "background", 1: "liver"}, "regions": {"a": (1,)}},
        {"names": {0: "background", 1: "liver"}, "ignore_label": 1},
        {"names": {0: "background", 1: "liver"}, "seg_threshold": 0.0},
    ],
)
def test_labels_that_contradict_themselves_are_refused(wrong):
    with pytest.raises(DataError, match="E-LABELS"):
        Labels(**wrong)


def test_by_default_a_region_is_written_as_the_label_that_later_ones_leave_it():
    labels = {"0": "background", "1": "edema", "2": "core", "3": "enhancing"}
    regions = {"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    assert Labels.from_dict({"labels": labels, "regions": regions}).region_order == (1, 2, 3)
    with pytest.raises(DataError, match="region 'core' lies within later ones"):
        Labels.from_dict({"labels": labels, "regions": {"core": [2, 3], "whole": [1, 2, 3]}})
    with pytest.raises(DataError, match=r"region_order gives 1 for region 'core', which unites \[2, 3\]"):
        Labels.from_dict({"labels": labels, "regions": {"core": [2, 3]}, "region_order": [1]})


def test_nnunets_ignore_label_is_no_organ():
    labels = Labels.from_dict({"labels": {"background": 0, "liver": 1, "ignore": 2}})
    assert (labels.names, labels.ignore_label) == ({0: "background", 1: "liver"}, 2)


def test_a_negative_ignore_label_is_refused():
    with pytest.raises(DataError, match="ignore_label -1; it must be from 1"):
        Labels({0: "background", 1: "liver"}, ignore_label=-1)


def test_the_threshold_of_fractional_segmentations_survives_a_manifest():
    labels = Labels.from_dict({"labels": {"0": "background", "1": "liver"}, "seg_threshold": 0.3})
    assert Labels.from_dict(labels.to_dict()).seg_threshold == 0.3
    assert PLAIN.seg_threshold == 0.5
