"""Prompts that several systems are asked, and images that several questions show: processed once, encoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from latefusion.data.prompts import prompt_inputs
from latefusion.models.base_model import beside_the_decoder
from latefusion.models.fingerprint import processor_fingerprint
from latefusion.models.inputs import PIXELS, encode_images, unwrapped, vision_features

LIMIT = 2**30  # bytes of features that are kept
BESIDE = 2**27  # bytes of what batches have beside pixels that are kept
FEATURES = "mm_encoder_outputs"


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
        return with_features(inputs, self.rows(model, parts, list(map(contents, parts))))

    def rows(
        self, model: Any, parts: Sequence[dict[str, Tensor]], images: Sequence[bytes]
    ) -> list[list[Tensor]]:
        """The features of each row of pixels, whose contents are `images`."""
        weights = vision_weights(model)
        return [self._row(model, (weights, image), part) for image, part in zip(images, parts, strict=True)]

    def known(self, model: Any, images: Sequence[bytes]) -> list[list[Tensor]] | None:
        """The features of these contents, if all of them are still there."""
        weights = vision_weights(model)
        if any((weights, image) not in self.features for image in images):
            return None
        return [self._kept((weights, image)) for image in images]

    def _row(self, model: Any, key: Any, part: dict[str, Tensor]) -> list[Tensor]:
        if key in self.features:
            return self._kept(key)
        pixels = part[PIXELS["image"]]
        if pixels.dim() == 5 and not pixels.any():  # a prompt without images among others: Idefics 3, SmolVLM
            self.features[key] = []
            return []
        output = vision_features(unwrapped(model).base_model, part).pooler_output
        row = self.features[key] = list(output) if isinstance(output, list | tuple) else [output]
        self.bytes += size(row)
        while self.bytes > self.limit and len(self.features) > 1:
            _, oldest = self.features.popitem(last=False)
            self.bytes -= size(oldest)
        return row

    def _kept(self, key: Any) -> list[Tensor]:
        self.features.move_to_end(key)
        return self.features[key]


@dataclass(frozen=True)
class Shown:
    """What is left of a batch once its images are encoded: its inputs without pixels, and the images' contents."""

    inputs: dict[str, Any]
    images: list[bytes]


class EncodedPrompts:
    """Batches of prompts, processed once for all systems, their images encoded once (`EncodedImages`).

    Attributes:
        last: the batch that was processed last, with its pixels: no two are in memory at once.
        shown: batches that were encoded before; those whose images do not have a row each are not kept.
    """

    def __init__(self, limit: int = LIMIT):
        self.images = EncodedImages(limit)
        self.last: tuple[Any, dict[str, Any]] | None = None
        self.shown: dict[Any, Shown] = {}
        self.room = BESIDE
        self._fingerprints: dict[int, tuple[Any, str]] = {}  # of processors, which stay alive here

    def encoded(
        self, model: Any, processor: Any, rows: Sequence[dict[str, Any]], name: Hashable
    ) -> dict[str, Any]:
        """`prompt_inputs` of these rows with features in place of pixels; the rows are not read if these are there.

        Args:
            name: of the batch; batches of one name have equal rows.
        """
        key = (name, self._fingerprint(processor), model.config.model_type, model.dtype, model.device)
        if key in self.shown:
            features = self.images.known(model, self.shown[key].images)
            if features is not None:
                return with_features(self.shown[key].inputs, features)
        if self.last is None or self.last[0] != key:
            self.last = None
            self.last = key, prompt_inputs(model, processor, rows)
        inputs = self.last[1]
        parts = rows_of_images(inputs)
        if parts is None:
            return encode_images(model, inputs)
        images = list(map(contents, parts))
        encoded = with_features(inputs, self.images.rows(model, parts, images))
        rest = {name: value for name, value in encoded.items() if name != FEATURES}
        if key not in self.shown and (held := size(rest.values())) <= self.room:
            self.room -= held
            self.shown[key] = Shown(rest, images)
        return encoded

    def _fingerprint(self, processor: Any) -> str:
        if id(processor) not in self._fingerprints:
            self._fingerprints[id(processor)] = processor, processor_fingerprint(processor)
        return self._fingerprints[id(processor)][1]


def with_features(inputs: Mapping[str, Any], rows: Sequence[list[Tensor]]) -> dict[str, Any]:
    """A model's inputs with the features of all rows of pixels in the place of these."""
    features: Any = [one for row in rows for one in row]
    if features and features[0].dim() > 2:  # the model gives a tensor, not a list
        features = torch.cat(features)
    rest = {name: value for name, value in inputs.items() if name != PIXELS["image"]}
    return {**rest, FEATURES: {"image": BaseModelOutputWithPooling(pooler_output=features)}}


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


def size(values: Iterable[Any]) -> int:
    """Bytes of the tensors among these."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
