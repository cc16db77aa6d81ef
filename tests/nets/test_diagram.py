"""Drawings of networks: what they show, and those in docs/."""

import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from medseg.nets import NETS
from medseg.nets.describe import drawn, imagined
from medseg.nets.diagram import drawing, layers_of

DOCS = Path(__file__).parents[2] / "docs"


def layers(name: str, spatial_dims: int = 2, **args):
    return layers_of(imagined(NETS[name], spatial_dims, args), in_channels=1)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_u_net_is_seen_layer_by_layer(spatial_dims):
    found = layers("unet", spatial_dims, channels=(8, 16, 32))
    assert Counter(layer.kind for layer in found) == {
        "image": 1, "convolution": 10, "transposed": 2, "joined": 2, "1 × 1 or linear": 1,
    }  # fmt: skip
    convolutions = [layer for layer in found if layer.kind == "convolution"]
    assert [(layer.channels, layer.halvings) for layer in convolutions] == [
        (8, 0), (8, 0), (16, 1), (16, 1), (32, 2), (32, 2), (16, 1), (16, 1), (8, 0), (8, 0),
    ]  # fmt: skip
    for joint in [layer for layer in found if layer.kind == "joined"]:
        up, skip = sorted(joint.sources, key=lambda number: found[number].kind == "convolution")
        assert found[up].kind == "transposed" and found[skip].kind == "convolution"
        assert found[up].halvings == found[skip].halvings == joint.halvings
    assert found[-1].channels == 2 and found[-1].depth == 14  # ten, two up, two joints of a half each, the last


def test_unpooling_is_told_where_the_maxima_were():
    found = layers("segnet")
    unpooling = [layer for layer in found if layer.kind == "unpooling"]
    assert [layer.halvings for layer in unpooling] == [4, 3, 2, 1, 0]
    for layer in unpooling[1:]:
        assert sorted(found[number].kind for number in layer.sources) == ["convolution", "pooling"]


def test_tokens_are_at_the_resolution_of_their_patches():
    found = layers("setr")
    attention = [layer for layer in found if layer.kind == "attention"]
    assert [(layer.halvings, layer.channels) for layer in attention] == [(4, 768)] * 12
    assert {layer.halvings for layer in layers("swin_unet") if layer.kind == "attention"} == {2, 3, 4, 5}


def test_skips_join_the_tokens_that_were_expanded_to_their_grid():
    assert [layer.halvings for layer in layers("swin_unet") if layer.kind == "joined"] == [4, 3, 2]


def test_streams_run_side_by_side():
    found = layers("hrnet")
    last = max(layer.depth for layer in found if layer.halvings == 5)
    beside = {layer.halvings for layer in found if last - 10 < layer.depth < last and layer.kind == "convolution"}
    assert beside == {2, 3, 4, 5}


def test_a_random_field_is_as_many_layers_as_steps():
    assert Counter(layer.kind for layer in layers("crf_rnn", iterations=7))["random field"] == 7
    assert layers("deep_parsing")[-1].kind == "random field"


def test_dilation_is_seen_in_depthwise_convolutions():
    assert "dilated" in {layer.kind for layer in layers("liteseg")}


def test_a_drawing_is_svg_with_a_mark_for_each_layer():
    found = layers("unet")
    picture = drawing(found)
    marks = [path.get("d", "") for path in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}path")]
    legend = len({layer.kind for layer in found})
    assert sum(d.count("z") for d in marks) == len(found) + legend
    assert re.findall(r"end\">(.*?)<", picture) == ["1", "1/2", "1/4", "1/8", "1/16"]


@pytest.mark.parametrize("name", NETS)
def test_the_page_shows_every_network_as_it_is(name):
    page, year = (DOCS / "networks.md").read_text(encoding="utf-8"), NETS[name].paper.split(",")[0].split()[-1]
    assert f"(networks/{name}.svg)" in page and f"(`{name}`, {year})" in page and f"\n*`{name}` measured: " in page
    drawn_then = (DOCS / "networks" / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn_then == drawn(name), "python docs/diagrams.py draws them again"
