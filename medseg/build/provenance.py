"""Where a run comes from: data, code, versions, hardware."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import monai
import torch

from medseg import __version__
from medseg.build.data import TrainingData
from medseg.data.manifest import Manifest
from medseg.workflow import Workflow

CODE = Path(__file__).parents[2]
"""Where the package lies; a git clone, unless it was installed."""

MANIFEST_TAG = "medseg.manifest_sha256"


def run_tags(plan: Workflow, data: TrainingData) -> dict[str, str]:
    """What a person may want to search runs by."""
    content = json.dumps(sorted((path.name, digest) for path, digest in data.hashes.items()))
    return {
        **workflow_tags(plan),
        "medseg.fold": str(data.fold),
        "medseg.data_hash": hashlib.sha256(content.encode()).hexdigest()[:16],
        MANIFEST_TAG: manifest_sha256(data.manifest, data.hashes),
    }


def workflow_tags(plan: Workflow) -> dict[str, str]:
    """The part of `run_tags` that is known before any case is read."""
    return {
        "medseg.workflow": plan.name,
        "medseg.network": plan.network.name,
        "medseg.loss": "+".join(term.name for term in plan.loss),
        "medseg.spatial_dims": str(len(plan.train.patch_size)),
        "medseg.git_commit": _git_commit(CODE) if (CODE / ".git").exists() else "unknown",  # installed: see the version
        "workflow.git_commit": _git_commit(plan.file.parent),
        "medseg.version": __version__,
        "medseg.versions": f"medseg {__version__}, torch {torch.__version__}, monai {monai.__version__}",
        "medseg.hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
    }


def manifest_sha256(source: Manifest, hashes: Mapping[Path, str]) -> str:
    """Hash of what is learned from: labels, channels, and each case's fold and files, wherever they lie.

    Args:
        source: The data set.
        hashes: sha256 of each of its training cases' files.
    """
    folds = source.folds()
    cases = sorted((case.id, folds[case.id], [hashes[file] for file in case.files]) for case in source.training)
    content = {"labels": source.labels.to_dict(), "channels": source.channels, "cases": cases}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _git_commit(folder: Path) -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown"
    return found.stdout.strip() or "unknown"
