"""Where a run comes from: data, code, versions, hardware."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import monai
import torch

from medseg import __version__
from medseg.build.data import TrainingData
from medseg.workflow import Workflow


def run_tags(plan: Workflow, data: TrainingData) -> dict[str, str]:
    """What a person may want to search runs by."""
    content = json.dumps(sorted((path.name, digest) for path, digest in data.hashes.items()))
    return {
        "medseg.workflow": plan.name,
        "medseg.network": plan.network.name,
        "medseg.fold": str(data.fold),
        "medseg.data_hash": hashlib.sha256(content.encode()).hexdigest()[:16],
        "medseg.git_commit": _git_commit(plan.file.parent),
        "medseg.versions": f"medseg {__version__}, torch {torch.__version__}, monai {monai.__version__}",
        "medseg.hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
    }


def _git_commit(folder: Path) -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown"
    return found.stdout.strip() or "unknown"
