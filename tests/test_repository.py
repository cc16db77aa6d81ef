"""What holds for the repository as a whole."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "medseg").rglob("*.py"))
WORKFLOWS = sorted((ROOT / "workflows").glob("*.yaml"))
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml")),
    *(path for folder in ("medseg", "tests", "workflows", "data_manifests", "benchmarks", ".ci")
      for path in (ROOT / folder).rglob("*") if path.suffix in {"", ".py", ".yaml", ".json", ".md", ".toml"}),
]  # fmt: skip


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_every_module_says_its_job_in_its_first_line(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree)
    assert docstring, f"{relative(module)} has no docstring"
    assert module.read_text(encoding="utf-8").startswith('"""')
    assert docstring.splitlines()[0].strip()


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    private = ["/" + start for start in ("work/", "root/", "home/", "Users/", "opt/")]
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in TEXTS
        if path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if any(start in line.replace("://", "") for start in private)
    ]
    assert found == []


def test_importing_medseg_loads_nothing_else() -> None:
    script = "import sys; before = set(sys.modules); import medseg; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["medseg"]


def test_imports_point_down_only() -> None:
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", lint, "--no-cache"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


def test_constraints_pin_every_dependency_exactly() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    missing = [one for one in wanted if one.split(">=")[0].split("[")[0].lower().replace("_", "-") not in pins]
    assert missing == []
    assert not [name for name, version in pins.items() if "+" in version], "a local build such as torch's +cpu"


@pytest.mark.parametrize("path", WORKFLOWS, ids=relative)
def test_every_workflow_loads(path: Path) -> None:
    from medseg.workflow import Workflow

    assert Workflow.load(path).name


@pytest.mark.parametrize("path", WORKFLOWS, ids=relative)
def test_every_workflow_opens_with_its_command_and_expected_dice(path: Path) -> None:
    comment = [line for line in path.read_text().split("\nname:")[0].splitlines() if line.startswith("#")]
    opening = "\n".join(comment)
    assert f"medseg train workflows/{path.name}" in opening or "make train" in opening
    assert "Dice" in opening


def test_the_schema_beside_the_workflows_is_todays() -> None:
    from medseg.workflow import json_schema

    written = json.loads((ROOT / "workflows" / "schema.json").read_text())
    assert written == json_schema(), "run: medseg schema -o workflows/schema.json"


@pytest.mark.parametrize("path", sorted((ROOT / "data_manifests").glob("*.json")), ids=relative)
def test_every_manifest_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg.data.manifest import Manifest

    monkeypatch.setenv("MEDSEG_DATA", "data")  # reading a manifest touches none of its scans
    assert Manifest.load(path).training


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    ("environment", "exit_code", "message"),
    [
        ({}, 0, "1 real-data tests deselected: set MEDSEG_DATA"),
        ({"MEDSEG_DATA": "."}, 0, "2 passed"),
        ({"MEDSEG_REQUIRE_DATA": "1"}, 4, "MEDSEG_DATA is not set"),
        ({"MEDSEG_DATA": "no/such/folder"}, 4, "is not a folder"),
    ],
)
def test_real_data_tests_run_where_there_is_data_and_are_counted_where_not(
    tmp_path: Path, workers: str, environment: dict[str, str], exit_code: int, message: str
) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    source = "import pytest\n\n@pytest.mark.real_data\ndef test_scan(data_dir): pass\n\ndef test_number(): pass\n"
    (tmp_path / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-n", workers, "-c", str(ROOT / "pyproject.toml"), "--rootdir", "."]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MEDSEG_", "PYTEST_"))}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "."],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=clean | environment,
    )  # fmt: skip
    assert done.returncode == exit_code
    assert message in done.stdout + done.stderr
