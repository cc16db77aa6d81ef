"""Trainings on the hippocampus that differ in one thing and take the same wall time each: which finds most?

    MEDSEG_DATA=/path/to/data python benchmarks/same_time.py networks [--minutes 15] [--only unet vnet] [--output DIR]
    MEDSEG_DATA=/path/to/data python benchmarks/same_time.py losses --minutes 10

Everything but the network or the loss is workflows/hippocampus.yaml's. A short run of the same command measures what
an iteration and what everything else takes (reading, validations, scoring of all held-out cases); the iterations of
the long run follow from that, so that its learning rate comes to its end when its time does. The time stated is the
whole command's. Widths of networks are such that a CPU makes at least a thousand iterations in a quarter of an hour.

`medseg compare` then holds every run to the first one, by Dice and by HD95.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKFLOW = Path(__file__).parents[1] / "workflows" / "hippocampus.yaml"
TRIAL_ITERATIONS = 40
NUM_VALIDATIONS = 3
METRICS = ("dice", "hd95")

Settings = dict[str, Any]


def network(name: str, lr: float | None = None, **args: Any) -> Settings:
    """A network, with AdamW's learning rate where it is not the workflow's."""
    settings: Settings = {"network": {"name": name, "args": args}}
    return settings if lr is None else settings | {"train.optimizer.lr": lr}


VARIED: dict[str, dict[str, Settings]] = {
    "networks": {
        "unet": network("unet", channels=[32, 64, 128, 256], decoder_convs_per_stage=1),
        "vnet": network(
            "vnet", channels=[16, 32, 64, 128], convs_per_stage=[1, 1, 2, 3], decoder_convs_per_stage=[1, 1, 2]
        ),
        "unet_plus_plus": network("unet_plus_plus", channels=[16, 32, 64, 128]),
        "transunet": network("transunet", image_size=[48, 64, 48], lr=1e-3),
        "deeplab_v3_plus": network("deeplab_v3_plus", output_stride=8, width=32, aspp_channels=128),
    },
    "losses": {
        "dice+cross_entropy": {"loss": ["dice", "cross_entropy"]},
        "dice": {"loss": ["dice"]},
        "tversky": {"loss": ["tversky"]},
        "focal_tversky": {"loss": ["focal_tversky"]},
        "lovasz+cross_entropy": {"loss": ["lovasz", "cross_entropy"]},
        "dice+boundary": {"loss": ["dice", {"name": "boundary", "weight": {"from": 0, "to": 0.05, "over": 1000}}]},
    },
}


def train(settings: Settings, iterations: int, folder: Path) -> dict[str, Any]:
    """What `medseg train --json` ends with."""
    settings = settings | {
        "train.iterations": iterations,
        "train.validate_every": -(-iterations // NUM_VALIDATIONS),
    }
    chosen = [text for key, value in settings.items() for text in ("--set", f"{key}={json.dumps(value)}")]
    return medseg("train", str(WORKFLOW), "--output", str(folder), *chosen)


def medseg(*arguments: str) -> dict[str, Any]:
    """A command's JSON."""
    command = [sys.executable, "-m", "medseg", *arguments, "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def row(name: str, settings: Settings, minutes: float, output: Path) -> str:
    """One training's line of the table."""
    trial = train(settings, TRIAL_ITERATIONS, output / f"{name}_trial")
    pace = trial["seconds_training"] / TRIAL_ITERATIONS
    besides = trial["seconds"] - trial["seconds_training"]
    found = train(settings, round((60 * minutes - besides) / pace), output / name)
    organs = " | ".join(f"{dice:.3f}" for dice in found["best"]["dice"].values())
    return (
        f"| `{name}` | {found['iterations']} | {found['seconds'] / 60:.1f} | {organs} "
        f"| {found['best']['mean_dice']:.3f} |"
    )


def compared(runs: list[Path], metric: str, output: Path) -> list[str]:
    """A line for each run: an organ's mean with its interval, and the difference from the first run's."""
    result = medseg("compare", *map(str, runs), "--metric", metric, "--output", str(output))
    first, *_ = result["comparisons"]
    organs = list(first["organs"])
    lines = [
        f"| {metric} | {' | '.join(f'{organ} | difference' for organ in organs)} |",
        "|---" * (1 + 2 * len(organs)) + "|",
    ]
    cells = " | ".join(f"{interval(first['organs'][organ], 'baseline')} | " for organ in organs)
    lines.append(f"| `{runs[0].name}` | {cells} |")
    for run, comparison in zip(runs[1:], result["comparisons"], strict=True):
        found = [comparison["organs"][organ] for organ in organs]
        cells = " | ".join(
            f"{interval(organ, 'run')} | {interval(organ, 'difference', '+')}, p {number(organ['p_holm'])}"
            for organ in found
        )
        lines.append(f"| `{run.name}` | {cells} |")
    return lines


def interval(found: dict[str, Any], key: str, sign: str = "") -> str:
    """``0.888 [0.880, 0.895]``."""
    low, high = found["ci95" if key == "difference" else f"{key}_ci95"]
    return f"{number(found[key], sign)} [{number(low, sign)}, {number(high, sign)}]"


def number(value: float | None, sign: str = "") -> str:
    """``0.031``; too few patients have neither test nor interval."""
    return "–" if value is None else f"{value:{sign}.3f}"


def main() -> None:
    """Train, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("varied", choices=list(VARIED))
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--only", nargs="+", help="some of the names")
    parser.add_argument("--output", type=Path, default=Path("runs/same_time"), help="a folder for the runs")
    options = parser.parse_args()
    chosen = {name: VARIED[options.varied][name] for name in options.only or VARIED[options.varied]}
    print(f"| {options.varied} | iterations | minutes | anterior | posterior | mean |\n|---|---|---|---|---|---|")
    for name, settings in chosen.items():
        print(row(name, settings, options.minutes, options.output), flush=True)
    runs = [options.output / name for name in chosen]
    for metric in METRICS if len(runs) > 1 else ():
        print("", *compared(runs, metric, options.output / f"compare_{metric}"), sep="\n")


if __name__ == "__main__":
    main()
