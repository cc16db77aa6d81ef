"""Published weights of encoders: read, renamed, and fitted to other channels and to 3D."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medseg.errors import WorkflowError
from medseg.nets.encoders.encoder import Encoder
from medseg.wording import listed

log = logging.getLogger("medseg")

Inflation = Literal["center", "spread"]

LISTED = 8
"""Names of one kind that a message lists before it counts the rest."""


def encoder_of(network: nn.Module) -> Encoder:
    """The part of a network that published weights are for.

    Raises:
        WorkflowError: If it has none.
    """
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, Encoder):
        raise WorkflowError(
            "E-ENCODER-WEIGHTS",
            f"{type(network).__name__} has no encoder that weights are published for; remove encoder_weights",
        )
    return encoder


def load_encoder_weights(encoder: Encoder, path: Path, *, inflation: Inflation = "center") -> None:
    """Start an encoder from published weights; one on the meta device only sees that they fit.

    Arguments and errors as `encoder_weights`.
    """
    found = encoder_weights(encoder, path, inflation=inflation)
    if any(parameter.is_meta for parameter in encoder.parameters()):
        return
    encoder.load_state_dict({**encoder.state_dict(), **found})
    if random := {name for name, _ in encoder.named_parameters()} - found.keys():
        log.warning(
            "W-ENCODER-WEIGHTS %s: has nothing that fits %s, which start random", path, listed(sorted(random), LISTED)
        )


def encoder_weights(encoder: Encoder, path: Path, *, inflation: Inflation = "center") -> dict[str, Tensor]:
    """What a file of published 2D weights gives an encoder, in 2D or 3D.

    The file's rows and columns become our second and first axis, as those of a picture do. Its first
    convolution is fitted to the encoder's channels, see `adapt_channels`; kernels to 3D, see `inflate`; and
    linear layers to the convolutions that they equal. All of the encoder must be in the file, and all of
    the file in the encoder, but for what `Encoder.unused` names.

    Args:
        encoder: May be on the meta device, to check a file.
        path: ``.pth``, ``.pt``, ``.bin`` or ``.safetensors``.
        inflation: How kernels become 3D.

    Returns:
        Weights for `encoder.load_state_dict`, together with those it has.

    Raises:
        WorkflowError: If the file cannot be read, or with all names that do not fit.
    """
    published = {_renamed(name, encoder.published): tensor for name, tensor in read_weights(path).items()}
    published = encoder.fitted(published)
    own = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    first = next((name for name, shape in own.items() if len(shape) > 3), None)  # the convolution that sees the image

    fitted = {
        name: _fitted(tensor, own[name], own[name][1] if name == first else None, inflation)
        for name, tensor in published.items()
        if name in own
    }
    wrong = {name for name, tensor in fitted.items() if tuple(tensor.shape) != own[name]}
    # Files of 2017 do not count batches yet.
    missing = {name for name in own.keys() - published.keys() if not name.endswith("num_batches_tracked")}
    unexpected = {name for name in published.keys() - own.keys() if not name.startswith(tuple(encoder.unused))}
    for prefix in encoder.unused:
        part = {name for name in own if name.startswith(prefix)}
        if part & (wrong | missing):  # all of a classifier or nothing
            wrong, missing = wrong - part, missing - part
            fitted = {name: tensor for name, tensor in fitted.items() if name not in part}
    if not published.keys() & own.keys():
        theirs, ours = (listed(sorted(names), 2) for names in (published, own))
        raise WorkflowError(
            "E-ENCODER-WEIGHTS",
            f"is of another architecture: it holds {theirs}, where this {type(encoder).__name__} has {ours}",
            where=str(path),
        )
    if wrong or missing or unexpected:
        shapes = [f"{name} {tuple(published[name].shape)} → {own[name]}" for name in wrong]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        differing = "; ".join(f"{kind}: {listed(sorted(names), LISTED)}" for kind, names in kinds.items() if names)
        raise WorkflowError(
            "E-ENCODER-WEIGHTS",
            f"the weights in it are not those of this {type(encoder).__name__}; {differing}; {_remedy(published, own)}",
            where=str(path),
        )
    return fitted


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; nothing in it is run.

    Raises:
        WorkflowError: If there is no such file, it is damaged, or it holds anything but tensors.
    """
    if not path.is_file():
        message = "is no file; download the weights first (a relative path counts from the workflow's folder)"
        raise WorkflowError("E-ENCODER-WEIGHTS", message, where=str(path))
    try:
        content = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # of a damaged file, torch raises almost anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WorkflowError(
            "E-ENCODER-WEIGHTS",
            f"cannot be read ({reason}); it is damaged, or holds more than tensors, which could run code and is not "
            "loaded; download it again, the plain state dict, best as .safetensors",
            where=str(path),
        ) from None
    weights = _unwrapped(content)
    if not weights or not all(isinstance(name, str) and isinstance(weights[name], Tensor) for name in weights):
        raise WorkflowError(
            "E-ENCODER-WEIGHTS", "holds no state dict, a table of tensors by name; save one", where=str(path)
        )
    damaged = [name for name, value in weights.items() if not value.isfinite().all()]
    if damaged:
        raise WorkflowError(
            "E-ENCODER-WEIGHTS",
            f"NaN or infinite in {listed(sorted(damaged), LISTED)}; download it again",
            where=str(path),
        )
    return {name.removeprefix("module."): value for name, value in weights.items()}


def adapt_channels(kernel: Tensor, in_channels: int) -> Tensor:
    """Fit a first convolution to another number of image channels.

    Its channels are repeated in turn, scaled to keep their sum on average, and then shifted evenly so that
    they keep it exactly: an image whose channels are all equal gives the response that it gave before. One
    channel gets the sum of all.

    Args:
        kernel: (O, C, …).
        in_channels: Of the image.

    Returns:
        (O, in_channels, …).
    """
    had = kernel.shape[1]
    if had == in_channels:
        return kernel
    repeated = kernel[:, [n % had for n in range(in_channels)]] * (had / in_channels)
    lost = kernel.sum(dim=1, keepdim=True) - repeated.sum(dim=1, keepdim=True)
    return repeated + lost / in_channels


def inflate(kernel: Tensor, depth: int, *, inflation: Inflation = "center") -> Tensor:
    """A 2D kernel as a 3D one that computes the same on a stack of equal slices.

    Args:
        kernel: (O, C, I, J).
        depth: Of the new kernel, along its third axis.
        inflation: ``center`` puts the kernel in the middle, with zeros around it: each slice first gives what
            it gives in 2D. ``spread`` shares it out evenly: the mean of the slices; near the ends of the
            volume, where zeros are padded, less. An even depth has no middle and is always spread.

    Returns:
        (O, C, I, J, depth).
    """
    if inflation == "spread" or depth % 2 == 0:
        return (kernel / depth)[..., None].expand(*kernel.shape, depth).contiguous()
    inflated = kernel.new_zeros(*kernel.shape, depth)
    inflated[..., depth // 2] = kernel
    return inflated


def _fitted(tensor: Tensor, shape: Sequence[int], in_channels: int | None, inflation: Inflation) -> Tensor:
    """One published tensor, brought as close to a shape as it can be."""
    if tensor.dim() == 2 and len(shape) > 3 and tensor.numel() == math.prod(shape[:4]):
        tensor = tensor.reshape(*shape[:2], shape[3], shape[2])
    if tensor.dim() == 4:
        tensor = tensor.float().transpose(2, 3)  # (O, C, rows, columns) → (O, C, I, J)
        if in_channels is not None:
            tensor = adapt_channels(tensor, in_channels)
        if len(shape) == 5:
            tensor = inflate(tensor, shape[4], inflation=inflation)
    return tensor


def _unwrapped(content: Any) -> Mapping[str, Any]:
    """The state dict within what was saved, where its authors saved more than that."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return content if isinstance(content, Mapping) else {}


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for published, ours in prefixes.items():
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return name


def _remedy(published: Mapping[str, Tensor], own: Mapping[str, Sequence[int]]) -> str:
    with_batch_norm, is_batch_norm = (
        any(name.endswith("running_mean") for name in names) for names in (published, own)
    )
    widths = Counter(tensor.shape[0] for tensor in published.values() if tensor.dim() > 2)
    if not widths - Counter(shape[0] for shape in own.values() if len(shape) > 2):  # the same but for the norm
        if with_batch_norm and not is_batch_norm:
            return "the file is of a network with batch norm: set norm to batch"
        if is_batch_norm and not with_batch_norm:
            return "the file is of a network without batch norm: set norm to none, or take the file with it"
    return "choose the file of this network, or the arguments (encoder, layers, channels, norm) of the network it is of"
