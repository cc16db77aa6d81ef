"""The page of a run: how good it is, where it fails, what that looks like, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from medseg.errors import MedsegError
from medseg.files import write_atomically
from medseg.labels import Labels
from medseg.metrics.table import MetricSummary, summarize
from medseg.reporting.figures import curves_figure, organs_figure
from medseg.reporting.page import asset, definitions, figure_svg, html_page, picture_html, section
from medseg.reporting.run import Result, Run, read_run
from medseg.reporting.scene import Scene, load_scene
from medseg.reporting.tables import Row, cases_table, mean_of, number, rank_cases, title_of
from medseg.reporting.viewer import Shown, inline_script, viewer_html

REPORT = "report.html"
"""What the page is called in a run folder."""

NUM_WORST = 5
MAX_TILES = 6
TOLD = ("E-MISSING-FILE", "E-SHOWS-TEXT", "E-PAIR-SHAPE")
"""Errors whose messages name no file."""

Missing = Mapping[str, Sequence[str]]
"""Why cases are not shown, and which."""


MEANINGS = {
    "dice": "<b>Dice</b> says how much two outlines overlap: 1 is the same outline, 0 no overlap at all. It is harsh "
    "on small structures, where a rim one voxel wide is much of the whole.",
    "iou": "<b>IoU</b> says the same more strictly: the share of the common area in the area of both.",
    "hd95": "<b>HD95</b> is a distance in millimetres: 95 % of each outline lie at most that far from the other. "
    "Small is good.",
    "assd": "<b>ASSD</b> is the average distance between the two outlines in millimetres. Small is good.",
}

LIMITS = (
    "For research only: not a medical device, and no ground for a decision about a patient. The numbers hold for scans "
    "like those of this data set; other scanners, protocols and patients need a test of their own. What the expert "
    "drew is taken for the truth here, and experts differ among themselves."
)


def write_run_page(folder: Path, output: Path, result: Result) -> dict[str, int]:
    """Make the page of a run folder.

    Args:
        folder: See `medseg.reporting.run.read_run`.
        output: The file to write.
        result: What `medseg train` said at its end; empty: that is not known.

    Returns:
        ``cases``, ``pictures`` and ``viewer_cases``: how many of each are in it.

    Raises:
        DataError: If the folder holds no table.
    """
    run = read_run(folder, result)
    metrics = metrics_of(run)
    rows = rank_cases(run.scores, metrics[0])
    scenes, missing = _scenes(run, rows)
    pictured = {case: f"picture-{n}" for n, case in enumerate(scenes)}
    volumes = {case: scene for case, scene in scenes.items() if scene.image.ndim == 3}
    parts = [
        _opening(run, rows, metrics[0]),
        _reading(metrics),
        _spread(run, rows, metrics),
        _progress(run),
        _viewer(run.labels, rows, volumes, metrics[0]),
        _pictures(run, rows, scenes, pictured, metrics[0], missing),
        section(
            "Every case, worst first",
            cases_table(rows, metrics, pictured),
            explanation="A click on a heading sorts by it; a linked case is pictured above.",
        ),
        _provenance(run),
        f"<footer><p>{LIMITS}</p></footer>",
        f"<script>{inline_script(asset('page.js'))}</script>",
    ]
    page = html_page(f"{run.name}: report", "\n".join(part for part in parts if part))
    write_atomically(output, page.encode())
    return {"cases": len(rows), "pictures": len(scenes), "viewer_cases": len(_chosen(rows, volumes))}


def why_missing(error: MedsegError | OSError) -> str:
    """In words that name no file, as a file's name may be a patient's."""
    if isinstance(error, MedsegError):
        return error.message if error.error_id in TOLD else f"a file cannot be used ({error.error_id})"
    return f"a file cannot be read ({error.strerror})"


def missing_notice(missing: Missing) -> str:
    """What is not shown, and why."""
    if not missing:
        return ""
    reasons = "; ".join(f"{escape(reason)} ({escape(', '.join(cases))})" for reason, cases in missing.items())
    return f'<p class="notice">Not shown here, and left out of the viewer: {reasons}. The numbers are not touched by this.</p>'


def metrics_of(run: Run) -> list[str]:
    """The metrics of a run's table, the one that ranks its cases first."""
    names = list(dict.fromkeys(metric for score in run.scores for metric in score.values))
    return sorted(names, key=lambda name: name != "dice")


def _opening(run: Run, rows: Sequence[Row], metric: str) -> str:
    summary = {organ: found[metric] for organ, found in summarize(run.scores).items() if metric in found}
    missed = sum(score.is_missed for score in run.scores)
    spurious = sum(score.is_spurious for score in run.scores)
    means = {organ: found["mean"] for organ, found in summary.items() if not math.isnan(found["mean"])}
    what = "segmentations were held to what an expert drew"
    if run.trainings:
        folds = f", in {len(run.trainings)} folds, each scored by the network that had not seen it" * (
            len(run.trainings) > 1
        )
        what = f"scans that the network had not seen in training were segmented and held to what an expert drew{folds}"
    lede = f"{len(rows)} {what}."
    if means:
        overall = mean_of(list(means.values()))
        lede += f" The mean {title_of(metric)} is <b>{number(overall)}</b>"
        lede += f", from {_extremes(means)}." if len(means) > 1 else "."
    lede += f" {_found(missed, spurious)}"
    tiles = "".join(_tile(organ, found, metric) for organ, found in _tiled(summary))
    eyebrow = "medseg report · for research only"
    return (
        f'<header><p class="eyebrow">{eyebrow}</p><h1>{escape(run.name)}</h1><p class="lede">{lede}</p>'
        f'<dl class="tiles">{tiles}</dl></header>'
    )


def _extremes(means: Mapping[str, float]) -> str:
    low, high = min(means, key=lambda o: means[o]), max(means, key=lambda o: means[o])
    return f"{number(means[low])} ({escape(low)}) to {number(means[high])} ({escape(high)})"


def _found(missed: int, spurious: int) -> str:
    """How often something was not found, or found where nothing is."""
    if not missed and not spurious:
        return "No organ was missed, and none was drawn where there is none."
    parts = [f"missed an organ altogether {_times(missed)}"] if missed else []
    parts += [f"drew {'one' if missed else 'an organ'} that is not there {_times(spurious)}"] if spurious else []
    return f"The network {' and '.join(parts)}; the table says where."


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _tiled(summary: Mapping[str, MetricSummary]) -> list[tuple[str, MetricSummary]]:
    """All organs, or the worst of them if they are many."""
    known = [(organ, found) for organ, found in summary.items() if not math.isnan(found["mean"])]
    if len(known) <= MAX_TILES:
        return known
    return sorted(known, key=lambda entry: entry[1]["mean"])[:MAX_TILES]


def _tile(organ: str, found: MetricSummary, metric: str) -> str:
    low, high = found["ci95"]
    interval = f"95 % interval {number(low)} to {number(high)}<br>" if found["n"] > 1 else ""
    cases = f"{found['n']} case{'s' * (found['n'] != 1)}"
    return (
        f'<div class="tile"><dt>{escape(organ)}</dt><dd><div class="number">{number(found["mean"])}</div>'
        f'<div class="detail">mean {escape(title_of(metric))}, median {number(found["median"])}<br>{interval}{cases}</div></dd></div>'
    )


def _reading(metrics: Sequence[str]) -> str:
    known = [MEANINGS[metric] for metric in metrics if metric in MEANINGS]
    known.append("An <b>interval</b> says where the mean would lie if other patients of the same kind had been chosen.")
    return section("How to read the numbers", f'<p class="explanation">{" ".join(known)}</p>')


def _spread(run: Run, rows: Sequence[Row], metrics: Sequence[str]) -> str:
    organs = list(dict.fromkeys(score.organ for score in run.scores))
    shown = [metric for metric in metrics if metric in MEANINGS and metric != "iou"] or list(metrics[:1])
    figures = []
    for metric in shown:
        values = {
            organ: [(row.anchor, row.organs[organ].values.get(metric, math.nan)) for row in rows if organ in row.organs]
            for organ in organs
        }
        limits = (-0.02, 1.02) if metric in ("dice", "iou") else None
        figure = organs_figure(values, across=title_of(metric), limits=limits)
        figures.append(_figure(figure_svg(figure, f"{title_of(metric)} of each organ: a box, and a dot for each case")))
    return section(
        "Organ by organ",
        "\n".join(figures),
        explanation="Each dot is a case, and leads to its row in the table. The box holds the middle half of the cases, the "
        "line in it is the median.",
    )


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


def _chosen(rows: Sequence[Row], volumes: Mapping[str, Scene]) -> list[tuple[str, Row]]:
    """The worst, the median and the best case, each once."""
    known = [row for row in rows if not math.isnan(row.rank)] or list(rows)
    named = {"worst": known[0], "median": known[len(known) // 2], "best": known[-1]}
    chosen: dict[str, tuple[str, Row]] = {}
    for name, row in named.items():
        if row.case in volumes:
            chosen.setdefault(row.case, (name, row))
    return list(chosen.values())


def _scenes(run: Run, rows: Sequence[Row]) -> tuple[dict[str, Scene], Missing]:
    """The cases that are shown, in the order of their rank, and those that cannot be."""
    known = [row for row in rows if not math.isnan(row.rank)] or list(rows)
    wanted = [*known[:NUM_WORST], known[len(known) // 2], known[-1]]
    scenes: dict[str, Scene] = {}
    missing: dict[str, list[str]] = {}
    for case in dict.fromkeys(row.case for row in wanted):
        training = next((training for training in run.trainings if case in training.cases), None)
        if training is None or training.spec is None:
            missing.setdefault("it is not known where their files are", []).append(case)
            continue
        try:
            scenes[case] = load_scene(training.cases[case], training.spec.preprocessing, training.spec.labels)
        except (MedsegError, OSError) as error:
            missing.setdefault(why_missing(error), []).append(case)
    return scenes, missing


def _viewer(labels: Labels | None, rows: Sequence[Row], volumes: Mapping[str, Scene], metric: str) -> str:
    chosen = _chosen(rows, volumes)
    if not chosen or labels is None:
        return ""
    shown = [
        Shown(volumes[row.case], f"{name}: {row.case}", f"{title_of(metric)} {number(row.rank)}")
        for name, row in chosen
    ]
    return section(
        "Look at the scans",
        viewer_html(shown, labels),
        explanation="As radiologists look: the patient’s right is at the left of the picture. A click moves the cross, "
        "the wheel goes through the slices, dragging with the right button sets the window. The scans are cropped around "
        "the organs and simplified, for this page only.",
    )


def _pictures(
    run: Run,
    rows: Sequence[Row],
    scenes: Mapping[str, Scene],
    pictured: Mapping[str, str],
    metric: str,
    missing: Missing,
) -> str:
    labels = run.labels
    figures = []
    place = {row.case: n for n, row in enumerate(rows)}
    for row in (row for row in rows if row.case in scenes):
        assert labels is not None
        numbers = ", ".join(f"{escape(o)} {number(s.values.get(metric, math.nan))}" for o, s in row.organs.items())
        caption = f"<strong>{escape(row.case)}</strong> · place {place[row.case] + 1} of {len(rows)} from the worst · {escape(title_of(metric))}: {numbers}"
        alt = f"Contours of {row.case} in the scan"
        picture = picture_html(scenes[row.case].picture(labels), alt)
        figures.append(f'<figure id="{pictured[row.case]}">{picture}<figcaption>{caption}</figcaption></figure>')
    notice = missing_notice(missing)
    if not figures and not notice:
        return ""
    return section(
        "Worst, median and best cases in pictures",
        f'<div class="pictures">{"".join(figures)}</div>{notice}',
        explanation="Colored lines: what the network drew. White lines: what the expert drew (the reference). The slices are those that show "
        "most of every organ." * bool(figures),
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
        "duration": _duration(seconds) if seconds else None,
        "data hash": found.get("medseg.manifest_sha256") or found.get("medseg.data_hash"),
        "git commit": found.get("medseg.git_commit"),
        "versions": found.get("medseg.versions"),
        "hardware": found.get("medseg.hardware"),
    }
    return section(
        "Where this comes from", f"<details><summary>Data, code and machine</summary>{definitions(entries)}</details>"
    )


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return (
        f"{seconds:.0f} s"
        if minutes < 2
        else f"{minutes:.0f} minutes"
        if minutes < 120
        else f"{minutes / 60:.1f} hours"
    )


def _figure(svg: str) -> str:
    return f'<figure class="figure">{svg}</figure>'
