"""VisiPruner on every family, against the full-length stock model with its eager attention maps edited."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES, LAYERS, continued, prompt, shared, softmax, text_tokens, vision_tokens
from helpers.oracle import attending, masked
from torch import Tensor

from latefusion.models.attach import attach
from latefusion.models.policies.visipruner.settings import VisiPruner

ROWS = ["t I tt", "tttt", "t I t I tt", "I t I t"]  # one image, none, several with text between
NEW_TOKENS = 3
EXIT_THRESHOLD = 0.9
TOLERANCE = 5e-6  # logits are of order 1

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@contextmanager
def shallow_maps(model: Any, vision: Tensor, ruled: Tensor, boundary: int) -> Iterator[dict[int, Any]]:
    """Edit an eager model's attention maps after the softmax, and record them with the values, by layer.

    Args:
        vision, ruled: bool `[B, T]`, vision tokens, and text that must not see them below `boundary`.
    """
    file: Any = sys.modules[type(model.get_decoder().layers[attending(model)[0]].self_attn).__module__]
    stock, seen = file.eager_attention_forward, {}

    def edited(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        output, maps = stock(module, query, key, value, mask, **kwargs)
        value = value.repeat_interleave(maps.shape[1] // value.shape[1], dim=1)  # [B, H, T, D]
        seen[module.layer_idx] = maps, value
        if module.layer_idx >= boundary:
            return output, maps
        maps = maps.clone()
        for b in range(len(maps)):
            columns = vision[b].nonzero().flatten().tolist()
            for row in range(maps.shape[2]):
                if ruled[b, row] and module.layer_idx == 0:
                    mass = maps[b, :, row, columns].sum(-1)
                    maps[b, :, row, columns] = 0
                    maps[b, :, row, columns[0]] = mass
                elif ruled[b, row] or (vision[b, row] and module.layer_idx == 0):
                    maps[b, :, row, columns] = 0
        return (maps @ value).transpose(1, 2).contiguous(), maps

    file.eager_attention_forward = edited
    try:
        yield seen
    finally:
        file.eager_attention_forward = stock


@dataclass
class Expected:
    policy: VisiPruner
    seen: list[Tensor]  # per layer, the vision tokens that take part, bool [B, T]
    fusion: list[int | None]
    exit: list[int | None]


def removal(maps: Tensor, value: Tensor, row: int, columns: list[int]) -> list[tuple[float, float]]:
    """Cosine without a key's contribution, and its norm, for the query row of one sample."""
    maps, value = maps.double(), value.double()
    output = torch.cat([maps[h, row] @ value[h] for h in range(len(maps))])
    effects = []
    for i in columns:
        part = torch.cat([maps[h, row, i] * value[h, i] for h in range(len(maps))])
        cosine = torch.nn.functional.cosine_similarity(output - part, output, dim=0)
        effects.append((cosine.item(), part.norm().item()))
    return effects


def ruled_text(inputs: dict[str, Any]) -> Tensor:
    vision = vision_tokens(inputs)
    return text_tokens(inputs) & (vision.cumsum(1) > 0)


@cache
def expected(family: str, side: str, stages: tuple[str, ...]) -> Expected:
    """Decide from the eager maps, with thresholds in the middle of what they show so that samples differ."""
    model, inputs = shared(family, "eager"), prompt(family, ROWS, side)
    vision, ruled = vision_tokens(inputs), ruled_text(inputs)
    last = [int(row.nonzero().max()) for row in inputs["attention_mask"]]
    boundary = softmax(family, 2 if "shallow" in stages else 0)
    policy = VisiPruner(boundary=boundary, exit_patience=1, stages=stages)
    result = Expected(policy, [vision] * LAYERS, [None] * len(ROWS), [None] * len(ROWS))
    shallow = policy.boundary if "shallow" in stages else 0
    middle = [i for i in attending(model) if i > policy.boundary]
    for layer in middle if "middle" in stages else ():
        with shallow_maps(model, vision, ruled, shallow) as maps, masked(model, vision, result.seen):
            model(**inputs, use_cache=False)
        by_layer = {}
        for b, row in enumerate(last):
            columns = result.seen[layer][b].nonzero().flatten().tolist()
            if columns:
                by_layer[b] = dict(
                    zip(columns, removal(maps[layer][0][b], maps[layer][1][b], row, columns), strict=True)
                )
        if layer == middle[0]:
            lowest = sorted(min(cosine for cosine, _ in effects.values()) for effects in by_layer.values())
            norms = sorted(norm for effects in by_layer.values() for _, norm in effects.values())
            result.policy = replace(
                policy,
                layer_threshold=(lowest[-1] + lowest[-2]) / 2,  # all samples with images but one fuse here
                tokens_threshold=(norms[len(norms) // 2 - 1] + norms[len(norms) // 2]) / 2,
                exit_threshold=EXIT_THRESHOLD,
            )
        decide(layer, by_layer, result)
    return result


def decide(layer: int, by_layer: dict[int, dict[int, tuple[float, float]]], result: Expected) -> None:
    """The next layers' vision tokens of every sample."""
    policy = result.policy
    for b, effects in by_layer.items():
        lowest = min(cosine for cosine, _ in effects.values())
        threshold = policy.layer_threshold if result.fusion[b] is None else policy.exit_threshold
        assert abs(lowest - threshold) > 1e-5, "a decision hangs on rounding"
        if result.fusion[b] is None and lowest < threshold:
            result.fusion[b] = layer
            stay = {i for i, (_, norm) in effects.items() if norm > policy.tokens_threshold}
        elif result.fusion[b] is not None and lowest >= threshold:
            stay = set()
        else:
            continue
        for later in range(layer + 1, LAYERS):
            result.seen[later] = result.seen[later].clone()
            for i in effects:
                result.seen[later][b, i] = i in stay
        if not stay and layer + 1 < LAYERS:
            result.exit[b] = layer + 1


@torch.no_grad()
def check(family: str, side: str, attention: str, stages: tuple[str, ...]) -> None:
    model, inputs = shared(family, attention), prompt(family, ROWS, side)
    want = expected(family, side, stages)
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    with attach(model, want.policy) as att:
        logits = model(**inputs, use_cache=False).logits
        trace = att.trace
        if side == "left":
            out = model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
    assert [record.fusion_layer for record in trace] == want.fusion
    assert [record.exit_layer for record in trace] == want.exit
    for b, record in enumerate(trace):
        there = text[b].sum().item()
        assert record.tokens == [there + seen[b].sum().item() for seen in want.seen]
        if record.kept is not None:
            assert record.fusion_layer is not None
            assert record.kept == want.seen[record.fusion_layer + 1][b].nonzero().flatten().tolist()

    eager, shallow = shared(family, "eager"), want.policy.boundary if "shallow" in stages else 0
    with shallow_maps(eager, vision, ruled_text(inputs), shallow), masked(eager, vision, want.seen):
        assert (logits - eager(**inputs, use_cache=False).logits)[text].abs().max() < TOLERANCE
    if side == "right":
        return
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    longer, grow = continued(family, inputs, new), (0, NEW_TOKENS)
    pad = torch.nn.functional.pad
    ruled, seen = pad(ruled_text(inputs), grow), [pad(mask, grow) for mask in want.seen]
    with shallow_maps(eager, pad(vision, grow), ruled, shallow), masked(eager, pad(vision, grow), seen):
        eager_logits = eager(**longer, use_cache=False).logits[:, -NEW_TOKENS - 1 : -1]
    assert (torch.stack(out.logits, 1) - eager_logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_decides_and_computes_as_the_edited_stock_model(family: str) -> None:
    check(family, "left", "sdpa", ("shallow", "middle", "deep"))
    fusion = expected(family, "left", ("shallow", "middle", "deep")).fusion
    assert fusion[1] is None and sum(layer is not None for layer in fusion) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages", [("middle", "deep"), ("shallow", "middle", "deep"), ("shallow",)], ids="+".join
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everywhere(family: str, side: str, attention: str, stages: tuple[str, ...]) -> None:
    check(family, side, attention, stages)
