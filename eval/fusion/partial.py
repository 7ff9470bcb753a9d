"""A forward that computes a few of the decoder's layers: from a state that is known, to a state that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Reached(Exception):
    """Ends a forward whose further layers nobody needs."""


@contextmanager
def started(layers: Sequence[nn.Module], first: int, state: Tensor | None) -> Iterator[None]:
    """Layers before `first` hand on what they are given, and layer `first` is given `state`, `[B, T, D]`.

    A model may still change what passes between layers (Qwen3-VL's deepstack); `state` replaces that, too.
    """
    if state is None:
        assert first == 0, "what a later layer is given must be known"
        yield
        return
    given: Tensor = state

    def hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def replace(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given, *args[1:])

    # before a policy's own hook, which gathers from what it sees
    handle = layers[first].register_forward_pre_hook(replace, prepend=True)
    for layer in layers[:first]:
        layer.forward = hand_on
    try:
        yield
    finally:
        handle.remove()
        for layer in layers[:first]:
            del layer.forward


def run_until(layers: Sequence[nn.Module], last: int, forward: Callable[[], Any]) -> Tensor:
    """What layer `last` is given in `forward`, which ends there, `[B, T, D]`."""
    found: list[Tensor] = []

    def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Reached

    with ExitStack() as held:
        handle = layers[last].register_forward_pre_hook(look, prepend=True)
        held.callback(handle.remove)
        try:
            with torch.no_grad():
                forward()
        except _Reached:
            return found[0]
    raise AssertionError("the forward did not reach the layer")
