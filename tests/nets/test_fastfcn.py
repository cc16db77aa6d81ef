from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from medseg.nets.blocks import Layers
from medseg.nets.fastfcn import FastFCN, JointPyramidUpsampling

SMALL: dict[str, Any] = {"encoder": "resnet18", "width": 4, "jpu_channels": 4, "head_channels": 4}


def count_on_meta(*args: Any, **kwargs: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in FastFCN(*args, **kwargs).parameters())


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (count_on_meta(dims, 1, 2) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((FastFCN.__doc__ or "").split())


def test_joint_pyramid_upsampling_has_the_paper_s_layers() -> None:
    with torch.device("meta"):
        made = JointPyramidUpsampling(Layers(2, norm="batch"), (512, 1024, 2048), 512)
    assert [level.conv.in_channels for level in made.levels] == [512, 1024, 2048]
    assert [level.conv.out_channels for level in made.levels] == [512] * 3
    assert [conv.conv_dw.dilation for conv in made.dilated] == [(n, n) for n in (1, 2, 4, 8)]
    assert {(conv.conv_dw.groups, conv.conv_pw.out_channels) for conv in made.dilated} == {(3 * 512, 512)}


@pytest.mark.parametrize("dims", [2, 3])
def test_joint_pyramid_upsampling_sees_all_levels_at_the_finest_resolution(dims: int) -> None:
    torch.manual_seed(0)
    made = JointPyramidUpsampling(Layers(dims, norm="none", activation="elu"), (2, 3, 4), 5, dilations=(1, 2)).double()
    features = [torch.randn(2, 2 + n, *[16 // 2**n] * dims).double() for n in range(3)]
    mode = "bilinear" if dims == 2 else "trilinear"
    brought = [level(x) for level, x in zip(made.levels, features, strict=True)]
    joined = torch.cat([F.interpolate(x, size=[16] * dims, mode=mode) for x in brought], dim=1)
    first, second = made(features).split(5, dim=1)
    torch.testing.assert_close(first, made.dilated[0](joined))
    torch.testing.assert_close(second, made.dilated[1](joined))


@pytest.mark.parametrize("context", ["aspp", "psp"])
def test_a_plain_encoder_s_features_are_classified_at_an_eighth_of_the_image(context: Any) -> None:
    network = FastFCN(2, 1, 2, context=context, deep_supervision=True, **SMALL).train()
    assert network.encoder.strides[-1] == (32, 32)
    seen: list[tuple[int, ...]] = []
    network.head.register_forward_hook(lambda _, __, logits: seen.append(tuple(logits.shape)))
    logits, auxiliary = network(torch.randn(2, 1, 64, 96))
    assert seen == [(2, 2, 8, 12)]
    assert logits.shape == (2, 2, 64, 96)
    assert auxiliary.shape == (2, 2, 4, 6)


def test_a_context_that_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="context is 'enc'; it must be one of aspp, psp"):
        FastFCN(2, 1, 2, context="enc")  # type: ignore[arg-type]
