"""Segmenting a CT from file to file: medseg, a MONAI script and nnU-Net's predictor with the same weights and windows.

    PYTHONPATH=NNUNET python benchmarks/inference.py [--shape 512 512 300] [--classes 25] [--channels 16 32 64 128]
        [--patch 96] [--rounds 3] [--threads 2] [--sides floor medseg monai nnunet] [--precision fp32] [--crop none]
        [--device cpu] [--spacing 0.8 0.8 1.0] [--file CT.nii.gz] [--output DIR]

The floor is the network alone on as many windows as medseg predicts. The others read the same .nii.gz, resample it to
1.5 mm, normalize it alike, slide over it with an overlap of one half and Gaussian weights, bring logits back to its own
grid and write the highest as a .nii.gz of bytes. The network is medseg's U-Net with random weights in all of them. Each
run has a process of its own in which everything is imported and the model is loaded before the clock starts; memory is
what the process adds from there on at its peak (VmHWM, set back, − VmRSS), the GPU's not counted.

`monai` is written as the spleen bundle of MONAI's model zoo is, but resamples in float32 where Spacingd's default is
float64, saves bytes, and interpolates logits as the others do, where the bundle has a softmax; `monai_labels` takes the
argmax first and brings labels back by the nearest neighbor, as the whole-body bundle does: less work, and stairs of
1.5 mm. `nnunet` is nnU-Net (nnunetv2, wherever Python finds it) as it predicts without worker processes, its default
functions resampling, `nnunet_torch` by resample_torch_fornnunet. It is let off cubic interpolation of the scan (linear
here as in the others) and more threads than --threads. It adds logits up in half precision, and --precision is not its:
fp32 on a CPU, fp16 on a GPU. It does not turn scans to RAS; the kernels' axes are swapped for it, so that it computes
the same of a scan that lies as RAS in its file (the phantom does).

At the end: windows that the network saw, and the share of voxels labelled as by medseg. They differ by window weights
(MONAI's are never below 0.001) and places (MONAI's are no even steps), nnU-Net's half precision, and resampling: MONAI's
Spacingd puts its voxels elsewhere, nnU-Net normalizes first. Random weights have many near ties.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SPACING_MM = (1.5, 1.5, 1.5)
CLIP = (-175.0, 250.0)
MEAN, STD = 40.0, 100.0
SIDES = ("floor", "medseg", "monai", "nnunet", "monai_labels", "nnunet_torch")

SEEN: Counter[str] = Counter()
"""Windows that this process's network saw, by their size."""


def model(options: argparse.Namespace) -> Any:
    """The network, the same in every process."""
    import torch

    from medseg.nets import NETS

    torch.manual_seed(0)
    network = NETS["unet"].network(
        spatial_dims=3, in_channels=1, out_channels=options.classes, channels=tuple(options.channels)
    )
    network.register_forward_pre_hook(
        lambda _, given: SEEN.update({"×".join(map(str, given[0].shape[2:])): len(given[0])})
    )
    return network.eval().to(options.device)


def specification(options: argparse.Namespace) -> Any:
    """What medseg needs to know of it."""
    from medseg.labels import Labels
    from medseg.model import Intensity, ModelSpec, Preprocessing, Window

    labels = Labels({n: f"organ {n}" if n else "background" for n in range(options.classes)})
    preprocessing = Preprocessing(spacing_mm=SPACING_MM, intensity=(Intensity(CLIP, "foreground", MEAN, STD),))
    window = Window((options.patch,) * 3, crop=options.crop)
    return ModelSpec("unet", {}, 3, ("CT",), labels, preprocessing, window)


def result(options: argparse.Namespace, side: str) -> Path:
    """Where a side writes its labels."""
    return options.output / f"{options.file.name.removesuffix('.nii.gz')}_{side}.nii.gz"


def medseg_side(options: argparse.Namespace) -> Callable[[], None]:
    """`medseg.inference.predictor`, as `medseg predict` uses it."""
    from medseg.data.volume_io import write_volume
    from medseg.inference.predictor import Predictor
    from medseg.memory import keep_freed_memory

    keep_freed_memory()
    predictor = Predictor(specification(options), model(options), device=options.device, precision=options.precision)

    def run() -> None:
        found = predictor.segment([options.file])
        write_volume(result(options, "medseg"), found.label)

    return run


def floor_side(options: argparse.Namespace) -> Callable[[], None]:
    """The network on random windows, as many as medseg predicts of this scan."""
    import torch

    from medseg.data.transforms import preprocess
    from medseg.inference.windows import Windows

    network, spec = model(options), specification(options)
    body_in = spec.channels if options.crop != "none" else ()
    prepared = preprocess([options.file], None, spec.preprocessing, body_in=body_in)
    count = Windows.over(prepared.image.shape[1:], spec.window, body=prepared.body).num_computed
    image = torch.rand(1, 1, *(options.patch,) * 3, device=options.device)

    def run() -> None:
        with (
            torch.inference_mode(),
            torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"),
        ):
            for _ in range(count):
                network(image)
        if options.device == "cuda":
            torch.cuda.synchronize()

    return run


def monai_side(options: argparse.Namespace, *, labels_back: bool = False) -> Callable[[], None]:
    """LoadImaged … Invertd, as MONAI's bundles do it: logits go back to the scan's grid, or labels."""
    import torch
    from monai import transforms as mt
    from monai.inferers import sliding_window_inference

    network = model(options)
    ras = (("L", "R"), ("P", "A"), ("I", "S"))
    low, high = ((value - MEAN) / STD for value in CLIP)
    before = mt.Compose(
        [
            mt.LoadImaged("image"),
            mt.EnsureChannelFirstd("image"),
            mt.Orientationd("image", axcodes="RAS", labels=ras),
            mt.Spacingd("image", SPACING_MM, mode="bilinear", dtype=np.float32),
            mt.ScaleIntensityRanged("image", *CLIP, low, high, clip=True),
        ]
    )
    invert = mt.Invertd("pred", before, orig_keys="image", nearest_interp=labels_back)
    argmax = mt.AsDiscreted("pred", argmax=True)
    save = mt.SaveImaged(
        "pred", output_dir=options.output, output_postfix=options.work, output_dtype=np.uint8, resample=False,
        separate_folder=False, print_log=False,
    )  # fmt: skip
    after = mt.Compose([argmax, invert, save] if labels_back else [invert, argmax, save])

    def run() -> None:
        data = before({"image": options.file})
        image = data["image"][None].to(options.device)
        with (
            torch.inference_mode(),
            torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"),
        ):
            logits = sliding_window_inference(image, (options.patch,) * 3, 1, network, overlap=0.5, mode="gaussian")
        data["pred"] = logits[0]
        del image, logits
        after(data)

    return run


def nnunet_side(options: argparse.Namespace, *, by_torch: bool = False) -> Callable[[], None]:
    """NnUNetPredictor on the same windows; its preprocessing, its export to labels on the source grid."""
    import torch

    os.environ["nnUNet_def_n_proc"] = str(torch.get_num_threads())  # noqa: SIM112  (its spelling; its own is 8)
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans, dataset = nnunet_plans(options, by_torch=by_torch)
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    _ = manager.image_reader_writer_class, configuration.preprocessor_class  # found by importing all there are
    network = turned(model(options))
    predictor = nnUNetPredictor(
        tile_step_size=0.5, use_gaussian=True, use_mirroring=False, device=torch.device(options.device),
        perform_everything_on_device=options.device == "cuda", allow_tqdm=False,
    )  # fmt: skip
    predictor.manual_initialization(
        network, manager, configuration, [network.state_dict()], dataset, "nnUNetTrainer", None
    )
    output = str(result(options, options.work)).removesuffix(".nii.gz")

    def run() -> None:
        predictor.predict_from_files_sequential([[str(options.file)]], [output])

    return run


def turned(network: Any) -> Any:
    """The network with its kernels' axes swapped: nnU-Net keeps scans as (z, y, x)."""
    for weights in network.parameters():
        if weights.ndim == 5:
            weights.data = weights.data.transpose(2, 4).contiguous()
    return network


def nnunet_plans(options: argparse.Namespace, *, by_torch: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans of a network with this patch and spacing, and the data set's description.

    Resampling is as nnU-Net's ExperimentPlanner or nnUNetPlannerResEncL_torchres plan it, but for the scan's order.
    """
    import torch

    function = "resample_torch_fornnunet" if by_torch else "resample_data_or_seg_to_shape"
    resampling: dict[str, Any] = {}
    for what in ("data", "seg", "probabilities"):
        if by_torch:
            how: dict[str, Any] = {"force_separate_z": False, "memefficient_seg_resampling": False,
                   "num_threads": torch.get_num_threads()}  # fmt: skip
        else:
            how = {"order": 1, "order_z": 0, "force_separate_z": None}
        resampling[f"resampling_fn_{what}"] = function
        resampling[f"resampling_fn_{what}_kwargs"] = {"is_seg": what == "seg", **how}
    configuration = {
        "data_identifier": "x", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [options.patch] * 3, "spacing": list(SPACING_MM), "median_image_size_in_voxels": [200] * 3,
        "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False], "batch_dice": False,
        "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []}, **resampling,
    }  # fmt: skip
    plans = {
        "dataset_name": "Dataset001_x", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
        "original_median_spacing_after_transp": list(SPACING_MM), "original_median_shape_after_transp": [200] * 3,
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "label_manager": "LabelManager",
        "experiment_planner_used": "ExperimentPlanner", "configurations": {"3d_fullres": configuration},
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": MEAN, "std": STD, "percentile_00_5": CLIP[0], "percentile_99_5": CLIP[1]}
        },
    }  # fmt: skip
    labels = {"background": 0} | {f"organ {n}": n for n in range(1, options.classes)}
    return plans, {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 1}


def work(options: argparse.Namespace) -> None:
    """One side once, in this process: says what it took."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    sides = {
        "floor": floor_side,
        "medseg": medseg_side,
        "monai": monai_side,
        "monai_labels": lambda o: monai_side(o, labels_back=True),
        "nnunet": nnunet_side,
        "nnunet_torch": lambda o: nnunet_side(o, by_torch=True),
    }
    run = sides[options.work](options)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = memory("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    run()
    took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    print(json.dumps({**took, "mb": (memory("VmHWM") - before) / 1e6, "windows": SEEN}))


def memory(field: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def agreement(file: Path, reference: Path) -> str:
    """How many voxels have the same label."""
    import nibabel

    found, expected = nibabel.load(file), nibabel.load(reference)
    if found.shape != expected.shape or not np.allclose(found.affine, expected.affine, atol=1e-3):
        return "on another grid"
    return f"{np.mean(np.asarray(found.dataobj) == np.asarray(expected.dataobj)):.2%} as medseg"


def make_scan(shape: list[int], spacing_mm: list[float], file: Path, *, number: int = 0) -> None:
    """A phantom of this size, as RAS in its file; another one for each number."""
    import nibabel

    from medseg.data.phantom.cases import ct_case
    from medseg.data.volume_io import write_volume

    write_volume(file, ct_case(number, tuple(shape), spacing_mm=tuple(spacing_mm)).image)  # type: ignore[arg-type]
    image = nibabel.load(file)
    nibabel.save(nibabel.as_closest_canonical(nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine)), file)


def main() -> None:
    """Run the sides in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 300])
    parser.add_argument("--spacing", type=float, nargs=3, default=[0.8, 0.8, 1.0])
    parser.add_argument("--classes", type=int, default=25)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:4]))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--crop", choices=["none", "air", "body"], default="none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--file", type=Path, help="a CT, instead of a phantom")
    parser.add_argument("--output", type=Path, help="where to write")
    parser.add_argument("--work", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.output = options.output or Path(temporary)
        options.output.mkdir(parents=True, exist_ok=True)
        if options.file is None:
            options.file = Path(temporary, "scan.nii.gz")
            make_scan(options.shape, options.spacing, options.file)
        arguments = [*sys.argv[1:], "--file", str(options.file), "--output", str(options.output)]
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
        for _ in range(options.rounds):
            for side in options.sides:
                done = subprocess.run(
                    [sys.executable, __file__, *arguments, "--work", side],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    print(f"{side}: ended with {done.returncode}", file=sys.stderr)
                    continue
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{side}: {found[side][-1]}", file=sys.stderr)
        show(found, options)


def show(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """A line for each side."""
    first = next((runs for runs in found.values() if runs), [])
    for side, runs in found.items():
        if not runs:
            continue
        seconds = sorted(run["seconds"] for run in runs)
        ratio = median(seconds) / median(run["seconds"] for run in first)
        peak = max(run["mb"] for run in runs)
        windows = ", ".join(f"{count} windows of {size}" for size, count in runs[0]["windows"].items())
        line = f"{side:12} {median(seconds):8.1f} s ({seconds[0]:.1f}–{seconds[-1]:.1f})  {ratio:5.2f} × {options.sides[0]}"
        line += f"  {median(run['cpu'] for run in runs):8.1f} s of CPU  peak {peak:6.0f} MB  {windows}"
        if side != "floor" and found.get("medseg"):
            line += f"  {agreement(result(options, side), result(options, 'medseg'))}"
        print(line)


if __name__ == "__main__":
    main()
