"""`Around`: runs a method of one module, a `forward` or `generate`, inside ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Around:
    """Stands in for `module.name` until `remove`; other instances of the class keep theirs.

    Args:
        around: called with the stock method, its arguments, and its keyword arguments; returns what a caller gets.
    """

    def __init__(
        self, module: nn.Module, name: str, around: Callable[[Callable[..., Any], tuple, dict[str, Any]], Any]
    ):
        self.module, self.name, self.around = module, name, around
        self._before = vars(module).get(name)  # somebody else's, as accelerate's; None: the class's own
        self._removed = False
        setattr(module, name, self)

    @torch.compiler.disable(recursive=False)  # dynamo takes the stock method for this one
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._removed:
            return self._stock(*args, **kwargs)
        return self.around(self._stock, args, kwargs)

    @property
    def _stock(self) -> Callable[..., Any]:
        return self._before or getattr(type(self.module), self.name).__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._stock)

    def remove(self) -> None:
        """Give the method back; where somebody has wrapped this since, it stays and does nothing."""
        self._removed = True
        if vars(self.module).get(self.name) is not self:
            return
        delattr(self.module, self.name)
        if self._before is not None:
            setattr(self.module, self.name, self._before)
