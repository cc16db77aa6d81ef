"""The networks: NETS says which there are, where they come from and what they are good for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from medseg.nets.attention_unet import AttentionUNet
from medseg.nets.deeplab_v3 import DeepLabV3
from medseg.nets.deeplab_v3_plus import DeepLabV3Plus
from medseg.nets.fcn import FCN
from medseg.nets.from_monai import UNETR, DynUNet, MedNeXt, SegResNet, SwinUNETR
from medseg.nets.network import SegmentationNetwork
from medseg.nets.nnunet import ResidualEncoderUNet
from medseg.nets.pspnet import PSPNet
from medseg.nets.segformer import SegFormer
from medseg.nets.segnet import SegNet
from medseg.nets.transunet import TransUNet
from medseg.nets.unet import UNet
from medseg.nets.unet_plus_plus import UNetPlusPlus
from medseg.nets.vnet import VNet
from medseg.registry import Registry


@dataclass(frozen=True)
class NetworkEntry:
    """A network that a workflow can name.

    Args:
        network: Its class; takes spatial_dims, in_channels, out_channels and arguments of its own.
        title: As in the paper.
        paper: Authors, year, arXiv or DOI.
        good_for: When to choose it, in three words.
        tiny: Arguments of a configuration small enough for tests.
        spatial_dims: Which of 2 and 3 it can be made for.
        tiny_stride: By how much the tiny configuration's logits are coarser than the image before they are interpolated.
    """

    network: Callable[..., SegmentationNetwork]
    title: str
    paper: str
    good_for: str
    tiny: Mapping[str, Any]
    spatial_dims: tuple[int, ...] = (2, 3)
    tiny_stride: int = 1


NETS: Registry[NetworkEntry] = Registry(
    "network",
    {
        "unet": NetworkEntry(
            UNet,
            title="U-Net",
            paper="Ronneberger et al. 2015, arXiv:1505.04597",
            good_for="the first choice",
            tiny={"channels": (4, 8, 8, 8)},
        ),
        "vnet": NetworkEntry(
            VNet,
            title="V-Net",
            paper="Milletari et al. 2016, arXiv:1606.04797",
            good_for="large organs, volumes",
            tiny={"channels": (4, 8, 8, 8), "convs_per_stage": (1, 2, 2, 2)},
        ),
        "fcn": NetworkEntry(
            FCN,
            title="FCN",
            paper="Long et al. 2015, arXiv:1411.4038",
            good_for="large objects, teaching",
            tiny={
                "channels": (4, 8, 8),
                "convs_per_stage": (1, 2, 2),
                "output_stride": 2,
                "fc_channels": 8,
                "dropout": 0.0,
            },
            tiny_stride=2,
        ),
        "segnet": NetworkEntry(
            SegNet,
            title="SegNet",
            paper="Badrinarayanan et al. 2017, arXiv:1511.00561",
            good_for="boundaries, little memory",
            tiny={"channels": (8, 16), "convs_per_stage": (1, 2)},
        ),
        "segformer": NetworkEntry(
            SegFormer,
            title="SegFormer",
            paper="Xie et al. 2021, arXiv:2105.15203",
            good_for="wide context, cheap",
            tiny={
                "channels": (8, 16),
                "depths": (1, 1),
                "num_heads": (1, 2),
                "strides": (4, 2),
                "decoder_channels": 16,
                "dropout": 0.0,
                "drop_path": 0.0,
            },
            tiny_stride=4,
        ),
        "transunet": NetworkEntry(
            TransUNet,
            title="TransUNet",
            paper="Chen et al. 2021, arXiv:2102.04306",
            good_for="distant context, many scans",
            tiny={
                "image_size": 32,
                "width": 8,
                "blocks": (1, 1),
                "hidden_channels": 16,
                "num_layers": 2,
                "num_heads": 2,
                "decoder_channels": (16, 8, 8),
                "dropout": 0.0,
            },
        ),
        "pspnet": NetworkEntry(
            PSPNet,
            title="PSPNet",
            paper="Zhao et al. 2017, arXiv:1612.01105",
            good_for="whole-image context",
            tiny={"encoder": "resnet18", "width": 8, "dropout": 0.0},
            tiny_stride=8,
        ),
        "deeplab_v3": NetworkEntry(
            DeepLabV3,
            title="DeepLab v3",
            paper="Chen et al. 2017, arXiv:1706.05587",
            good_for="very different sizes",
            tiny={"encoder": "resnet18", "width": 8, "rates": (1, 2), "aspp_channels": 16, "dropout": 0.0},
            tiny_stride=8,
        ),
        "deeplab_v3_plus": NetworkEntry(
            DeepLabV3Plus,
            title="DeepLab v3+",
            paper="Chen et al. 2018, arXiv:1802.02611",
            good_for="different sizes, sharper",
            tiny={
                "encoder": "resnet18",
                "width": 8,
                "rates": (1, 2),
                "aspp_channels": 16,
                "low_level_channels": 8,
                "dropout": 0.0,
            },
            tiny_stride=4,
        ),
        "unet_plus_plus": NetworkEntry(
            UNetPlusPlus,
            title="UNet++",
            paper="Zhou et al. 2018, arXiv:1807.10165",
            good_for="varied sizes, prunable",
            tiny={"channels": (4, 8, 8, 8)},
        ),
        "attention_unet": NetworkEntry(
            AttentionUNet,
            title="Attention U-Net",
            paper="Oktay et al. 2018, arXiv:1804.03999",
            good_for="small, varying organs",
            tiny={"channels": (4, 8, 8, 8)},
        ),
        "nnunet_residual": NetworkEntry(
            ResidualEncoderUNet,
            title="nnU-Net ResEnc",
            paper="Isensee et al. 2024, arXiv:2404.09556",
            good_for="accuracy, large GPU",
            tiny={"channels": (4, 8, 8, 8), "blocks_per_stage": (1, 2, 2, 1)},
        ),
        "dynunet": NetworkEntry(
            DynUNet,
            title="DynUNet (MONAI)",
            paper="Isensee et al. 2018, arXiv:1809.10486",
            good_for="comparing with MONAI",
            tiny={"channels": (4, 8, 8, 8)},
        ),
        "segresnet": NetworkEntry(
            SegResNet,
            title="SegResNet (MONAI)",
            paper="Myronenko 2018, arXiv:1810.11654",
            good_for="tumors in MRI",
            tiny={"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)},
        ),
        "swin_unetr": NetworkEntry(
            SwinUNETR,
            title="Swin UNETR (MONAI)",
            paper="Hatamizadeh et al. 2022, arXiv:2201.01266",
            good_for="many organs, many scans",
            tiny={"feature_size": 12, "depths": (2, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 4},
        ),
        "unetr": NetworkEntry(
            UNETR,
            title="UNETR (MONAI)",
            paper="Hatamizadeh et al. 2022, arXiv:2103.10504",
            good_for="context, many scans",
            tiny={"image_size": 32, "feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2},
        ),
        "mednext": NetworkEntry(
            MedNeXt,
            title="MedNeXt (MONAI)",
            paper="Roy et al. 2023, arXiv:2303.09975",
            good_for="accuracy, few parameters",
            tiny={"init_filters": 4},
        ),
    },
)
"""Adding a network is one file and one line here; the tests are parametrized over this table."""
