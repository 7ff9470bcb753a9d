"""The launch of a run and its folder: the configured number of processes, one run per folder. Without torch.

Evaluation, calibration and profile hold their folders in the same way.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from latefusion.recipes.launcher import launched, rank, world_size

LOCK = ".lock"
MARK = "interrupted"


@contextmanager
def claimed(output_dir: str | Path, key: str = "output_dir") -> Iterator[None]:
    """Lock the output folder of a run against other runs. The lock ends with the process, however it ends.

    Only the first process of a run takes it. A process must not lock a folder twice: the inner end would unlock it.

    Raises:
        ValueError: another run holds the folder, or it cannot be written.
    """
    if rank() != 0:
        yield
        return
    path = Path(output_dir) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise ValueError(
            f"{key}={output_dir} cannot be written ({error.strerror}); choose another {key}=FOLDER."
        ) from None
    with file:
        _lock(file, output_dir, key)
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}))
        file.flush()
        yield


def check_writable(folder: str | Path, key: str = "output_dir") -> None:
    """Raise ValueError if a folder cannot be made or written into."""
    path = Path(folder)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = os.strerror(errno.EACCES if there.is_dir() else errno.ENOTDIR)
        raise ValueError(f"{key}={folder} cannot be written ({why}); choose another {key}=FOLDER.")


def check_unfinished(folder: str | Path, result: str, *, overwrite: bool, key: str = "output") -> None:
    """Raise ValueError if a folder holds finished work, which only `overwrite=true` replaces.

    Args:
        result: the file that holds it; without it the work was interrupted, and goes on.
    """
    file = Path(folder) / result
    if rank() == 0 and file.exists() and not overwrite:
        raise ValueError(
            f"{file} is there already; replace it with overwrite=true, or choose another {key}=FOLDER."
        )


def check_unclaimed(output_dir: str | Path) -> None:
    """Raise ValueError if another run holds the folder now."""
    path = Path(output_dir) / LOCK
    if rank() == 0 and os.access(path, os.W_OK):
        with path.open("a+") as file:
            _lock(file, output_dir, "output_dir")


def _lock(file: TextIO, output_dir: str | Path, key: str) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = json.loads(file.read() or "{}")
        raise ValueError(
            f"{output_dir} is in use by another run (process {holder.get('process', '?')} on "
            f"{holder.get('host', '?')}, since {holder.get('since', '?')}); wait for it, stop it, or choose "
            f"another {key}=FOLDER."
        ) from None


def check_launch(processes: int | None) -> None:
    """Check that the launched processes train as one run.

    Args:
        processes: the number that the run must have; None: what the launcher says.

    Raises:
        ValueError: each would train by itself, or another number was started.
    """
    world = launched()
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if world is None and tasks > 1:
        raise ValueError(
            f"SLURM started {tasks} tasks but WORLD_SIZE is not set, so each would train by itself; export RANK, "
            "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as docs/training.md shows."
        )
    if processes is not None and world_size() != processes:
        raise ValueError(
            f"engine.processes={processes}, but {world_size()} process(es) were started; launch with "
            f"torchrun --nproc_per_node or accelerate launch --multi_gpu --num_processes."
        )


def leave_mark(output_dir: str | Path, step: int) -> None:
    """Leave a file that says a signal stopped the run: launchers replace the exit status. The next start removes it."""
    (Path(output_dir) / MARK).write_text(f"{step}\n")


def remove_mark(output_dir: str | Path) -> None:
    """Remove that file: the run goes on, or another begins."""
    if rank() == 0:
        (Path(output_dir) / MARK).unlink(missing_ok=True)
