"""What `medseg nets` tells."""

import re
from pathlib import Path

from rich.console import Console

from medseg.nets import NETS
from medseg.nets.describe import describe, explain, imagined, number_of_parameters
from medseg.nets.listing import millions, net_page, nets_table


def printed(what) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_a_network_is_described_by_its_defaults():
    found = describe("unet")
    assert found["parameters"] == {"2d": 5_685_058, "3d": 16_544_130}
    assert found["min_size"] == {"2d": [16, 16], "3d": [16, 16, 16]}
    assert set(describe("unet", spatial_dims=3)["parameters"]) == {"3d"}


def test_its_arguments_come_with_defaults_and_meanings():
    arguments = {argument["name"]: argument for argument in explain("unet")["arguments"]}
    assert "spatial_dims" not in arguments
    assert arguments["channels"]["default"] == (32, 64, 128, 256, 320)
    assert arguments["norm"]["meaning"].startswith("``auto`` (instance in 3D, batch in 2D)")
    assert all(argument["meaning"] for argument in arguments.values())


def test_its_structure_tells_what_every_part_gives():
    parts = {part["part"]: part for part in explain("unet")["structure"]}
    assert parts["encoder.4"] == {
        "part": "encoder.4",
        "kind": "ConvStage",
        "parameters": 4_977_920,
        "shape": [320, 2, 2, 2],
    }
    assert list(parts)[-1] == "head" and parts["head"]["shape"] == [2, 32, 32, 32]
    assert sum(part["parameters"] for part in parts.values()) == 16_544_130


def test_every_network_has_a_row_in_the_table_and_a_meaning_for_each_argument():
    table = printed(nets_table({name: describe(name) for name in NETS}))
    for name, entry in NETS.items():
        assert f"{name} " in table and entry.title in table
        found = explain(name, spatial_dims=max(entry.spatial_dims))
        assert not [argument["name"] for argument in found["arguments"] if not argument["meaning"]], name
        assert entry.paper in printed(net_page(found))


def test_numbers_are_rounded_for_people():
    assert [millions(n) for n in (5_685_058, 134_346_581, 1_457_330_000)] == ["5.69 M", "134 M", "1.46 G"]
    net = imagined(NETS["unet"], 2)
    assert next(net.parameters()).is_meta and number_of_parameters(net) == 5_685_058


def test_the_readme_lists_every_network_as_it_is() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+?): (.+?), \[(.+?)\].* \| (.+?) \| .+ \|$", readme, flags=re.MULTILINE)
    expected = []
    for name, entry in NETS.items():
        authors, identifier = entry.paper.split(", ")
        counted = ", ".join(millions(number) for number in describe(name)["parameters"].values())
        expected.append((name, entry.title, authors, identifier, counted))
    assert rows == expected
