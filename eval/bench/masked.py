"""Frozen vision tokens as ViCA's authors trained them: the stock model under masks, at the cost of the dense one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from latefusion.models.schedule import VisionSchedule


@contextmanager
def masked(model: nn.Module, schedule: VisionSchedule, vision: Tensor) -> Iterator[None]:
    """Context in which the model computes `schedule` (with `cross`) by masks, over all tokens in every layer.

    In layers that do not read, masks hide the vision tokens from the text; after each layer the vision tokens' states
    are put back. With `freeze_prefix` the text before the image loses its attention output. No row is padded.

    Args:
        model: the multimodal model, or PEFT's wrapper of it.
        vision: bool `[B, T]`.
    """
    assert schedule.cross is not None
    layers: Any = model.get_decoder().layers  # type: ignore[operator]
    length, frozen = vision.shape[1], vision[..., None]
    causal = torch.ones(length, length, dtype=torch.bool, device=vision.device).tril()[None, None]
    itself = torch.eye(length, dtype=torch.bool, device=vision.device)
    blind = causal & (~vision[:, None, None] | itself)  # bool [B, 1, T, T]
    prefix = ((vision.cumsum(1) == 0) & vision.any(1, keepdim=True))[..., None]  # bool [B, T, 1]
    handles = []
    for i, layer in enumerate(layers):
        mask = causal.expand_as(blind) if i in schedule.cross else blind
        handles.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}),
                with_kwargs=True,
            )
        )
        handles.append(
            layer.register_forward_hook(
                lambda module, args, output: torch.where(frozen, args[0], output),
            )
        )
        if schedule.freeze_prefix:
            handles.append(
                layer.self_attn.o_proj.register_forward_pre_hook(
                    lambda module, args: (args[0].masked_fill(prefix, 0),)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
