"""What one recorded prefill of every prompt says of every setting before any of them runs: a floor for its FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from latefusion.eval.thresholds.replay import Recorded
from latefusion.models.flops import layer_flops


def surveyed(recorded: Recorded, tokens_thresholds: Sequence[float]) -> dict[str, Any]:
    """Each layer's least cosine `[layers, B]`, and how many tokens it would keep, `[layers, thresholds, B]`."""
    kept = [
        [(norms > threshold).sum(1).cpu().numpy() for threshold in tokens_thresholds]
        for norms in recorded.norms
    ]
    return {"least": recorded.least, "kept": np.array(kept)}


def fusion_layers(least: NDArray, boundary: int, layer_threshold: float) -> NDArray:
    """Each prompt's fusion layer, the number of layers if there is none; `least` is `[layers, B]`."""
    fuses = least < layer_threshold
    fuses[: boundary + 1] = False
    return np.where(fuses.any(0), fuses.argmax(0), len(fuses))


def floor(
    config: PretrainedConfig,
    setting: dict[str, Any],
    *,
    least: NDArray,
    kept: NDArray,
    text: NDArray,
    vision: NDArray,
    patience: int,
) -> NDArray:
    """The least that a setting can compute of each prompt, FLOPs `[N]`: exact, if vision leaves when it first may.

    Args:
        least: `[layers, N]`; kept: tokens above the setting's threshold, `[layers, N]`.
        text, vision: tokens of each prompt, `[N]`.
        patience: layers after fusion that have to pass before vision leaves.
    """
    layers = len(least)
    fusion = fusion_layers(least, setting["boundary"], setting["layer_threshold"])
    chosen = np.take_along_axis(kept, np.minimum(fusion, layers - 1)[None], 0)[0]
    cost = np.array([layer_flops(config, n) for n in range(int((text + vision).max()) + 1)], float)
    whole = np.minimum(fusion + 1, layers)  # layers that compute every token
    pruned = layers - whole
    if "deep" in setting["stages"]:
        pruned = np.minimum(pruned, patience)
    rest = layers - whole - pruned
    return whole * cost[text + vision] + pruned * cost[text + chosen] + rest * cost[text]
