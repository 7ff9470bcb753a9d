"""Frozen vision tokens: a layer computes only their keys and values, for the text to read."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from latefusion.models.executor.around import Around
from latefusion.models.executor.attention import Attention
from latefusion.models.executor.layout import Layout
from latefusion.models.executor.threads import PerThread

TEXT_ROWS = "latefusion_text_rows"  # the layer hands it to its attention with its other keyword arguments
SILENT_ROWS = (
    "latefusion_silent_rows"  # likewise: bool, the rows among those that attend whose output is zero
)
Stock = Callable[..., Any]
_LOCK = threading.Lock()
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
OUTPUTS, MLPS = ("o_proj", "out_proj"), ("mlp", "feed_forward")  # names of one thing in different families
ROW_BY_ROW = re.compile(
    r"norm|rotary|^(gate|g)_proj$|^sinks$"
)  # other parts of an attention that frozen rows pass


class ReadingLayer:
    """Stands around the parts of a decoder layer, idle unless it is called with `TEXT_ROWS`, a `Layout` over its input.

    Then norms, k_proj and v_proj work on every row, q_proj, attention, o_proj and the MLP on these rows alone. What
    they leave out is zero, so that a frozen row keeps its state through both residual additions; in layers that do more
    to a row than that (experts beside the MLP, a scale), the state is put back at the end. The argument travels with
    the call: gradient checkpointing, which calls the layer a second time, brings it again.

    Args:
        readers: who may call it with `TEXT_ROWS`; while it is empty, the parts run by themselves.
    """

    def __init__(self, layer: nn.Module, readers: Collection[Any]):
        self.layer, self.readers = layer, readers
        self._calls = PerThread(_Call)
        self._parts: dict[str, Around] = {}
        self._only_adds = _only_adds(layer)
        self.output = _named(layer.get_submodule("self_attn"), OUTPUTS)
        self.mlp = _named(layer, MLPS)
        self.put_on_top()

    def put_on_top(self) -> None:
        """Stand around the parts as they are now: PEFT may have wrapped them since, or Liger put kernels in place."""
        for name, run in (
            ("self_attn", self._run_attention),
            ("self_attn.q_proj", self._run_queries),
            (f"self_attn.{self.output}", self._run_output),
            (self.mlp, self._run_mlp),
        ):
            part, around = self.layer.get_submodule(name), self._parts.get(name)
            if around is not None and around.module is part and around.on_top:
                continue
            with _LOCK:  # another thread may be here, too
                if self._parts.get(name) is around:
                    self._parts[name] = Around(part, "forward", run, occasions=self.readers)
                    if around is not None:
                        around.remove()

    def remove(self) -> None:
        """Give the parts back."""
        for part in self._parts.values():
            part.remove()
        self._parts = {}

    def forget(self) -> None:
        """Forget the call that this thread is in; after a forward that was interrupted."""
        call = self._calls.get()
        call.rows = call.silent = None

    def attend(
        self, attention: Attention, module: nn.Module, query: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The stock attention, only for the text rows of the call."""
        rows = self._calls.get().rows
        if rows is None:
            return attention(module, query, *args, **kwargs)
        index = rows.index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])  # [B, H, n, D]
        output, weights = attention(module, query.gather(2, index), *args, **kwargs)  # [B, n, H, D]
        flat = output.flatten(2)
        return _put(rows, flat).unflatten(2, output.shape[2:]), weights

    def _run_attention(self, stock: Stock, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = self._calls.get()
        call.rows, call.silent = kwargs.pop(TEXT_ROWS, None), kwargs.pop(SILENT_ROWS, None)
        return stock(*args, **kwargs)

    def _run_queries(self, stock: Stock, args: tuple, kwargs: dict[str, Any]) -> Any:
        rows = self._calls.get().rows
        if rows is None:
            return stock(*args, **kwargs)
        return _put(rows, stock(rows.take(args[0]), *args[1:], **kwargs))

    def _run_output(self, stock: Stock, args: tuple, kwargs: dict[str, Any]) -> Any:
        """o_proj on the attention output of the text rows, zero where they are silent."""
        call = self._calls.get()
        if call.rows is None and call.silent is None:
            return stock(*args, **kwargs)
        attended = args[0] if call.rows is None else call.rows.take(args[0])
        if call.silent is not None:
            attended = attended.masked_fill(call.silent[..., None], 0)
        output = stock(attended, *args[1:], **kwargs)
        return output if call.rows is None else _put(call.rows, output)

    def _run_mlp(self, stock: Stock, args: tuple, kwargs: dict[str, Any]) -> Any:
        rows = self._calls.get().rows
        self.forget()  # the MLP comes last
        if rows is None:
            return stock(*args, **kwargs)
        others = (self._of_rows(rows, arg, args[0].shape[:2]) for arg in args[1:])
        output = stock(rows.take(args[0]), *others, **kwargs)
        if isinstance(output, tuple):  # with what a router says of the rows
            return (_put(rows, output[0]), *output[1:])
        return _put(rows, output)

    @staticmethod
    def _of_rows(rows: Layout, arg: Any, shape: torch.Size) -> Any:
        """What the MLP is handed of every row, `[B, N]`, for some of them: the kinds of tokens that Ernie routes by."""
        return arg.gather(1, rows.index) if isinstance(arg, Tensor) and arg.shape == shape else arg

    def restore(self, rows: Layout, hidden_states: Tensor, output: Tensor) -> Tensor:
        """The layer's output, with the state that the other rows than `rows` had before."""
        return output if self._only_adds else rows.put(hidden_states, rows.take(output))


class _Call:
    """The call of a layer that a thread is in."""

    def __init__(self) -> None:
        self.rows: Layout | None = None  # the text rows, where others are frozen
        self.silent: Tensor | None = None  # bool, the rows that attend whose output is zero


def check_parts(layer: nn.Module) -> None:
    """Raise ValueError if a layer is not made of the parts that `ReadingLayer` puts its hooks on."""
    attention = layer.get_submodule("self_attn")
    missing = [name for name in PROJECTIONS if name not in attention._modules]
    missing += [
        "/".join(names) for part, names in ((attention, OUTPUTS), (layer, MLPS)) if not _named(part, names)
    ]
    if missing:
        raise ValueError(
            f"{type(layer).__name__} has no {missing[0]}, so its vision tokens cannot be "
            "frozen: use a schedule without cross."
        )
    parts = [
        name for name in (*attention._modules, *attention._parameters) if name not in PROJECTIONS + OUTPUTS
    ]
    unknown = [name for name in parts if not ROW_BY_ROW.search(name)]
    if unknown:
        raise ValueError(
            f"the attention of {type(layer).__name__} has a part {unknown[0]}, which has not been tested with frozen "
            "vision tokens: use a schedule without cross."
        )


def _only_adds(layer: nn.Module) -> bool:
    """Whether all that a layer does to its rows is to add the outputs of attention and MLP."""
    parts = {
        name for name, _ in layer.named_children() if "norm" not in name.lower() and "dropout" not in name
    }
    values = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    return parts == {"self_attn", _named(layer, MLPS)} and not values


def output_projection(attention: nn.Module) -> nn.Module:
    """The projection after an attention's heads."""
    return attention.get_submodule(_named(attention, OUTPUTS))


def _named(module: nn.Module, names: tuple[str, ...]) -> str:
    """Which of these names one of the module's parts has; empty: none."""
    return next((name for name in names if name in module._modules), "")


def _put(rows: Layout, output: Tensor) -> Tensor:
    """Some rows' output `[B, n, D]` among all rows, `[B, N, D]`; zero at the others."""
    return rows.put(_zeros(rows, output), output)


def _zeros(rows: Layout, like: Tensor) -> Tensor:
    """`[B, N, D]` for the `[B, n, D]` of some rows."""
    return torch.zeros(like.shape[0], rows.length, like.shape[2], dtype=like.dtype, device=like.device)
