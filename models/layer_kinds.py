"""Which decoder layers attend with a softmax, and which run a recurrence: linear attention or a short convolution.

A recurrence reads tokens into a state, one after the other, and a token that is not there is not read. It has no
attention weights, so no policy can rank tokens there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

RECURRENT = {"linear_attention", "conv"}  # as `layer_types` of a configuration has it


def layer_kind(config: PretrainedConfig, layer: int) -> str:
    """What a decoder layer is, as `layer_types` of the configuration says."""
    kinds: list[str] | None = getattr(config.get_text_config(), "layer_types", None)
    return kinds[layer] if kinds else "full_attention"


def attends(config: PretrainedConfig) -> list[bool]:
    """Whether each decoder layer attends with a softmax."""
    return [layer_kind(config, i) not in RECURRENT for i in range(config.get_text_config().num_hidden_layers)]


def require_attention(what: str, layers: Iterable[int], attention: Sequence[bool], shift: int = 0) -> None:
    """Raise ValueError if one of the layers runs a recurrence, in whose place softmax attention is needed.

    Args:
        what: the setting that names the layers, for the message.
        attention: per decoder layer, whether it attends with a softmax.
        shift: the setting's own number is the layer's plus this.
    """
    for layer in layers:
        if attention[layer]:
            continue
        near = nearest_attention(layer, attention)
        numbers = " or ".join(str(i + shift) for i in near)
        raise ValueError(
            f"{what}={layer + shift} looks at the attention of layer {layer}, which runs a recurrence (linear "
            f"attention or a convolution) and has none: the nearest softmax layers are {' and '.join(map(str, near))}, "
            f"so choose {what}={numbers}."
            if near
            else f"{what}={layer + shift} looks at the attention of layer {layer}, but no layer of this decoder "
            "attends with a softmax."
        )


def nearest_attention(layer: int, attention: Sequence[bool]) -> list[int]:
    """The softmax layers next to a layer, before and after it."""
    before = [i for i in range(layer) if attention[i]][-1:]
    after = [i for i in range(layer + 1, len(attention)) if attention[i]][:1]
    return before + after
