"""The networks: NETS says which there are, where they come from and what they are good for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from medseg.nets.attention_unet import AttentionUNet
from medseg.nets.bisenet import BiSeNet
from medseg.nets.crf_layers import CRFAsRNN, DeepParsingNetwork
from medseg.nets.ddrnet import DDRNet
from medseg.nets.deconvnet import DeconvNet
from medseg.nets.deeplab_v1 import DeepLabV1
from medseg.nets.deeplab_v2 import DeepLabV2
from medseg.nets.deeplab_v3 import DeepLabV3
from medseg.nets.deeplab_v3_plus import DeepLabV3Plus
from medseg.nets.dfanet import DFANet
from medseg.nets.enet import ENet
from medseg.nets.espnet import ESPNet
from medseg.nets.fast_scnn import FastSCNN
from medseg.nets.fastfcn import FastFCN
from medseg.nets.fcn import FCN
from medseg.nets.from_monai import UNETR, DynUNet, MedNeXt, SegResNet, SwinUNETR
from medseg.nets.hrnet import HRNet
from medseg.nets.liteseg import LiteSeg
from medseg.nets.network import SegmentationNetwork
from medseg.nets.nnunet import ResidualEncoderUNet
from medseg.nets.pixelnet import PixelNet
from medseg.nets.pspnet import PSPNet
from medseg.nets.refinenet import RefineNet
from medseg.nets.segformer import SegFormer
from medseg.nets.segnet import SegNet
from medseg.nets.setr import SETR
from medseg.nets.swin_unet import SwinUNet
from medseg.nets.transunet import TransUNet
from medseg.nets.unet import UNet
from medseg.nets.unet_3_plus import UNet3Plus
from medseg.nets.unet_plus_plus import UNetPlusPlus
from medseg.nets.upernet import UPerNet
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
            good_for="boundaries without skips",
            tiny={"channels": (8, 16), "convs_per_stage": (1, 2)},
        ),
        "deconvnet": NetworkEntry(
            DeconvNet,
            title="DeconvNet",
            paper="Noh et al. 2015, arXiv:1505.04366",
            good_for="boundaries, whole shapes",
            tiny={"channels": (4, 8), "convs_per_stage": 1, "fc_channels": 16},
        ),
        "pixelnet": NetworkEntry(
            PixelNet,
            title="PixelNet",
            paper="Bansal et al. 2017, arXiv:1702.06506",
            good_for="detail, many details",
            tiny={
                "channels": (8, 8, 16),
                "convs_per_stage": (1, 2, 2),
                "fc_channels": 16,
                "mlp_channels": (16, 16),
                "dropout": 0.0,
            },
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
        "setr": NetworkEntry(
            SETR,
            title="SETR",
            paper="Zheng et al. 2021, arXiv:2012.15840",
            good_for="context, published weights",
            tiny={
                "image_size": 32,
                "patch_size": 4,
                "hidden_channels": 32,
                "num_layers": 3,
                "num_heads": 2,
                "decoder_channels": 16,
                "drop_path": 0.0,
            },
            tiny_stride=2,
        ),
        "swin_unet": NetworkEntry(
            SwinUNet,
            title="Swin-Unet",
            paper="Cao et al. 2021, arXiv:2105.05537",
            good_for="context, many pictures",
            tiny={
                "channels": 8,
                "depths": (2, 2),
                "num_heads": (1, 2),
                "window_size": 4,
                "patch_size": 2,
                "drop_path": 0.0,
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
        "refinenet": NetworkEntry(
            RefineNet,
            title="RefineNet",
            paper="Lin et al. 2017, arXiv:1611.06612",
            good_for="context, then detail",
            tiny={"encoder": "resnet18", "width": 8, "channels": (8, 8, 8, 16), "dropout": 0.0},
            tiny_stride=4,
        ),
        "deeplab_v1": NetworkEntry(
            DeepLabV1,
            title="DeepLab v1",
            paper="Chen et al. 2015, arXiv:1412.7062",
            good_for="large organs, teaching",
            tiny={"width": 8, "rate": 2, "fc_channels": 16, "dropout": 0.0},
            tiny_stride=8,
        ),
        "deeplab_v2": NetworkEntry(
            DeepLabV2,
            title="DeepLab v2",
            paper="Chen et al. 2016, arXiv:1606.00915",
            good_for="large organs, scales",
            tiny={"encoder": "resnet18", "width": 8, "rates": (1, 2), "dropout": 0.0},
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
        "hrnet": NetworkEntry(
            HRNet,
            title="HRNetV2",
            paper="Wang et al. 2020, arXiv:1908.07919",
            good_for="fine structures, context",
            tiny={"width": 8, "stem_channels": 8, "modules_per_stage": (1, 1), "blocks_per_module": 1},
            tiny_stride=4,
        ),
        "fastfcn": NetworkEntry(
            FastFCN,
            title="FastFCN",
            paper="Wu et al. 2019, arXiv:1903.11816",
            good_for="context, quick in 3D",
            tiny={
                "encoder": "resnet18",
                "width": 8,
                "jpu_channels": 8,
                "rates": (1, 2),
                "head_channels": 16,
                "dropout": 0.0,
            },
            tiny_stride=8,
        ),
        "upernet": NetworkEntry(
            UPerNet,
            title="UPerNet",
            paper="Xiao et al. 2018, arXiv:1807.10221",
            good_for="organs within organs",
            tiny={"encoder": "resnet18", "width": 8, "channels": 16, "dropout": 0.0},
            tiny_stride=4,
        ),
        "unet_plus_plus": NetworkEntry(
            UNetPlusPlus,
            title="UNet++",
            paper="Zhou et al. 2018, arXiv:1807.10165",
            good_for="varied sizes, prunable",
            tiny={"channels": (4, 8, 8, 8)},
        ),
        "unet_3_plus": NetworkEntry(
            UNet3Plus,
            title="UNet 3+",
            paper="Huang et al. 2020, arXiv:2004.08790",
            good_for="organs often absent",
            tiny={"channels": (4, 8, 8, 8), "skip_channels": 4},
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
        "crf_rnn": NetworkEntry(
            CRFAsRNN,
            title="CRF-as-RNN",
            paper="Zheng et al. 2015, arXiv:1502.03240",
            good_for="sharper edges, trained",
            tiny={
                "network": {"name": "unet", "args": {"channels": (4, 8, 8, 8)}},
                "crf": {"neighbors": 6},
                "train_iterations": 2,
                "iterations": 3,
            },
        ),
        "deep_parsing": NetworkEntry(
            DeepParsingNetwork,
            title="Deep parsing network",
            paper="Liu et al. 2015, arXiv:1509.02634",
            good_for="labels in context",
            tiny={
                "network": {"name": "unet", "args": {"channels": (4, 8, 8, 8)}},
                "crf": {"neighbors": 6},
                "context_size": 3,
                "contexts": 2,
            },
        ),
        "fast_scnn": NetworkEntry(
            FastSCNN,
            title="Fast-SCNN",
            paper="Poudel et al. 2019, arXiv:1902.04502",
            good_for="speed, few parameters",
            tiny={
                "stem_channels": (8, 8, 16),
                "channels": (16, 16, 16),
                "blocks": 1,
                "expansion": 2,
                "output_stride": 2,
                "dropout": 0.0,
            },
            tiny_stride=2,
        ),
        "enet": NetworkEntry(
            ENet,
            title="ENet",
            paper="Paszke et al. 2016, arXiv:1606.02147",
            good_for="speed, tiny models",
            tiny={
                "channels": (32, 32, 32),
                "regular_blocks": 1,
                "context_stages": 1,
                "dilations": (2, 4),
                "dropout": 0.0,
            },
        ),
        "espnet": NetworkEntry(
            ESPNet,
            title="ESPNet",
            paper="Mehta et al. 2018, arXiv:1803.06815",
            good_for="speed, wide context",
            tiny={"channels": (8, 16, 16), "blocks": (1, 1), "dilations": (1, 2, 4), "decoder_channels": 8},
        ),
        "bisenet": NetworkEntry(
            BiSeNet,
            title="BiSeNet",
            paper="Yu et al. 2018, arXiv:1808.00897",
            good_for="speed, large organs",
            tiny={"width": 8, "context_channels": 16},
            tiny_stride=8,
        ),
        "dfanet": NetworkEntry(
            DFANet,
            title="DFANet",
            paper="Li et al. 2019, arXiv:1904.02216",
            good_for="speed, repeated context",
            tiny={
                "stem_stride": 1,
                "channels": (16, 32),
                "blocks": (1, 2),
                "num_runs": 2,
                "attention_channels": 16,
                "decoder_channels": 16,
            },
            tiny_stride=2,
        ),
        "liteseg": NetworkEntry(
            LiteSeg,
            title="LiteSeg",
            paper="Emara et al. 2019, arXiv:1912.06683",
            good_for="DeepLab, but cheap",
            tiny={"encoder": "resnet18", "width": 8, "rates": (1, 2), "output_stride": 8, "pyramid_channels": 16},
            tiny_stride=4,
        ),
        "ddrnet": NetworkEntry(
            DDRNet,
            title="DDRNet",
            paper="Pan et al. 2022, arXiv:2101.06085",
            good_for="speed, large pictures",
            tiny={
                "width": 8,
                "blocks": (1, 1, 1, 1),
                "context_channels": 8,
                "head_channels": 16,
                "stem_stride": 2,
            },
            tiny_stride=4,
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
