"""What must always hold, over every family: identity, oracle, cached = uncached, ranking, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.families import (
    EVEN,
    FAMILIES,
    LAYERS,
    MIXED,
    TOLERANCE,
    build,
    continued,
    gradient_tolerance,
    prompt,
    shared,
    text_tokens,
    vision_tokens,
)
from helpers.forwards import KEEPS, generate, gradients, gradients_checkpointed, seen_by_keeps
from helpers.oracle import band, masked
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from latefusion import VisionSchedule
from latefusion.models.attach import attach

# rows of one batch: one image, none, several; different lengths, so all but one row are padded
BATCHES = [MIXED, EVEN, ["ttI t", "tI ttttttttt"], ["I tt"], ["tt"], ["t I t I t I tttt", "tttttttttt"]]
BANDS = [(2, 4), (0, 3), (3, None), (1, 5)]

family_side_attention = [
    pytest.mark.parametrize("family", FAMILIES),
    pytest.mark.parametrize("side", ["left", "right"]),
    pytest.mark.parametrize("attention", ["sdpa", "eager"]),
]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def everywhere(test: Any) -> Any:
    for mark in family_side_attention:
        test = mark(test)
    return test


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def padding(inputs: dict[str, Any]) -> torch.Tensor:
    return inputs["attention_mask"]


# ---------------------------------------------------------------- identity


def check_identity(family: str, side: str, attention: str, rows: list[str]) -> None:
    model, inputs = shared(family, attention), prompt(family, rows, side)
    with torch.no_grad():
        logits, out = model(**inputs).logits, generate(model, inputs)
        for everything in (VisionSchedule(), VisionSchedule(keep={2: 1000})):
            with attach(model, everything):
                assert torch.equal(model(**inputs).logits, logits)
                same = generate(model, inputs)
        assert torch.equal(same.sequences, out.sequences)
        assert all(torch.equal(a, b) for a, b in zip(same.logits, out.logits, strict=True))
        assert torch.equal(model(**inputs).logits, logits)  # and detach gave it back


@everywhere
def test_a_policy_that_keeps_everything_changes_no_bit(family: str, side: str, attention: str) -> None:
    check_identity(family, side, attention, MIXED)


# ---------------------------------------------------------------- oracle


def check_bands(family: str, side: str, attention: str, rows: list[str]) -> None:
    """Uncached and cached prefill under several bands against the full-length model."""
    model, inputs = shared(family, attention), prompt(family, rows, side)
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    with torch.no_grad():
        for enter, exit in BANDS:
            with masked(model, vision, band(vision, LAYERS, enter, exit), padding=padding(inputs)):
                expected = model(**inputs, use_cache=False).logits[text]
            with attach(model, VisionSchedule(enter=enter, exit=exit)):
                assert gap(model(**inputs, use_cache=False).logits[text], expected) <= TOLERANCE
                assert gap(model(**inputs, use_cache=True).logits[text], expected) <= TOLERANCE


@everywhere
def test_bands_equal_the_masked_model(family: str, side: str, attention: str) -> None:
    check_bands(family, side, attention, MIXED)
    if side == "left":
        check_bands(family, side, attention, EVEN)  # no padding, so no mask


@everywhere
def test_keeps_choose_by_attention_and_equal_the_masked_model(family: str, side: str, attention: str) -> None:
    model, inputs = shared(family, attention), prompt(family, MIXED, side)
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    seen = seen_by_keeps(family, inputs)
    with torch.no_grad():
        with masked(model, vision, seen, padding=padding(inputs)):
            expected = model(**inputs, use_cache=False).logits[text]
        with attach(model, KEEPS) as attachment:
            logits = model(**inputs).logits[text]
            trace = attachment.trace
    for record, chosen, sees in zip(trace, seen[4], vision, strict=True):
        assert record.kept == (chosen.nonzero().flatten().tolist() if sees.any() else None)
    assert gap(logits, expected) <= TOLERANCE


# ---------------------------------------------------------------- cached = uncached


def check_generation(family: str, attention: str, rows: list[str], schedule: VisionSchedule) -> None:
    """Every step of `generate` against one full-length masked forward over what it wrote."""
    model, inputs = shared(family, attention), prompt(family, rows)
    with torch.no_grad():
        with attach(model, schedule):
            out = generate(model, inputs, tokens=5)
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        if schedule.keep:
            seen = seen_by_keeps(family, inputs, schedule)
        else:
            seen = band(vision_tokens(inputs), LAYERS, schedule.enter, schedule.exit)
        longer = continued(family, inputs, new)
        grow = lambda mask: torch.nn.functional.pad(mask, (0, new.shape[1]))  # noqa: E731
        seen, vision = [grow(mask) for mask in seen], grow(vision_tokens(inputs))
        with masked(model, vision, seen, padding=padding(longer)):
            expected = model(**longer, use_cache=False).logits[:, -new.shape[1] - 1 : -1]
    assert gap(torch.stack(out.logits, 1), expected) <= TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_the_masked_model(family: str, attention: str) -> None:
    check_generation(family, attention, MIXED, VisionSchedule(enter=2, exit=4))
    check_generation(family, attention, MIXED, KEEPS)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_masked_model(family: str, attention: str) -> None:
    model, inputs = shared(family, attention), prompt(family, MIXED, "right")
    vision = vision_tokens(inputs)
    with masked(model, vision, seen_by_keeps(family, inputs), padding=padding(inputs)):
        expected, expected_loss = gradients(model, inputs)
    with attach(model, KEEPS):
        (grads, loss), (again, loss_again) = gradients(model, inputs), gradients_checkpointed(model, inputs)
    assert grads.keys() == expected.keys()
    scale = max(grad.abs().max().item() for grad in expected.values())
    worst = max(gap(grads[name], expected[name]) for name in grads)
    assert worst / max(scale, 1.0) <= gradient_tolerance(family)
    assert abs(loss - expected_loss) <= TOLERANCE
    assert loss == loss_again and all(torch.equal(grads[name], again[name]) for name in grads)


def test_gradient_checkpointing_of_an_earlier_transformers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There the whole call is computed again, which hands the layer the tokens that it was to leave out."""
    if "__call__" not in vars(GradientCheckpointingLayer):
        monkeypatch.setattr(GradientCheckpointingLayer, "__call__", nn.Module.__call__, raising=False)
    model, inputs = build("llava"), prompt("llava", MIXED, "right")
    refused = pytest.raises(ValueError, match="compute layers again without the policy: install transformers")
    with attach(model, KEEPS), refused:
        gradients_checkpointed(model, inputs)


# ---------------------------------------------------------------- all batches (slow)


@pytest.mark.slow
@everywhere
def test_every_batch(family: str, side: str, attention: str) -> None:
    for rows in BATCHES:
        if rows != ["tt"]:
            check_bands(family, side, attention, rows)
        check_identity(family, side, attention, rows)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_band_generates(family: str, attention: str) -> None:
    for rows in BATCHES:
        for enter, exit in BANDS:
            check_generation(family, attention, rows, VisionSchedule(enter=enter, exit=exit))
