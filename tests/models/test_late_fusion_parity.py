"""Schedules against recorded runs of HiDrop and ViCA (`helpers/published_runs.py`).

Without the recordings the tests are skipped; in CI (`CI=true`) that fails.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers.published_runs import (
    ATTENTIONS,
    CASES,
    PARITY,
    Case,
    inference_errors,
    schedule,
    tagged,
    training_errors,
)

TOLERANCE = 1e-4


def test_recordings_are_there() -> None:
    if CASES:
        return
    message = f"no recorded runs in {PARITY}; name their folder in LATEFUSION_PARITY_DIR."
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", tagged("core"))
def test_prefill_and_decode(name: str, attention: str) -> None:
    assert max(inference_errors(name, attention).values()) < TOLERANCE


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", tagged("train"))
def test_training_loss_and_gradients(name: str, attention: str) -> None:
    assert max(training_errors(name, attention).values()) < TOLERANCE


# ---------------------------------------------------------------- corners of the official code: what ours does there


@pytest.mark.parametrize("name", ["h09_two_images", "c11_13b_two_images"])
def test_every_image_is_scheduled(name: str) -> None:
    """The official code schedules the first image alone, and the second runs through every layer like text."""
    if name not in CASES:
        pytest.skip("no recorded runs")
    run = Case(name, "sdpa")
    policy = schedule(run.case)
    _, logits, trace = run.generated(policy)
    layers, both = run.case["llama_config"]["num_hidden_layers"], int(run.vision.sum())
    assert trace.vision == policy.vision_tokens(layers, both)
    assert (logits[0] - run.golden["prefill_logits"]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["h01_text_only", "c12_13b_text_only"])
def test_a_prompt_without_an_image_is_the_stock_models(name: str) -> None:
    """ViCA's masked path drops the attention output of the whole prompt there, its accelerated path fails."""
    if name not in CASES:
        pytest.skip("no recorded runs")
    run = Case(name, "sdpa")
    with torch.no_grad():
        stock = run.model(inputs_embeds=run.embeds).logits[0, -1]
    assert torch.equal(run.generated(schedule(run.case))[1][0], stock)


@pytest.mark.parametrize("name", ["c13_3b_flash", "c14_13b_flash"])
def test_one_rule_whatever_the_kernel(name: str) -> None:
    """The official accelerated path under flash attention runs by another rule than the weights were trained with."""
    if name not in CASES:
        pytest.skip("no recorded runs")
    runs = [Case(name, attention) for attention in ("sdpa", "eager")]
    ours = [run.generated(schedule(run.case))[1] for run in runs]
    assert (ours[0] - ours[1]).abs().max() < TOLERANCE
    assert (ours[0][0] - runs[0].golden["prefill_logits"]).abs().max() > 0.1
