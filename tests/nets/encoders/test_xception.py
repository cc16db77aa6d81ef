from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg.nets.encoders.xception import Xception


def on_meta(num_layers: int) -> Xception:
    with torch.device("meta"):
        return Xception(2, 3, num_layers=num_layers, norm="batch")


@pytest.mark.parametrize(("num_layers", "millions"), [(41, 26.97), (65, 39.92)])
def test_it_has_as_many_parameters_as_timm_s_with_the_classifier(num_layers: int, millions: float) -> None:
    classifier = 1000 * 2048 + 1000
    count = sum(p.numel() for p in on_meta(num_layers).parameters()) + classifier
    assert round(count / 1e6, 2) == millions


def test_its_modules_are_named_as_in_timm_s_checkpoint() -> None:
    shapes = {name: tuple(weight.shape) for name, weight in on_meta(65).state_dict().items()}
    expected = {
        "stem.0.conv.weight": (32, 3, 3, 3),
        "stem.1.bn.running_mean": (64,),
        "blocks.0.shortcut.conv.weight": (128, 64, 1, 1),
        "blocks.2.shortcut.bn.weight": (728,),
        "blocks.3.stack.conv1.conv_dw.weight": (728, 1, 3, 3),
        "blocks.18.stack.conv3.bn_dw.running_var": (728,),
        "blocks.19.stack.conv2.conv_pw.weight": (1024, 728, 1, 1),
        "blocks.20.stack.conv3.bn_pw.bias": (2048,),
    }
    assert expected.items() <= shapes.items()
    without_shortcut = [n for n in range(21) if f"blocks.{n}.shortcut.conv.weight" not in shapes]
    assert without_shortcut == [*range(3, 19), 20]


def test_a_block_sums_its_input_before_any_activation() -> None:
    xception = Xception(2, 3, num_layers=41, width=8, norm="none").eval()
    block = xception.blocks[5]
    nn.init.zeros_(block.stack.conv3.conv_pw.weight)
    x = torch.randn(1, 91, 4, 4)
    kept = x.clone()
    assert torch.equal(block(x)[0], kept)


def test_a_number_of_layers_that_it_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers is 71; it must be one of 41, 65"):
        Xception(2, 3, num_layers=71)
