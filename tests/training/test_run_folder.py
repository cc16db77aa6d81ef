import json
import subprocess
import sys

import pytest

from medseg.errors import WorkflowError
from medseg.training.run_folder import RunFolder

HOLDER = """
import sys, time
from pathlib import Path
from medseg.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_cannot_train_into_the_same_folder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(WorkflowError, match="E-RUN-LOCKED"):
            RunFolder(tmp_path)
        holder.kill()
    RunFolder(tmp_path).close()  # the lock ends with its process


def test_what_a_run_was_made_from_cannot_change(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.record("workflow.yaml", "a: 1\nb: 2\n")
        folder.record("workflow.yaml", "a: 1\nb: 2\n")
        with pytest.raises(WorkflowError, match=r"E-RESUME .*'b: 2' is now 'b: 3'"):
            folder.record("workflow.yaml", "a: 1\nb: 3\n")
        folder.record("workflow.yaml", "a: 1\nb: 3\n", free=("b:",))
        assert (tmp_path / "workflow.yaml").read_text() == "a: 1\nb: 3\n"


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_torn_lines(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.log(step, {"train/loss": 1.0})
        folder.add_validation(step, [("a", "kidney, left", 0.5)])
    with folder.log_file.open("a") as stream:
        stream.write('{"step": 4')
    with folder.validation_table.open("a") as stream:
        stream.write("20,a")
    folder.continue_from(20)
    assert [json.loads(line)["step"] for line in folder.log_file.read_text().splitlines()] == [10, 20]
    assert (
        folder.validation_table.read_text()
        == 'step,case,organ,dice\n10,a,"kidney, left",0.5\n20,a,"kidney, left",0.5\n'
    )
    folder.close()


def test_a_table_torn_in_its_first_line_begins_anew(tmp_path):
    folder = RunFolder(tmp_path)
    for torn in ("", "step,ca", "step,case,organ,dice\n4,a,"):
        folder.validation_table.write_text(torn)
        folder.continue_from(4)
        assert folder.validation_table.read_text() == "step,case,organ,dice\n"
    folder.close()
