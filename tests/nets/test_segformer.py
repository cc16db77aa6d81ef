from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medseg.errors import WorkflowError
from medseg.nets.encoders.mit import MIT_SIZES, MiT, ReducedAttention
from medseg.nets.segformer import SegFormer
from medseg.nets.weights import load_encoder_weights

B0: dict[str, Any] = {"variant": "b0", "norm": "batch"}
COUNTS = {
    "b0": 3_752_694,
    "b1": 13_715_798,
    "b2": 27_461_974,
    "b3": 47_337_814,
    "b4": 64_108_374,
    "b5": 84_708_694,
}


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(*args: Any, **kwargs: Any) -> SegFormer:
    with torch.device("meta"):
        return SegFormer(*args, **kwargs)


@pytest.mark.parametrize(("variant", "count"), COUNTS.items())
def test_each_variant_has_the_published_number_of_parameters(variant: str, count: int) -> None:
    assert num_parameters(on_meta(2, 3, 150, variant=variant, norm="batch")) == count


def test_the_docstring_states_the_default_number_of_parameters() -> None:
    in_2d, in_3d = (num_parameters(on_meta(dims, 1, 2)) for dims in (2, 3))
    assert f"{in_3d:,} parameters in 3D and {in_2d:,} in 2D" in " ".join((SegFormer.__doc__ or "").split())


def published_shapes(size: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a checkpoint ``mit_b*.pth``, but the classifier's."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    before = 3
    for n, (width, depth) in enumerate(zip(size.channels, size.depths, strict=True), start=1):
        kernel, reduction = (7 if n == 1 else 3), (8, 4, 2, 1)[n - 1]
        layer(f"patch_embed{n}.proj", width, before, kernel, kernel)
        layer(f"patch_embed{n}.norm", width)
        for b in range(depth):
            block = f"block{n}.{b}"
            for norm in ("norm1", "norm2"):
                layer(f"{block}.{norm}", width)
            layer(f"{block}.attn.q", width, width)
            layer(f"{block}.attn.kv", 2 * width, width)
            layer(f"{block}.attn.proj", width, width)
            if reduction > 1:
                layer(f"{block}.attn.sr", width, width, reduction, reduction)
                layer(f"{block}.attn.norm", width)
            layer(f"{block}.mlp.fc1", 4 * width, width)
            layer(f"{block}.mlp.dwconv.dwconv", 4 * width, 1, 3, 3)
            layer(f"{block}.mlp.fc2", width, 4 * width)
        layer(f"norm{n}", width)
        before = width
    return shapes


@pytest.mark.parametrize("variant", ["b0", "b2"])
def test_the_encoder_s_weights_have_the_published_names_and_shapes(variant: str) -> None:
    size = MIT_SIZES[variant]
    with torch.device("meta"):
        encoder = MiT(2, 3, channels=size.channels, depths=size.depths)
    assert {name: tuple(w.shape) for name, w in encoder.state_dict().items()} == published_shapes(size)


def test_an_encoder_with_loaded_weights_sees_a_picture_as_the_published_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    args: dict[str, Any] = {"channels": (4, 8), "depths": (1, 2), "num_heads": (1, 2), "strides": (4, 2)}
    published = MiT(2, 3, **args).eval()  # run on rows and columns
    torch.save(published.state_dict(), tmp_path / "mit.pth")
    picture = torch.randn(1, 3, 32, 40)
    as_volume = picture.transpose(2, 3)
    flat, deep = MiT(2, 3, **args).eval(), MiT(3, 3, in_plane=True, **args).eval()
    for loaded in (flat, deep):
        load_encoder_weights(loaded, tmp_path / "mit.pth")
    stack = deep(as_volume[..., None].expand(-1, -1, -1, -1, 3))
    for feature, found, slices in zip(published(picture), flat(as_volume), stack, strict=True):
        expected = feature.transpose(2, 3)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(slices, expected[..., None].expand_as(slices), rtol=1e-4, atol=1e-4)


def test_it_takes_any_size_and_sees_all_of_it() -> None:
    torch.manual_seed(0)
    network = SegFormer(2, 1, 2, **B0).eval()
    assert network.min_size == (32, 32)
    for size in ((32, 32), (45, 97), (160, 64)):
        assert network(torch.zeros(1, 1, *size)).shape == (1, 2, *size)
    x = torch.randn(1, 1, 160, 64, requires_grad=True)
    network(x)[0, 1, 0, 0].backward()
    assert x.grad is not None and x.grad[0, 0, -32:, -32:].abs().sum() > 0


def test_every_stage_attends_to_keys_on_the_deepest_grid() -> None:
    network = SegFormer(3, 1, 2, channels=(4, 4, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)).eval()
    num_keys = []
    for module in network.modules():
        if isinstance(module, ReducedAttention):
            module.kv.register_forward_hook(lambda _, args, __: num_keys.append(args[0].shape[1]))
    network(torch.zeros(1, 1, 64, 32, 32))
    assert num_keys == [2, 2, 2, 2]


def test_there_are_no_position_embeddings_and_yet_equal_tokens_learn_where_they_are() -> None:
    torch.manual_seed(0)
    network = SegFormer(2, 1, 1, channels=(4, 8), depths=(1, 1), num_heads=(1, 1), strides=(2, 2), norm="none").eval()
    assert not [name for name in network.state_dict() if "pos" in name]
    logits = network(torch.ones(1, 1, 32, 32))
    assert logits.std() > 1e-3  # by the padding of the convolutions alone


def test_finer_strides_give_finer_logits_and_a_smaller_minimum() -> None:
    network = SegFormer(3, 1, 2, channels=(4, 8), depths=(1, 1), num_heads=(1, 1), strides=(2, 2)).eval()
    assert network.min_size == (4, 4, 4)
    with pytest.raises(WorkflowError, match="E-PATCH-SIZE"):
        network(torch.zeros(1, 1, 8, 8, 3))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"variant": "b6"}, "variant"),
        ({"depths": (1, 1)}, "2 depths"),
        ({"depths": (1, 0, 1, 1)}, "at least 1 block"),
        ({"num_heads": (3, 2, 5, 8)}, "heads must divide"),
        ({"norm": "layr"}, "norm"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        on_meta(2, 1, 1, **args)
    assert isinstance(caught.value, ValueError) or caught.value.error_id == "E-UNKNOWN-NAME"
