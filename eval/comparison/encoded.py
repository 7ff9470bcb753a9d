"""Images that several questions show, or several systems: encoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from latefusion.models.base_model import beside_the_decoder
from latefusion.models.inputs import PIXELS, encode_images, unwrapped, vision_features

LIMIT = 2**30  # bytes of features that are kept


class EncodedImages:
    """Features by the contents of an image and the weights that encode it.

    Images are encoded one at a time, so that features do not depend on what else a batch holds, nor on where an
    interrupted evaluation goes on. Where a model's tensors do not have a row an image (patches of all images in one),
    and for videos, a batch is encoded as a whole, every time.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit, self.bytes = limit, 0
        self.features: OrderedDict[Any, list[Tensor]] = OrderedDict()  # the one used last at the end

    def encode(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Replace pixels by features (`encode_images`); images that were encoded before are not encoded again."""
        parts = rows_of_images(inputs)
        if parts is None:
            return encode_images(model, inputs)
        weights = vision_weights(model)
        rows = [self._row(model, (weights, contents(part)), part) for part in parts]
        features: Any = [one for row in rows for one in row]
        if features and features[0].dim() > 2:  # the model gives a tensor, not a list
            features = torch.cat(features)
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        output = BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]
        return {**rest, "mm_encoder_outputs": {"image": output}}

    def _row(self, model: Any, key: Any, part: dict[str, Tensor]) -> list[Tensor]:
        pixels = part[PIXELS["image"]]
        if pixels.dim() == 5 and not pixels.any():  # a prompt without images among others: Idefics 3, SmolVLM
            return []
        if key in self.features:
            self.features.move_to_end(key)
            return self.features[key]
        output = vision_features(unwrapped(model).base_model, part).pooler_output
        row = self.features[key] = list(output) if isinstance(output, list | tuple) else [output]
        self.bytes += size(row)
        while self.bytes > self.limit and len(self.features) > 1:
            _, oldest = self.features.popitem(last=False)
            self.bytes -= size(oldest)
        return row


def rows_of_images(inputs: Mapping[str, Any]) -> list[dict[str, Tensor]] | None:
    """The inputs of the image encoder, one row of each at a time; None if they are not a row an image."""
    pixels = inputs.get(PIXELS["image"])
    if not isinstance(pixels, Tensor) or PIXELS["video"] in inputs:
        return None
    about = {
        name: value
        for name, value in inputs.items()
        if name.startswith(("pixel_", "image_")) and isinstance(value, Tensor)
    }
    if any(len(value) != len(pixels) for value in about.values()):
        return None
    return [{name: value[i : i + 1] for name, value in about.items()} for i in range(len(pixels))]


def contents(part: Mapping[str, Tensor]) -> bytes:
    """Hash of an image's tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(part):
        tensor = part[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.digest()


def vision_weights(model: Any) -> tuple[Any, ...]:
    """A key that differs between two image encoders: where their weights lie, and which adapters are on."""
    modules = [module for part in beside_the_decoder(unwrapped(model)) for module in part.modules()]
    places = tuple(p.data_ptr() for module in modules for p in module.parameters(recurse=False))
    switched = [module for module in modules if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    return places, tuple((bool(m.disable_adapters), tuple(m.active_adapters)) for m in switched)


def size(row: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in row)
