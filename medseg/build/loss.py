"""From the workflow's list of losses to their sum."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from medseg.errors import WorkflowError
from medseg.labels import Labels
from medseg.losses import BESIDE_OVERLAP, LOSSES, Compound, DeepSupervision, Ramp
from medseg.registry import check_arguments
from medseg.workflow import LossTerm, Workflow
from medseg.workflow import Ramp as RampChoice

log = logging.getLogger("medseg")


def loss(workflow: Workflow, extra_weights: Sequence[float] = ()) -> nn.Module:
    """The weighted sum of the workflow's losses.

    Args:
        workflow: The workflow, its class weights in numbers.
        extra_weights: Of the network's outputs but the main one: those of deep supervision, or of auxiliary heads.

    Raises:
        WorkflowError: If one cannot be made.
    """
    terms, weights = [], []
    for n, term in enumerate(workflow.loss):
        with workflow.blamed("loss", n):
            kind = LOSSES[term.name]
            check_arguments(f"loss {term.name!r}", kind, term.args)
            try:
                terms.append(kind(**term.args))
            except (TypeError, ValueError) as error:
                raise WorkflowError("E-ARGUMENT", f"loss {term.name!r}: {error}") from None
        weights.append(_weight(term))
    summed = Compound(terms, weights)
    return DeepSupervision(summed, extra_weights) if extra_weights else summed


def check_loss(workflow: Workflow, labels: Labels) -> None:
    """Compute the loss of a few voxels, and warn of one that may not do what it is meant to.

    Raises:
        WorkflowError: If it cannot be made or computed.
    """
    made = loss(workflow)
    target, mask = labels.target(torch.zeros((1, 1, 2, 2, 2), dtype=torch.uint8))
    with workflow.blamed("loss"):
        try:
            made(torch.zeros((1, labels.num_outputs, 2, 2, 2)), target, mask)
        except (TypeError, ValueError, RuntimeError) as error:
            raise WorkflowError("E-ARGUMENT", f"cannot be computed for {labels.num_outputs} outputs: {error}") from None
    iterations = workflow.train.iterations
    for n, term in enumerate(workflow.loss):
        ramp = _weight(term)
        if isinstance(ramp, Ramp) and ramp.over > iterations:
            log.warning(
                "W-RAMP %s: goes from %g to %g over %d iterations, but only to %.3g in the %d of train.iterations",
                workflow.where("loss", n, "weight"), ramp.start, ramp.end, ramp.over, ramp.at(iterations), iterations,
            )  # fmt: skip
    names = [term.name for term in workflow.loss if term.ever_counts]
    if set(names) <= BESIDE_OVERLAP:
        log.warning(
            "W-LOSS %s: %s is meant to stand beside a loss of overlap; put one before it, as in loss: [dice, …]",
            workflow.where("loss"), " + ".join(names),
        )  # fmt: skip


def _weight(term: LossTerm) -> float | Ramp:
    weight = term.weight
    return Ramp(weight.start, weight.end, weight.over) if isinstance(weight, RampChoice) else weight
