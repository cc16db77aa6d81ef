from __future__ import annotations

import itertools
from typing import Any

import monai.networks.nets as monai_nets
import pytest
import safetensors.torch
import torch
from monai.networks.nets.mednext import create_mednext
from torch import nn

from medseg.nets import NETS
from medseg.nets.from_monai import UNETR, DynUNet, MedNeXt, SegResNet, SwinUNETR

DIMS = pytest.mark.parametrize("dims", [2, 3])
NAMES = ["dynunet", "segresnet", "swin_unetr", "unetr", "mednext"]


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(network: Any, *args: Any, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return network(*args, **kwargs)


@pytest.mark.parametrize("kind", [DynUNet, SegResNet, SwinUNETR, UNETR, MedNeXt])
def test_the_docstring_states_the_default_number_of_parameters(kind: Any) -> None:
    in_2d, in_3d = (num_parameters(on_meta(kind, dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((kind.__doc__ or "").split())


def test_swin_unetr_and_unetr_have_the_published_number_of_parameters() -> None:
    assert num_parameters(on_meta(SwinUNETR, 3, 1, 14)) == 62_187_296
    unused = 12 * 2 * 768  # norms of an attention that UNETR does not have
    assert num_parameters(on_meta(UNETR, 3, 1, 14)) + unused == 92_802_478


@pytest.mark.parametrize(("size", "millions"), [("S", 5.6), ("B", 10.5), ("M", 17.6), ("L", 61.8)])
@pytest.mark.parametrize("supervised", [False, True])
def test_mednext_s_sizes_are_monai_s_and_the_paper_s(size: str, millions: float, supervised: bool) -> None:
    ours = on_meta(MedNeXt, 3, 1, 2, size=size, deep_supervision=supervised)
    theirs = on_meta(create_mednext, size, 3, 1, 2, deep_supervision=supervised)
    assert num_parameters(ours) == num_parameters(theirs)
    assert num_parameters(ours) / 1e6 == pytest.approx(millions, abs=0.1)


def monai_s(name: str, dims: int, supervised: bool = False) -> nn.Module:
    """What the tiny configuration is made of, as a user of MONAI would make it."""
    norm = ("INSTANCE", {"affine": True}) if dims == 3 else "BATCH"
    if name == "dynunet":
        return monai_nets.DynUNet(
            dims, 2, 3, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=(4, 8, 8, 8), norm_name=norm,
            deep_supervision=supervised,
        )  # fmt: skip
    if name == "segresnet":
        return monai_nets.SegResNet(dims, 8, 2, 3, blocks_down=(1, 1, 1), blocks_up=(1, 1))
    if name == "swin_unetr":
        return monai_nets.SwinUNETR(
            2, 3, depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2), window_size=4, feature_size=12, spatial_dims=dims,
            norm_name="instance" if dims == 3 else "batch",
        )  # fmt: skip
    if name == "unetr":
        return monai_nets.UNETR(
            2, 3, 32, feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2, spatial_dims=dims,
            norm_name="instance" if dims == 3 else "batch",
        )  # fmt: skip
    return monai_nets.MedNeXt(
        dims, 4, 2, 3, kernel_size=3, use_residual_connection=True, deep_supervision=supervised
    )  # fmt: skip


@DIMS
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_monai_s_own_network_load_and_give_the_same_logits(name: str, dims: int) -> None:
    torch.manual_seed(0)
    theirs = monai_s(name, dims).eval()
    ours = NETS[name].network(dims, 2, 3, **NETS[name].tiny).eval()
    missing, unexpected = ours.network.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    assert all(key.startswith("skip_layers.") or "norm_cross_attn" in key for key in unexpected)
    x = torch.randn(1, 2, *[32 if name == "unetr" else 64, 32, 32][:dims])
    torch.testing.assert_close(ours(x), theirs(x))


@DIMS
@pytest.mark.parametrize("name", ["dynunet", "mednext"])
def test_deep_supervision_gives_monai_s_outputs_at_their_own_resolution(name: str, dims: int) -> None:
    torch.manual_seed(0)
    theirs = monai_s(name, dims, supervised=True).train()
    ours = NETS[name].network(dims, 2, 3, deep_supervision=True, **NETS[name].tiny).train()
    ours.network.load_state_dict(theirs.state_dict(), strict=False)
    heads = theirs.deep_supervision_heads if name == "dynunet" else theirs.out_blocks[::-1]
    for head, given in zip(ours.extra_heads, heads, strict=True):
        weight, bias = given.parameters()
        if name == "mednext":  # there a transposed convolution
            weight = weight.transpose(0, 1)
        head.load_state_dict({"weight": weight, "bias": bias})
    x = torch.randn(2, 2, *[32] * dims)
    expected = theirs(x)
    if name == "dynunet":  # MONAI's brings all to full size by repeating voxels
        expected = [output[(..., *[slice(None, None, 2**n)] * dims)] for n, output in enumerate(expected.unbind(dim=1))]
    outputs = ours(x)
    assert len(outputs) == len(expected)
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted)
    assert ours.extra_weights == tuple(0.5**n for n in range(1, len(outputs)))


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_into_a_file_that_holds_nothing_twice(name: str) -> None:
    network = NETS[name].network(2, 2, 3, **NETS[name].tiny)
    stored = safetensors.torch.load(safetensors.torch.save(network.state_dict()))
    assert stored.keys() == network.state_dict().keys()


@DIMS
def test_unetr_takes_another_size_than_it_was_made_for(dims: int) -> None:
    torch.manual_seed(0)
    built = monai_nets.UNETR(
        2, 3, [48, 16, 32][:dims], feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2, spatial_dims=dims,
        norm_name="instance",
    ).eval()  # fmt: skip
    other = UNETR(dims, 2, 3, norm="instance", **NETS["unetr"].tiny).eval()
    places = torch.randn(24)  # the same everywhere, so interpolating them must change nothing
    for network in (built, other.network):
        network.vit.patch_embedding.position_embeddings.data[:] = places
    weights = {k: v for k, v in built.state_dict().items() if "position" not in k and "cross" not in k}
    missing, unexpected = other.network.load_state_dict(weights, strict=False)
    assert missing == ["vit.patch_embedding.position_embeddings"] and not unexpected
    x = torch.randn(1, 2, *[48, 16, 32][:dims])
    torch.testing.assert_close(other(x), built(x))


def test_unetr_s_places_keep_their_order_when_interpolated() -> None:
    network = UNETR(2, 1, 1, image_size=(32, 32), feature_size=4, hidden_size=8, mlp_dim=8, num_heads=1).eval()
    embedding = network.network.vit.patch_embedding
    nn.init.zeros_(embedding.patch_embeddings.weight)
    nn.init.zeros_(embedding.patch_embeddings.bias)
    embedding.position_embeddings.data = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 4, 1).repeat(1, 1, 8)
    tokens = network._embedded(torch.zeros(1, 1, 64, 32))[0, :, 0].view(4, 2)
    assert all((a < b).all() for a, b in itertools.pairwise(tokens))  # from 0 1 to 2 3, down the first axis
    torch.testing.assert_close(tokens[:, 1] - tokens[:, 0], torch.ones(4))


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        (DynUNet, {"channels": (4, 4)}, "three levels"),
        (DynUNet, {"norm": "layr"}, "norm"),
        (SegResNet, {"blocks_up": (1, 1)}, "blocks_up has 2 entries; give 3"),
        (SwinUNETR, {"depths": (2, 2)}, "depths has 2 entries; give 4"),
        (SwinUNETR, {"feature_size": 10}, "must divide the channels"),
        (SwinUNETR, {"num_heads": (5, 6, 12, 24)}, "must divide the channels"),
        (UNETR, {"image_size": (96, 96)}, "one an axis"),
        (MedNeXt, {"size": "XL"}, "no MedNeXt size is called 'XL'"),
        (MedNeXt, {"kernel_size": 4}, "must be odd"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(kind: Any, args: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        on_meta(kind, 3, 1, 1, **args)
    assert isinstance(caught.value, ValueError) or caught.value.error_id == "E-UNKNOWN-NAME"
