from __future__ import annotations

from typing import Any

import pytest
import torch

from medseg.nets.pspnet import PSPNet


def count_on_meta(*args: Any, **kwargs: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in PSPNet(*args, **kwargs).parameters())


@pytest.mark.parametrize(("deep_supervision", "count"), [(False, 46_592_597), (True, 48_957_802)])
def test_the_paper_s_network_has_as_many_parameters_as_other_implementations(
    deep_supervision: bool, count: int
) -> None:
    assert count_on_meta(2, 3, 21, norm="batch", deep_supervision=deep_supervision) == count


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (count_on_meta(dims, 1, 2) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((PSPNet.__doc__ or "").split())


def test_training_scores_the_stage_before_the_last_with_the_paper_s_weight() -> None:
    network = PSPNet(2, 1, 3, encoder="resnet18", width=4, deep_supervision=True).train()
    logits, auxiliary = network(torch.randn(2, 1, 32, 48))
    assert logits.shape == (2, 3, 32, 48)
    assert auxiliary.shape == (2, 3, 4, 6)
    assert network.extra_weights == (0.4,)


def test_every_voxel_knows_the_whole_image() -> None:
    torch.manual_seed(0)
    network = PSPNet(2, 1, 1, encoder="resnet18", width=4, norm="none", activation="elu").eval()
    x = torch.randn(1, 1, 16, 512, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[0, 0, 8, 0], x)
    assert gradient[..., -8:].abs().sum() > 0
