"""Run only some of the decoder's layers: start at a layer from a known state, or stop at one and return its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from latefusion.models.executor.around import beneath


class _Reached(Exception):
    """Ends a forward once the wanted layer is reached."""


def _skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a layer that `starting_at` leaves out."""
    return hidden_states


def is_skipped(stock: Callable[..., Any]) -> bool:
    """Whether a layer's `forward` does not compute anything, inside `starting_at`."""
    return stock is _skip


@contextmanager
def starting_at(layers: Sequence[nn.Module], first: int, state: Tensor | None) -> Iterator[None]:
    """Forwards inside skip the layers before `first` and give that layer `state`.

    Models that add to the hidden states between layers (Qwen3-VL's deepstack) still do so before layer `first`;
    `state` replaces what they made, so it has to contain it.

    Args:
        layers: all of the decoder's.
        state: the input of layer `first`, `[B, T, D]`; None: a forward as usual, for `first` 0.
    """
    if state is None:
        if first != 0:
            raise ValueError(f"layer {first} needs the state that it starts from.")
        yield
        return

    def replace(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (state, *args[1:])

    handle = layers[first].register_forward_pre_hook(replace, prepend=True)
    try:
        with ExitStack() as skipped:
            for layer in layers[:first]:  # a policy still runs around them: it selects tokens layer by layer
                skipped.enter_context(beneath(layer, "forward", _skip))
            yield
    finally:
        handle.remove()


def input_of_layer(layers: Sequence[nn.Module], last: int, forward: Callable[[], Any]) -> Tensor:
    """Run `forward` up to layer `last` and return that layer's input, `[B, T, D]`; no later layer runs."""
    return inputs_of_layers(layers, [last], forward)[0]


def inputs_of_layers(
    layers: Sequence[nn.Module], names: Sequence[int], forward: Callable[[], Any]
) -> list[Tensor]:
    """Run `forward` up to the last of the layers `names`, which ascend, and return their inputs, `[B, T, D]` each."""
    states: list[Tensor] = []

    def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
        states.append(args[0])
        if len(states) == len(names):
            raise _Reached

    handles = [layers[name].register_forward_pre_hook(look, prepend=True) for name in names]
    try:
        with torch.no_grad():
            forward()
    except _Reached:
        return states
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError(f"the forward did not reach layer {names[-1]}")
