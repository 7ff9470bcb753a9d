"""docs/slurm.sh, with SLURM's commands and python played by a few lines of shell."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm.sh"
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" || status=$?; done
exit ${status:-0}
"""
SCONTROL = """#!/bin/bash
echo "$@" >> calls
[ "$1" = show ] && printf 'first\\nsecond\\n'
exit 0
"""
PYTHON = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> started
exit $STATUS
"""


@pytest.fixture
def submit(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(status):
        job = {"SLURM_JOB_NAME": "latefusion", "SLURM_JOB_ID": "40007", "SLURM_JOB_NODELIST": "n[1-2]"}
        tasks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "STATUS": str(status)}
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        bash = shutil.which("bash")
        command = [bash, str(SCRIPT), "recipe=late_fusion", "schedule.keep={4: 2}"]
        return subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **job, **tasks, "PATH": path}
        ).returncode

    return run


def test_every_task_gets_its_rank(submit, tmp_path):
    assert submit(0) == 0
    run = "training/train.py output_dir=outputs/latefusion-40007 resume=false engine.processes=2"
    assert (tmp_path / "started").read_text().splitlines() == [
        f"{rank} {rank} 2 2 first 24007 {run} recipe=late_fusion schedule.keep={{4: 2}}" for rank in (0, 1)
    ]
    assert (tmp_path / "calls").read_text() == "show hostnames n[1-2]\n"


def test_a_preempted_run_is_queued_again_and_goes_on(submit, tmp_path):
    assert submit(75) == 0
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "requeue 40007"
    (tmp_path / "outputs" / "latefusion-40007" / "checkpoint-20").mkdir(parents=True)
    submit(0)
    assert " resume=true " in (tmp_path / "started").read_text().splitlines()[-1]


def test_a_run_that_fails_is_not_queued_again(submit, tmp_path):
    assert submit(1) == 1
    assert "requeue" not in (tmp_path / "calls").read_text()
