"""Helpers around a model's inputs."""

from functools import wraps
from types import MethodType

import torch
from helpers.tiny_base import tiny_base

from latefusion.models.inputs import vision_features


def test_images_are_encoded_through_a_method_that_was_wrapped():
    """FSDP2 wraps the outermost module's method, and Python then takes the first argument for `self`."""
    model, _ = tiny_base()
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16), "input_ids": torch.zeros(1, 4)}
    expected = vision_features(model, inputs).pooler_output
    method = model.get_image_features

    @wraps(method)
    def wrapped(self, *args, **kwargs):
        return method(*args, **kwargs)

    model.get_image_features = MethodType(wrapped, model)
    for features, others in zip(vision_features(model, inputs).pooler_output, expected, strict=True):
        assert torch.equal(features, others)
