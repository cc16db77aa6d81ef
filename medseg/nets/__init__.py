"""The networks: NETS says which there are, where they come from and what they are good for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from medseg.nets.network import SegmentationNetwork
from medseg.nets.unet import UNet
from medseg.nets.vnet import VNet
from medseg.registry import Registry


@dataclass(frozen=True)
class NetworkEntry:
    """A network that a workflow can name.

    Args:
        network: Its class; takes spatial_dims, in_channels, out_channels and arguments of its own.
        title: As in the paper.
        paper: Authors, year, arXiv or DOI.
        good_for: When to choose it, in one line.
        tiny: Arguments of a configuration small enough for tests.
        spatial_dims: Which of 2 and 3 it can be made for.
    """

    network: Callable[..., SegmentationNetwork]
    title: str
    paper: str
    good_for: str
    tiny: Mapping[str, Any]
    spatial_dims: tuple[int, ...] = (2, 3)


NETS: Registry[NetworkEntry] = Registry(
    "network",
    {
        "unet": NetworkEntry(
            UNet,
            title="U-Net",
            paper="Ronneberger et al. 2015, arXiv:1505.04597",
            good_for="the first choice for organs and lesions, from few scans",
            tiny={"channels": (4, 8, 8, 8)},
        ),
        "vnet": NetworkEntry(
            VNet,
            title="V-Net",
            paper="Milletari et al. 2016, arXiv:1606.04797",
            good_for="large organs in volumes; wide kernels, slow without a GPU",
            tiny={"channels": (4, 8, 8, 8), "convs_per_stage": (1, 2, 2, 2)},
        ),
    },
)
"""Adding a network is one file and one line here; the tests are parametrized over this table."""
