"""`PerThread`: a state of its own for each thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

State = TypeVar("State")


class PerThread(threading.local, Generic[State]):
    """A state for each thread, made where the thread first asks for it. A copy begins with new states."""

    def __init__(self, make: Callable[[], State]):
        self._make, self._state = make, make()

    def get(self) -> State:
        """The calling thread's state."""
        return self._get() if torch.compiler.is_compiling() else self._state

    @torch.compiler.disable(recursive=False)  # dynamo would take one thread's state for that of all
    def _get(self) -> State:
        return self._state

    def __reduce__(self) -> Any:
        return PerThread, (self._make,)
