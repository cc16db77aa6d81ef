"""Metrics by name, and names that stand for several."""

from __future__ import annotations

from collections.abc import Sequence

from medseg.errors import WorkflowError
from medseg.metrics import METRICS
from medseg.registry import did_you_mean

METRIC_GROUPS = {
    "overlap": ("dice", "iou", "precision", "recall", "specificity"),
    "surface": ("hd", "hd95", "assd", "nsd"),
    "volume": tuple(name for name in METRICS if "volume" in name),
    "lesion": tuple(name for name in METRICS if name.startswith("lesion")),
    "image": tuple(name for name, metric in METRICS.items() if metric.scope == "image"),
    "all": tuple(METRICS),
}


def chosen_metrics(names: Sequence[str]) -> list[str]:
    """The metrics that names of metrics and of `METRIC_GROUPS` mean, each once.

    Raises:
        WorkflowError: If a name is unknown, or there is none.
    """
    chosen = list(dict.fromkeys(metric for name in names for metric in METRIC_GROUPS.get(name, (name,))))
    for name in chosen:
        base = name.partition(":")[0]
        if base not in METRICS:
            hint = did_you_mean(base, [*METRICS, *METRIC_GROUPS])
            raise WorkflowError("E-UNKNOWN-NAME", f"no metric is called {name!r}{hint}", where="--metrics")
        METRICS[name]  # which knows whether it takes a number
    if not chosen:
        raise WorkflowError("E-METRICS", "names no metric; see `medseg metrics`", where="--metrics")
    return chosen


def groups_text() -> str:
    """A line for each group."""
    return "\n".join(f"{group}: {', '.join(members)}" for group, members in METRIC_GROUPS.items() if group != "all")


def groups_of(name: str) -> list[str]:
    """The groups that a metric belongs to."""
    return [group for group, members in METRIC_GROUPS.items() if name in members]


def asks_for_lesions(names: Sequence[str]) -> bool:
    """Whether any of these metrics looks at lesions one by one."""
    return any(name.startswith("lesion") for name in names)
