"""A comparison of runs as a page, for readers who are no statisticians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from medseg import __version__
from medseg.metrics import METRICS
from medseg.metrics.statistics import MIN_PATIENTS
from medseg.reporting.comparison_figure import Differences, comparison_figure, ranking_figure
from medseg.reporting.comparison_table import (
    COMPARED,
    RANKED,
    SIGNIFICANT,
    compared_rows,
    mean_row,
    ranked_rows,
    with_interval,
)
from medseg.reporting.page import figure_svg, html_page
from medseg.reporting.words import plain_words
from medseg.wording import counted

Result = Mapping[str, Any]

MAX_CASES = 5


def comparison_page(result: Result, differences: Differences) -> str:
    """A comparison as one HTML file, which says in words what was found and how far to trust it.

    Args:
        result: What `medseg.compare.compare` returns.
        differences: Of each of its comparisons, by organ and case.
    """
    names = ", ".join(comparison["label"] for comparison in result["comparisons"])
    title = f"{_metric_title(result['metric'])}: {names} compared with {result['baseline_label']}"
    figure = figure_svg(comparison_figure(result, differences))
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(plain_words(result['metric']))} {_direction(result)}</p>",
        _list(finding for comparison in result["comparisons"] for finding in _findings(comparison, result)),
        f"<figure>{figure}<figcaption>{escape(_CAPTION)}</figcaption></figure>",
        *(_organ_table(comparison, result) for comparison in result["comparisons"]),
        *(_extremes(c, found, result) for c, found in zip(result["comparisons"], differences, strict=True)),
        _left_out(result),
        _how_to_read(_READING),
        _provenance([result["baseline"], *(comparison["run"] for comparison in result["comparisons"])]),
    ]
    return html_page(title, "\n".join(body))


def ranking_page(result: Result) -> str:
    """A ranking as one HTML file.

    Args:
        result: What `medseg.compare.rank_experiment` returns.
    """
    title = f"{result['experiment']}: runs ranked by {_metric_title(result['metric'])} of {', '.join(result['organs'])}"
    cases = counted(result["n_cases"], "case")
    intro = f"Mean over {', '.join(result['organs'])} of {cases} that all these runs were scored on."
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(plain_words(result['metric']))} {_direction(result)} {escape(intro)}</p>",
        f"<figure>{figure_svg(ranking_figure(result))}</figure>",
        _table(RANKED, ranked_rows(result)),
        _left_out(result),
        _how_to_read(_READING_RANKS),
        _provenance([f"{row['run']}: {row['run_id']}" for row in result["ranking"]]),
    ]
    return html_page(title, "\n".join(body))


_CAPTION = (
    "Each dot is a case, blue where the compared run is better and orange where it is worse. The diamond is the mean "
    "of an organ and the bar its 95 % interval; a filled diamond means that chance is an unlikely explanation (p below "
    "0.05 after Holm’s correction). A triangle at the edge is a case that lies farther out."
)

_ONE_TRAINING = (
    "<b>One run each says nothing about the variance of training.</b> The same workflow trained again with another "
    "seed gives another model, and other numbers. What is shown here are differences between these trained models on "
    "these cases; to compare methods, train each several times."
)
_INTERVAL = (
    "<b>95 % interval.</b> Had other patients of the same kind been scanned, the mean difference would have been "
    "another. Made in this way, 95 of 100 intervals hold the true one. One that does not hold 0 speaks for a "
    "difference, and its ends tell how small or large it may be: ask whether that matters to a patient. "
    "(Bootstrap of patients, expanded percentiles.)"
)
_P = (
    "<b>p (Holm).</b> How often two equally good runs would differ at least as clearly by chance "
    "(Wilcoxon’s signed-rank test on the patients), made larger by Holm’s correction as several tests find something by "
    f"chance sooner than one. A large p does not prove that runs are equal. With fewer than {MIN_PATIENTS} patients no "
    "p can be below 0.05: the table says “too few”."
)
_MISSES = (
    "<b>Missed and invented organs.</b> An organ that a run does not find has Dice 0; it has no surface, so that its "
    "distance counts as the diagonal of the scan, as does that of an organ that is not in the scan; an organ rightly "
    "left out counts as 0 mm where another run invents it. Where the length of the diagonal is not known, the pair is "
    "left out, which is said above. Dice is not defined where an organ is rightly left out: such pairs do not count."
)
_READING = (
    _ONE_TRAINING,
    _INTERVAL,
    _P,
    "<b>Effect.</b> The matched-pairs rank-biserial correlation: +1 where the run is better in every case, −1 where it "
    "is worse in every one, 0 where gains and losses balance.",
    "<b>Better / equal / worse.</b> In how many cases, however small the difference.",
    _MISSES,
)
_READING_RANKS = (
    _ONE_TRAINING,
    _INTERVAL,
    _P,
    "<b>The best is chosen by the same cases</b> that it is then compared on, so that its lead is on average too large: "
    "judge it on cases that chose nothing.",
    _MISSES,
)


def _findings(comparison: Result, result: Result) -> list[str]:
    """What was found, in sentences."""
    organs, name = comparison["organs"], comparison["label"]
    sign = -1 if result["lower_is_better"] else 1
    told = []
    for word, wanted in (("better", 1), ("worse", -1)):
        clear = [
            f"{organ} ({with_interval(found['difference'], found['ci95'], signed=True)})"
            for organ, found in organs.items()
            if found["p_holm"] < SIGNIFICANT and wanted * sign * found["difference"] > 0
        ]
        if clear:
            told.append(f"{name} is {word} than {result['baseline_label']} in {_and(clear)}.")
    unclear = [o for o, found in organs.items() if found["n"] and not found["p_holm"] < SIGNIFICANT]
    if unclear:
        told.append(f"{name}: in {_and(unclear)} these cases do not tell the two runs apart.")
    misses = [
        f"{organ}: {found['missed_baseline']} before, {found['missed_run']} now"
        for organ, found in organs.items()
        if found["missed_baseline"] or found["missed_run"]
    ]
    told.append(f"{name}: missed organs: {'; '.join(misses)}." if misses else f"{name}: neither run missed an organ.")
    return told


def _organ_table(comparison: Result, result: Result) -> str:
    rows = [*compared_rows(comparison), mean_row(comparison)]
    about = (
        f"“Before” is {result['baseline_label']}, “now” is {comparison['label']}: means over the cases that both have a "
        "value of. An arrow leads from one run’s count to the other’s."
    )
    return f"<h2>{escape(comparison['label'])}</h2>{_table(COMPARED, rows)}<p>{escape(about)}</p>"


def _extremes(comparison: Result, differences: Mapping[str, Mapping[str, float]], result: Result) -> str:
    """The cases worth looking at: where one run gains or loses most."""
    sign = -1 if result["lower_is_better"] else 1
    gains = sorted(
        ((sign * value, case, organ) for organ, found in differences.items() for case, value in found.items()),
        key=lambda entry: -abs(entry[0]),
    )
    rows = [
        (case, organ, f"{sign * gain:+.3f}", "better" if gain > 0 else "worse")
        for gain, case, organ in gains[:MAX_CASES]
        if gain
    ]
    if not rows:
        return ""
    heading = f"Cases to look at: the largest differences of {comparison['label']}"
    return f"<h3>{escape(heading)}</h3>{_table(('case', 'organ', 'difference', ''), rows)}"


def _left_out(result: Result) -> str:
    """Everything that was not counted, every case by its name."""
    entries = list(result["warnings"])
    for comparison in result.get("comparisons", ()):
        for which, name in (("baseline", result["baseline_label"]), ("run", comparison["label"])):
            if len(cases := comparison["unpaired"][which]) > MAX_CASES:  # else a warning has named them
                entries.append(f"only {name} has: {', '.join(cases)}")
        if len(lost := comparison["lost"]) > MAX_CASES:
            told = ", ".join(f"{organ} of {case}" for case, organ in lost)
            entries.append(f"{comparison['label']} has no result for: {told}")
    return f"<h2>Left out, and warnings</h2>{_list(entries) if entries else '<p>Nothing was left out.</p>'}"


def _how_to_read(paragraphs: Sequence[str]) -> str:
    return "<h2>How to read this</h2>" + "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)


def _provenance(names: Sequence[str]) -> str:
    return (
        f"<details><summary>What was compared</summary>{_list(names)}</details>"
        f"<p><small>medseg {escape(__version__)}. For research; not a medical device.</small></p>"
    )


def _direction(result: Result) -> str:
    return f"{'Less' if result['lower_is_better'] else 'More'} is better."


def _metric_title(metric: str) -> str:
    return METRICS[metric].title if metric in METRICS else metric


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{_unbroken(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _unbroken(cell: str) -> str:
    """A cell whose numbers stay on one line."""
    text = escape(cell)
    return text.replace(" ", "&nbsp;") if cell[:1] in "+-−0123456789" else text


def _list(entries: Any) -> str:
    return f"<ul>{''.join(f'<li>{escape(entry)}</li>' for entry in entries)}</ul>"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
