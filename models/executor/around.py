"""`Around`: runs a method of one module, a `forward` or `generate`, inside ours."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NOT_EXPORTED = (
    "a model under a policy cannot be exported: how many tokens each layer computes depends on the prompt, and a "
    "graph would hold one prompt's numbers. Call detach() to export the model without the policy, or let vLLM "
    "serve a student (docs/serving.md)."
)


def refuse_export() -> None:
    """Raise ValueError inside of torch.export, before it traces anything."""
    tracer = sys.modules.get("torch.export._trace")
    if getattr(tracer, "_EXPORT_FLAGS", None) is not None:
        raise ValueError(NOT_EXPORTED)


class Around:
    """Stands in for `module.name` until `remove`; other instances of the class keep theirs.

    A stand-in costs a call less than a hook, and hooks of others run around it, whenever they were registered.

    Args:
        around: called with the stock method, its arguments, and its keyword arguments; returns what a caller gets.
        occasions: calls go straight to the stock method while this is empty.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        around: Callable[[Callable[..., Any], tuple, dict[str, Any]], Any],
        occasions: Collection[Any] = ("always",),
    ):
        self.module, self.name, self.around, self.occasions = module, name, around, occasions
        self._before = vars(module).get(name)  # somebody else's, as accelerate's; None: the class's own
        self._removed = False
        setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.occasions and not self._removed:
            return self._run(args, kwargs)
        if self._before is None:  # `stock` without its calls, in the way of every decode step
            return getattr(type(self.module), self.name)(self.module, *args, **kwargs)
        return self._before(*args, **kwargs)

    @torch.compiler.disable(
        recursive=False, reason=NOT_EXPORTED
    )  # dynamo takes the stock method for this one
    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.around(self.stock, args, kwargs)

    @property
    def stock(self) -> Callable[..., Any]:
        """The method that this replaces."""
        return self._before or getattr(type(self.module), self.name).__get__(self.module)

    @property
    def on_top(self) -> bool:
        """Whether a call of the method comes here first; if not, somebody has wrapped it or put theirs in its place."""
        return vars(self.module).get(self.name) is self

    @property
    def __code__(self) -> Any:
        """What `torch.export(strict=False)` looks for first."""
        refuse_export()
        raise AttributeError("__code__")

    @property
    def __signature__(self) -> inspect.Signature:
        """What `torch.export(strict=True)` looks for first; behind it, dynamo would wrap a refusal in 23 lines."""
        refuse_export()
        return inspect.signature(self.stock)

    def remove(self) -> None:
        """Give the method back; where somebody has wrapped this since, it stays and does nothing."""
        self._removed = True
        if not self.on_top:
            return
        delattr(self.module, self.name)
        if self._before is not None:
            setattr(self.module, self.name, self._before)


@contextmanager
def beneath(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Context in which `method` runs in place of `module.name`, inside every wrapper around it."""
    top = vars(module).get(name)
    if isinstance(top, Around):
        before, top._before = top._before, method
    else:
        setattr(module, name, method)
    try:
        yield
    finally:
        if isinstance(top, Around):
            top._before = before
        elif top is None:
            delattr(module, name)
        else:
            setattr(module, name, top)
