import pytest
import torch
from torch import Tensor, nn

from medseg.errors import WorkflowError
from medseg.inference.tta import Mirrored, mirrored_channels
from medseg.labels import Labels

KIDNEYS = Labels({0: "background", 1: "liver", 2: "left kidney", 3: "right kidney"}, pairs=((2, 3),))


class WhichSide(nn.Module):
    """Says left kidney in the first half of axis 0 and right kidney in the second, with the image as certainty."""

    def forward(self, x: Tensor) -> Tensor:
        side = torch.linspace(-1, 1, x.shape[2]).reshape(1, 1, -1, 1, 1)
        return torch.cat([torch.zeros_like(x), x, x.abs() * -side, x.abs() * side], dim=1)


def image() -> Tensor:
    return torch.randn((2, 1, 6, 5, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_a_network_that_treats_mirrored_patients_alike_gives_the_same_mirrored(axes):
    torch.testing.assert_close(Mirrored(WhichSide(), axes, KIDNEYS)(image()), WhichSide()(image()))


def test_left_and_right_would_cancel_without_their_pairs():
    unpaired = Labels(KIDNEYS.names)
    mirrored = Mirrored(WhichSide(), (0,), unpaired)(image())
    torch.testing.assert_close(mirrored[:, 2:], torch.zeros(2, 2, 6, 5, 4))


@pytest.mark.parametrize(("axes", "num_passes"), [((1,), 2), ((0, 2), 4), ((0, 1, 2), 8)])
def test_all_combinations_of_axes_are_averaged(axes, num_passes):
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return (x * torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape)).repeat(1, 2, 1, 1, 1)

    labels = Labels({0: "background", 1: "liver"})
    result = Mirrored(Spy(), axes, labels)(image())
    assert len({tuple(x.flatten().tolist()) for x in seen}) == num_passes
    weights = torch.arange(image().numel(), dtype=torch.float32).reshape(image().shape)
    for axis in axes:
        weights = (weights + weights.flip(axis + 2)) / 2
    torch.testing.assert_close(result, (image() * weights).repeat(1, 2, 1, 1, 1))


def test_paired_labels_exchange_their_channels():
    assert mirrored_channels(KIDNEYS) == (0, 1, 3, 2)


def test_regions_exchange_channels_when_their_values_trade_places():
    labels = Labels(
        {0: "background", 1: "left lung", 2: "right lung", 3: "left tumour", 4: "right tumour"},
        regions={"lungs": (1, 2, 3, 4), "left": (1, 3), "right": (2, 4), "tumours": (4, 3)},
        region_order=(1, 1, 2, 3),
        pairs=((1, 2), (3, 4)),
    )
    assert mirrored_channels(labels) == (0, 2, 1, 3)


def test_a_region_without_counterpart_cannot_be_mirrored_left_to_right():
    labels = Labels(
        {0: "background", 1: "left lung", 2: "right lung"}, regions={"left": (1,)}, region_order=(1,), pairs=((1, 2),)
    )
    with pytest.raises(WorkflowError, match="region 'left'"):
        Mirrored(WhichSide(), (0, 1), labels)
    Mirrored(WhichSide(), (1, 2), labels)
