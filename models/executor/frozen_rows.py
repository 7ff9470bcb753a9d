"""Frozen vision tokens: a layer computes their keys and values for the text to read, and nothing else of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from latefusion.models.executor.attention import StandIn
from latefusion.models.executor.layout import Layout

TEXT_ROWS = "latefusion_text_rows"  # the layer hands it to its attention with its other keyword arguments


class ReadingLayer:
    """Hooks inside one decoder layer, idle unless the layer is called with `TEXT_ROWS`, a `Layout` over its input.

    Then norms, k_proj and v_proj work on every row, q_proj, attention, o_proj and the MLP on these rows alone. What
    they leave out is zero, so that a frozen row keeps its state through both residual additions. The argument travels
    with the call: gradient checkpointing, which calls the layer a second time, brings it again.

    Raises:
        ValueError: the layer is not made of these parts.
    """

    def __init__(self, layer: nn.Module, config: PretrainedConfig):
        self.attention: nn.Module = layer.get_submodule("self_attn")
        self.config = config
        missing = [n for n in ("q_proj", "k_proj", "v_proj", "o_proj") if n not in self.attention._modules]
        if missing or "mlp" not in layer._modules:
            raise ValueError(
                f"{type(layer).__name__} has no {missing[0] if missing else 'mlp'}, so its vision tokens cannot be "
                "frozen: use a schedule without cross."
            )
        self._rows: Layout | None = None
        self._held: list[Any] = []  # while the attention runs
        mlp = layer.get_submodule("mlp")
        self.handles: list[RemovableHandle] = [
            self.attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            self.attention.register_forward_hook(self._after_attention, always_call=True),
            mlp.register_forward_pre_hook(self._take),
            mlp.register_forward_hook(self._put),
        ]

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._rows = kwargs.get(TEXT_ROWS)
        if self._rows is None:
            return None
        for name in ("q_proj", "o_proj"):  # found anew: adapters may have been put around them
            linear = module.get_submodule(name)
            self._held.append(linear.register_forward_pre_hook(self._take))
            self._held.append(linear.register_forward_hook(self._put))
        if narrows(self.config):
            self._held.append(StandIn(self.config._attn_implementation, self._attend))
        return args, {name: value for name, value in kwargs.items() if name != TEXT_ROWS}

    def _after_attention(self, module: nn.Module, args: tuple, output: Any) -> None:
        for held in self._held:
            held.remove()
        self._held = []

    def _take(self, module: nn.Module, args: tuple) -> tuple | None:
        return None if self._rows is None else (self._rows.take(args[0]), *args[1:])

    def _put(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        rows = self._rows
        return None if rows is None else rows.put(_zeros(rows, output), output)

    def _attend(self, module: nn.Module, query: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        stand_in, rows = self._held[-1], self._rows
        assert rows is not None
        index = rows.index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])  # [B, H, n, D]
        output, weights = stand_in.stock(module, query.gather(2, index), *rest, **kwargs)  # [B, n, H, D]
        flat = output.flatten(2)
        return rows.put(_zeros(rows, flat), flat).unflatten(2, output.shape[2:]), weights


def narrows(config: PretrainedConfig) -> bool:
    """Whether attention runs on the text rows alone: flash attention needs all rows for its causal order."""
    return not is_flash_attention_requested(config)


def _zeros(rows: Layout, like: Tensor) -> Tensor:
    """`[B, N, D]` for the `[B, n, D]` of some rows."""
    return torch.zeros(like.shape[0], rows.length, like.shape[2], dtype=like.dtype, device=like.device)
