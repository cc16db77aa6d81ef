from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.errors import WorkflowError
from medseg.nets.bisenet import AttentionRefinement, BiSeNet, FeatureFusion
from medseg.nets.blocks import Layers

SMALL: dict[str, Any] = {"width": 4, "context_channels": 8}


def count_on_meta(*args: Any, **kwargs: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in BiSeNet(*args, **kwargs).parameters())


def test_its_parameters_differ_from_another_implementation_s_by_norms_in_the_fusion_s_gate() -> None:
    norms, biases = 2 * (64 + 256), 64 + 256  # theirs has norms where ours, as squeeze and excitation, has biases
    assert count_on_meta(2, 3, 19, norm="batch") == 12_796_499 - norms + biases


def test_the_auxiliary_heads_come_on_top() -> None:
    head = 9 * 128 * 256 + 2 * 256 + 256 * 19 + 19
    plain, supervised = (count_on_meta(2, 3, 19, deep_supervision=on) for on in (False, True))
    assert supervised == plain + 2 * head


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (count_on_meta(dims, 1, 2) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((BiSeNet.__doc__ or "").split())


@pytest.mark.parametrize("dims", [2, 3])
def test_the_spatial_path_keeps_an_eighth_while_the_context_path_goes_down_to_a_thirty_second(dims: int) -> None:
    network = BiSeNet(dims, 1, 2, **SMALL)
    seen: dict[str, Tensor] = {}
    for name in ("spatial.0", "spatial.1", "spatial", "encoder.layer4", "context.refine.1", "context.refine.0", "fuse"):
        network.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: seen.update({name: y}))
    network(torch.randn(2, 1, *[64] * dims))
    sizes = {name: 64 // y.shape[-1] for name, y in seen.items()}
    assert sizes == {
        "spatial.0": 2, "spatial.1": 4, "spatial": 8,
        "encoder.layer4": 32, "context.refine.1": 16, "context.refine.0": 8, "fuse": 8,
    }  # fmt: skip
    assert all(len(set(y.shape[2:])) == 1 for y in seen.values())


def test_the_spatial_path_alone_sees_only_near_the_voxel_and_the_context_path_the_whole_image() -> None:
    torch.manual_seed(0)
    network = BiSeNet(2, 1, 2, **SMALL, norm="none", activation="elu").eval()
    x = torch.randn(1, 1, 64, 512, requires_grad=True)
    (near,) = torch.autograd.grad(network.spatial(x)[0, :, 4, 0].sum(), x)
    assert near[..., :8].abs().sum() > 0 and near[..., 32:].abs().sum() == 0
    (whole,) = torch.autograd.grad(network(x)[0, 0, 32, 0], x)
    assert whole[..., -8:].abs().sum() > 0


def test_attention_refinement_weighs_each_channel_by_one_number_for_the_whole_image() -> None:
    torch.manual_seed(0)
    refinement = AttentionRefinement(Layers(2, norm="auto", activation="elu"), 3, 5).eval()
    x = torch.randn(2, 3, 8, 9)
    ratio = refinement(x) / refinement.conv(x)
    torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio))
    assert (ratio > 0).all() and (ratio < 1).all()
    assert ratio[..., 0, 0].unique().numel() == 10


def test_fusion_adds_the_weighed_channels_to_what_they_were() -> None:
    torch.manual_seed(0)
    fusion = FeatureFusion(Layers(2), 8, reduction=4).eval()
    spatial, context = torch.randn(2, 2, 4, 6, 6).unbind()
    x = fusion.join(torch.cat([spatial, context], dim=1))
    ratio = fusion(spatial, context) / x
    torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio))
    assert (ratio > 1).all() and (ratio < 2).all()


def test_training_scores_the_context_path_twice_with_the_paper_s_weight() -> None:
    network = BiSeNet(2, 1, 3, **SMALL, deep_supervision=True).train()
    outputs = network(torch.randn(2, 1, 64, 96))
    assert [tuple(y.shape) for y in outputs] == [(2, 3, 64, 96), (2, 3, 8, 12), (2, 3, 4, 6)]
    assert network.extra_weights == (1.0, 1.0)


def test_a_single_image_is_refused_where_the_asked_norm_cannot_learn_from_it() -> None:
    x = torch.randn(1, 1, 64, 64)
    assert BiSeNet(2, 1, 2, **SMALL).train()(x).shape == (1, 2, 64, 64)
    network = BiSeNet(2, 1, 2, **SMALL, norm="batch")
    with pytest.raises(WorkflowError, match="E-BATCH-SIZE"):
        network.train()(x)
    assert network.eval()(x).shape == (1, 2, 64, 64)
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.context.attend.modules())


def test_the_third_axis_of_thick_slices_keeps_its_resolution() -> None:
    network = BiSeNet(3, 1, 2, **SMALL, in_plane=True).eval()
    assert network.min_size == (32, 32, 1)
    assert network(torch.zeros(1, 1, 33, 64, 3)).shape == (1, 2, 33, 64, 3)
