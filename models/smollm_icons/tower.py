"""The vision tower: EfficientNet-Lite0 as a transformers model that stock LLaVA can hold.

A picture of 768 x 768 pixels becomes 12 x 12 tokens of 1456 numbers: the last block's 2 x 2 places side by
side (4 x 320), two earlier blocks averaged over the token (112 + 40), all standardised, and the token's row and
column (12 + 12, one-hot).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from latefusion.models.smollm_icons.packages import empty_network

SIDE = 12  # vision tokens in a row
CHANNELS = 4 * 320 + 112 + 40
STRIDE = 64  # pixels of a token's side
FOLLOWS = {  # convolution -> the batch norm after it
    "_conv_stem": "_bn0",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
    "_conv_head": "_bn1",
}


class IconsTowerConfig(PretrainedConfig):
    model_type = "latefusion_icons_tower"

    def __init__(
        self, image_size: int = SIDE * STRIDE, patch_size: int = STRIDE, hidden_size: int = CHANNELS + 2 * SIDE,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        self.image_size, self.patch_size, self.hidden_size = image_size, patch_size, hidden_size


def folded(network: nn.Module) -> nn.Module:
    """An EfficientNet in evaluation mode with its batch norms and even paddings in its convolutions.

    The same function to float error, in less than half the time on a CPU; `network` is changed.
    """
    for parent in list(network.modules()):
        children = dict(parent.named_children())
        for name, norm in FOLLOWS.items():
            if name in children and norm in children:
                both: Any = (children[name], children[norm])
                convolution: Any = fuse_conv_bn_eval(*both)
                left, right, above, below = getattr(convolution.static_padding, "padding", (0, 0, 0, 0))
                if left == right == above == below:
                    convolution.padding, convolution.static_padding = (above, left), nn.Identity()
                setattr(parent, name, convolution)
                setattr(parent, norm, nn.Identity())
        if "_swish" in children:
            parent._swish = nn.ReLU6(inplace=True)
    return network


def picture_features(network: Any, pixels: Tensor) -> Tensor:
    """Features of normalised pixels [B, 3, 768, 768]: [B, 144, CHANNELS], not yet standardised."""
    x = network._swish(network._bn0(network._conv_stem(pixels)))
    outputs = {}
    for index, block in enumerate(network._blocks):
        x = block(x)
        if index in (4, 10, 15):
            outputs[index] = x
    last = F.pixel_unshuffle(outputs[15], 2)
    early = [F.avg_pool2d(outputs[10], 4), F.avg_pool2d(outputs[4], 8)]
    return torch.cat([last, *early], 1).flatten(2).transpose(1, 2)


def token_places() -> Tensor:
    """Row and column of each token, one-hot: [144, 24]."""
    one = torch.eye(SIDE)
    rows = one[:, None].expand(SIDE, SIDE, SIDE)
    columns = one[None].expand(SIDE, SIDE, SIDE)
    return torch.cat([rows, columns], -1).reshape(SIDE * SIDE, 2 * SIDE)


def standardise(features: Tensor, mean: Tensor, std: Tensor, places: Tensor) -> Tensor:
    """What the projector reads: standardised, clamped features with their places, in float32."""
    x = ((features.float() - mean.float()) / std.float()).clamp(-6, 6)
    return torch.cat([x, places.float().expand(len(x), -1, -1)], -1)


class IconsTower(PreTrainedModel):
    """EfficientNet-Lite0 that gives 144 tokens; its statistics are buffers, saved with its weights."""

    config_class = IconsTowerConfig
    main_input_name = "pixel_values"
    base_model_prefix = "tower"
    input_modalities = "image"
    _no_split_modules = []  # noqa: RUF012
    mean: Tensor
    std: Tensor
    places: Tensor

    def __init__(self, config: IconsTowerConfig) -> None:
        super().__init__(config)
        self.network: Any = folded(empty_network())
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("std", torch.ones(CHANNELS))
        self.register_buffer("places", token_places())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        dtype = self.network._conv_stem.weight.dtype
        pixels = pixel_values.to(dtype, memory_format=torch.channels_last)  # a third faster on a CPU
        features = picture_features(self.network, pixels)
        tokens = standardise(features, self.mean, self.std, self.places).to(dtype)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(IconsTowerConfig.model_type, IconsTowerConfig, exist_ok=True)
AutoModel.register(IconsTowerConfig, IconsTower, exist_ok=True)
