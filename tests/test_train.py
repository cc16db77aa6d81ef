"""The main job, from a workflow to a model, an MLflow run and tables; killed and resumed; broken and told so."""

import csv
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import save_file

from medseg.build.data import manifest
from medseg.build.provenance import CODE
from medseg.build.training import check_parts, recorded
from medseg.compare import compare
from medseg.data.volume_io import read_label, read_volume, write_volume
from medseg.errors import MedsegError
from medseg.geometry import Geometry, Volume
from medseg.nets import NETS
from medseg.outcome import print_result, training_summary
from medseg.predict import predict
from medseg.tracking.mlflow_tracker import open_store
from medseg.tracking.runs import experiment_runs
from medseg.train import train
from medseg.workflow import Workflow

LABELS = {"0": "background", "1": "bright", "2": "dark"}
WORKFLOW = """\
name: tiny
data:
  manifest: dataset.json
  spacing_mm: [1.0, 1.0, 2.0]
network: {name: unet, args: {channels: [4, 8], dropout: 0.1}}
train:
  patch_size: [16, 16, 8]
  batch_size: 2
  iterations: 12
  validate_every: 4
  precision: fp32
  ema: 0.9
validate: {fold: 0}
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty working folder with a data set of six small scans and a workflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_scans(tmp_path)
    (tmp_path / "tiny.yaml").write_text(WORKFLOW)
    return tmp_path


def write_scans(folder: Path) -> None:
    generator = np.random.default_rng(0)
    training = []
    affine = np.array([[-1.0, 0, 0, 10], [0, -1.0, 0, 20], [0, 0, 2.0, -30], [0, 0, 0, 1]])  # LPS, as CTs come
    for n in range(6):
        label = np.zeros((1, 20, 22, 12), np.uint8)
        i, j, k = generator.integers(2, (8, 8, 5))
        label[0, i : i + 6, j : j + 6, k : k + 4] = 1
        label[0, i : i + 6, j + 7 : j + 11, k : k + 4] = 2
        image = generator.normal(0, 20, label.shape) + np.choose(label, [0, 200, -200])
        paths = {kind: f"{kind}s/scan_{n}.nii.gz" for kind in ("image", "label")}
        for kind, array in (("image", image.astype(np.int16)), ("label", label)):
            (folder / f"{kind}s").mkdir(exist_ok=True)
            write_volume(folder / paths[kind], Volume(array, Geometry((20, 22, 12), affine)))
        training.append({**paths, "fold": n % 3})
    (folder / "dataset.json").write_text(json.dumps({"name": "tiny", "labels": LABELS, "training": training}))


def start(home: Path, *arguments: str, program: Sequence[str] = ("-m", "medseg.cli")) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *program, "train", "tiny.yaml", *arguments],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(home: Path, *arguments: str) -> dict:
    process = start(home, "--json", *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


def histories(home: Path, run_id: str) -> dict[str, dict[int, float]]:
    """Every metric of an MLflow run, step by step; fails where a step stands twice."""
    client = open_store(f"sqlite:///{home / 'mlflow.db'}")
    found = {}
    for key in client.get_run(run_id).data.metrics:
        history = client.get_metric_history(run_id, key)
        found[key] = {metric.step: metric.value for metric in history}
        assert len(found[key]) == len(history), f"{key} stands more than once for a step"
    return found


def test_a_training_leaves_a_model_tables_pictures_and_an_mlflow_run(home):
    result = train(Path("tiny.yaml"), overrides=["track.tensorboard=true"])
    folder = Path(result["run_dir"])
    assert folder.parent == Path("runs/tiny")
    for name in ("workflow.yaml", "manifest.json", "validation.csv", "per_case.csv", "log.jsonl", "model/model.json"):
        assert (folder / name).exists(), name
    rows = list(csv.DictReader((folder / "per_case.csv").read_text().splitlines()))
    assert {row["case"] for row in rows} == {"scan_0", "scan_3"}
    assert len(list(folder.glob("pictures/step-*/*.png"))) == 6
    metrics = histories(home, result["mlflow_run_id"])
    assert sorted(metrics["val/dice/bright"]) == [4, 8, 12]
    for metric in ("dice", "hd95"):
        known = [float(row[metric]) for row in rows if row["organ"] == "bright" and row[metric]]
        found = metrics.get(f"final/best/{metric}/bright", {12: math.nan})
        assert found == pytest.approx({12: np.mean(known) if known else math.nan}, rel=1e-4, nan_ok=True)
    client = open_store(f"sqlite:///{home / 'mlflow.db'}")
    recorded = client.get_run(result["mlflow_run_id"])
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params["train.batch_size"] == "2"
    tags = {"fold": "0", "network": "unet", "loss": "dice+cross_entropy", "spatial_dims": "3"}
    tags["manifest_sha256"] = result["manifest_sha256"]
    found = {name: recorded.data.tags[f"medseg.{name}"] for name in tags}
    assert found == tags
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CODE, capture_output=True, text=True).stdout.strip()
    assert recorded.data.tags["medseg.git_commit"] == (commit or "unknown")  # of medseg's code, not of this folder
    assert recorded.data.tags["workflow.git_commit"] == "unknown"
    (told,) = recorded.inputs.dataset_inputs
    assert (told.dataset.name, told.dataset.digest) == ("tiny", result["manifest_sha256"][:36])
    assert "scan_" not in str(told.to_dictionary())
    assert str(home) not in str(told.to_dictionary())
    assert "per_case.json" in recorded.data.tags["mlflow.loggedArtifacts"]
    (events,) = (folder / "tensorboard").iterdir()
    assert events.read_bytes().count(b"val/dice/bright") == 3
    assert events.read_bytes().count(b"\x89PNG") == 6
    assert set(result["best"]["dice"]) == {"bright", "dark"}
    assert not list(home.rglob("*.tmp"))


def test_the_trained_model_segments_on_the_scans_own_grid(home):
    result = train(Path("tiny.yaml"))
    done = predict(result["run_dir"], [Path("images/scan_1.nii.gz")], output=Path("out"))
    (written,) = done["done"]
    scan, segmentation = read_volume(Path("images/scan_1.nii.gz")), read_label(Path(written["output"]))
    assert segmentation.geometry.matches(scan.geometry, tolerance=1e-6)


def test_all_folds_are_nested_runs_under_a_parent_with_the_joint_result(home, capsys):
    result = train(Path("tiny.yaml"), fold="all", overrides=["train.iterations=4"])
    client = open_store(f"sqlite:///{home / 'mlflow.db'}")
    for fold in result["folds"]:
        tags = client.get_run(fold["mlflow_run_id"]).data.tags
        assert tags["mlflow.parentRunId"] == result["mlflow_run_id"]
        assert tags["medseg.manifest_sha256"] == result["folds"][0]["manifest_sha256"]
    parent = client.get_run(result["mlflow_run_id"])
    assert parent.data.tags["medseg.manifest_sha256"] == result["folds"][0]["manifest_sha256"]
    assert [told.dataset.name for told in parent.inputs.dataset_inputs] == ["tiny"]
    assert [run.run_id for run in experiment_runs("tiny")] == [result["mlflow_run_id"]]
    joint = histories(home, result["mlflow_run_id"])
    assert joint["cv/mean_dice"][0] == pytest.approx(result["best"]["mean_dice"])
    assert joint["cv/dice/bright"][0] == pytest.approx(result["best"]["dice"]["bright"])
    assert len(result["folds"]) == 3
    rows = list(csv.DictReader(Path(result["per_case"]).read_text().splitlines()))
    assert sorted({row["case"] for row in rows}) == [f"scan_{n}" for n in range(6)]
    bright = [float(row["dice"]) for row in rows if row["organ"] == "bright"]
    assert result["best"]["dice"]["bright"] == pytest.approx(np.mean(bright))
    assert result["model_dir"] is None
    assert [Path(model).parent.name for model in result["model_dirs"]] == ["fold_0", "fold_1", "fold_2"]
    compared = compare([result["run_dir"], result["mlflow_run_id"]])["comparisons"][0]["organs"]["bright"]
    assert (compared["n"], compared["ties"]) == (6, 6)
    assert len(predict(result["run_dir"], [Path("images/scan_1.nii.gz")], output=Path("out"))["done"]) == 1
    capsys.readouterr()
    print_result(result, as_json=False, table=training_summary)
    assert "fold 2, iteration 4" in capsys.readouterr().out


def test_all_folds_killed_before_the_first_has_a_folder_are_found_by_resume(home):
    arguments = ("--fold", "all", "--set", "train.iterations=4")
    killed = start(home, *arguments, program=[str(KILLED), "writing a case into the cache", "1"])
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = (home / "runs" / "tiny").iterdir()
    assert not list(folder.glob("fold_*"))
    result = train(Path("tiny.yaml"), fold="all", overrides=["train.iterations=4"], resume=True)
    assert home / result["run_dir"] == folder
    (folder / "result.json").unlink()
    with pytest.raises(MedsegError, match=r"E-RESUME .*'iterations: 4' is now 'iterations: 8'"):
        train(Path("tiny.yaml"), fold="all", overrides=["train.iterations=8"], resume=True)


def test_fine_tuning_starts_from_a_models_weights(home):
    first = train(Path("tiny.yaml"), overrides=["train.iterations=4", "train.ema=0"])
    second = train(
        Path("tiny.yaml"),
        overrides=[
            "train.iterations=1",
            "train.ema=0",
            "train.optimizer.lr=1e-12",
            f"init={{model: {first['run_dir']}, skip: [head]}}",
        ],
    )
    before, after = (load_file(Path(r["model_dir"]) / "model.safetensors") for r in (first, second))
    for name in before:
        assert np.allclose(before[name], after[name], atol=1e-6) == (not name.startswith("head")), name


@pytest.mark.parametrize(("supervised", "then"), [("true", "false"), ("false", "true")])
def test_heads_that_only_deep_supervision_has_do_not_keep_fine_tuning_from_starting(home, supervised, then):
    common = ["train.iterations=1", "network.args.channels=[4, 4, 4, 4]"]
    first = train(Path("tiny.yaml"), overrides=[*common, f"train.deep_supervision={supervised}"])
    again = ["train.optimizer.lr=1e-12", f"init={{model: {first['run_dir']}}}", f"train.deep_supervision={then}"]
    second = train(Path("tiny.yaml"), overrides=[*common, *again])
    before, after = (load_file(Path(r["model_dir"]) / "model.safetensors") for r in (first, second))
    assert ("extra_heads.0.weight" in before) == (supervised == "true")
    assert ("extra_heads.0.weight" in after) == (then == "true")
    assert np.allclose(before["head.weight"], after["head.weight"], atol=1e-6)


def test_a_slice_network_trains_on_volumes_and_predicts_volumes(home):
    overrides = ["train.patch_size=[16, 16]", "data.context_slices=1", "train.iterations=4"]
    result = train(Path("tiny.yaml"), overrides=overrides)
    done = predict(result["run_dir"], [Path("images/scan_1.nii.gz")], output=Path("out"))
    assert read_label(Path(done["done"][0]["output"])).array.shape == (1, 20, 22, 12)


def test_a_dry_run_says_how_long_and_leaves_nothing(home, capsys):
    result = train(Path("tiny.yaml"), dry_run=True)
    assert result["seconds_per_iteration"] > 0
    told = capsys.readouterr().err
    assert "4 training and 2 held-out cases" in told
    assert re.search(r"a validation case: about \d+ s on this machine", told)
    assert not Path("runs").exists()
    assert not Path("mlflow.db").exists()


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            "name: unet",
            "name: unett",
            r"tiny\.yaml:5:11 network.name?: no network is called 'unett'; did you mean 'unet'\?",
        ),
        (
            "channels: [4, 8]",
            "chanels: [4, 8]",
            r"tiny\.yaml:5:\d+ network.*: network 'unet' has no argument 'chanels'; did",
        ),
        ("[16, 16, 8]", "[1, 16, 8]", r"tiny\.yaml:7:3 train\.patch_size: .*at least 2 × 2 × 2"),
        (
            "dataset.json",
            "datset.json",
            r"tiny\.yaml:3:3 data\.manifest: .*datset\.json: cannot be read .*did you mean 'dataset",
        ),
        (
            "dataset.json",
            "${NOT_SET}/x.json",
            r"tiny\.yaml:3:3 data\.manifest: .*needs the environment variable NOT_SET",
        ),
        (
            "fold: 0}",
            "fold: 0, unions: {all: [1, 9]}}",
            r"tiny\.yaml:13:\d+ validate\.unions\.all: labels \[9\] are not",
        ),
        ("name: tiny", "name: tiny\nloss: []", r"tiny\.yaml:2:1 loss: "),
        (
            "name: tiny",
            "name: tiny\ninfer: {postprocess: {keep_largset: [bright]}}",
            r"tiny\.yaml:2:\d+ infer\.postprocess",
        ),
        (
            "name: tiny",
            "name: tiny\nloss: [{name: cross_entropy, args: {class_weights: [1, 2]}}]",
            r"tiny\.yaml:2:1 loss: .*class_weights has 2 entries but the network has 3 outputs",
        ),
        ("channels: [4, 8]", "channels: [-1, 8]", r"tiny\.yaml:5:\d+ network\.args: network 'unet': "),
        ("name: tiny", "name: tiny\naugment: [{name: flip, args: {axes: 5}}]", r"tiny\.yaml:2:1 augment: "),
        (
            "[1.0, 1.0, 2.0]",
            "[1.0, 1.0, 2.0]\n  intensity: {clip: [250, -175]}",
            r"tiny\.yaml:5:3 data\.intensity.*lowest",
        ),
        (
            "batch_size: 2",
            "batch_size: 20",
            r"tiny\.yaml:8:3 train\.batch_size: batch_size 20 but fold 0 has 4 training cases",
        ),
        (
            "fold: 0",
            "fold: 7",
            r"tiny\.yaml:13:12 validate\.fold: .*fold 7 holds out 0 of 6 cases; folds here: \[0, 1, 2\]",
        ),
    ],
)
def test_a_workflow_that_cannot_be_built_is_refused_with_its_line(home, before, after, expected):
    Path("tiny.yaml").write_text(WORKFLOW.replace(before, after))
    with pytest.raises(MedsegError, match=expected):
        train(Path("tiny.yaml"))
    assert not [name for name in ("cache", "runs", "mlflow.db") if Path(name).exists()]


def test_a_declared_label_that_no_case_has_is_refused(home):
    data = json.loads(Path("dataset.json").read_text())
    data["labels"]["3"] = "spleen"
    Path("dataset.json").write_text(json.dumps(data))
    with pytest.raises(MedsegError, match=r"E-LABEL-ABSENT .*'spleen', which no training case"):
        train(Path("tiny.yaml"))


def test_a_scan_on_both_sides_under_two_names_is_refused(home):
    data = json.loads(Path("dataset.json").read_text())
    shutil.copy("images/scan_1.nii.gz", "images/copy.nii.gz")
    data["training"].append({**data["training"][1], "image": "images/copy.nii.gz", "fold": 0})
    Path("dataset.json").write_text(json.dumps(data))
    with pytest.raises(MedsegError, match=r"E-LEAKAGE .*case copy, which is held out, is that of training case scan_1"):
        train(Path("tiny.yaml"))


def test_a_union_called_like_an_organ_is_refused(home):
    Path("tiny.yaml").write_text(WORKFLOW.replace("{fold: 0}", "{fold: 0, unions: {bright: [1, 2]}}"))
    with pytest.raises(MedsegError, match=r"E-UNION .*'bright' is an organ already"):
        train(Path("tiny.yaml"))


def test_a_servers_password_is_not_written_down(home):
    uri = f"sqlite://me:hidden@/{home / 'mlflow.db'}"
    plan = Workflow.load(Path("tiny.yaml"), [f"track.uri={uri}"])
    assert "hidden" not in recorded(plan).to_yaml()


def test_a_run_resumes_only_with_its_own_workflow(home):
    result = train(Path("tiny.yaml"), overrides=["train.iterations=4"])
    with pytest.raises(MedsegError, match="E-OUTPUT-EXISTS"):
        train(Path("tiny.yaml"), output=Path(result["run_dir"]))
    with pytest.raises(MedsegError, match=r"E-RESUME .*'iterations: 4' is now 'iterations: 12'"):
        train(Path("tiny.yaml"), output=Path(result["run_dir"]), resume=True)


def test_a_run_resumes_only_with_its_own_fold(home):
    result = train(Path("tiny.yaml"), fold="1", overrides=["train.iterations=4"])
    with pytest.raises(MedsegError, match=r"E-RESUME .*'fold: 1' is now 'fold: 0'"):
        train(Path("tiny.yaml"), overrides=["train.iterations=4"], output=Path(result["run_dir"]), resume=True)


def test_resume_finds_the_latest_run_that_did_not_finish(home):
    first = train(Path("tiny.yaml"), overrides=["train.iterations=4"])
    with pytest.raises(MedsegError, match="holds no unfinished run"):
        train(Path("tiny.yaml"), overrides=["train.iterations=4"], resume=True)
    (Path(first["run_dir"]) / "result.json").unlink()  # as if killed while scoring
    second = train(Path("tiny.yaml"), overrides=["train.iterations=4"], resume=True)
    assert {key: second[key] for key in ("run_dir", "mlflow_run_id", "best")} == {
        key: first[key] for key in ("run_dir", "mlflow_run_id", "best")
    }
    histories(home, second["mlflow_run_id"])


def test_sigterm_saves_and_says_how_to_go_on(home):
    process = start(home, "--set", "train.iterations=100000", "--output", "out")
    wait_for(home / "out" / "checkpoints" / "last" / "step-00000004.sha256", process)
    os.killpg(process.pid, signal.SIGTERM)  # as schedulers do: data-loading workers get it too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    command = re.search(r"medseg train tiny\.yaml .* --output out --resume", err.replace("\n", " "))
    assert command, err
    recorded = json.loads((home / "out" / "tracking.json").read_text())
    client = open_store(f"sqlite:///{home / 'mlflow.db'}")
    assert client.get_run(recorded["run_id"]).info.status == "KILLED"


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


KILLED = Path(__file__).with_name("killed.py")
MOMENTS = runpy.run_path(str(KILLED))["MOMENTS"]


def killed_and_resumed(home: Path, *kills: tuple[str, float]) -> dict:
    """A run SIGKILLed at each of some moments (see killed.py), then resumed to the end."""
    for moment, count in kills:
        process = start(home, "--output", "broken", "--resume", program=[str(KILLED), moment, str(count)])
        out, err = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, f"{moment} {count}: {out}{err}"
    print((home / "killed.txt").read_text())
    (home / "killed.txt").unlink()
    return run(home, "--output", "broken", "--resume")


def assert_as_if_never_killed(home: Path, whole: dict, broken: dict) -> None:
    weights = [load_file(Path(home, r["model_dir"]) / "model.safetensors") for r in (whole, broken)]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    expected, found = (histories(home, r["mlflow_run_id"]) for r in (whole, broken))
    del expected["seconds"], found["seconds"]  # the only ones that may differ
    assert found == expected
    client = open_store(f"sqlite:///{home / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "tiny")
    assert len(client.search_runs([experiment.experiment_id])) == 2
    files = [
        {str(p.relative_to(home / r["run_dir"])) for p in (home / r["run_dir"]).rglob("*")} for r in (whole, broken)
    ]
    assert files[0] == files[1]
    assert not list(home.rglob("*.tmp"))
    for name in ("validation.csv", "per_case.csv", "log.jsonl"):
        assert (home / whole["run_dir"] / name).read_text() == (home / broken["run_dir"] / name).read_text()


def test_a_run_killed_with_sigkill_and_resumed_ends_as_if_never_killed(home):
    broken = killed_and_resumed(home, ("writing a checkpoint", 2), ("validating", 3))
    assert_as_if_never_killed(home, run(home, "--output", "whole"), broken)


def test_a_worker_that_is_killed_is_replaced_and_the_result_is_the_same(home):
    program = [str(KILLED), "the first worker reads a sample", "7"]
    process = start(home, "--json", "--output", "broken", program=program)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("W-WORKER") == 1
    assert "a data-loading worker was ended by SIGKILL" in err
    (home / "killed.txt").unlink()
    assert_as_if_never_killed(home, train(Path("tiny.yaml"), output=Path("whole")), json.loads(out))


def test_workers_that_are_killed_again_and_again_end_a_training_that_fewer_can_go_on_with(home):
    program = [str(KILLED), "each worker reads a sample", "5"]
    process = start(home, "--set", "train.workers=1", "--output", "broken", program=program)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 4
    assert err.count("W-WORKER") == 2
    message = " ".join(err.split())
    assert re.search(
        r"E-WORKER --set train\.workers: .*(SIGKILL|broke its connection), 3 times in a row; .*use fewer train\.workers",
        message,
    )
    assert "medseg train tiny.yaml --set train.workers=1 --output broken --resume" in message
    assert "Traceback" not in err
    client = open_store(f"sqlite:///{home / 'mlflow.db'}")
    run_id = json.loads((home / "broken" / "tracking.json").read_text())["run_id"]
    assert client.get_run(run_id).info.status == "FAILED"
    (home / "killed.txt").unlink()
    broken = train(Path("tiny.yaml"), overrides=["train.workers=0"], output=Path("broken"), resume=True)
    whole = train(Path("tiny.yaml"), overrides=["train.workers=0"], output=Path("whole"))
    assert_as_if_never_killed(home, whole, broken)


LIMITED = """
import resource
from pathlib import Path
import medseg.train
from medseg.cli import main

now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 900_000_000,) * 2)
main()
"""


def test_a_patch_that_the_memory_cannot_hold_is_told_with_what_to_change(home):
    overrides = (
        "train.patch_size=[128, 128, 128]",
        "network.args.channels=[64, 64]",
        "augment=none",
        "train.workers=0",
    )
    arguments = [part for override in overrides for part in ("--set", override)]
    process = start(home, "--output", "out", *arguments, program=["-c", LIMITED])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 4, err
    expected = (
        r"E-MEMORY --set train\.patch_size: the memory is not enough: 1\.07 GB more were asked for; batch_size is 2"
    )
    assert re.search(expected + r" and patch_size \[128, 128, 128\]: .*train\.accumulate", " ".join(err.split())), err
    assert "Traceback" not in err
    client = open_store(f"sqlite:///{home / 'mlflow.db'}")
    run_id = json.loads((home / "out" / "tracking.json").read_text())["run_id"]
    assert client.get_run(run_id).info.status == "FAILED"


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment_that_writes_or_computes(home, moment):
    broken = killed_and_resumed(home, (moment, 1))
    assert_as_if_never_killed(home, run(home, "--output", "whole"), broken)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
def test_kills_at_random_moments(home, trial):
    whole = run(home, "--output", "whole")
    shutil.rmtree(home / "cache")  # so that a kill may come while cases are prepared
    delay = random.Random(trial).uniform(0, 0.7 * whole["seconds"])
    assert_as_if_never_killed(home, whole, killed_and_resumed(home, ("after", delay)))


def test_published_weights_start_the_encoder(home):
    """Of pictures with three colors, for volumes of one channel; a step size of nothing leaves them as they begin."""
    picture = NETS["segnet"].network(2, 3, 2, **NETS["segnet"].tiny, norm="batch").encoder.state_dict()
    save_file(picture, "vgg.safetensors")
    network = {"name": "segnet", "args": {**NETS["segnet"].tiny, "norm": "batch"}, "encoder_weights": "vgg.safetensors"}
    overrides = [f"network={json.dumps(network)}", "train.optimizer.lr=1e-12", "train.precision=fp32"]
    run = Path(train(Path("tiny.yaml"), overrides=overrides)["run_dir"])
    weights = load_file(run / "model" / "model.safetensors")
    name, kernel = next((name, tensor) for name, tensor in picture.items() if tensor.ndim == 4)
    found = weights[f"encoder.{name}"]  # (O, 1, 3, 3, 3): the colors summed, the plane in the middle
    np.testing.assert_allclose(found[:, 0, :, :, 1], kernel.sum(1).transpose(1, 2), atol=1e-6)
    assert abs(found[..., [0, 2]]).max() < 1e-9


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("segnet", "gone.pth", r"gone\.pth: is no file"),
        ("segnet", "tiny.yaml", r"E-ENCODER-WEIGHTS"),
        ("unet", "tiny.yaml", r"UNet has no encoder that weights are published for; remove encoder_weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_case_is_read(home, name, file, expected):
    network = {"name": name, "args": NETS[name].tiny, "encoder_weights": file}
    with pytest.raises(MedsegError, match=expected):
        train(Path("tiny.yaml"), overrides=[f"network={json.dumps(network)}"])
    assert not Path("cache").exists()


@pytest.mark.parametrize(
    ("loss", "warnings"),
    [
        ("[dice, {name: boundary, weight: {from: 0, to: 1, over: 8}}]", []),
        (
            "[dice, {name: boundary, weight: {from: 0, to: 1, over: 16}}]",
            [
                "W-RAMP --set loss[1].weight: goes from 0 to 1 over 16 iterations, but only to 0.5 in the 8 of train.iter"
            ],
        ),
        ("[cldice, {name: hausdorff, weight: 0}]", ["W-LOSS --set loss: cldice is meant to stand beside a loss of ov"]),
        ("[boundary, cross_entropy]", []),
    ],
)
def test_a_loss_that_may_not_do_what_it_is_meant_to_is_warned_of(home, caplog, loss, warnings):
    workflow = Workflow.load(home / "tiny.yaml", [f"loss={loss}", "train.iterations=8"])
    check_parts(workflow, manifest(workflow))
    assert len(caplog.messages) == len(warnings)
    for message, expected in zip(caplog.messages, warnings, strict=True):
        assert message.startswith(expected)


def test_balanced_class_weights_are_recorded_and_told_as_the_numbers_they_stand_for(home, capsys):
    terms = "[{name: cross_entropy, args: {class_weights: balanced}}, {name: boundary, weight: {from: 0, to: 0.1, over: 2}}]"
    overrides = [f"loss={terms}", "train.iterations=2", "train.precision=bf16"]
    result = train(home / "tiny.yaml", overrides=overrides, output=home / "run")
    found = Workflow.load(Path(result["run_dir"], "workflow.yaml")).loss
    voxels = np.array([20 * 22 * 12 - 144 - 96, 144, 96])  # of every scan
    assert found[0].args["class_weights"] == pytest.approx(voxels.sum() / (3 * voxels), rel=1e-5)
    assert "class_weights: balanced means background 0.349, bright 12.2, dark 18.3\n" in capsys.readouterr().err
    (line,) = Path(result["run_dir"], "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2  # the last iteration, however short the training
    assert train(home / "tiny.yaml", overrides=overrides, output=home / "run", resume=True)["iterations"] == 2
    with pytest.raises(MedsegError, match="is 'balance'; it must be a list of numbers or balanced or null"):
        train(home / "tiny.yaml", overrides=[f"loss={terms.replace('balanced', 'balance')}"])
