"""Scans a minute: a folder of CTs by `medseg predict`, and by `nnUNetv2_predict` with the same weights and windows.

    PYTHONPATH=NNUNET python benchmarks/throughput.py [--scans 20] [--size 256 256 160] [--spacing 0.8 0.8 1.0]
        [--workers 1] [--sides medseg nnunet] [--rounds 3] [--classes 25] [--channels 16 32 64 128] [--patch 96]
        [--crop none] [--device cpu] [--output DIR]

Phantoms are segmented by the two commands, as a person types them: files in, files out, 1.5 mm, overlap of one half,
Gaussian weights, no mirroring. The network is medseg's U-Net with random weights; nnU-Net (nnunetv2, wherever Python
finds it) is given it in a model folder, the kernels' axes swapped, and computes it in the precision that medseg chooses
on this machine (bf16 where the hardware has it, which nnU-Net's own networks on a CPU have not). It reads ahead and
writes in three processes each, its default; `nnunet_torch` has resample_torch_fornnunet instead of its default
functions, `nnunet_fp32` no bf16.

Printed for each: scans a minute of the whole command, and after the first scan (of several workers: after
as many), from the time at which its segmentation was written to that of the last one's, which leaves starting and
loading out; the ratio of the latter to medseg's; the peak memory of all its processes, seen from outside (PSS, which
counts what processes share once); and the voxels of one scan that are labelled as by medseg: random weights have many
near ties, which bf16 decides by chance. For medseg besides: the network's time by workers × wall time, after each
worker's first scan. At --workers 1 the network has all cores; with more they are divided.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from batch import share_in_network
from inference import agreement, make_scan, nnunet_plans, specification, turned
from torch import Tensor, nn

from medseg.inference.predictor import has_bf16
from medseg.model import save_model
from medseg.nets import NETS

SIDES = ("medseg", "nnunet", "nnunet_torch", "nnunet_fp32")
LOOK_EVERY_S = 0.25
NNUNET = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as run; run()"  # nnUNetv2_predict


class Network(nn.Module):
    """medseg's U-Net as nnU-Net calls it."""

    def __init__(
        self, input_channels: int, num_classes: int, *, channels: list[int], bf16: bool, deep_supervision: bool = False
    ) -> None:
        super().__init__()
        self.unet = NETS["unet"].network(
            spatial_dims=3, in_channels=input_channels, out_channels=num_classes, channels=tuple(channels)
        )
        self.bf16 = bf16

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, I, J, K) → (B, R, I, J, K)."""
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.bf16):
            return self.unet(image)


def medseg_command(options: argparse.Namespace, scans: Path, output: Path) -> list[str]:
    """The model, and what a person types."""
    spec = replace(specification(options), network_args={"channels": options.channels})
    model = Path(f"{output}_model")
    save_model(model, spec, network(options).unet.state_dict())
    words = [sys.executable, "-m", "medseg", "predict", str(model), str(scans), "-o", str(output)]
    return [*words, "--workers", str(options.workers), "--device", options.device, "--json"]


def nnunet_command(options: argparse.Namespace, side: str, scans: Path, output: Path) -> list[str]:
    """The same as a trained nnU-Net."""
    plans, dataset = nnunet_plans(options, by_torch=side == "nnunet_torch")
    bf16 = has_bf16(options.device) and side != "nnunet_fp32"
    plans["configurations"]["3d_fullres"]["architecture"] = {
        "network_class_name": "throughput.Network", "arch_kwargs": {"channels": options.channels, "bf16": bf16},
        "_kw_requires_import": [],
    }  # fmt: skip
    model = Path(f"{output}_model", "Dataset001_x", "nnUNetTrainer__nnUNetPlans__3d_fullres")
    (model / "fold_0").mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(dataset))
    checkpoint = {
        "trainer_name": "nnUNetTrainer", "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": None, "network_weights": turned(network(options)).state_dict(),
    }  # fmt: skip
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    words = [sys.executable, "-c", NNUNET, "-i", str(scans), "-o", str(output), "-d", "Dataset001_x", "-f", "0"]
    return [*words, "-c", "3d_fullres", "-device", options.device, "--disable_tta", "--disable_progress_bar"]


def network(options: argparse.Namespace) -> Network:
    """The network, the same at each call."""
    torch.manual_seed(0)
    return Network(1, options.classes, channels=options.channels, bf16=False)


def measured(options: argparse.Namespace, side: str, scans: Path, output: Path) -> dict[str, float]:
    """One command from its start to its end."""
    words = medseg_command(options, scans, output) if side == "medseg" else nnunet_command(options, side, scans, output)
    found_by = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    folders = {f"nnUNet_{name}": f"{output}_model" for name in ("raw", "preprocessed", "results")}
    threads = {"nnUNet_def_n_proc": str(os.cpu_count())}  # its own is 8
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(found_by)} | folders | threads
    peak = 0
    started = time.monotonic()
    with Path(f"{output}.log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(LOOK_EVERY_S)
    seconds = time.monotonic() - started
    written = sorted(file.stat().st_mtime for file in output.glob("*.nii.gz"))
    if process.returncode or len(written) != options.scans:
        raise SystemExit(f"{side} ended with {process.returncode}:\n{Path(log.name).read_text()[-2000:]}")
    found = {"seconds": seconds, "a_minute": 60 * len(written) / seconds, "mb": peak / 1e6}
    first = options.workers if side == "medseg" else 1  # as many are begun at once
    found["a_minute_after_first"] = 60 * (len(written) - first) / (written[-1] - written[first - 1])
    if side == "medseg":
        found["share"] = share_in_network(output) or 0.0
    return found


def memory(session: int) -> int:
    """Bytes of all processes of a session; what several of them hold in common counts once."""
    total = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                pss = next(
                    line for line in (folder / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:")
                )
                total += int(pss.split()[1]) * 1024
        except (OSError, StopIteration):  # it has just ended
            continue
    return total


def show(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """A line for each side."""
    middle = {side: {name: median(run[name] for run in runs) for name in runs[0]} for side, runs in found.items()}
    first = next(iter(middle.values()))
    precision = "bf16" if has_bf16(options.device) else "fp32"
    print(f"{options.scans} scans of {'×'.join(map(str, options.size))}, {options.workers} workers, {precision}")
    print("| | scans a minute | after the first | to the first side | peak MB | voxels | in the network |")
    print("|---|---|---|---|---|---|---|")
    for side, row in middle.items():
        paces = [run["a_minute_after_first"] for run in found[side]]
        pace = f"{row['a_minute_after_first']:.1f} ({min(paces):.1f}–{max(paces):.1f})"
        ratio = row["a_minute_after_first"] / first["a_minute_after_first"]
        alike = "" if side == "medseg" or "medseg" not in found else labelled_alike(options, side)
        share = f"{row['share']:.3f}" if "share" in row else ""
        print(f"| {side} | {row['a_minute']:.1f} | {pace} | {ratio:.2f} × | {row['mb']:.0f} | {alike} | {share} |")


def labelled_alike(options: argparse.Namespace, side: str) -> str:
    """How many voxels of the first scan have the same label."""
    file, reference = (sorted((options.output / f"{name}_0").glob("*.nii.gz"))[0] for name in (side, "medseg"))
    return agreement(file, reference)


def main() -> None:
    """Run the sides in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=20)
    parser.add_argument("--size", type=int, nargs=3, default=[256, 256, 160])
    parser.add_argument("--spacing", type=float, nargs=3, default=[0.8, 0.8, 1.0], help="of the scans, in mm")
    parser.add_argument("--workers", type=int, default=1, help="of medseg")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:2]))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--classes", type=int, default=25)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--crop", choices=["none", "air", "body"], default="none")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="a new folder for scans, models and segmentations")
    options = parser.parse_args()
    if options.scans <= options.workers:
        parser.error("--scans: more than there are workers")
    with tempfile.TemporaryDirectory() as temporary:
        options.output = (options.output or Path(temporary)).resolve()
        scans = options.output / "scans"
        scans.mkdir(parents=True)
        for number in range(options.scans):
            make_scan(options.size, options.spacing, scans / f"scan_{number:02d}_0000.nii.gz", number=number)
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
        for round_ in range(options.rounds):
            for side in options.sides:
                found[side].append(measured(options, side, scans, options.output / f"{side}_{round_}"))
                print(f"{side}: {found[side][-1]}", file=sys.stderr)
        show(found, options)


if __name__ == "__main__":
    main()
