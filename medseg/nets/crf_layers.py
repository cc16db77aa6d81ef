"""Networks whose last layer is a random field, trained with them: CRF-as-RNN and the deep parsing network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medseg.nets.blocks import Layers
from medseg.nets.crf import CRF, Messages, full_precision, mean_field
from medseg.nets.network import SegmentationNetwork
from medseg.registry import check_arguments

GIVEN = ("spatial_dims", "in_channels", "out_channels", "deep_supervision")
"""What the network inside is passed as its surroundings are."""


class WithRandomField(SegmentationNetwork):
    """A network, and a random field that its logits go through. A subclass says which, in `field`.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        network: The network: ``name``, and ``args`` where the defaults are not wanted.
        spacing_mm: Voxel size that distances are measured with.
        regions: Whether the outputs are regions, which may overlap.
        deep_supervision: The network's own; the field takes its main output alone.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        network: Mapping[str, Any],
        spacing_mm: Sequence[float] | None,
        regions: bool,
        deep_supervision: bool,
    ) -> None:
        made = _network(network, spatial_dims, in_channels, out_channels, deep_supervision=deep_supervision)
        super().__init__(made.sizes, extra_weights=made.extra_weights)
        self.network = made
        self.regions = regions
        self.spacing_mm = tuple(spacing_mm or [1.0] * spatial_dims)
        if len(self.spacing_mm) != spatial_dims or min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm is {list(self.spacing_mm)}; give {spatial_dims} numbers above 0")

    @property
    def encoder(self) -> nn.Module | None:
        """What published weights are for."""
        return getattr(self.network, "encoder", None)

    @abstractmethod
    def field(self, logits: Tensor, image: Tensor) -> Tensor:
        """Logits after the field, both (B, R, I, J[, K])."""

    def outputs(self, x: Tensor) -> list[Tensor]:
        main, *others = self.network.outputs(x)
        with full_precision(x.device):
            exact = main.double() if main.dtype == torch.float64 else main.float()
            return [self.field(exact, x.to(exact.dtype)), *others]


class CRFAsRNN(WithRandomField):
    """CRF-as-RNN: a fully connected CRF's mean-field steps as the last layer, trained together with the network.

    The weights of both kernels, one for each label, and what each pair of labels costs beside each other are learned, the
    kernels' widths are given. The network inside then need not draw edges itself, where the image shows them.

    Takes the sizes that the network inside takes. With the U-Net inside 16,544,138 parameters in 3D and 5,685,066 in 2D
    (one channel in, two out): the network's own, and 8. Each step costs as much as a convolution of one channel that has
    as many weights as there are neighbors.

    Departs from the paper: the appearance kernel has a window, not all pairs; any network, ``{name: fcn}`` being the
    paper's, and no weights from an earlier training without the CRF.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        network: The network: ``name``, and ``args`` where the defaults are not wanted.
        crf: Kernels and first weights, as of the post-processing of that name; distances are in voxels where `spacing_mm`
            says nothing else. By default windows of at most 26 neighbors in 3D and 20 in 2D.
        spacing_mm: Voxel size that distances are measured with.
        train_iterations: Mean-field steps in training.
        iterations: Mean-field steps at prediction.
        regions: Whether the outputs are regions, which may overlap.
        deep_supervision: The network's own; the CRF takes its main output alone.

    Reference:
        Zheng et al. 2015, arXiv:1502.03240.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        network: Mapping[str, Any] = {"name": "unet"},
        crf: Mapping[str, Any] = {},
        spacing_mm: Sequence[float] | None = None,
        train_iterations: int = 5,
        iterations: int = 10,
        regions: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(
            spatial_dims, in_channels, out_channels,
            network=network, spacing_mm=spacing_mm, regions=regions, deep_supervision=deep_supervision,
        )  # fmt: skip
        if min(train_iterations, iterations) < 1:
            raise ValueError(f"{train_iterations} and {iterations} iterations; there must be at least 1")
        self.train_iterations, self.iterations = train_iterations, iterations
        self.crf = _windowed(crf, spatial_dims, given=("iterations",))
        self.crf.check(num_channels=in_channels, num_labels=out_channels, regions=regions)
        first = torch.tensor([self.crf.appearance_weight, self.crf.smoothness_weight])
        self.kernel_weights = nn.Parameter(first[:, None].repeat(1, out_channels))
        potts = -torch.eye(out_channels) if regions else 1 - torch.eye(out_channels)
        costs = self.crf.compatibility
        self.compatibility = nn.Parameter(potts if costs is None else torch.tensor(costs, dtype=torch.float32))

    def field(self, logits: Tensor, image: Tensor) -> Tensor:
        return mean_field(
            logits,
            Messages(self.crf, image, self.spacing_mm),
            self.kernel_weights,
            iterations=self.train_iterations if self.training else self.iterations,
            compatibility=self.compatibility,
            regions=self.regions,
        )


class DeepParsingNetwork(WithRandomField):
    """The deep parsing network: a Markov random field solved in one step, of layers that a network has anyway.

    Probabilities are spread to voxels that look alike (local convolution, the triple penalty); convolutions over all labels'
    maps then learn in which surroundings a label is unlikely, several kinds for each label, and the mildest penalty counts
    (block-min pooling): where CRFs only smooth, these learn that a tumor lies in a liver.

    Takes the sizes that the network inside takes. With the U-Net inside 16,546,645 parameters in 3D and 5,686,693 in 2D
    (one channel in, two out).

    Departs from the paper: any network, not VGG16, says what each voxel would be alone; the local convolution's filters are
    Gaussians of distance in space and color at every place, as the paper's at the start of training, and stay so, as
    filters learned for each place fit one image size only; all is trained at once, not layer by layer.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the image.
        out_channels: Classes or regions.
        network: The network: ``name``, and ``args`` where the defaults are not wanted.
        crf: The local convolution's ``theta_alpha_mm, theta_beta, cutoff, neighbors``, as of CRF-as-RNN.
        spacing_mm: Voxel size that distances are measured with.
        context_size: Of the label-context convolution's kernels; None: 9 in 2D, as the paper's, and 5 in 3D.
        contexts: Kinds of surroundings that are learned for each label.
        regions: Whether the outputs are regions, which may overlap.
        deep_supervision: The network's own; the field takes its main output alone.

    Reference:
        Liu et al. 2015, arXiv:1509.02634.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        network: Mapping[str, Any] = {"name": "unet"},
        crf: Mapping[str, Any] = {},
        spacing_mm: Sequence[float] | None = None,
        context_size: int | None = None,
        contexts: int = 5,
        regions: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(
            spatial_dims, in_channels, out_channels,
            network=network, spacing_mm=spacing_mm, regions=regions, deep_supervision=deep_supervision,
        )  # fmt: skip
        if contexts < 1:
            raise ValueError(f"contexts is {contexts}; there must be at least 1")
        fixed = (
            "iterations",
            "appearance_weight",
            "smoothness_weight",
            "theta_gamma_mm",
            "compatibility",
            "normalization",
        )
        self.crf = _windowed(crf, spatial_dims, given=fixed)
        self.crf.check(num_channels=in_channels, num_labels=out_channels, regions=regions)
        self.contexts = contexts
        size = context_size or (9 if spatial_dims == 2 else 5)
        self.context = Layers(spatial_dims).conv(out_channels, out_channels * contexts, kernel_size=size)
        self.strength = nn.Parameter(torch.ones(contexts))
        _start_even(self.context)

    def field(self, logits: Tensor, image: Tensor) -> Tensor:
        belief = logits.sigmoid() if self.regions else logits.softmax(dim=1)
        local, _ = Messages(self.crf, image, self.spacing_mm).filters
        penalties = self.context(belief + local(belief)).sigmoid()  # (B, R × contexts, I, J[, K])
        blocks = penalties.unflatten(1, (-1, self.contexts)).movedim(2, -1) * self.strength
        return logits - blocks.amin(dim=-1)


def _windowed(args: Mapping[str, Any], spatial_dims: int, given: Sequence[str]) -> CRF:
    """A CRF that costs about as much as a layer."""
    check_arguments("crf", CRF, args, given)
    return CRF(**{"connections": "window", "neighbors": 26 if spatial_dims == 3 else 20, **args})


def _network(
    choice: Mapping[str, Any], spatial_dims: int, in_channels: int, out_channels: int, *, deep_supervision: bool
) -> SegmentationNetwork:
    """The network inside.

    Raises:
        WorkflowError: If there is none of that name, or it does not take the arguments.
        ValueError: If something else is said of it, or it has no padding or no deep supervision.
    """
    from medseg.nets import NETS  # which holds the networks of this file

    if set(choice) - {"name", "args"} or "name" not in choice:
        raise ValueError(f"network is {dict(choice)}; give its name, and args where the defaults are not wanted")
    name, args = choice["name"], choice.get("args") or {}
    entry = NETS[name]
    check_arguments(f"network {name!r}", entry.network, args, GIVEN)
    own = {"deep_supervision": True} if deep_supervision else {}
    try:
        made = entry.network(spatial_dims, in_channels, out_channels, **args, **own)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
    if any(axis.margin for axis in made.sizes):
        raise ValueError(f"{name}: unpadded convolutions give less than the image; use padding: same")
    return made


def _start_even(context: nn.Module) -> None:
    """Kernels that say nothing of labels which are everywhere alike, or one of a block would be the mildest everywhere."""
    weight, bias = context.weight, context.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    with torch.no_grad():
        nn.init.normal_(weight, std=1 / weight[0].numel() ** 0.5)
        weight -= weight.mean(dim=tuple(range(2, weight.dim())), keepdim=True)
        nn.init.zeros_(bias)
