from __future__ import annotations

import pytest
import torch
from monai.networks.nets import resnet as monai_resnet
from torch import nn

from medseg.nets.encoders.resnet import ResNet


@pytest.mark.parametrize(
    ("num_layers", "count"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160)]
)
def test_it_has_as_many_parameters_as_torchvision_s_but_for_the_classifier(num_layers: int, count: int) -> None:
    with torch.device("meta"):
        resnet = ResNet(2, 3, num_layers=num_layers, norm="batch")
    classifier = 1000 * resnet.channels[-1] + 1000
    assert sum(p.numel() for p in resnet.parameters()) == count - classifier


@pytest.mark.parametrize("num_layers", [18, 50])
@pytest.mark.parametrize("dims", [2, 3])
def test_weights_named_as_in_torchvision_give_the_features_of_another_implementation(
    num_layers: int, dims: int
) -> None:
    torch.manual_seed(0)
    other = getattr(monai_resnet, f"resnet{num_layers}")(
        spatial_dims=dims, n_input_channels=3, conv1_t_stride=2, shortcut_type="B", bias_downsample=False,
        feed_forward=False, widen_factor=1 / 16,
    ).eval()  # fmt: skip
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    resnet = ResNet(dims, 3, num_layers=num_layers, width=4, norm="batch").eval()
    resnet.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, *[64, 32, 32][:dims])
    torch.testing.assert_close(resnet(x)[-1].flatten(2).mean(dim=2), other(x))


def test_a_number_of_layers_that_no_resnet_has_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers is 42; it must be one of 18, 34, 50, 101"):
        ResNet(2, 3, num_layers=42)
