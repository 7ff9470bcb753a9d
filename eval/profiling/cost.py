"""What a profile will cost, before it starts: in prefills of one prompt."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from latefusion.models.flops import layer_flops
from latefusion.models.schedule import VisionSchedule

SEARCH = 16  # prefills a sample that the search for keeps may take at most


@dataclass(frozen=True)
class Cost:
    """Prefills a sample, in decoder FLOPs of a dense one.

    Attributes:
        observing: the dense forward, and one head to check the continuation by.
        knock_outs: on continued prompts; whole: the same where every knock-out needs a forward of its own.
        deciding: bands, keeps, front, at most.
    """

    observing: float
    knock_outs: float
    whole: float
    deciding: float

    @property
    def total(self) -> float:
        return self.observing + self.knock_outs + self.deciding


def expected(config: PretrainedConfig, n_text: float, n_vision: float) -> Cost:
    """For prompts of so many tokens, answers included, all text after the images."""
    layers = config.get_text_config().num_hidden_layers
    text, vision = round(n_text), round(n_vision)
    dense = VisionSchedule().flops(config, text, vision)
    rest = layers * layer_flops(config, text, past=vision) / dense
    head = layers * layer_flops(config, vision) / dense
    late = [VisionSchedule(enter=a).flops(config, 0, vision) / dense for a in range(1, layers)]
    leave = [VisionSchedule(exit=b).flops(config, text, vision) / dense for b in range(1, layers)]
    enter = [VisionSchedule(enter=a).flops(config, text, vision) / dense for a in range(1, layers)]
    continued = 2 * head + sum(late) + (5 * layers - 3) * rest
    whole = layers + (layers - 2) + (layers - 1) + sum(leave) + sum(enter)
    return Cost(observing=1.0, knock_outs=continued, whole=whole, deciding=2.0 + SEARCH)
