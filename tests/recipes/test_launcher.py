"""How a process of a run ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.launch import free_port

PROCESSES = 6  # in pairs; without `run_to_exit` about every second process aborts
# One core, and threads of gloo that run only when nothing else does: they let go of a tensor late
PAIR = """
import atexit, os, sys
import torch, torch.distributed as dist
from latefusion.recipes.launcher import run_to_exit

def main():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(10))
    for thread in os.listdir("/proc/self/task"):
        name = open(f"/proc/self/task/{thread}/comm").read()
        if name.startswith("pt_gloo"):
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    atexit.register(print, "at exit")
    dist.all_reduce(torch.ones(10), async_op=True).wait()
    sys.exit(75)

run_to_exit(main)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="names and priorities of threads, as on Linux"
)
def test_a_process_that_has_joined_others_ends_with_its_status():
    for _ in range(PROCESSES // 2):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        place |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", PAIR],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | place | {"RANK": str(rank)},
            )
            for rank in range(2)
        ]
        for process in pair:
            printed, complained = process.communicate(timeout=300)
            assert (process.returncode, printed) == (75, "at exit\n"), complained


@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("sys.exit(3)", 3), ("sys.exit('error: no')", 1)])
def test_a_process_alone_ends_as_python_ends_it(end, status):
    lines = f"import sys\nfrom latefusion.recipes.launcher import run_to_exit\ndef main(): {end}\nrun_to_exit(main)"
    process = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert process.returncode == status
    assert process.stderr == ("error: no\n" if status == 1 else "")


def test_an_interrupted_command_ends_in_a_sentence():
    lines = """
from latefusion.recipes.launcher import GOES_ON, run_to_exit
def main(): raise KeyboardInterrupt
run_to_exit(main, interrupted=GOES_ON)
"""
    process = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert process.returncode == 130
    assert process.stderr == "\nInterrupted; the same command goes on where it stopped.\n"
