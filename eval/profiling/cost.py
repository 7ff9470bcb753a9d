"""What a profile will cost, before it starts: in prefills of one prompt."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from latefusion.eval.profiling.decide import BANDS, NEAR
from latefusion.models.flops import layer_flops

SEARCH = 16  # prefills a sample that measuring schedules may take at most


@dataclass(frozen=True)
class Cost:
    """Prefills a sample, in decoder FLOPs of a dense one.

    Attributes:
        observing: the dense forward whose attention and states are looked at.
        knock_outs: all of them, and the dense forward that checks whether prompts can be continued.
        deciding: bands, keeps, front, at most.
    """

    observing: float
    knock_outs: float
    deciding: float

    @property
    def total(self) -> float:
        return self.observing + self.knock_outs + self.deciding


def expected(config: PretrainedConfig, n_text: float, n_vision: float, *, continued: bool) -> Cost:
    """For prompts of so many tokens, answers included.

    A decoder of L layers takes, for every kind of knock-out, L (L - 1) / 2 layers from where its ways part, and a few
    whole ones until there (`paths.py`, `Whole`, `Continued`).

    Args:
        continued: whether the text follows on the cache of the images; else every forward holds all of a prompt.
    """
    layers = config.get_text_config().num_hidden_layers
    text, vision = round(n_text), round(n_vision)
    dense = layer_flops(config, text + vision)
    alone = layer_flops(config, text) / dense  # a prompt without vision
    half = (layers - 1) / 2
    if continued:
        rest, head = layer_flops(config, text, past=vision) / dense, layer_flops(config, vision) / dense
        knock_outs = 1 + head * (2 + half) + rest * (5 * half + 5)
        bands = 1 + head + rest * (1 + NEAR + BANDS)
    else:
        knock_outs = 4 + 4 * half + alone * (1 + half)
        bands = 3 + NEAR + alone * BANDS
    return Cost(observing=1.0, knock_outs=knock_outs, deciding=bands + SEARCH)
