"""What keeps a run from being lost: signals that save first, and processes that train as one or not at all."""

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
AT_ONCE = 1.0  # seconds: one Ctrl-C may come twice, from the terminal and from the launcher


class Preempted(Exception):
    """The run was asked to stop and saved a checkpoint first."""

    def __init__(self, step: int):
        super().__init__(f"stopped by a signal after step {step}, which is saved")
        self.step = step


def check_world(found: int) -> None:
    """Refuse to train where the engine did not take part in what the launcher started.

    Args:
        found: processes that the engine knows of.

    Raises:
        ValueError: in one sentence.
    """
    wanted = world_size()
    joined = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if not found == joined == wanted:
        raise ValueError(
            f"the launcher started {wanted} process(es), but the engine counts {found} and torch.distributed "
            f"{joined}, so they would train apart; check the launcher's settings (accelerate env)."
        )


class Signals:
    """SIGTERM, SIGUSR1 and Ctrl-C as a request to stop after the running step, agreed on by all processes.

    A second Ctrl-C stops at once.

    `close` gives back the handlers that were there when this was made, also where an engine put its own in between.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interrupted: float | None = None
        self._process = os.getpid()  # loader workers inherit the handlers
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
                if os.getpid() == self._process and rank() == 0:
                    os.write(2, b"\nStopping after this step, which is saved; Ctrl-C again stops at once.\n")
            elif now > self._interrupted + AT_ONCE:
                raise KeyboardInterrupt
        self.asked = True

    def stop(self, device: torch.device | str) -> bool:
        """Whether any process was asked; every process calls this after every step."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self.asked
        flag = torch.tensor(int(self.asked), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
