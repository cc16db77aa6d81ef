"""What a training step holds in memory, told without taking it."""

import pytest
import torch

from medseg.build.memory import held_for_backward
from medseg.nets import NETS


@pytest.mark.parametrize(("dims", "size"), [(2, (40, 24)), (3, (16, 24, 8))])
def test_what_the_backward_pass_needs_is_the_same_on_the_meta_device(dims, size):
    arguments = {"spatial_dims": dims, "in_channels": 2, "out_channels": 3, **NETS["unet"].tiny}
    real = NETS["unet"].network(**arguments)
    with torch.device("meta"):
        imagined = NETS["unet"].network(**arguments)
    held = held_for_backward(real, torch.zeros(4, 2, *size))
    assert held_for_backward(imagined, torch.empty((4, 2, *size), device="meta")) == held
    assert held > 4 * 4 * real.encoder[0].blocks[0].conv.out_channels * torch.Size(size).numel()


def test_twice_the_batch_needs_twice_the_memory():
    with torch.device("meta"):
        net = NETS["unet"].network(spatial_dims=3, in_channels=1, out_channels=2, norm="none")
        one, two = (held_for_backward(net, torch.empty(n, 1, 64, 64, 64)) for n in (1, 2))
    assert two == 2 * one
