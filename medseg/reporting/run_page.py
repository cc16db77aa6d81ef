"""The page of a run: how good it is, where it fails, what that looks like, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from medseg.data.manifest import Case
from medseg.files import write_atomically
from medseg.geometry import Volume
from medseg.labels import Labels
from medseg.metrics import METRICS
from medseg.metrics.paired import is_distance, sign_of
from medseg.metrics.statistics import mean_of_known
from medseg.metrics.table import MetricSummary, score_case, summarize
from medseg.model import Preprocessing
from medseg.reporting.figures import curves_figure, organs_figure
from medseg.reporting.page import asset, definitions, figure_svg, html_page, section
from medseg.reporting.pictures import (
    Missing,
    drawn,
    labels_of,
    load_scenes,
    missing_notice,
    picture_anchors,
    pictures_section,
)
from medseg.reporting.run import Result, Run, read_run
from medseg.reporting.scene import Scene
from medseg.reporting.tables import Row, cases_table, number, rank_cases, values_of
from medseg.reporting.viewer import Shown, inline_script, shown, viewer_section
from medseg.reporting.words import digits_for, is_score, plain_words, short_name
from medseg.wording import counted, duration

NUM_WORST = 5
MAX_TILES = 6
SAME_DICE = 0.001
"""Differences below this are rounding."""

LIMITS = (
    "For research only: not a medical device, and no ground for a decision about a patient. The numbers hold for scans "
    "like those of this data set; other scanners, protocols and patients need a test of their own. What the expert "
    "drew is taken for the truth here, and experts differ among themselves."
)


def write_run_page(
    folder: Path,
    output: Path,
    result: Result,
    *,
    scans: Mapping[str, Case] | None = None,
    labels: Labels | None = None,
    preprocessing: Preprocessing | None = None,
) -> dict[str, int]:
    """Make the page of a run folder.

    Args:
        folder: See `medseg.reporting.run.read_run`, as for all but the output.
        output: The file to write.
        result: What `medseg train` said at its end; empty: that is not known.
        scans: Of an evaluation: by case the scans, where it does not know them itself.
        labels: Of an evaluation: what the values mean.
        preprocessing: Of an evaluation: says how to read the scans.

    Returns:
        ``cases``, ``pictures`` and ``viewer_cases``: how many of each are in it.

    Raises:
        DataError: If the folder holds no table.
    """
    run = read_run(folder, result, scans=scans, labels=labels, preprocessing=preprocessing)
    metrics = metrics_of(run)
    rows = rank_cases(run.scores, metrics[0])
    scenes, missing = _scenes(run, rows)
    labels = run.labels or labels_of(scenes.values())
    in_viewer = _in_viewer(rows, scenes, labels, metrics[0])
    parts = [
        _opening(run, rows, metrics[0]),
        _reading(metrics),
        _spread(rows, metrics),
        _progress(run),
        viewer_section(in_viewer, labels),
        _pictures(run, rows, scenes, missing, labels, metrics[0]),
        section(
            "Every case, worst first",
            cases_table(rows, metrics, picture_anchors(scenes)),
            explanation="A click on a heading sorts by it."
            + " A linked case is pictured above." * bool(scenes)
            + " A missed organ without a value ranks as the worst that can be."
            * _misses_without_value(rows, metrics[0]),
        ),
        _provenance(run),
        f"<footer><p>{LIMITS}</p></footer>",
        f"<script>{inline_script(asset('page.js'))}</script>",
    ]
    page = html_page(f"{run.name}: report", "\n".join(part for part in parts if part))
    write_atomically(output, page.encode())
    return {"cases": len(rows), "pictures": len(scenes), "viewer_cases": len(in_viewer)}


def metrics_of(run: Run) -> list[str]:
    """The metrics of a run's table, the one that ranks its cases first: Dice, or else one that has better and worse."""
    names = list(dict.fromkeys(metric for score in run.scores for metric in score.values))
    return sorted(names, key=lambda name: (name != "dice", not _is_ranked(name)))


def _is_ranked(metric: str) -> bool:
    return metric not in METRICS or METRICS[metric].is_ranked


def _opening(run: Run, rows: Sequence[Row], metric: str) -> str:
    summary = {organ: found[metric] for organ, found in summarize(run.scores).items() if metric in found}
    missed = sum(score.is_missed for score in run.scores)
    spurious = sum(score.is_spurious for score in run.scores)
    means = {organ: found["mean"] for organ, found in summary.items() if not math.isnan(found["mean"])}
    digits = digits_for(metric, list(means.values()))
    if run.trainings:
        folds = f", in {len(run.trainings)} folds, each scored by the network that had not seen it"
        what = f"that the network had not seen in training {_were(rows)} segmented and held to what an expert drew"
        lede = f"{counted(len(rows), 'scan')} {what}{folds * (len(run.trainings) > 1)}."
    else:
        lede = f"{counted(len(rows), 'segmentation')} {_were(rows)} held to what an expert drew."
    if means:
        mean = number(float(mean_of_known(list(means.values()))), digits)
        lede += f" The mean {escape(short_name(metric))} is <b>{mean}</b>"
        lede += f", from {_extremes(means, digits)}." if len(means) > 1 else "."
    else:
        lede += f" None of them has a value of {escape(short_name(metric))}; the table’s notes say why."
    lede += f" {_found(missed, spurious, 'The network' if run.trainings else 'The prediction')}"
    tiles = "".join(_tile(organ, found, metric, digits) for organ, found in _tiled(summary, metric))
    return (
        f'<header><p class="eyebrow">medseg report · for research only</p><h1>{escape(run.name)}</h1>'
        f'<p class="lede">{lede}</p>{_not_scored(run)}<dl class="tiles">{tiles}</dl></header>'
    )


def _were(rows: Sequence[Row]) -> str:
    return "was" if len(rows) == 1 else "were"


def _not_scored(run: Run) -> str:
    """What an evaluation left out, of which its numbers say nothing."""
    failed = [f"{entry['case']} ({entry['error_id']})" for entry in run.result.get("failed") or ()]
    alone = list((run.result.get("unmatched") or {}).get("references") or ())
    told = [
        f"{len(cases)} {what}: {escape(', '.join(cases))}."
        for what, cases in (("could not be scored", failed), ("had a reference and no segmentation", alone))
        if cases
    ]
    return f'<p class="notice">Not in these numbers: {" ".join(told)}</p>' if told else ""


def _extremes(means: Mapping[str, float], digits: int) -> str:
    low, high = min(means, key=lambda o: means[o]), max(means, key=lambda o: means[o])
    return f"{number(means[low], digits)} ({escape(low)}) to {number(means[high], digits)} ({escape(high)})"


def _found(missed: int, spurious: int, who: str) -> str:
    """How often something was not found, or found where nothing is."""
    if not missed and not spurious:
        return "No organ was missed, and none was drawn where there is none."
    parts = [f"missed an organ altogether {_times(missed)}"] if missed else []
    parts += [f"drew {'one' if missed else 'an organ'} that is not there {_times(spurious)}"] if spurious else []
    return f"{who} <b>{' and '.join(parts)}</b>; the table says where."


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _misses_without_value(rows: Sequence[Row], metric: str) -> bool:
    scores = [score for row in rows for score in row.organs.values()]
    return any(score.is_missed and math.isnan(score.values.get(metric, 0.0)) for score in scores)


def _tiled(summary: Mapping[str, MetricSummary], metric: str) -> list[tuple[str, MetricSummary]]:
    """All organs, or the worst of them if they are many."""
    known = [(organ, found) for organ, found in summary.items() if not math.isnan(found["mean"])]
    if len(known) <= MAX_TILES:
        return known
    return sorted(known, key=lambda entry: sign_of(metric) * entry[1]["mean"])[:MAX_TILES]


def _tile(organ: str, found: MetricSummary, metric: str, digits: int) -> str:
    low, high = found["ci95"]
    interval = f"95 % interval {number(low, digits)} to {number(high, digits)}<br>" if found["n"] > 1 else ""
    cases = counted(found["n"], "case")
    missed = f", missed in {found['n_missed']}" if found["n_missed"] else ""
    return (
        f'<div class="tile"><dt>{escape(organ)}</dt><dd><div class="number">{number(found["mean"], digits)}</div>'
        f'<div class="detail">mean {escape(short_name(metric))}, median {number(found["median"], digits)}<br>'
        f"{interval}{cases}{missed}</div></dd></div>"
    )


def _reading(metrics: Sequence[str]) -> str:
    told = {short_name(metric): plain_words(metric) for metric in metrics}
    told["interval"] = "Where the mean would lie if other patients of the same kind had been chosen."
    return section("How to read the numbers", definitions(told))


def _spread(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """A figure for each metric but IoU beside Dice, which it follows from."""
    shown = [metric for metric in metrics if metric != "iou" or "dice" not in metrics]
    organs = list(dict.fromkeys(organ for row in rows for organ in row.organs))
    figures, is_left_out = [], False
    for metric in shown:
        values = {organ: values_of(rows, organ, metric) for organ in organs}
        if not any(map(math.isfinite, (value for found in values.values() for value in found))):
            continue
        is_left_out |= is_distance(metric) and _misses_without_value(rows, metric)
        dots = {
            organ: [(row.anchor, value) for row, value in zip(rows, values[organ], strict=True)] for organ in organs
        }
        limits = (-0.02, 1.02) if is_score(metric) else None
        figure = organs_figure(dots, across=short_name(metric), limits=limits)
        figures.append(
            _figure(figure_svg(figure, f"{short_name(metric)} of each organ: a box, and a dot for each case"))
        )
    if not figures:
        return ""
    explanation = (
        "Each dot is a case, and leads to its row in the table. The box holds the middle half of the cases, the line in "
        "it is the median."
    )
    explanation += " A missed organ has no distance: it is not among the dots of a distance." * is_left_out
    return section("Organ by organ", "\n".join(figures), explanation=explanation)


def _progress(run: Run) -> str:
    losses = [training.losses for training in run.trainings if training.losses]
    organs = list(dict.fromkeys(organ for training in run.trainings for organ in training.dice))
    dice = {organ: [t.dice[organ] for t in run.trainings if organ in t.dice] for organ in organs}
    figures = []
    if losses:
        figure = curves_figure({"loss": losses}, across="iteration", up="training loss", limits=None)
        figures.append(_figure(figure_svg(figure, "Training loss over iterations")))
    if dice:
        figure = curves_figure(dice, across="iteration", up="Dice on held-out cases", limits=(0, 1))
        figures.append(_figure(figure_svg(figure, "Dice of each organ on held-out cases over iterations")))
    if not figures:
        return ""
    explanation = (
        "What the network had still to learn (left, lower is better), and how well it did meanwhile on scans that it did "
        "not learn from (right, higher is better; on the network's own grid)."
    )
    explanation += " A line for each fold." if len(run.trainings) > 1 else ""
    return section("How training went", f'<div class="pair">{"".join(figures)}</div>', explanation=explanation)


def _named(rows: Sequence[Row]) -> dict[str, Row]:
    """The worst, the median and the best case that has a value."""
    known = [row for row in rows if not math.isnan(row.rank)] or list(rows)
    return {"worst": known[0], "median": known[len(known) // 2], "best": known[-1]}


def _in_viewer(rows: Sequence[Row], scenes: Mapping[str, Scene], labels: Labels, metric: str) -> list[Shown]:
    """The worst, the median and the best case in the viewer, each once."""
    digits = digits_for(metric, [row.rank for row in rows])
    named: dict[str, Shown] = {}
    for name, row in _named(rows).items():
        if row.case in scenes and scenes[row.case].image.ndim == 3:
            detail = f"{short_name(metric)} {number(row.mean(metric), digits)}"
            if row.case not in named:
                named[row.case] = shown(scenes[row.case], labels, f"{name}: {row.case}", detail)
    return list(named.values())


def _scenes(run: Run, rows: Sequence[Row]) -> tuple[dict[str, Scene], Missing]:
    """The cases that are shown, in the order of their rank, and those that cannot be."""
    known = [row for row in rows if not math.isnan(row.rank)]
    wanted = {row.case: row for row in [*known[:NUM_WORST], *_named(rows).values()]}
    scenes, missing = load_scenes(wanted, run.cases, run.preprocessing, run.labels, unknown=run.unknown)
    if run.labels:
        for case in [case for case, scene in scenes.items() if not _is_as_scored(scene, wanted[case], run.labels)]:
            del scenes[case]
            missing.setdefault("what is drawn there is not what was scored", []).append(case)
    return scenes, missing


def _is_as_scored(scene: Scene, row: Row, labels: Labels) -> bool:
    """Whether the files still hold what the table tells of: they may be others by now, or have other label values."""
    if scene.reference is None:
        return True
    reference, prediction = (Volume(drawn[None], scene.geometry) for drawn in (scene.reference, scene.prediction))
    return all(
        abs(score.values["dice"] - row.organs[score.organ].values.get("dice", math.nan)) <= SAME_DICE
        for score in score_case(row.case, reference, prediction, labels, metrics=["dice"])
        if score.organ in row.organs and not math.isnan(row.organs[score.organ].values.get("dice", math.nan))
    )


def _pictures(
    run: Run, rows: Sequence[Row], scenes: Mapping[str, Scene], missing: Missing, labels: Labels, metric: str
) -> str:
    places = {row.case: place for place, row in enumerate(rows, start=1)}
    captions = {}
    for row in (row for row in rows if row.case in scenes):
        values = {organ: score.values[metric] for organ, score in row.organs.items() if metric in score.values}
        digits = digits_for(metric, list(values.values()))
        numbers = ", ".join(f"{escape(organ)} {number(value, digits)}" for organ, value in values.items())
        place = f'<a href="#{row.anchor}">place {places[row.case]} of {len(rows)}</a>, the worst being the first'
        captions[row.case] = f"{place} · {escape(short_name(metric))}: {numbers}"
    notice = missing_notice(missing)
    if scenes and run.labels is None:
        notice += '<p class="notice">Nothing says what the labels are called: name them with <code>--labels</code>.</p>'
    return pictures_section(
        "Worst, median and best cases in pictures",
        {case: drawn(scene, labels) for case, scene in scenes.items()},
        captions,
        of_volumes=any(scene.image.ndim == 3 for scene in scenes.values()),
        notice=notice,
        explanation=f"Colored lines: {'what the network drew' if run.trainings else 'the prediction'}. "
        "White lines: what the expert drew (the reference).",
    )


def _provenance(run: Run) -> str:
    spec = next((training.spec for training in run.trainings if training.spec), None)
    found = dict(spec.provenance) if spec else {}
    seconds = run.result.get("seconds")
    entries = {
        "run folder": run.folder.resolve().name,
        "MLflow run": run.result.get("mlflow_run_id") or found.get("mlflow_run_id"),
        "network": spec.network if spec else None,
        "held-out fold": found.get("fold") if len(run.trainings) < 2 else f"each of {len(run.trainings)}",
        "best at iteration": (run.result.get("best") or {}).get("step"),
        "iterations": run.result.get("iterations"),
        "duration": duration(seconds) if seconds else None,
        "data hash": found.get("medseg.manifest_sha256") or found.get("medseg.data_hash"),
        "git commit": found.get("medseg.git_commit"),
        "versions": found.get("medseg.versions"),
        "hardware": found.get("medseg.hardware"),
    }
    return section(
        "Where this comes from", f"<details><summary>Data, code and machine</summary>{definitions(entries)}</details>"
    )


def _figure(svg: str) -> str:
    return f'<figure class="figure">{svg}</figure>'
