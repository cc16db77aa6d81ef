"""Networks trained on the hippocampus for the same wall time each: which one finds most in a quarter of an hour?

    MEDSEG_DATA=/path/to/data python benchmarks/same_time.py [--minutes 15] [--only unet vnet] [--output DIR]

Everything but the network is workflows/hippocampus.yaml's. A short run of the same command measures what an
iteration and what everything else takes (reading, validations, scoring of all held-out cases); the iterations of the
long run follow from that, so that its learning rate comes to its end when its time does. The time stated is the
whole command's. Widths are such that a CPU makes at least a thousand iterations.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKFLOW = Path(__file__).parents[1] / "workflows" / "hippocampus.yaml"
NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"channels": [32, 64, 128, 256], "decoder_convs_per_stage": 1},
    "vnet": {"channels": [16, 32, 64, 128], "convs_per_stage": [1, 1, 2, 3], "decoder_convs_per_stage": [1, 1, 2]},
    "unet_plus_plus": {"channels": [16, 32, 64, 128]},
    "transunet": {"image_size": [48, 64, 48]},
    "deeplab_v3_plus": {"output_stride": 8, "width": 32, "aspp_channels": 128},
}
LEARNING_RATES = {"transunet": 1e-3}  # of AdamW, where not the workflow's
TRIAL_ITERATIONS = 40
NUM_VALIDATIONS = 3


def train(name: str, iterations: int, folder: Path) -> dict[str, Any]:
    """What `medseg train --json` ends with."""
    settings = {
        "network": {"name": name, "args": NETWORKS[name]},
        "train.iterations": iterations,
        "train.validate_every": -(-iterations // NUM_VALIDATIONS),
    }
    if name in LEARNING_RATES:
        settings["train.optimizer.lr"] = LEARNING_RATES[name]
    chosen = [text for key, value in settings.items() for text in ("--set", f"{key}={json.dumps(value)}")]
    command = [sys.executable, "-m", "medseg", "train", str(WORKFLOW), "--output", str(folder), "--json", *chosen]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def row(name: str, minutes: float, output: Path) -> str:
    """One network's line of the table."""
    trial = train(name, TRIAL_ITERATIONS, output / f"{name}_trial")
    pace = trial["seconds_training"] / TRIAL_ITERATIONS
    besides = trial["seconds"] - trial["seconds_training"]
    found = train(name, round((60 * minutes - besides) / pace), output / name)
    organs = " | ".join(f"{dice:.3f}" for dice in found["best"]["dice"].values())
    settings = ", ".join(f"{key} {value}" for key, value in NETWORKS[name].items())
    return (
        f"| `{name}` ({settings}) | {found['iterations']} | {found['seconds'] / 60:.1f} | {organs} "
        f"| {found['best']['mean_dice']:.3f} |"
    )


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--output", type=Path, default=Path("runs/same_time"), help="a folder for the runs")
    options = parser.parse_args()
    print("| network | iterations | minutes | anterior | posterior | mean |\n|---|---|---|---|---|---|")
    for name in options.only:
        print(row(name, options.minutes, options.output), flush=True)


if __name__ == "__main__":
    main()
