"""3D convolutions whose gradients are right in bfloat16 on a CPU, where torch's own are not for the smallest images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """As torch's, but in float32 where its bfloat16 gradient would be wrong, see `is_wrong_in_bfloat16`."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_wrong_in_bfloat16(x, self.kernel_size):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def conv_class(spatial_dims: int) -> Any:
    """The convolution of 2D or 3D images."""
    return nn.Conv2d if spatial_dims == 2 else Conv3d


def convolve(x: Tensor, weight: Tensor, *, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """A convolution without bias by weights that were computed, with the same care."""
    if weight.dim() == 4:
        return F.conv2d(x, weight, stride=stride, padding=padding)
    if not is_wrong_in_bfloat16(x, weight.shape[2:]):
        return F.conv3d(x, weight, stride=stride, padding=padding)
    with torch.autocast("cpu", enabled=False):
        return F.conv3d(x.float(), weight.float(), stride=stride, padding=padding)


def is_wrong_in_bfloat16(x: Tensor, kernel_size: Sequence[int]) -> bool:
    """Whether autocast on a CPU would compute a wrong gradient for the weights.

    Where a kernel is longer than the image, oneDNN's bfloat16 code reads and writes beyond its buffers (seen with
    torch 2.13 on AVX-512: gradients that are arbitrary, infinite or differ from call to call, and broken heaps).
    Such images are a few voxels, at the bottom of a U, where float32 costs next to nothing.

    Args:
        x: (B, C, I, J, K).
        kernel_size: An entry an axis.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    return any(kernel > size for kernel, size in zip(kernel_size, x.shape[2:], strict=True))


def with_exact_convolutions(network: nn.Module) -> nn.Module:
    """A network of another library with its 3D convolutions replaced by ours; its weights keep their names."""
    for module in network.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = Conv3d
    return network
