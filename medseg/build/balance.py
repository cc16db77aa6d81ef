"""What ``class_weights: balanced`` of a loss means in numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from medseg.data.dataset import CachedCase
from medseg.labels import Labels
from medseg.workflow import Workflow

BALANCED = "balanced"


def balanced_weights(cases: Iterable[CachedCase], labels: Labels) -> tuple[float, ...]:
    """For each output the inverse of its frequency, brought to a mean of 1 over the voxels.

    Output c weighs N / (C · n_c): n_c are its voxels in all whole label maps on the preprocessed grid, ignored ones
    left out, C is the number of outputs that have any, N the sum of n_c. So every class has the same share in a
    weighted loss of patches drawn anywhere; train.foreground_ratio draws small organs oftener on top of that. It is
    scikit-learn's rule. Of regions, n_c are the voxels of the labels they unite. An output without voxels weighs 0.

    Args:
        cases: Those to learn from.
        labels: What their label maps mean.

    Returns:
        One weight an output, in their order, to six digits.
    """
    united = tuple(labels.regions.values()) or tuple((value,) for value in sorted(labels.names))
    totals = [0] * len(united)
    for case in cases:
        counts = case.description["voxels"]
        for n, values in enumerate(united):
            totals[n] += sum(counts.get(str(value), 0) for value in values)
    present = sum(total > 0 for total in totals)
    return tuple(float(f"{sum(totals) / (present * total):.6g}") if total else 0.0 for total in totals)


def weights_told(weights: Sequence[float], labels: Labels) -> str:
    """A line that names each output's weight."""
    names = tuple(labels.regions) or tuple(labels.names[value] for value in sorted(labels.names))
    listed = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(names, weights, strict=True))
    return f"class_weights: balanced means {listed}"


def with_class_weights(workflow: Workflow, weights: Sequence[float]) -> Workflow:
    """The workflow with numbers where a loss says ``class_weights: balanced``."""
    terms = tuple(
        term.model_copy(update={"args": {**term.args, "class_weights": list(weights)}})
        if term.args.get("class_weights") == BALANCED
        else term
        for term in workflow.loss
    )
    return workflow.model_copy(update={"loss": terms})
