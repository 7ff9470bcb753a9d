"""Runs of the entry point in new processes, as a user starts them."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

from helpers.tiny_base import BAND, SMALL

from latefusion.training import run

TRAIN, TEACH = (Path(run.__file__).with_name(name) for name in ("train.py", "teach.py"))
ON_CPU = Path(__file__).with_name("fsdp_on_cpu.py")
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port={port}"],
    "accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
        "--main_process_port={port}",
    ],
    "alone": [sys.executable],
    "gpus": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=gpu", "--master_port={port}"],
}
for node in (0, 1):  # one process each
    LAUNCHERS[f"node {node}"] = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=2"),
        *("--num_processes=2", f"--machine_rank={node}", "--main_process_ip=127.0.0.1"),
        "--main_process_port={port}",
    ]


def free_port() -> int:
    """A port for a rendezvous that starts in a while.

    Below those that the system lends to any connection (from 32768 on Linux), or a run beside this one could be lent
    it before the rendezvous takes it; at random, for other tests look for theirs at the same time.
    """
    for port in random.SystemRandom().sample(range(10_000, 32_768), 100):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
        return port
    raise RuntimeError("none of 100 ports between 10000 and 32767 is free")


def start(
    launcher: str, base: Path, output: Path, *overrides: str, at: int | None = None, script: Path = TRAIN
) -> subprocess.Popen:
    """A run of 3 steps on the tiny model, on scenes and in a band where `overrides` do not say otherwise."""
    quick = ("train.steps=3", "train.save_every=3", "train.log_every=1", "train.threads=1")
    fixed = ("train.learning_rate=1e-2", "eval.enabled=false", "model.visipruner.boundary=1")
    where = (f"model.path={base}", f"output_dir={output}")
    scenes = () if any(word.startswith("data=") for word in overrides) else ("data.scenes=8",)
    band = () if "schedule=auto" in overrides else BAND
    return spawn(launcher, *quick, *scenes, *fixed, *SMALL, *band, *where, *overrides, at=at, script=script)


def spawn(launcher: str, *overrides: str, at: int | None = None, script: Path = TRAIN) -> subprocess.Popen:
    """A run in a process group of its own, on the CPU unless the launcher is `gpus`.

    Args:
        at: the port where its processes meet (one that is alone finds its own).
        script: of `training/`.
    """
    port = str(at or free_port())
    command = [part.format(port=port) for part in LAUNCHERS[launcher]]
    on_cpu = launcher != "gpus"
    scripts = [str(ON_CPU), str(script)] if on_cpu and "engine=fsdp2" in overrides else [str(script)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja, for DeepSpeed
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("MASTER_PORT", None)
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["PYTHONWARNINGS"] = (
        "ignore"  # ZeRO-3's would fill a pipe that nobody reads while a run goes on
    )
    return subprocess.Popen(
        [*command, *scripts, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    """Wait for the end; what it printed."""
    printed, complained = process.communicate(timeout=900)
    assert process.returncode == 0, complained[-3000:]
    return printed


def launch(launcher: str, base: Path, output: Path, *overrides: str, script: Path = TRAIN) -> str:
    """Run to the end; what it printed."""
    return finish(start(launcher, base, output, *overrides, script=script))
