"""What a profile costs, in FLOPs and bytes that torch counts, against a prefill of the same prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import LAYERS, shared
from helpers.planted_models import BOUND, grouped, measurer, planted, planted_batch
from helpers.profile_batches import batch_of
from torch.utils.flop_counter import FlopCounterMode

from latefusion.data.prompt_batches import Group, counts
from latefusion.eval.fusion import plan
from latefusion.eval.fusion.blind import Runner
from latefusion.eval.fusion.decide import Goal, near_bands
from latefusion.eval.fusion.knockouts import effects, knock_outs
from latefusion.eval.fusion.plan import OPTIONAL, Shape
from latefusion.eval.fusion.run import shapes
from latefusion.eval.fusion.study import Study
from latefusion.eval.memory import peak_bytes
from latefusion.models.attach import attach
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry_fit import fit_entry

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PROMPTS = [  # mostly vision, as in any MLLM
    ("llava", "t IIIIIIII tttt"),
    ("llava", "t IIII t IIII tttt"),  # what cannot be continued
    ("qwen3_vl", "tItItItIt tttt"),
    ("gemma3", "t I tttt"),
    ("gemma3", "t IIIIIIII tttt"),  # longer than the window of its local attention
    ("paligemma", "IIIIIIII tttt"),
]
WORDY = [  # mostly text
    ("llava", "t I" + 40 * "t"),
    ("llava", "t I" + 30 * "t" + "I tttt"),
    ("qwen3_vl", "t I" + 40 * "t"),
    ("gemma3", "I" + 40 * "t"),
    ("paligemma", "I" + 40 * "t"),
]


@pytest.mark.parametrize(("family", "row"), PROMPTS)
def test_knock_outs_take_two_prefills_a_layer_and_the_memory_of_one(family: str, row: str) -> None:
    """At most 2 L + 3 prefills for L layers, as announced, and at most 1.3 times what a prefill holds."""
    model, batch = shared(family), batch_of(family, [row] * 2)

    def prefill() -> Any:
        with torch.no_grad():
            return model(**batch.fresh(), use_cache=True, logits_to_keep=batch.columns)

    kinds, cpu = knock_outs(LAYERS), torch.device("cpu")
    with attach(model, VisionSchedule()) as attachment:
        runner = Runner(model, attachment, batch)
        with FlopCounterMode(display=False) as one:
            prefill()
        with FlopCounterMode(display=False) as every:
            effects(runner, kinds)
        measured = every.get_total_flops() / one.get_total_flops()
        assert measured <= 2 * LAYERS + 3
        (shape,) = shapes(attachment, grouped([batch]))
        announced = plan.knock_out_cost(model.config, shape)
        assert 0.9 * announced <= measured <= 1.1 * announced  # lm_head, which is not announced, counts here
        assert peak_bytes(lambda: effects(runner, kinds), cpu) <= 1.3 * peak_bytes(prefill, cpu)


@pytest.mark.parametrize(("family", "row"), [("gemma3", "t I tttt"), ("paligemma", "IIII tttt")])
def test_layers_are_computed_as_often_as_their_knock_outs_need(family: str, row: str) -> None:
    """Counted layer by layer: layer i belongs to the ways that part at or before it."""
    model, batch = shared(family), batch_of(family, [row] * 2)
    length = batch.labels.shape[1]
    with attach(model, VisionSchedule()) as attachment, counted(model) as calls:
        effects(Runner(model, attachment, batch), knock_outs(LAYERS))
    for i, tokens in calls.items():
        assert tokens <= batch.size * length * (5 * i + 6), i
    assert calls[0] < 6 * batch.size * length


@contextmanager
def counted(model: Any) -> Iterator[Counter[int]]:
    """Tokens that each layer's MLP computes inside."""
    calls: Counter[int] = Counter()
    handles = [
        layer.mlp.register_forward_hook(
            lambda m, args, out, i=i: calls.update({i: out.shape[0] * out.shape[1]})
        )
        for i, layer in enumerate(model.get_decoder().layers)
    ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("family", "row"), WORDY)
def test_prompts_of_mostly_text_stay_within_two_prefills_a_layer(
    family: str, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer's tokens counted, with a constant small enough to matter to six layers."""
    monkeypatch.setattr(plan, "KNOCK_OUTS", 3)
    model, batches = shared(family), [batch_of(family, [row, row + "t"]), batch_of(family, [row, row + "tt"])]
    with attach(model, VisionSchedule()) as attachment:
        made = measurer(model, attachment, batches, tmp_path / "measured.jsonl")
        with counted(model) as calls:
            measured = made.knock_outs()
        whole = [effects(Runner(model, attachment, batch), knock_outs(LAYERS))[1] for batch in batches]
    prefills = sum(calls.values()) / (LAYERS * sum(batch.labels.numel() for batch in batches))
    assert made.plan.cost.knock_outs <= 2 * LAYERS + 3
    assert made.plan.cost.knock_outs == pytest.approx(prefills, rel=0.03)  # by FLOPs and by tokens
    assert any(made.plan.left_out)
    for key in knock_outs(LAYERS):
        kl = [value for changed in whole for value in changed[key].kl]
        for i, left in enumerate(made.plan.left_out):
            if key[0] in left:
                kl[2 * i : 2 * i + 2] = [None, None]
        assert measured[f"{key[0]} {key[1]}"]["kl"] == kl, key


@pytest.mark.parametrize("cached", [True, False])
def test_whatever_the_prompts_two_prefills_a_layer_and_a_constant_are_announced(cached: bool) -> None:
    config = shared("llava").config.get_text_config()
    layers = config.num_hidden_layers
    try:
        for config.num_hidden_layers in (2, 16, 32, 80):
            for text in (10, 100, 1000, 10000):
                shape = Shape(4, 8, text + 600, 601, 600, tried=True, cached=cached)
                usual = Shape(4, 8, 640, 601, 600, tried=True, cached=cached)
                for batches in ([shape] * 2, [shape] * 7, [usual, shape, usual], [shape, usual, shape]):
                    made = plan.make_plan(config, batches)
                    assert made.cost.knock_outs <= 2 * config.num_hidden_layers + 8
                    for kind in OPTIONAL:
                        assert sum(kind in left for left in made.left_out) <= (len(batches) + 1) // 2
                    if text <= 100:
                        assert not any(made.left_out)
        assert plan.make_plan(config, [shape]).left_out == [()]
        assert plan.make_plan(config, [shape] * 2).left_out == [("frozen",), ("single",)]
    finally:
        config.num_hidden_layers = layers


def test_every_batch_counts_in_what_is_announced() -> None:
    config = shared("llava").config
    short = Shape(10, 20, 700, 601, 600, tried=True, cached=True)
    long = Shape(2, 4, 5000, 601, 600, tried=False, cached=False)
    mean = (10 * plan.knock_out_cost(config, short) + 2 * plan.knock_out_cost(config, long)) / 12
    assert plan.make_plan(config, [short, long]).cost.knock_outs == pytest.approx(mean)
    assert plan.make_plan(config, [long, short]).cost.knock_outs == pytest.approx(mean)
    two = Group((0, 2), make=pytest.fail, places=(1, 2, 3), lengths=(5, 7), answers=2)
    one = Group((1,), make=pytest.fail, places=(0, 1), lengths=(10,), answers=1)
    assert counts([two, one]) == (pytest.approx(14 / 3), pytest.approx(8 / 3))


def test_no_more_bands_are_measured_than_are_announced() -> None:
    ends = [(enter, leave, n) for n in range(2, 14) for enter in range(n) for leave in range(n + 1)]
    assert max(len(near_bands(*end)) for end in ends) == plan.BANDS


def test_the_cost_that_is_announced_is_an_upper_bound_for_what_is_measured(tmp_path: Path) -> None:
    """In two batches, whose dense answers are held, or computed again for each schedule."""
    model = planted("llava", 1, 5)
    batches = [planted_batch(model, 6, images=8), planted_batch(model, 6, images=8)]
    with attach(model, VisionSchedule()) as attachment:
        with FlopCounterMode(display=False) as one:
            Runner(model, attachment, batches[0]).answers(VisionSchedule())
        made = measurer(model, attachment, batches, tmp_path / "m.jsonl")
        others = [planted_batch(model, 6, images=8, seed=1)]
        confirmer = measurer(model, attachment, others, tmp_path / "c.jsonl")
        with FlopCounterMode(display=False) as all_of_it:
            Study(made, confirmer, Goal(bound=BOUND), True, *counts(made.groups)).run(
                lambda enter: fit_entry(attachment, [(b.fresh(), b.vision) for b in batches], enter)
            )
        with FlopCounterMode(display=False) as again:
            made.schedule(VisionSchedule(exit=1), None, 0.0)
    announced = 2 * made.plan.cost.total + made.plan.cost.confirming  # in batches
    assert made.plan.hold and all_of_it.get_total_flops() <= announced * one.get_total_flops()
    assert again.get_total_flops() < one.get_total_flops()  # no dense forward among them


def test_answers_too_many_to_hold_are_announced_as_computed_again() -> None:
    config = shared("llava").config
    few, many = (Shape(4, n, 700, 601, 600, tried=True, cached=True) for n in (8, 2**23))
    held, fresh = plan.make_plan(config, [few] * 2), plan.make_plan(config, [few, many])
    assert held.hold and not fresh.hold
    assert fresh.cost.deciding - held.cost.deciding == pytest.approx(plan.SCHEDULES)


def test_images_are_encoded_once_while_their_batches_fit_into_memory(tmp_path: Path) -> None:
    model = planted("llava", 1, 5)
    batches, numbers = [planted_batch(model, 4), planted_batch(model, 4, seed=1)], []
    for room in (plan.HELD, batches[0].bytes, 0):
        made: list[int] = []
        with attach(model, VisionSchedule()) as attachment:
            one = measurer(model, attachment, batches, tmp_path / f"{room}.jsonl")
            one.groups = [
                replace(group, make=lambda i=i, make=group.make, made=made: made.append(i) or make())  # type: ignore[func-returns-value]
                for i, group in enumerate(one.groups)
            ]
            one._room = room
            numbers.append([one.schedule(VisionSchedule(exit=layer), None, 0.0) for layer in (1, 2, 3)])
        assert made == ([0, 1] if room == plan.HELD else [0, 1, 1, 1] if room else [0, 1] * 3)
    assert numbers[0] == numbers[1] == numbers[2]
