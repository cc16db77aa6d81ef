"""What people want to know of a network before they choose it: size, least input, arguments, structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medseg.nets import NETS, NetworkEntry
from medseg.nets.diagram import drawing, layers_of
from medseg.nets.network import SegmentationNetwork
from medseg.parts import described, documented

IMAGE_CHANNELS, CLASSES = 1, 2
"""What parameters are counted for; a network's own share hardly depends on them."""

_DEPTH = 2


def describe(name: str, *, spatial_dims: int | None = None) -> dict[str, Any]:
    """A network in short, as a row of a table.

    Args:
        name: In NETS.
        spatial_dims: Only this of 2 and 3.

    Returns:
        ``title, paper, good_for``, and for each of 2D and 3D that it can be made for, with its default
        arguments: ``parameters`` and ``min_size``, by ``"2d"`` and ``"3d"``.
    """
    entry = NETS[name]
    dims = [n for n in entry.spatial_dims if spatial_dims in (None, n)]
    made = {f"{n}d": imagined(entry, n) for n in dims}
    return {
        **described(entry),
        "parameters": {key: number_of_parameters(net) for key, net in made.items()},
        "min_size": {key: list(net.min_size) for key, net in made.items()},
    }


def explain(name: str, *, spatial_dims: int | None = None) -> dict[str, Any]:
    """A network at length: `describe`, and its docstring, arguments and structure.

    Returns:
        Also ``about`` and ``arguments`` as in `documented`, and ``structure`` (a line a part: where it stands, its
        kind, parameters, and the shape it gives).
    """
    entry = NETS[name]
    dims = spatial_dims or max(entry.spatial_dims)
    return {
        **describe(name, spatial_dims=spatial_dims),
        **documented(entry.network),
        "structure": structure(imagined(entry, dims)),
    }


def drawn(name: str, *, spatial_dims: int | None = None) -> str:
    """A network with its default arguments as an SVG picture, see `medseg.nets.diagram`; in 2D unless 3D is asked for."""
    entry = NETS[name]
    return drawing(layers_of(imagined(entry, spatial_dims or min(entry.spatial_dims)), IMAGE_CHANNELS))


def imagined(entry: NetworkEntry, spatial_dims: int, args: Mapping[str, Any] | None = None) -> SegmentationNetwork:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return entry.network(spatial_dims, IMAGE_CHANNELS, CLASSES, **(args or {}))


def number_of_parameters(net: nn.Module) -> int:
    """Trainable ones."""
    return sum(weight.numel() for weight in net.parameters() if weight.requires_grad)


def structure(net: SegmentationNetwork) -> list[dict[str, Any]]:
    """The parts of a network, two levels deep, with what each gives for an image of twice the least size.

    Args:
        net: On the meta device.

    Returns:
        ``part, kind, parameters, shape`` (channels first, without the batch), in the order of the computation.
    """
    shapes: dict[str, list[int]] = {}

    def noting(name: str) -> Any:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            last = output[-1] if isinstance(output, list | tuple) else output
            if isinstance(last, Tensor):
                shapes[name] = list(last.shape[1:])

        return note

    parts = {name: part for name, part in net.named_modules() if name and name.count(".") < _DEPTH}
    hooks = [part.register_forward_hook(noting(name)) for name, part in parts.items()]
    with torch.inference_mode():
        net.eval()(torch.empty((1, IMAGE_CHANNELS, *[2 * n for n in net.min_size]), device="meta"))
    for hook in hooks:
        hook.remove()
    return [
        {
            "part": name,
            "kind": type(parts[name]).__name__,
            "parameters": number_of_parameters(parts[name]),
            "shape": shape,
        }
        for name, shape in shapes.items()
    ]
