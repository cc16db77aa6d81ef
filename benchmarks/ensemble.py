"""What averaging brings: one fold's model, mirrored left to right, five folds, and both, on cases that none has seen.

    MEDSEG_DATA=/path/to/data python benchmarks/ensemble.py [--minutes 10] [--output DIR]

Every fifth case of the hippocampus (44 of 220) is declared as test. Five folds of the other 176 are trained by
workflows/hippocampus.yaml, each as long as stated (the whole command, with its validations), and the 44 are segmented
in each way. `medseg compare` holds every way to the first one by the cases' Dice; the last lines are the rank
correlations of what a prediction says of itself, which knows no reference, with its true Dice: each case's uncertainty,
and the agreement of its folds or mirror images.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from pathlib import Path
from typing import Any

from same_time import METRICS, NUM_VALIDATIONS, TRIAL_ITERATIONS, WORKFLOW, compared, medseg
from scipy.stats import spearmanr

TEST_EVERY = 5
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fold_0": ("fold_0", ("--no-tta",)),
    "fold_0_mirrored": ("fold_0", ("--tta",)),
    "five_folds": (".", ("--no-tta",)),
    "five_folds_mirrored": (".", ("--tta",)),
}
"""Which part of the cross-validation's folder is the model, and how it predicts."""


def manifest_with_test(folder: Path) -> Path:
    """The hippocampus with every fifth case declared as test."""
    root = Path(os.environ["MEDSEG_DATA"], "hippocampus").resolve()
    told = json.loads((root / "dataset.json").read_text())
    cases = sorted(told["training"], key=lambda case: case["image"])
    told |= {"root": str(root), "test": cases[::TEST_EVERY]}
    told["training"] = [case for case in cases if case not in told["test"]]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "hippocampus.json"
    path.write_text(json.dumps(told, indent=1))
    return path


def train(manifest: Path, iterations: int, fold: str, folder: Path) -> dict[str, Any]:
    """What `medseg train --json` ends with."""
    settings = {
        "data.manifest": str(manifest),
        "train.iterations": iterations,
        "train.validate_every": -(-iterations // NUM_VALIDATIONS),
    }
    chosen = [text for key, value in settings.items() for text in ("--set", f"{key}={json.dumps(value)}")]
    return medseg("train", str(WORKFLOW), "--fold", fold, "--output", str(folder), *chosen)


def iterations_for(minutes: float, manifest: Path, output: Path) -> int:
    """As many as one fold makes in this time, of which reading, validations and scoring take their part."""
    trial = train(manifest, TRIAL_ITERATIONS, "0", output / "trial")
    pace = trial["seconds_training"] / TRIAL_ITERATIONS
    return round((60 * minutes - trial["seconds"] + trial["seconds_training"]) / pace)


def correlation(predictions: Path, tables: Path, column: str) -> str:
    """Spearman's rank correlation of a column of the predictions' summary with the cases' mean Dice over the organs."""
    dice: dict[str, list[float]] = {}
    with (tables / "per_case.csv").open() as file:
        for row in csv.DictReader(file):
            if row["dice"]:
                dice.setdefault(row["case"], []).append(float(row["dice"]))
    with (predictions / "summary.csv").open() as file:
        told = {row["case"]: row[column] for row in csv.DictReader(file)}
    cases = sorted(dice)
    if not all(told[case] for case in cases):  # one model without mirror images agrees with nobody
        return "–"
    found = spearmanr([float(told[case]) for case in cases], [sum(dice[case]) / len(dice[case]) for case in cases])
    return f"{found.statistic:.2f} (p {found.pvalue:.3f})"


def main() -> None:
    """Train, segment, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of a fold")
    parser.add_argument("--output", type=Path, default=Path("runs/ensemble"), help="a folder for all that is made")
    options = parser.parse_args()
    output: Path = options.output
    manifest = manifest_with_test(output)
    iterations = iterations_for(options.minutes, manifest, output)
    train(manifest, iterations, "all", output / "folds")
    tables, correlations = [], []
    for way, (model, how) in WAYS.items():
        predictions, table = output / "predictions" / way, output / "tables" / way
        said = medseg(
            "predict", str(output / "folds" / model), str(manifest), "--split", "test", "--uncertainty", *how,
            "--output", str(predictions), "--force",
        )  # fmt: skip
        metrics = ",".join(METRICS)
        medseg(
            "evaluate", str(predictions), str(manifest), "--split", "test", "--metrics", metrics,
            "--output", str(table),
        )  # fmt: skip
        tables.append(table)
        found = [correlation(predictions, table, column) for column in ("uncertainty", "agreement")]
        correlations.append(f"| `{way}` | {said['seconds']:.0f} | {' | '.join(found)} |")
    print(f"five folds of {iterations} iterations")
    for metric in METRICS:
        print("", *compared(tables, metric, output / f"compare_{metric}"), sep="\n")
    print("", "rank correlations with the Dice:", "", "| way | seconds | uncertainty | agreement |", sep="\n")
    print("|---|---|---|---|", *correlations, sep="\n")


if __name__ == "__main__":
    main()
