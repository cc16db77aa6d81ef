"""Every network of the table, by its name in a workflow: trained, used to predict, evaluated."""

import json
from pathlib import Path

import pytest

from medseg.data.volume_io import read_geometry
from medseg.data_tools import make_phantom
from medseg.evaluate import evaluate
from medseg.nets import NETS
from medseg.predict import predict
from medseg.train import train

pytestmark = pytest.mark.slow

WORKFLOWS = Path(__file__).parents[1] / "workflows"
FEW = ["train.iterations=2", "train.validate_every=2", "train.batch_size=2", "train.workers=0", "validate.max_cases=1"]


def named(dims: int) -> list[str]:
    return [name for name, entry in NETS.items() if dims in entry.spatial_dims]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    """A manifest of three small phantoms."""
    folder = tmp_path_factory.mktemp("phantom")
    return Path(make_phantom(folder / "cases", num_cases=3, shape=(48, 48, 40))["manifest"])


@pytest.fixture
def nuclei(tmp_path, data_dir) -> Path:
    """A manifest of six real pictures."""
    data = json.loads((WORKFLOWS.parent / "data_manifests" / "nuclei.json").read_text())
    data["training"] = [{**entry, "fold": n % 2} for n, entry in enumerate(data["training"][:6])]
    (tmp_path / "nuclei.json").write_text(json.dumps(data))
    return tmp_path / "nuclei.json"


def go(workflow: str, manifest: Path, name: str, overrides: list[str]) -> None:
    network = json.dumps({"name": name, "args": NETS[name].tiny})
    chosen = [f"data.manifest={manifest}", f"network={network}", *FEW, *overrides]
    run = train(WORKFLOWS / workflow, overrides=chosen)["run_dir"]
    found = predict(run, [manifest], split="fold_0", output=Path("out"))
    assert not found["failed"] and found["done"]
    for done in found["done"]:
        assert read_geometry(Path(done["output"])).shape == read_geometry(Path(done["input"])).shape
    assert evaluate(Path("out"), manifest, split="fold_0")["cases"] == len(found["done"])


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize("name", named(3))
def test_in_3d_on_phantoms(name, phantom):
    go("liver.yaml", phantom, name, ["train.patch_size=[32, 32, 32]"])


@pytest.mark.parametrize("name", named(2))
def test_in_2d_on_slices_of_phantoms(name, phantom):
    go("liver.yaml", phantom, name, ["train.patch_size=[32, 32]"])


@pytest.mark.real_data
@pytest.mark.parametrize("name", named(2))
def test_in_2d_on_real_pictures(name, nuclei):
    go("nuclei.yaml", nuclei, name, ["train.patch_size=[64, 64]"])
