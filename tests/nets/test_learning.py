"""Every network learns four small pictures and two small phantoms by heart: what does not is broken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medseg.losses import LOSSES
from medseg.nets import NETS

pytestmark = pytest.mark.slow

MAX_STEPS = 400
LOOK_EVERY = 20
ALL = [pytest.param(name, dims, id=f"{name}-{dims}d") for name, entry in NETS.items() for dims in entry.spatial_dims]


def scans(dims: int) -> tuple[Tensor, Tensor]:
    """Ellipsoids that span more than half of each side, bright in noise, one of two classes inside the other."""
    rng = np.random.default_rng(0)
    side, number = (64, 4) if dims == 2 else (32, 2)
    axes = np.meshgrid(*[np.arange(side)] * dims, indexing="ij")
    images, labels = [], []
    for _ in range(number):
        center, radii = rng.uniform(0.45, 0.55, dims) * side, rng.uniform(0.3, 0.42, dims) * side
        distance = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, center, radii, strict=True))
        label = (distance < 1).astype(np.int64) + (distance < 0.35)
        images.append((label + rng.normal(0, 0.3, label.shape))[None])
        labels.append(label)
    return torch.from_numpy(np.stack(images)).float(), torch.from_numpy(np.stack(labels))


def dice(found: Tensor, truth: Tensor) -> float:
    """The lower one of the two classes."""
    return min(
        float(2 * ((found == n) & (truth == n)).sum() / ((found == n).sum() + (truth == n).sum())) for n in (1, 2)
    )


def goal(truth: Tensor, stride: int) -> float:
    """0.95, or what logits of a coarser grid can reach."""
    classes = F.one_hot(truth, 3).movedim(-1, 1).float()
    pool, mode = (F.avg_pool2d, "bilinear") if truth.ndim == 3 else (F.avg_pool3d, "trilinear")
    coarse = F.interpolate(pool(classes, stride), size=truth.shape[1:], mode=mode)
    return min(0.95, dice(coarse.argmax(1), truth) - 0.03)


@pytest.mark.parametrize(("name", "dims"), ALL)
def test_it_learns_a_few_scans_by_heart(name: str, dims: int, record_property) -> None:
    torch.manual_seed(0)
    image, truth = scans(dims)
    network = NETS[name].network(dims, 1, 3, **NETS[name].tiny)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = [LOSSES["cross_entropy"](), LOSSES["dice"]()]
    wanted = goal(truth, NETS[name].tiny_stride)
    reached = []
    for step in range(1, MAX_STEPS + 1):
        logits = network.train()(image)
        sum(loss(logits, truth) for loss in losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % LOOK_EVERY == 0:
            with torch.inference_mode():
                reached.append(dice(network.eval()(image).argmax(1), truth))
            if reached[-1] >= wanted:
                record_property("steps", step)
                record_property("dice", round(reached[-1], 3))
                return
    pytest.fail(f"Dice {max(reached):.3f} after {MAX_STEPS} steps, wanted {wanted:.3f}; every {LOOK_EVERY}: {reached}")
