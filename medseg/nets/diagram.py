"""A drawing of a network: its layers from left to right, at the resolution they work on, as tall as they have channels.

It shows what the network was seen doing with an image, not what is told of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from medseg.nets.crf_layers import WithRandomField
from medseg.nets.network import SegmentationNetwork

LINEAR, SUM, JOINED = "1 × 1 or linear", "sum or product", "joined"
COLORS = {
    "image": "#222222",
    "convolution": "#2f6db5",
    "dilated": "#7b3fa0",
    "depthwise or grouped": "#1b998b",
    LINEAR: "#8fbce6",
    "transposed": "#e07b00",
    "attention": "#c62839",
    "random field": "#8d1b3d",
    "pooling": "#8c8c8c",
    "unpooling": "#b59b00",
    "interpolation": "#d9b44a",
    SUM: "#444444",
    JOINED: "#444444",
}
"""Of each kind of layer."""

_OTHER_KINDS = {
    "linear": LINEAR,
    "scaled_dot_product_attention": "attention",
    "softmax": "attention",
    "interpolate": "interpolation",
    "scatter": "unpooling",
    "cat": JOINED,
    "stack": JOINED,
}
_WITHIN_ATTENTION = ("matmul", "bmm", "einsum")

SIZES = {2: 224, 3: 192}
"""Of the image along each axis, in 2D and 3D: such that windows of 7 and 6 tokens divide it at every stage of a Swin."""
WHOLE = 8
"""So many halvings leave a single voxel of such an image."""

WIDTH, LEFT, RIGHT, TOP, ROW, LINE = 820, 58, 18, 30, 40, 18
TALLEST, THICKEST, MOST_CHANNELS = 34.0, 8.0, 2048


@dataclass(frozen=True)
class Layer:
    """Something that a network computes.

    Args:
        kind: Among `COLORS`.
        channels: Of what it gives.
        halvings: How much coarser than the image that is, as a power of 2, rounded.
        depth: How many layers lie before it, along the longest way; where layers meet counts as half of one.
        sources: The numbers of those that it computes on.
    """

    kind: str
    channels: int
    halvings: int
    depth: float
    sources: tuple[int, ...]


def layers_of(net: SegmentationNetwork, in_channels: int) -> list[Layer]:
    """What a network computes to predict an image of `SIZES`, in order; the first is the image.

    Args:
        net: On the meta device.
        in_channels: Of the image.
    """
    dims = len(net.min_size)
    image = torch.empty((1, in_channels, *[SIZES[dims]] * dims), device="meta")
    watching = _Watching(image)
    with torch.no_grad(), _seeing_fields(net, watching), watching:
        net.eval()(image)
    return watching.layers


class _Watching(TorchFunctionMode):
    """Notes down what is computed, and of what."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.dims = image.dim() - 2
        self.layers = [Layer("image", image.shape[1], 0, 0.0, ())]
        self._of = {id(image): 0}  # the layer that a tensor comes from
        self._kept = [image]  # another tensor might get the number of one that is gone

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        result = func(*args, **named)
        sources = self.sources(args, named)
        made = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        if sources and made:
            name = getattr(func, "__name__", "")
            kind = _kind(name, args, named, made[0])
            if kind is None and len(sources) > 1 and name not in _WITHIN_ATTENTION:
                kind = SUM
            is_linear = name == "linear"
            self.note(made, max(sources) if kind is None else self.add(kind, made[0], sources, channels_last=is_linear))
        return result

    def sources(self, *given: Any) -> tuple[int, ...]:
        """The layers that tensors come from."""
        found = (self._of.get(id(tensor)) for tensor in tree_iter(given) if isinstance(tensor, Tensor))
        return tuple(dict.fromkeys(number for number in found if number is not None))

    def add(self, kind: str, made: Tensor, sources: tuple[int, ...], *, channels_last: bool = False) -> int:
        """The number of one more."""
        before = max(self.layers[number].depth for number in sources)
        entering = self.layers[sources[0]]
        if kind == "attention":  # of queries, keys and values, which may have been made by one layer together
            channels, halvings = entering.channels // (3 if len(sources) == 1 else 1), entering.halvings
        elif channels_last or kind == "unpooling" or made.dim() == self.dims + 2:
            channels = made.shape[-1 if channels_last else 1]
            halvings = round(math.log2(SIZES[self.dims]) - math.log2(made.numel() / channels) / self.dims)
        else:  # tokens in some arrangement, as many as came in; what was expanded is as fine as what it meets
            finest = min((self.layers[number] for number in sources), key=lambda layer: layer.halvings)
            channels, halvings = finest.channels, finest.halvings
        step = 0.5 if kind in (SUM, JOINED) else 1.0
        self.layers.append(Layer(kind, channels, max(0, halvings), before + step, sources))
        return len(self.layers) - 1

    def note(self, made: Sequence[Tensor], number: int) -> None:
        """Tensors that come from a layer."""
        self._of |= {id(tensor): number for tensor in made}
        self._kept += made


def _kind(name: str, args: Sequence[Any], named: Mapping[str, Any], made: Tensor) -> str | None:
    """Of the layer that a function of torch is; None where it is none, as norms, activations and reshaping are."""
    if name.startswith("conv_transpose"):
        return "transposed"
    if name.startswith("conv"):
        weight, dilation, groups = (
            named.get(argument, args[place] if place < len(args) else default)
            for argument, place, default in (("weight", 1, None), ("dilation", 5, 1), ("groups", 6, 1))
        )
        if max([dilation] if isinstance(dilation, int) else dilation) > 1:
            return "dilated"
        if groups > 1:
            return "depthwise or grouped"
        return LINEAR if math.prod(weight.shape[2:]) == 1 else "convolution"
    if "pool" in name or (
        name == "mean" and args[0].dim() == made.dim() and made[0, 0].numel() < args[0][0, 0].numel()
    ):
        return "pooling"
    return _OTHER_KINDS.get(name)


@contextmanager
def _seeing_fields(net: SegmentationNetwork, watching: _Watching) -> Iterator[None]:
    """A random field's steps are layers of their own, whose many small functions would hide the network."""
    if not isinstance(net, WithRandomField):
        yield
        return

    def field(logits: Tensor, image: Tensor) -> Tensor:
        sources = watching.sources(logits, image)
        for _ in range(getattr(net, "iterations", 1)):
            sources = (watching.add("random field", logits, sources),)
        after = torch.empty_like(logits)
        watching.note([after], sources[0])
        return after

    own, net.field = net.field, field  # type: ignore[method-assign]
    try:
        yield
    finally:
        net.field = own  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Mark:
    x: float
    y: float
    height: float


def drawing(layers: Sequence[Layer]) -> str:
    """Layers as an SVG picture: from left to right by their depth, from top to bottom as they are coarser."""
    deepest = max(layer.depth for layer in layers) + 1
    unit = (WIDTH - LEFT - RIGHT) / deepest
    thickness = min(THICKEST, 0.7 * unit)
    rows = {row: TOP + ROW * n for n, row in enumerate(sorted({layer.halvings for layer in layers}))}
    marks = _marks(layers, rows, unit)
    bottom = max(rows.values()) + ROW
    kinds = [kind for kind in COLORS if any(layer.kind == kind for layer in layers)]
    legend, height = _legend(kinds, bottom)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11" fill="#333333">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for row, y in rows.items():
        scale = "whole" if row >= WHOLE else f"1/{2**row}" if row else "1"
        parts.append(f'<path d="M{LEFT - 6} {y}H{WIDTH - RIGHT}" stroke="#eeeeee"/>')
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{scale}</text>')
    parts.append(f'<path d="{_ways(layers, marks, thickness)}" fill="none" stroke="#999999" stroke-width="0.7"/>')
    for kind in kinds:
        of_kind = [mark for layer, mark in zip(layers, marks, strict=True) if layer.kind == kind]
        parts.append(f'<path d="{"".join(_shape(kind, mark, thickness) for mark in of_kind)}" fill="{COLORS[kind]}"/>')
    return "\n".join([*parts, *legend, "</svg>\n"])


def _marks(layers: Sequence[Layer], rows: Mapping[int, float], unit: float) -> list[_Mark]:
    """Where each layer is drawn; those side by side at one depth and resolution share the height of a row."""
    beside: dict[tuple[float, int], list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        beside[layer.depth, layer.halvings].append(number)
    marks: dict[int, _Mark] = {}
    for (depth, row), numbers in beside.items():
        heights = [_height(layers[number]) for number in numbers]
        shrunk = min(1.0, (TALLEST - 2 * (len(numbers) - 1)) / sum(heights))
        y = -(shrunk * sum(heights) + 2 * (len(numbers) - 1)) / 2
        for number, height in zip(numbers, heights, strict=True):
            middle = rows[row] + y + shrunk * height / 2
            marks[number] = _Mark(LEFT + unit * (depth + 0.5), middle, max(1.0, shrunk * height))
            y += shrunk * height + 2
    return [marks[number] for number in range(len(layers))]


def _height(layer: Layer) -> float:
    if layer.kind in (SUM, JOINED):
        return 4.0
    return TALLEST * max(0.12, min(1.0, math.log2(max(2, layer.channels)) / math.log2(MOST_CHANNELS)))


def _shape(kind: str, mark: _Mark, thickness: float) -> str:
    if kind == SUM:
        r = min(2.5, max(0.8, thickness / 2))
        return (
            f"M{mark.x - r:.1f} {mark.y:.1f}a{r:.1f} {r:.1f} 0 1 0 {2 * r:.1f} 0a{r:.1f} {r:.1f} 0 1 0-{2 * r:.1f} 0z"
        )
    wide = min(5.0, max(1.6, thickness)) if kind == JOINED else thickness
    tall = wide if kind == JOINED else mark.height
    return f"M{mark.x - wide / 2:.1f} {mark.y - tall / 2:.1f}h{wide:.1f}v{tall:.1f}h-{wide:.1f}z"


def _ways(layers: Sequence[Layer], marks: Sequence[_Mark], thickness: float) -> str:
    """From each layer to those that compute on it: straight, or in a bow over others of the same row."""
    in_row: dict[int, list[float]] = defaultdict(list)
    for layer in layers:
        in_row[layer.halvings].append(layer.depth)
    ways = []
    for layer, mark in zip(layers, marks, strict=True):
        for number in layer.sources:
            source, begin = layers[number], marks[number]
            row = layer.halvings
            over = row == source.halvings and any(source.depth < d < layer.depth for d in in_row[row])
            start, end = f"M{begin.x + thickness / 2:.1f} {begin.y:.1f}", f"{mark.x - thickness / 2:.1f} {mark.y:.1f}"
            if over:
                rise = TALLEST / 2 + min(14.0, 2 + 0.05 * (mark.x - begin.x))
                top = min(begin.y, mark.y) - rise
                ways.append(f"{start}C{begin.x:.1f} {top:.1f} {mark.x:.1f} {top:.1f} {end}")
            else:
                ways.append(f"{start}L{end}")
    return "".join(ways)


def _legend(kinds: Sequence[str], top: float) -> tuple[list[str], int]:
    """A square and a word for each kind, in lines; and where they end."""
    parts, x, y = [], float(LEFT), top
    for kind in kinds:
        wide = 24 + 6.2 * len(kind)
        if x + wide > WIDTH - RIGHT:
            x, y = LEFT, y + LINE
        shape = _shape(kind, _Mark(x + 4, y - 4, 9.0), 9.0)
        parts.append(f'<path d="{shape}" fill="{COLORS[kind]}"/><text x="{x + 13:.0f}" y="{y:.0f}">{kind}</text>')
        x += wide
    return parts, round(y + 12)
