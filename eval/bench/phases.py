"""Where the time of a training step goes: each method's own time, without that of the timed methods it calls."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch


def clock(device: str) -> float:
    """Seconds: of this thread on a CPU, so that other processes do not count; of the wall once a GPU is idle."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


class Phases:
    """A stopwatch of named phases, of which the innermost one runs.

    On a GPU each change of phase waits for the device, so that its work counts where it was launched; the whole is then
    a little slower than without the stopwatch.
    """

    def __init__(self, device: str):
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.noted: defaultdict[str, float] = defaultdict(float)
        self.forgotten: defaultdict[str, float] = defaultdict(float)
        self._stack = ["rest"]
        self._since = clock(device)

    def _turn(self) -> None:
        now = clock(self.device)
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def reset(self) -> None:
        """Begin again; what has been counted so far goes to `forgotten`."""
        self._turn()
        self.forgotten, self.seconds = self.seconds, defaultdict(float)

    def note(self) -> None:
        """Keep what has been counted so far in `noted`."""
        self._turn()
        self.noted = defaultdict(float, self.seconds)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as a phase."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def watching(self, methods: Mapping[tuple[type, str], str]) -> Iterator[None]:
        """Count calls of these methods, of any object, as the phases they are given."""
        patches = [
            patch.object(owner, method, self.timed(name, getattr(owner, method)))
            for (owner, method), name in methods.items()
        ]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()
            self._turn()
