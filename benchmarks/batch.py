"""Batches that survive: good and bad scans, workers shot at random, the whole command shot and resumed.

    MEDSEG_DATA=/path/to/data python benchmarks/batch.py [--scans 200] [--bad 10] [--kills 20] [--command-kills 2]
        [--workers 2] [--model MODEL] [--executor local|ray|slurm]

Scans of the hippocampus, and spoiled copies of some of them (empty, cut short, a flipped bit, a web page, another
modality's header …), are segmented twice by `medseg predict`: undisturbed, and with SIGKILL sent to a worker at random
moments; the command itself is killed too, and resumed. Then every good scan must be committed exactly once by the
ledger's log, with a label map of the same bits as the undisturbed one's, every bad one reported, and nothing may be
left half-written. Without --model, a small U-Net with random weights serves: which voxels it finds is of no matter here.

Printed besides, of the undisturbed run: scans a minute, and the network's share of the wall time after the first case.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import nibabel as nib
import numpy as np

from medseg.files import is_running

OVER = {"ledger.db", "summary.csv", "report.html", ".lock", "slurm"}
LOAD_S = 240.0
"""A command that has begun nothing for so long is broken."""


def cut_short(path: Path) -> None:
    """Half of the file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped_bit(path: Path) -> None:
    """The file with another checksum."""
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # of the checksum
    path.write_bytes(bytes(content))


def resaved(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """The scan with other voxels."""

    def spoil(path: Path) -> None:
        image = nib.load(path)
        nib.Nifti1Image(change(np.asarray(image.dataobj).astype(np.float32)), image.affine).to_filename(path)

    return spoil


SPOIL: tuple[Callable[[Path], object], ...] = (
    lambda path: path.write_bytes(b""),
    cut_short,
    flipped_bit,
    lambda path: path.write_text("<html>the login page of a server that wanted a password</html>"),
    resaved(lambda voxels: np.full_like(voxels, np.nan)),
    resaved(lambda voxels: voxels.astype(np.complex64)),
    resaved(lambda voxels: voxels[..., 0]),
    resaved(lambda voxels: np.stack([voxels] * 3, -1)),
    lambda path: path.write_bytes(path.read_bytes()[:10]),
    lambda path: path.write_bytes(os.urandom(1000)),
)


def furnish(folder: Path, num_scans: int, num_bad: int) -> tuple[list[str], list[str]]:
    """Good scans and spoiled ones, in one folder; their names."""
    source = Path(os.environ["MEDSEG_DATA"])
    files = sorted(file for file in source.rglob("hippocampus*.nii.gz") if "images" in file.parent.name)
    if not files:
        raise SystemExit(f"no images*/hippocampus*.nii.gz below {source}")
    folder.mkdir()
    good = [f"good_{n:03d}" for n in range(num_scans)]
    bad = [f"bad_{n:02d}" for n in range(num_bad)]
    for n, name in enumerate([*good, *bad]):
        shutil.copy(files[n % len(files)], folder / f"{name}.nii.gz")
    for n, name in enumerate(bad):
        SPOIL[n % len(SPOIL)](folder / f"{name}.nii.gz")
    return good, bad


def random_model(folder: Path) -> Path:
    """A small U-Net as it is before training."""
    import torch

    from medseg.labels import Labels
    from medseg.model import Intensity, ModelSpec, Preprocessing, Window, save_model
    from medseg.nets import NETS

    args = {"channels": [8, 16, 32]}
    spec = ModelSpec(
        network="unet",
        network_args=args,
        spatial_dims=3,
        channels=("MRI",),
        labels=Labels({0: "background", 1: "anterior", 2: "posterior"}),
        preprocessing=Preprocessing(spacing_mm=(1.0, 1.0, 1.0), intensity=(Intensity(normalize="zscore"),)),
        window=Window((32, 32, 32)),
    )
    torch.manual_seed(0)
    network = NETS["unet"].network(spatial_dims=3, in_channels=1, out_channels=3, **args)
    save_model(folder, spec, network.state_dict())
    return folder


def command(model: Path, scans: Path, output: Path, options: argparse.Namespace, *more: str) -> list[str]:
    """What a person types."""
    words = [sys.executable, "-m", "medseg", "predict", str(model), str(scans), "-o", str(output), "--json"]
    words += ["--workers", str(options.workers), "--executor", options.executor, *more]
    return words + (["--slurm", "cluster=local"] if options.executor == "slurm" else [])


def ask(output: Path, query: str) -> list[tuple]:
    """Rows of the ledger; none while there is no ledger."""
    try:
        with closing(sqlite3.connect(f"{(output / 'ledger.db').as_uri()}?mode=ro", uri=True, timeout=60)) as db:
            return db.execute(query).fetchall()
    except sqlite3.OperationalError:
        return []


def workers(output: Path) -> list[int]:
    """The processes that have a case in hand, and are alive."""
    names = [name for (name,) in ask(output, "SELECT DISTINCT worker FROM cases WHERE state = 'running'")]
    return [pid for name in names if is_running(pid := int(name.split(":")[1]))]


def parent(pid: int) -> int:
    """The process that started another one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def shoot(pid: int, num_shots: int, executor: str) -> None:
    """Kill a worker; on a cluster every second time the actor or task that watches over it, from two processes above."""
    with suppress(ProcessLookupError, FileNotFoundError):  # it has died of another shot meanwhile
        os.kill(pid if executor == "local" or num_shots % 2 else parent(parent(pid)), signal.SIGKILL)


def ended(output: Path) -> int:
    """How many cases are done or given up."""
    return sum(count for (count,) in ask(output, "SELECT count(*) FROM cases WHERE state NOT IN ('todo', 'running')"))


def disturbed(words: list[str], output: Path, total: int, options: argparse.Namespace) -> tuple[dict, int, int]:
    """Run the command, shoot at it in its course, resume it; its result and how often workers and it were shot."""
    draw = random.Random(options.seed)
    shots = sorted(draw.uniform(0.02, 0.85) * total for _ in range(options.kills))
    ends = [total * (n + 1) / (options.command_kills + 1.5) for n in range(options.command_kills)]
    num_shots = num_ends = 0
    told = output.with_suffix(".json")
    while True:
        with told.open("w") as stream:  # no pipe, which tasks that outlive the command would hold open
            process = subprocess.Popen(words + (["--resume"] if num_ends else []), stdout=stream)
        heard = time.monotonic()
        while process.poll() is None:
            time.sleep(draw.uniform(0.01, 0.1))
            done = ended(output)
            if num_ends < len(ends) and done >= ends[num_ends]:
                process.kill()
                num_ends += 1
                break
            there = workers(output)
            if there:
                heard = time.monotonic()
            if there and num_shots < len(shots) and done >= shots[num_shots]:
                shoot(draw.choice(there), num_shots, options.executor)
                num_shots += 1
            if time.monotonic() > heard + LOAD_S:
                process.kill()
                raise SystemExit("nothing goes on")
        if process.wait() != -signal.SIGKILL:
            return json.loads(told.read_text()), num_shots, num_ends


def share_in_network(output: Path) -> float | None:
    """The networks' time by the workers' wall time, from each one's first case to the end of the last; None: not told."""
    rows = ask(
        output,
        "SELECT log.at, log.worker, told FROM cases JOIN log USING (id) WHERE event = 'done' AND state = 'done' ORDER BY at",
    )
    ended: dict[str, float] = {}
    network = wall = 0.0
    for at, worker, told in rows:
        if worker not in ended:
            ended[worker] = at
            wall += rows[-1][0] - at
        else:
            network += json.loads(told).get("network_seconds", math.nan)
    return network / wall if wall and math.isfinite(network) else None


def main() -> None:
    """Segment twice, once under fire, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=200)
    parser.add_argument("--bad", type=int, default=10)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--command-kills", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--executor", default="local", choices=("local", "ray", "slurm"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        scans, plain, shot = (Path(home, name) for name in ("scans", "undisturbed", "disturbed"))
        good, bad = furnish(scans, options.scans, options.bad)
        model = options.model or random_model(Path(home, "model"))
        started = time.monotonic()
        undisturbed = json.loads(subprocess.run(command(model, scans, plain, options), stdout=subprocess.PIPE).stdout)
        first = time.monotonic() - started
        started = time.monotonic()
        words = command(model, scans, shot, options)
        result, num_shots, num_ends = disturbed(words, shot, len(good) + len(bad), options)
        second = time.monotonic() - started
        committed = Counter(case for (case,) in ask(shot, "SELECT id FROM log WHERE event IN ('done', 'recovered')"))
        differing = [
            name
            for name in good
            if not (shot / f"{name}.nii.gz").exists()
            or not np.array_equal(*(np.asarray(nib.load(out / f"{name}.nii.gz").dataobj) for out in (plain, shot)))
        ]
        failed = sorted(entry["case"] for entry in result["failed"])
        left = sorted({path.name for path in shot.iterdir()} - OVER - {f"{name}.nii.gz" for name in good})
        recovered = len(ask(shot, "SELECT 1 FROM log WHERE event = 'recovered'"))
        checks = {
            "every good scan committed exactly once": committed == Counter(good),
            "label maps equal, bit by bit": not differing,
            "every bad scan reported, and no other": failed == sorted(bad),
            "bad scans as in the undisturbed run": result["failed"] == undisturbed["failed"],
            "nothing half-written": not left,
        }
        print(f"{len(good)} good and {len(bad)} bad scans, {options.workers} workers, {options.executor}")
        print(f"undisturbed {first:.0f} s, {60 * len(good) / first:.1f} scans a minute with the start; ", end="")
        share = share_in_network(plain)
        print(f"share of the wall time in the network {'not told' if share is None else f'{share:.2f}'}")
        print(f"disturbed {second:.0f} s: {num_shots} workers and {num_ends} commands killed; ", end="")
        print(f"{recovered} commits recovered from files that were there")
        for what, holds in checks.items():
            print(f"{'yes' if holds else 'NO '}  {what}")
        if not all(checks.values()):
            print(f"differing {differing}, left {left}, failed {failed}, committed {committed.most_common(3)}")
            raise SystemExit(1)


if __name__ == "__main__":
    main()
