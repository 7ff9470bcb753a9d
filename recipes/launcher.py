"""This process's place in its run, from the environment that every launcher sets. Without torch."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable

INTERRUPTED = 130  # exit status of a command that Ctrl-C ended, as shells have it
STOPPED = "Interrupted."
GOES_ON = "Interrupted; the same command goes on where it stopped."


def rank() -> int:
    """This process's number in the run; 0 is the one that writes."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes the run has, as the launcher says; 1 without a launcher."""
    return launched() or 1


def launched() -> int | None:
    """How many processes a launcher has started as one run; None: no launcher says."""
    number = os.environ.get("WORLD_SIZE")
    return None if number is None else int(number)


def local_world_size() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def run_to_exit(main: Callable[[], object], interrupted: str = STOPPED) -> None:
    """Run a command's `main`; where processes were joined, end this one without Python's clean-up of all modules.

    Ctrl-C ends it in a sentence, without a traceback.

    A thread of `torch.distributed` lets go of a tensor a moment after the operation is done. If Python is being cleaned
    up by then, C++ aborts ("terminate called without an active exception") a process that had done its work (Python
    below 3.14, gloo). Handlers registered to run at exit do run.

    Args:
        main: ends by returning or by SystemExit; any other exception passes.
        interrupted: that sentence.
    """
    status: int | str | None = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
        if not joined():
            raise
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        status = INTERRUPTED
    if not joined():
        if status:
            sys.exit(status)
        return
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as Python does: threads first
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def joined() -> bool:
    """Whether this process has joined a group of `torch.distributed`, be it of one."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
