import json

import pytest

from medseg.errors import WorkflowError
from medseg.training.run_folder import RunFolder


def test_two_trainings_cannot_share_a_folder(tmp_path):
    first = RunFolder(tmp_path / "run")
    with pytest.raises(WorkflowError, match="E-RUN-LOCKED"):
        RunFolder(tmp_path / "run")
    first.close()
    RunFolder(tmp_path / "run").close()


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_torn_lines(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.log(step, {"train/loss": 1.0})
        folder.add_validation(step, [("a", "liver", 0.5)])
    with folder.log_file.open("a") as stream:
        stream.write('{"step": 4')
    with folder.validation_table.open("a") as stream:
        stream.write("20,a")
    folder.continue_from(20)
    assert [json.loads(line)["step"] for line in folder.log_file.read_text().splitlines()] == [10, 20]
    assert folder.validation_table.read_text() == "step,case,organ,dice\n10,a,liver,0.5\n20,a,liver,0.5\n"
    folder.close()
