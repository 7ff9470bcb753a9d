"""Signals that save before they stop a run, and the check that all processes train as one."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from latefusion.recipes.launcher import rank, world_size

PREEMPTED = 75  # exit status EX_TEMPFAIL: nothing is wrong, run it again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AT_ONCE = 1.0  # seconds in which a second Ctrl-C counts as the first: terminal and launcher both send one


class Preempted(Exception):
    """A signal stopped the run, which saved a checkpoint first."""

    def __init__(self, step: int):
        super().__init__(f"stopped by a signal after step {step}, which is saved")
        self.step = step


def check_world(processes: int) -> None:
    """Check that the engine uses all processes that the launcher started.

    Args:
        processes: that the engine counts.

    Raises:
        ValueError: it does not.
    """
    started = world_size()
    joined = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if not processes == joined == started:
        raise ValueError(
            f"the launcher started {started} process(es), but the engine counts {processes} and torch.distributed "
            f"{joined}, so each would train by itself; check the launcher's settings (accelerate env)."
        )


class Signals:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a request to stop after this step, on which all processes agree.

    A second Ctrl-C stops at once. `close` restores the handlers from before, also if an engine has set its own since.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupted: float | None = None
        self._process = os.getpid()  # loader workers inherit the handlers
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._request)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
                if os.getpid() == self._process and rank() == 0:
                    os.write(2, b"\nStopping after this step, which is saved; Ctrl-C again stops at once.\n")
            elif now > self._interrupted + AT_ONCE:
                raise KeyboardInterrupt
        self.requested = True

    def stop(self, device: torch.device | str) -> bool:
        """Whether any process got a request to stop; every process calls this after every step."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self.requested
        flag = torch.tensor(int(self.requested), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
