from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from medseg import __version__
from medseg.cli import app
from medseg.errors import DataError, Interrupted, Problems, TrainingError, WorkflowError
from medseg.losses import LOSSES
from medseg.metrics import METRICS

Fake = Callable[..., list[dict[str, Any]]]


def medseg(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a function in the place of a verb; gives the list of the calls it gets."""

    def install(verb: str, answer: Any = None, *, module: str | None = None) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            calls.append({"args": args, **kwargs})
            print("a library that chatters")
            if isinstance(answer, BaseException):
                raise answer
            return {} if answer is None else answer

        stand = ModuleType(module or f"medseg.{verb}")
        setattr(stand, verb, stand_in)
        stand.rank_experiment = stand_in  # what the command imports beside `compare`
        monkeypatch.setitem(sys.modules, stand.__name__, stand)
        monkeypatch.setattr(
            "medseg.workflow.Workflow.load", lambda path, overrides: None
        )  # `train` looks before it goes
        return calls

    return install


def test_help_is_instant_and_loads_no_framework() -> None:
    script = """
import resource, sys
from medseg.cli import app
try:
    app(["--help"])
except SystemExit as end:
    assert end.code == 0
used = resource.getrusage(resource.RUSAGE_SELF)
loaded = {"torch", "monai", "mlflow", "numpy", "SimpleITK", "lightning_fabric"} & sys.modules.keys()
print(f"{used.ru_utime + used.ru_stime} {sorted(loaded)}", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, loaded = done.stderr.split(" ", 1)
    assert "predict" in done.stdout
    assert loaded.strip() == "[]"
    assert float(seconds) < 0.5


def test_version_is_the_packages() -> None:
    assert medseg("--version").stdout == f"medseg {__version__}\n"


@pytest.mark.parametrize("command", ["train", "predict", "evaluate", "compare", "nets", "sync", "ui", "data phantom"])
def test_every_command_has_help(command: str) -> None:
    result = medseg(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"{command} [OPTIONS]" in result.stdout


def test_train_hands_its_arguments_to_the_verb(fake: Fake) -> None:
    calls = fake("train")
    result = medseg(
        "train", "w.yaml", "--set", "train.batch_size=4", "--set", "name=x", "--fold", "all",
        "--output", "out", "--resume", "--device", "cpu", "--dry-run",
    )  # fmt: skip
    assert result.exit_code == 0
    assert calls == [
        {
            "args": (Path("w.yaml"),),
            "overrides": ["train.batch_size=4", "name=x"],
            "fold": "all",
            "output": Path("out"),
            "resume": True,
            "device": "cpu",
            "dry_run": True,
        }
    ]


def test_predict_hands_its_arguments_to_the_verb(fake: Fake) -> None:
    calls = fake("predict", {"done": [], "failed": [], "seconds": 0.0})
    result = medseg(
        "predict", "models:/liver@best", "a.nii.gz", "b", "-o", "out", "--format", "mha", "--split", "test",
        "--overlap", "0.25", "--crop", "none", "--with", "runs/other", "--tta", "--prune", "2", "--probabilities", "--workers", "3", "--slurm", "partition=gpu", "--slurm", "mem_gb=16", "--force", "--uri", "http://x",
    )  # fmt: skip
    assert result.exit_code == 0
    assert calls == [
        {
            "args": (["models:/liver@best", "runs/other"], [Path("a.nii.gz"), Path("b")]),
            "output": Path("out"),
            "format": "mha",
            "split": "test",
            "overlap": 0.25,
            "crop": "none",
            "tta": True,
            "prune": 2,
            "probabilities": True,
            "uncertainty": False,
            "entropy": False,
            "device": "auto",
            "workers": 3,
            "executor": "local",
            "address": None,
            "slurm": {"partition": "gpu", "mem_gb": "16"},
            "resume": False,
            "force": True,
            "report": True,
            "dry_run": False,
            "tracking_uri": "http://x",
        }
    ]
    medseg("predict", "model", "a.nii", "-o", "out", "--no-report")
    assert calls[1]["report"] is False


def test_evaluate_splits_the_metrics_at_commas(fake: Fake) -> None:
    calls = fake("evaluate", {"cases": 0, "mean": {}, "per_organ": {}})
    assert medseg("evaluate", "p", "r", "--metrics", "dice, hd95", "--json").exit_code == 0
    assert calls[0]["metrics"] == ("dice", "hd95")


def test_compare_hands_over_all_runs_in_their_order(fake: Fake) -> None:
    calls = fake("compare", {"warnings": []})
    assert medseg("compare", "b", "a", "c", "--json").exit_code == 0
    assert calls[0]["args"] == (["b", "a", "c"],)
    assert calls[0]["log"] is True


@pytest.mark.parametrize(("worse", "code"), [(False, 0), (True, 1)])
def test_a_worse_run_is_an_exit_code_of_its_own_after_the_result(fake: Fake, worse: bool, code: int) -> None:
    found = {"label": "now", "worse": worse, "why_worse": ["mean difference -0.0100"]}
    fake("compare", {"baseline_label": "before", "comparisons": [found]})
    done = medseg("compare", "before", "now", "--fail-if-worse", "--json")
    assert done.exit_code == code
    assert json.loads(done.stdout)["comparisons"][0]["worse"] is worse
    assert ("worse than before in dice: now (mean difference -0.0100)" in done.stderr) is worse
    assert medseg("compare", "before", "now", "--json").exit_code == 0


def test_an_experiment_is_ranked_instead_of_runs(fake: Fake) -> None:
    assert medseg("compare", "a", "--experiment", "liver").exit_code == 2
    assert "E-COMPARE-RUNS" in medseg("compare", "--experiment", "liver", "--fail-if-worse").stderr


def test_json_is_one_object_on_stdout_and_all_else_goes_to_stderr(fake: Fake) -> None:
    fake("train", {"run_dir": Path("runs/x"), "best": {"step": 5, "dice": {"liver": float("nan")}}, "seconds": 1.5})
    result = medseg("train", "w.yaml", "--json")
    expected = {"run_dir": "runs/x", "best": {"step": 5, "dice": {"liver": None}}, "seconds": 1.5}
    assert json.loads(result.stdout) == expected
    assert result.stdout.count("\n") == 1
    assert result.stderr == "a library that chatters\n"


def test_json_knows_numpys_numbers_and_has_null_for_what_json_lacks(fake: Fake) -> None:
    numbers = [np.int64(3), np.float32(0.5), np.float64("inf"), True, None, Path("x")]
    fake("train", {"numbers": numbers})
    assert json.loads(medseg("train", "w.yaml", "--json").stdout) == {"numbers": [3, 0.5, None, True, None, "x"]}


def test_without_json_the_result_is_a_listing(fake: Fake) -> None:
    fake("train", {"run_dir": "runs/[x]", "best": {"mean_dice": 0.98765}})
    assert medseg("train", "w.yaml").stdout == "run_dir  runs/[x]\nbest\n  mean_dice  0.9877\n"


def test_evaluate_exits_with_3_where_cases_were_skipped(fake: Fake) -> None:
    fake("evaluate", {"failed": [{"case": "x", "error_id": "E-X", "message": "E-X x: is broken"}]})
    assert medseg("evaluate", "p", "r", "--skip-failed", "--json").exit_code == 3


@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [
        (WorkflowError("E-FIELD", "is missing", where="w.yaml:3:1"), 2),
        (DataError("E-SPACING", "spacing [0, 1, 1] mm"), 2),
        (Problems([WorkflowError("E-A", "one"), DataError("E-B", "two")]), 2),
        (TrainingError("E-NAN", "loss is NaN"), 4),
        (Interrupted("E-INTERRUPTED", "stopped at step 7"), 130),
    ],
)
def test_a_users_fault_is_its_message_and_its_exit_code(fake: Fake, fault: Exception, exit_code: int) -> None:
    fake("train", fault)
    result = medseg("train", "w.yaml", "--json")
    assert result.exit_code == exit_code
    assert result.stderr == f"a library that chatters\n{fault}\n"
    assert result.stdout == ""


def test_a_long_message_is_not_wrapped(fake: Fake) -> None:
    fake("train", WorkflowError("E-FIELD", "word " * 60 + "end", where="a/long/path.yaml"))
    assert len(medseg("train", "w.yaml").stderr.splitlines()) == 2


def test_an_internal_error_is_one_line_and_exit_code_4(fake: Fake) -> None:
    fake("train", ZeroDivisionError("division by zero\nand more"))
    result = medseg("train", "w.yaml")
    assert result.exit_code == 4
    assert result.stderr.splitlines()[1:] == [
        "internal error: ZeroDivisionError: division by zero; "
        "this is a fault of medseg: run with --debug for the traceback"
    ]


@pytest.mark.parametrize("arguments", [("--debug", "train", "w.yaml"), ("train", "w.yaml", "--debug")])
def test_debug_shows_the_traceback_wherever_it_stands(fake: Fake, arguments: tuple[str, ...]) -> None:
    fake("train", WorkflowError("E-FIELD", "is missing"))
    result = medseg(*arguments)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("E-FIELD is missing\n")


def test_the_environment_can_ask_for_tracebacks(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSEG_DEBUG", "1")
    fake("train", KeyError("x"))
    assert "Traceback (most recent call last)" in medseg("train", "w.yaml").stderr


def test_ctrl_c_exits_with_130(fake: Fake) -> None:
    fake("train", KeyboardInterrupt())
    result = medseg("train", "w.yaml")
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted\n")


def test_predict_exits_with_3_when_some_cases_failed(fake: Fake) -> None:
    failed = [{"case": "a", "input": "a.nii", "error_id": "E-SPACING", "message": "E-SPACING spacing 0"}]
    fake("predict", {"done": [], "failed": failed, "seconds": 1.0})
    result = medseg("predict", "model", "a.nii", "-o", "out", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["failed"] == failed
    assert (
        medseg("predict", "model", "a.nii", "-o", "out").stdout == "0 segmented in 1 s, 1 failed\nE-SPACING spacing 0\n"
    )


def test_a_failed_scans_message_is_one_line_however_long(fake: Fake) -> None:
    failed = [{"case": "a", "input": "a.nii", "error_id": "E-X", "message": f"E-X {'folder/' * 30}a.nii: is empty"}]
    fake("predict", {"done": [], "failed": failed, "seconds": 1.0})
    told = medseg("predict", "model", "a.nii", "-o", "out").stdout.splitlines()
    assert told[1:] == [failed[0]["message"]]


def test_a_mistake_in_a_workflow_is_told_before_any_framework_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text("nam: liver\n")
    script = """
import sys
from medseg.cli import app
try:
    app(["train", "w.yaml"])
except SystemExit as end:
    print(end.code, sorted({"torch", "monai", "mlflow"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "2 []\n"
    assert "w.yaml:1:1 nam: not a field; did you mean 'name'?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Missing argument"),
        (["train", "w.yaml", "--device", "tpu"], "'tpu' is not one of"),
        (["predict", "model", "scan.nii"], "Missing option '--output'"),
        (["trian"], "No such command 'trian'"),
    ],
)
def test_a_wrong_call_exits_with_2_and_says_why(arguments: list[str], message: str) -> None:
    result = medseg(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_ui_exits_as_the_server_does(fake: Fake) -> None:
    calls = fake("serve_ui", 7, module="medseg.tracking.ui")
    assert medseg("ui", "--uri", "sqlite:///x.db", "--port", "5001").exit_code == 7
    assert calls == [{"args": ("sqlite:///x.db", "127.0.0.1", 5001), "auth": False}]


def test_sync_says_how_much_it_sent(fake: Fake) -> None:
    fake("sync", 12, module="medseg.tracking.mlflow_tracker")
    assert json.loads(medseg("sync", "runs/x", "--json").stdout) == {"run_dir": "runs/x", "sent": 12}


def test_nets_lists_names_papers_and_uses() -> None:
    listed = json.loads(medseg("nets", "--json").stdout)
    assert listed["unet"]["title"] == "U-Net"
    assert all(entry["paper"] and entry["good_for"] for entry in listed.values())
    assert listed["unet"]["parameters"]["3d"] == 16_544_130
    told = json.loads(medseg("nets", "unet", "--json").stdout)
    assert told["name"] == "unet" and told["arguments"] and told["structure"]
    assert listed["unet"].items() <= told.items()
    assert "U-Net" in medseg("nets").stdout
    only_2d = json.loads(medseg("nets", "--spatial-dims", "2", "--json").stdout)
    assert set(only_2d["unet"]["min_size"]) == {"2d"}


def test_nets_draws_one_network(tmp_path: Path) -> None:
    file = tmp_path / "enet.svg"
    assert f"drawn: {file}" in medseg("nets", "enet", "--picture", str(file)).stdout.replace("\n", "")
    assert file.read_text(encoding="utf-8").startswith("<svg")
    for arguments in (["--picture", str(file)], ["enet", "--picture", str(tmp_path / "enet.png")]):
        refused = medseg("nets", *arguments)
        assert refused.exit_code == 2 and "--picture" in refused.stderr


def test_nets_of_an_unknown_name_suggests_the_close_one() -> None:
    result = medseg("nets", "unte")
    assert result.exit_code == 2
    assert "did you mean 'unet'?" in result.stderr


def test_losses_lists_names_papers_and_uses() -> None:
    listed = json.loads(medseg("losses", "--json").stdout)
    assert {"dice", "cross_entropy"} <= listed.keys()
    assert all(entry["good_for"] for entry in listed.values())


@pytest.mark.parametrize(("command", "table"), [("losses", LOSSES), ("metrics", METRICS)])
def test_names_that_one_has_to_type_are_whole_in_a_narrow_console(
    monkeypatch: pytest.MonkeyPatch, command: str, table: dict[str, Any]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = medseg(command).stdout.splitlines()
    assert {line.split(" ")[0] for line in lines} >= table.keys()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)


def test_every_loss_and_metric_tells_its_arguments_and_meaning() -> None:
    for command, table in (("losses", LOSSES), ("metrics", METRICS)):
        for name in table:
            told = json.loads(medseg(command, name, "--json").stdout)
            assert told["name"] == name and told["about"] and told["paper"]
            assert not [argument["name"] for argument in told["arguments"] if not argument["meaning"]], name
    page = medseg("losses", "focal").stdout
    assert "Lin et al. 2017" in page and re.search(r"gamma +2\.0 +How much; 0 is cross-entropy\.", page)
    told = json.loads(medseg("metrics", "nsd:2", "--json").stdout)
    assert told["name"] == "nsd" and told["groups"] == ["surface", "all"]
    assert [(argument["name"], argument["default"]) for argument in told["arguments"]] == [("tolerance_mm", 1.0)]
    assert "surface: hd, hd95, assd, nsd\n" in re.sub(" +\n", "\n", medseg("metrics").stdout)
    assert "did you mean 'boundary'?" in medseg("losses", "boundry").stderr


def test_phantom_makes_a_data_set(tmp_path: Path) -> None:
    result = medseg("data", "phantom", str(tmp_path / "set"), "--cases", "1", "--json")
    assert json.loads(result.stdout) == {"manifest": str(tmp_path / "set" / "dataset.json"), "cases": 1}
    assert (tmp_path / "set" / "images" / "case_000.nii.gz").exists()


def test_a_file_where_a_folder_must_be_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    result = medseg("data", "phantom", str(tmp_path / "taken"), "--cases", "1")
    assert result.exit_code == 2
    assert f"E-FILE {tmp_path / 'taken'}: is a file; give a folder" in result.stderr


def test_a_folder_that_takes_no_file_is_named_rather_than_the_hidden_file(fake: Fake) -> None:
    fake("train", FileNotFoundError(2, "No such file or directory", "/proc/.1a2b3c4d.host.17.tmp"))
    assert medseg("train", "liver.yaml").stderr.splitlines()[1:] == ["E-FILE /proc: No such file or directory"]


def test_schema_describes_a_workflow(tmp_path: Path) -> None:
    file = tmp_path / "new" / "schema.json"
    assert medseg("schema", "-o", str(file)).exit_code == 0
    schema = json.loads(file.read_text())
    assert {"data", "network", "train"} <= schema["properties"].keys()
    assert json.loads(medseg("schema").stdout) == schema


def test_a_full_disk_is_told_in_one_message(fake: Fake) -> None:
    fake("train", OSError(errno.ENOSPC, "No space left on device"))
    result = medseg("train", "w.yaml")
    assert result.exit_code == 4
    assert result.stderr.endswith(
        "E-DISK: No space left on device; make room, then go on where this ended (--resume)\n"
    )


def test_register_tells_how_predict_finds_the_model(fake: Fake) -> None:
    calls = fake("register", {"model": "models:/liver@champion"}, module="medseg.tracking.models")
    result = medseg("register", "runs/x", "liver", "--alias", "champion", "--json")
    assert json.loads(result.stdout) == {"model": "models:/liver@champion"}
    assert calls == [{"args": ("runs/x", "liver"), "alias": "champion", "tracking_uri": None}]
