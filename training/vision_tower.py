"""A model's vision tower and projector, run outside its forward: encode images once, and keep processes in step.

Where weights lie in shards, or the projector trains, every process must run the same modules in the same order. A batch
without images then runs the tower on a blank image and drops the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from latefusion.data.samples import Refused
from latefusion.models.inputs import PIXELS, unwrapped, vision_features, with_features

IMAGE_INPUTS = (*PIXELS.values(), "mm_encoder_outputs")


def refuse_videos(inputs: Mapping[str, Any]) -> None:
    """Raise Refused for inputs with videos: of weights in shards, processes would run the tower in different orders."""
    if PIXELS["video"] in inputs:
        raise Refused("videos are not trained with weights in shards (ZeRO-3, FSDP2); use ZeRO-2 or DDP.")


class VisionTower:
    """The vision tower and projector of `model`.

    Args:
        model: a student's, or the Hugging Face model itself.
        blank: what the processor makes of any one image; None: batches without images run no tower.
        sharded: the weights lie in shards (ZeRO-3), which all processes gather module by module in the same order: the
            tower runs before the rest, whether a process has images or not.
    """

    def __init__(self, model: Any, *, blank: Mapping[str, Any] | None = None, sharded: bool = False):
        self.model, self.blank, self.sharded = model, blank, sharded

    def needs_blank(self, inputs: Mapping[str, Any]) -> bool:
        """Whether these inputs have no images, but other processes may be running their towers now."""
        return self.blank is not None and not any(name in inputs for name in IMAGE_INPUTS)

    def encode(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with the pixels, if there are any, replaced by the features that the decoder receives."""
        owner = self._owner()
        if isinstance(owner, FSDPModule):
            refuse_videos(inputs)
        return with_features(owner, inputs)

    def encode_blank(self, device: torch.device) -> Tensor:
        """Zero, computed from the features of the blank image, so that gradients run through the tower."""
        assert self.blank is not None
        moved = {name: torch.as_tensor(value).to(device) for name, value in self.blank.items()}
        with self._autocast(device):
            features = vision_features(self._owner(), moved)
            return 0.0 * sum(of_image.sum() for of_image in features.pooler_output)

    def run_first(self, inputs: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], Tensor | None]:
        """Run the tower before a forward, if the other processes need it.

        Returns:
            The inputs for the forward, and the zero of `encode_blank` if there were no images.
        """
        if self.needs_blank(inputs):
            return inputs, self.encode_blank(device)
        if self.sharded:
            refuse_videos(inputs)
            with self._autocast(device) if torch.is_grad_enabled() else nullcontext():
                return self.encode(inputs), None
        return inputs, None

    @contextmanager
    def zero_added(self, zero: Tensor | None) -> Iterator[None]:
        """Add the zero of `encode_blank` to the token embeddings, so that the backward pass reaches the tower."""
        if zero is None:
            yield
            return
        hook = self.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output + zero.to(output.dtype)
        )
        try:
            yield
        finally:
            hook.remove()

    def _owner(self) -> Any:
        owner = self.model
        if not isinstance(owner, FSDPModule):  # under FSDP2 the outermost module gathers the weights
            owner = unwrapped(owner).base_model
        return owner

    def _autocast(self, device: torch.device) -> torch.autocast:
        """Engines put autocast around the forward alone; a projector that trains is float32 in a bfloat16 model."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.model.dtype is torch.bfloat16)
