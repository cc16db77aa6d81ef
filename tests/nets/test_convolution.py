from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medseg.nets import NETS
from medseg.nets.convolution import Conv3d, convolve, with_exact_convolutions

SMALLER_THAN_THE_KERNEL = [((2, 2, 2), 3), ((2, 8, 8), 3), ((4, 4, 4), 5), ((3, 6, 6), 5), ((2, 2, 1), 3)]


def gradient(conv: nn.Module, x: Tensor, *, autocast: bool) -> Tensor:
    conv.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        conv(x).float().square().sum().backward()
    return conv.weight.grad.clone()


@pytest.mark.parametrize(("size", "kernel"), SMALLER_THAN_THE_KERNEL)
def test_bfloat16_gradients_are_right_where_the_kernel_is_longer_than_the_image(
    size: tuple[int, ...], kernel: int
) -> None:
    torch.manual_seed(0)
    conv = Conv3d(32, 32, kernel, padding=kernel // 2)
    x = torch.randn(2, 32, *size)
    wanted = gradient(conv, x, autocast=False)
    for _ in range(5):
        for number in (10_000, 1_000_000):  # what torch's own would take for memory of the image
            del [torch.full((number,), torch.nan)][:]
        torch.testing.assert_close(gradient(conv, x, autocast=True), wanted, rtol=0.05, atol=0.02 * float(wanted.std()))


def test_larger_images_are_computed_in_bfloat16() -> None:
    conv = Conv3d(4, 4, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.zeros(1, 4, 3, 3, 3)).dtype == torch.bfloat16
        assert conv(torch.zeros(1, 4, 2, 4, 4)).dtype == torch.float32
        small, large = torch.zeros(1, 4, 2, 2, 2), torch.zeros(1, 4, 4, 4, 4)
        one = (1, 1, 1)
        assert convolve(small, conv.weight, stride=one, padding=one).dtype == torch.float32
        assert convolve(large, conv.weight, stride=one, padding=one).dtype == torch.bfloat16


def test_convolutions_of_other_libraries_are_replaced_with_their_weights() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.ConvTranspose3d(2, 2, 2))
    names, image = list(network.state_dict()), torch.randn(1, 1, 6, 6, 6)
    before = network(image)
    assert isinstance(with_exact_convolutions(network)[0], Conv3d)
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(image), before)


@pytest.mark.parametrize("name", [name for name, entry in NETS.items() if 3 in entry.spatial_dims])
def test_no_network_has_a_3d_convolution_of_torch_itself(name: str) -> None:
    network = NETS[name].network(3, 1, 2, **NETS[name].tiny)
    assert not [path for path, module in network.named_modules() if type(module) is nn.Conv3d]
