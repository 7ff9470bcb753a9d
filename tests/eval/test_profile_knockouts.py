"""Knock-outs against the masked oracle: over whole prompts, and continued on a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.families import LAYERS, shared
from helpers.oracle import band, masked
from helpers.oracle import blinded as blinded_oracle
from helpers.profile_batches import MIXED, ONE_IMAGE, batch_of

from latefusion.data.prompt_batches import Batch
from latefusion.eval.fusion.blind import (
    CachedRuns,
    KnockOut,
    Runner,
    Runs,
    WholeRuns,
    cheapest_runs,
    position_ids_of,
)
from latefusion.eval.fusion.effects import Answers
from latefusion.eval.fusion.knockouts import KINDS, bands, blinded, effects, knock_outs, reading_effects
from latefusion.models.attach import attach
from latefusion.models.schedule import VisionSchedule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def judged(model: Any, batch: Batch, kind: str, layer: int) -> Answers:
    """The oracle's answers."""
    vision, padding = batch.vision, batch.inputs["attention_mask"]
    spans = {"prefix": (0, layer), "suffix": (layer, LAYERS), "single": (layer, layer + 1)}
    if kind == "late":
        context = masked(model, vision, band(vision, LAYERS, layer), padding=padding)
    else:
        hidden = range(*spans.get(kind, (0, 0)))
        still = layer if kind == "frozen" else 0
        context = blinded_oracle(model, vision, hidden, padding=padding, still=still)
    with torch.no_grad(), context:
        logits = model(**batch.fresh(), use_cache=False).logits
    return Answers.of(batch, logits[:, batch.columns], batch.columns)


def close(a: Answers, b: Answers) -> bool:
    return (a.log_probs - b.log_probs).abs().max().item() < 2e-5


def all_knock_outs(runs: Runs) -> dict[tuple[str, int], Answers]:
    keys = knock_outs(LAYERS)
    answers = dict(blinded(runs, keys))
    answers.update(runs.late_and_frozen(keys))
    assert sorted(answers) == sorted(keys)
    return answers


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llava", "sdpa"),
        ("llava", "eager"),
        ("qwen2_vl", "sdpa"),
        ("qwen3_vl", "sdpa"),
        ("gemma3", "sdpa"),
        ("paligemma", "sdpa"),
        ("lfm2_vl", "sdpa"),
        ("qwen3_5", "sdpa"),
    ],
)
def test_knock_outs_over_whole_prompts_equal_the_masked_oracle(family: str, attention: str) -> None:
    """Text between images, rows of different length; what Qwen3-VL's tower adds between layers."""
    rows = ["I tt I ttt", "I I ttt"] if family == "paligemma" else MIXED
    model, batch = shared(family, attention), batch_of(family, rows)
    with attach(model, VisionSchedule()) as attachment:
        measured = all_knock_outs(WholeRuns(Runner(model, attachment, batch)))
    dense = judged(model, batch, "frozen", 0)
    for (kind, layer), answers in measured.items():
        assert close(answers, judged(model, batch, kind, layer)), (kind, layer)
        assert not close(answers, dense), (kind, layer)
    assert not any("forward" in vars(layer) for layer in model.get_decoder().layers)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "internvl", "gemma3"])
def test_knock_outs_continued_on_a_cache_equal_the_masked_oracle(family: str) -> None:
    model, batch = shared(family), batch_of(family, ONE_IMAGE)
    with attach(model, VisionSchedule()) as attachment:
        runner = Runner(model, attachment, batch)
        with position_ids_of(model.get_decoder()) as positions:
            runner.answers(VisionSchedule())
        cached = CachedRuns.of(runner, positions)
        assert cached is not None
        assert close(cached.dense(), judged(model, batch, "frozen", 0))
        measured = all_knock_outs(cached)
    for (kind, layer), answers in measured.items():
        assert close(answers, judged(model, batch, kind, layer)), (kind, layer)


@pytest.mark.parametrize(("family", "rows"), [("llava", ONE_IMAGE), ("llava", MIXED), ("gemma3", ONE_IMAGE)])
def test_bands_equal_the_masked_oracle(family: str, rows: list[str]) -> None:
    model, batch = shared(family), batch_of(family, rows)
    pairs = [(0, 4), (0, 6), (2, 3), (2, 5), (3, 5), (3, 6)]
    with attach(model, VisionSchedule()) as attachment:
        _, _, runs = cheapest_runs(Runner(model, attachment, batch))
        assert isinstance(runs, WholeRuns if rows is MIXED else CachedRuns)
        measured = dict(bands(runs, pairs))
    assert sorted(measured) == pairs
    for (a, b), answers in measured.items():
        hidden = [i for i in range(LAYERS) if not a <= i < b]
        with (
            torch.no_grad(),
            blinded_oracle(model, batch.vision, hidden, padding=batch.inputs["attention_mask"]),
        ):
            logits = model(**batch.fresh(), use_cache=False).logits
        assert close(answers, Answers.of(batch, logits[:, batch.columns], batch.columns)), (a, b)


@pytest.mark.parametrize(
    ("family", "rows"),
    [("llava", ONE_IMAGE), ("llava", MIXED), ("gemma3", ONE_IMAGE), ("qwen3_5", ONE_IMAGE)],
)
def test_text_that_reads_in_some_layers_alone_equals_the_masked_oracle(family: str, rows: list[str]) -> None:
    model, batch = shared(family), batch_of(family, rows)
    sets = [(3,), (0, 4), (1, 2, 5), tuple(range(LAYERS))]
    with attach(model, VisionSchedule()) as attachment:
        runner = Runner(model, attachment, batch)
        dense = runner.answers(VisionSchedule())
        changed = dict(reading_effects(runner, sets))
    assert list(changed) == sets
    for read, effect in changed.items():
        hidden = [i for i in range(LAYERS) if i not in read]
        with (
            torch.no_grad(),
            blinded_oracle(model, batch.vision, hidden, padding=batch.inputs["attention_mask"]),
        ):
            logits = model(**batch.fresh(), use_cache=False).logits
        expected = dense.effect(Answers.of(batch, logits[:, batch.columns], batch.columns))
        assert effect.kl == pytest.approx(expected.kl, abs=1e-5) and effect.right == expected.right, read


@pytest.mark.parametrize(
    ("family", "rows", "kind"),
    [
        ("llava", ["tt I t I tt"], WholeRuns),
        ("llava", ["tt I ttt", "t I ttt"], WholeRuns),
        ("paligemma", ONE_IMAGE, WholeRuns),  # images see the text behind them
        ("gemma3", ["tt I I tttt"], WholeRuns),  # longer than the window of its local attention
        ("lfm2_vl", ONE_IMAGE, WholeRuns),  # a state cannot be told apart from its vision tokens
        ("gemma3", ONE_IMAGE, CachedRuns),
        ("llava", ["tt I I tttt"], CachedRuns),
    ],
)
def test_prompts_are_continued_where_that_gives_the_same(family: str, rows: list[str], kind: type) -> None:
    model, batch = shared(family), batch_of(family, rows)
    with attach(model, VisionSchedule()) as attachment:
        assert type(cheapest_runs(Runner(model, attachment, batch))[2]) is kind


def test_effects_are_kl_and_exact_match_by_hand() -> None:
    model, batch = shared("llava"), batch_of("llava", ONE_IMAGE)
    with attach(model, VisionSchedule()) as attachment, torch.no_grad():
        dense = model(**batch.fresh()).logits.double().log_softmax(-1)
        with attachment.using(VisionSchedule(enter=3)):
            late = model(**batch.fresh()).logits.double().log_softmax(-1)
        for row in range(2):  # make one sample's answer what late entry writes
            at = [t for t in range(batch.labels.shape[1]) if batch.labels[row, t] != -100]
            if row == 0:
                batch.labels[row, at] = late[row].argmax(-1)[[t - 1 for t in at]]
            batch.labels[1, at[0] if row else 0] = 5 if row else -100
        _, changed = effects(Runner(model, attachment, batch), [("late", 3)])
    effect = changed["late", 3]
    assert effect.right == [True, False]
    for row in range(2):
        at = [t - 1 for t in range(batch.labels.shape[1]) if batch.labels[row, t] != -100]
        kl = [(dense[row, t].exp() * (dense[row, t] - late[row, t])).sum().item() for t in at]
        assert effect.kl[row] == pytest.approx(sum(kl) / len(kl), rel=1e-4)


def test_every_kind_is_measured_at_every_layer_once() -> None:
    keys = knock_outs(3)
    assert len(keys) == len(set(keys)) == 3 + 2 + 1 + 2 + 2 and {kind for kind, _ in keys} == set(KINDS)


def test_a_knock_out_names_layers_that_exist() -> None:
    with pytest.raises(ValueError, match="layer 9"):
        attach(shared("llava"), KnockOut([9]))
