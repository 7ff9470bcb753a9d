"""Frozen vision tokens: a layer computes only their keys and values, for the text to read."""

from __future__ import annotations

import re
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from latefusion.models.executor.attention import Attention
from latefusion.models.executor.layout import Layout
from latefusion.models.executor.threads import PerThread

TEXT_ROWS = "latefusion_text_rows"  # the layer hands it to its attention with its other keyword arguments
SILENT_ROWS = (
    "latefusion_silent_rows"  # likewise: bool, the rows among those that attend whose output is zero
)
_LOCK = threading.Lock()
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
OUTPUTS, MLPS = ("o_proj", "out_proj"), ("mlp", "feed_forward")  # names of one thing in different families
ROW_BY_ROW = re.compile(
    r"norm|rotary|^(gate|g)_proj$|^sinks$"
)  # other parts of an attention that frozen rows pass


class ReadingLayer:
    """Hooks inside one decoder layer, idle unless the layer is called with `TEXT_ROWS`, a `Layout` over its input.

    Then norms, k_proj and v_proj work on every row, q_proj, attention, o_proj and the MLP on these rows alone. What
    they leave out is zero, so that a frozen row keeps its state through both residual additions; in layers that do more
    to a row than that (experts beside the MLP, a scale), the state is put back at the end. The argument travels with
    the call: gradient checkpointing, which calls the layer a second time, brings it again.
    """

    def __init__(self, layer: nn.Module):
        self.attention: nn.Module = layer.get_submodule("self_attn")
        self._calls = PerThread(_Call)
        mlp = layer.get_submodule(_named(layer, MLPS))
        self.output = _named(self.attention, OUTPUTS)
        self._handles: list[RemovableHandle] = [
            self.attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            mlp.register_forward_pre_hook(self._take),
            mlp.register_forward_hook(self._after_mlp),
        ]
        if not _only_adds(layer):
            self._handles.append(layer.register_forward_hook(self._restore, with_kwargs=True))
        self._linears: dict[str, tuple[nn.Module, list[RemovableHandle]]] = {}

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in [
            *self._handles,
            *(handle for _, handles in self._linears.values() for handle in handles),
        ]:
            handle.remove()
        self._handles, self._linears = [], {}

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
        return rows.put(_zeros(rows, flat), flat).unflatten(2, output.shape[2:]), weights

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = self._calls.get()
        call.rows, call.silent = kwargs.get(TEXT_ROWS), kwargs.get(SILENT_ROWS)
        if call.rows is None and call.silent is None:
            return None
        self._hook_linears()
        return args, {name: value for name, value in kwargs.items() if name not in (TEXT_ROWS, SILENT_ROWS)}

    def _hook_linears(self) -> None:
        """Put hooks on q_proj and o_proj as they are now: PEFT may have wrapped them since."""
        for name in ("q_proj", self.output):
            linear = self.attention.get_submodule(name)
            if self._linears.get(name, (None, []))[0] is linear:
                continue
            with _LOCK:  # another thread may be here, too
                before, handles = self._linears.get(name, (None, []))
                if before is not linear:
                    hooks = [
                        linear.register_forward_pre_hook(self._take if name == "q_proj" else self._take_loud),
                        linear.register_forward_hook(self._put),
                    ]
                    self._linears[name] = linear, hooks
                    for handle in handles:
                        handle.remove()

    def _take(self, module: nn.Module, args: tuple) -> tuple | None:
        rows = self._calls.get().rows
        return None if rows is None else (rows.take(args[0]), *args[1:])

    def _take_loud(self, module: nn.Module, args: tuple) -> tuple | None:
        """What o_proj gets: the attention output of the text rows, zero where they are silent."""
        args, silent = self._take(module, args) or args, self._calls.get().silent
        return args if silent is None else (args[0].masked_fill(silent[..., None], 0), *args[1:])

    def _put(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        rows = self._calls.get().rows
        return None if rows is None else rows.put(_zeros(rows, output), output)

    def _after_mlp(self, module: nn.Module, args: tuple, output: Any) -> Any:
        several = isinstance(output, tuple)  # with what a router says of the rows
        whole = self._put(module, args, output[0] if several else output)
        if whole is not None and several:
            whole = (whole, *output[1:])  # type: ignore[assignment]
        self.forget()  # the MLP comes last
        return whole

    def _restore(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        rows = kwargs.get(TEXT_ROWS)
        return None if rows is None else rows.put(args[0], rows.take(output))


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


def _zeros(rows: Layout, like: Tensor) -> Tensor:
    """`[B, N, D]` for the `[B, n, D]` of some rows."""
    return torch.zeros(like.shape[0], rows.length, like.shape[2], dtype=like.dtype, device=like.device)
