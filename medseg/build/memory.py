"""What a training step must hold in memory, told before it is tried: a system short of memory just kills."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from medseg.build.model import Hardware
from medseg.errors import WorkflowError
from medseg.workflow import Workflow

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container or a Slurm job
_GB = 1e9


def check_step_fits(workflow: Workflow, net: nn.Module, channels: int, hardware: Hardware) -> None:
    """Refuse a patch and a batch that the device cannot hold, whatever else is done.

    Args:
        workflow: The workflow.
        net: Its network, on the meta device.
        channels: Of the image.
        hardware: What it is to train on.

    Raises:
        WorkflowError: If what the backward pass needs alone is more than the device has.
    """
    options = workflow.train
    patch = list(options.patch_size)
    if len(patch) == 2:
        patch.insert(workflow.data.slice_axis, 1 + 2 * workflow.data.context_slices)
    held = held_for_backward(net, torch.empty((options.batch_size, channels, *patch), device="meta"))
    if options.precision != "fp32":
        held //= 2  # at best: all of it in bf16
    room = device_memory(hardware)
    if held > room:
        raise WorkflowError(
            "E-MEMORY",
            f"a batch of {options.batch_size} patches of {' × '.join(map(str, options.patch_size))} needs at least "
            f"{held / _GB:.0f} GB, and this {'GPU' if hardware.accelerator == 'cuda' else 'machine'} has "
            f"{room / _GB:.0f} GB; use smaller patches or batches (train.accumulate makes up for these)",
            where=workflow.where("train", "patch_size"),
        )


def held_for_backward(net: nn.Module, image: Tensor) -> int:
    """Bytes that autograd keeps from a forward pass in training, without the weights.

    Args:
        net: Any network; on the meta device nothing is computed.
        image: On the same device.
    """
    weights = {weight.untyped_storage()._cdata for weight in net.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes(), tensor  # with the tensor, lest another takes its place
        return tensor

    was_training = net.training
    net.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = net(image)  # its outputs hold the graph
    del held
    net.train(was_training)
    return sum(size for size, _ in kept.values())


def device_memory(hardware: Hardware) -> int:
    """Bytes of the GPU, or of this machine as far as a container or a job may use it."""
    if hardware.accelerator == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical
