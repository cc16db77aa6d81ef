from __future__ import annotations

from typing import Any

import torch

from medseg.nets.deeplab_v3_plus import DeepLabV3Plus


def count_on_meta(*args: Any, **kwargs: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DeepLabV3Plus(*args, **kwargs).parameters())


def test_it_has_as_many_parameters_as_another_implementation() -> None:
    assert count_on_meta(2, 3, 21, norm="batch") == 26_682_725


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (count_on_meta(dims, 1, 2) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((DeepLabV3Plus.__doc__ or "").split())


def test_the_decoder_is_as_fine_as_the_early_features() -> None:
    network = DeepLabV3Plus(2, 1, 2, encoder="xception41", width=4).eval()
    seen: list[torch.Size] = []
    network.decoder.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].shape, output.shape]))
    network(torch.randn(1, 1, 64, 32))
    assert seen == [(1, 48 + 256, 16, 8), (1, 256, 16, 8)]


def test_early_features_reach_the_logits_past_the_pyramid() -> None:
    torch.manual_seed(0)
    network = DeepLabV3Plus(2, 1, 2, encoder="resnet18", width=4, aspp_channels=4).eval()
    torch.nn.init.zeros_(network.aspp.project.norm.weight)  # nothing comes from the last features
    x = torch.randn(1, 1, 32, 32)
    assert network(x).std() > 0
