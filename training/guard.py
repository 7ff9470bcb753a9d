"""What keeps a run from being lost, or from running twice: its folder's lock, signals, the number of processes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

LOCK = ".lock"
MARK = "interrupted"
PREEMPTED = 75  # exit status EX_TEMPFAIL: nothing is wrong, run it again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run was asked to stop and saved a checkpoint first."""

    def __init__(self, step: int):
        super().__init__(f"stopped by a signal after step {step}, which is saved")
        self.step = step


@contextmanager
def claimed(output_dir: str | Path) -> Iterator[None]:
    """Hold the output folder of a run against any other. The lock ends with the process, however it ends.

    Only the first process of a run claims it.

    Raises:
        ValueError: another run holds the folder, or it cannot be written.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    path = Path(output_dir) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise ValueError(
            f"output_dir={output_dir} cannot be written ({error.strerror}); choose another output_dir=FOLDER."
        ) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = json.loads(file.read() or "{}")
            raise ValueError(
                f"{output_dir} is in use by another run (process {holder.get('process', '?')} on "
                f"{holder.get('host', '?')}, since {holder.get('since', '?')}); wait for it, stop it, or choose "
                "another output_dir=FOLDER."
            ) from None
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}))
        file.flush()
        (Path(output_dir) / MARK).unlink(missing_ok=True)
        yield


def check_launch(processes: int | None) -> None:
    """Refuse to start where several processes would each train by themselves, or fewer than wanted.

    Args:
        processes: that the run must consist of; None: as many as the launcher says.

    Raises:
        ValueError: in one sentence.
    """
    world = os.environ.get("WORLD_SIZE")
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if world is None and tasks > 1:
        raise ValueError(
            f"SLURM started {tasks} tasks but WORLD_SIZE is not set, so each would train by itself; export RANK, "
            "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as docs/training.md shows."
        )
    if processes is not None and int(world or 1) != processes:
        raise ValueError(
            f"engine.processes={processes}, but {world or 1} process(es) were started; launch with "
            f"torchrun --nproc_per_node or accelerate launch --multi_gpu --num_processes."
        )


def check_world(found: int) -> None:
    """Refuse to train where the engine did not take part in what the launcher started.

    Args:
        found: processes that the engine knows of.

    Raises:
        ValueError: in one sentence.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    joined = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if not found == joined == wanted:
        raise ValueError(
            f"the launcher started {wanted} process(es), but the engine counts {found} and torch.distributed "
            f"{joined}, so they would train apart; check the launcher's settings (accelerate env)."
        )


class Signals:
    """SIGTERM and SIGUSR1 as a request to stop after the running step, agreed on by all processes.

    `close` gives back the handlers that were there when this was made, also where an engine put its own in between.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def stop(self, device: torch.device | str) -> bool:
        """Whether any process was asked; every process calls this after every step."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self.asked
        flag = torch.tensor(int(self.asked), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def leave_mark(output_dir: str | Path, step: int) -> None:
    """A file for launchers, which replace a process's exit status by their own; the next start removes it."""
    (Path(output_dir) / MARK).write_text(f"{step}\n")
