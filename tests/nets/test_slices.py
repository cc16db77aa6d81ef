from __future__ import annotations

import pytest
import torch

from medseg.nets.slices import OnSlices
from medseg.nets.unet import UNet


@pytest.fixture
def network() -> UNet:
    torch.manual_seed(0)
    return UNet(2, 6, 2, channels=(4, 4, 4, 4), deep_supervision=True)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_and_its_neighbours_are_channels_and_the_result_is_one_slice(network: UNet, axis: int) -> None:
    x = torch.randn(3, 2, 10, 12, 3).movedim(4, 2 + axis)  # 2 channels, 3 slices
    wrapped = OnSlices(network, axis, 1).eval()
    slices = [x.select(2 + axis, n) for n in range(3)]
    flat = torch.stack([s[:, c] for c in range(2) for s in slices], dim=1)
    logits = wrapped(x)
    assert logits.shape == torch.empty(3, 2, 10, 12, 1).movedim(4, 2 + axis).shape
    assert torch.equal(logits.squeeze(2 + axis), network(flat))


def test_a_list_of_outputs_stays_a_list_with_its_weights(network: UNet) -> None:
    wrapped = OnSlices(network, 2, 1).train()
    outputs = wrapped(torch.randn(2, 2, 16, 16, 3))
    assert [tuple(output.shape) for output in outputs] == [(2, 2, 16, 16, 1), (2, 2, 8, 8, 1)]
    assert wrapped.extra_weights == (0.5,)


def test_weights_trained_with_deep_supervision_load_through_the_wrapper(network: UNet) -> None:
    plain = OnSlices(UNet(2, 6, 2, channels=(4, 4, 4, 4)), 2, 1)
    plain.load_state_dict(OnSlices(network, 2, 1).state_dict())


def test_a_wrong_number_of_slices_is_refused(network: UNet) -> None:
    with pytest.raises(ValueError, match=r"5 slices along axis 2 of .*; expected 3"):
        OnSlices(network, 2, 1)(torch.zeros(1, 2, 16, 16, 5))
