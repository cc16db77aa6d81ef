"""A 2D network on volumes, slice by slice."""

from __future__ import annotations

from torch import Tensor, nn

from medseg.nets.network import SegmentationNetwork


class OnSlices(nn.Module):
    """Wraps a 2D network so that it takes and gives volumes one slice thick.

    A slice's neighbours on either side become channels of the 2D input: all slices of the first image
    channel, then those of the second.

    Args:
        network: 2D, made for C × (1 + 2 × context_slices) channels.
        slice_axis: Spatial axis the slices are cut along: 0, 1 or 2.
        context_slices: Neighbours on either side.
    """

    def __init__(self, network: SegmentationNetwork, slice_axis: int = 2, context_slices: int = 0) -> None:
        super().__init__()
        self.network = network
        self.slice_axis = slice_axis
        self.context_slices = context_slices

    @property
    def extra_weights(self) -> tuple[float, ...]:
        """Loss weights of the outputs beyond the main one."""
        return self.network.extra_weights

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of the middle slice.

        Args:
            x: (B, C, I, J, S), with the S = 1 + 2 × context_slices slices at `slice_axis`.

        Returns:
            (B, R, I, J, 1) with the single slice at `slice_axis`; a list where the network gives one.
        """
        axis = self.slice_axis + 2
        found, expected = x.shape[axis], 1 + 2 * self.context_slices
        if found != expected:
            raise ValueError(f"{found} slices along axis {self.slice_axis} of {tuple(x.shape)}; expected {expected}")
        result = self.network(x.movedim(axis, 2).flatten(1, 2))  # (B, C S, I, J)
        if isinstance(result, Tensor):
            return result.unsqueeze(axis)
        return [output.unsqueeze(axis) for output in result]
