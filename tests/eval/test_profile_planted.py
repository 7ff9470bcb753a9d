"""A profile of models whose band is known by construction; what it writes; going on after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.families import HIDDEN, LAYERS, TOKENS_PER_IMAGE, shared
from helpers.planted_models import BOUND, NO_PLAN, grouped, measurer, planted, planted_batch, questions
from transformers.modeling_outputs import BaseModelOutputWithPooling

from latefusion.data.prompt_batches import Batch, counts
from latefusion.eval.fusion.decide import Goal
from latefusion.eval.fusion.effects import Answers
from latefusion.eval.fusion.knockouts import knock_outs
from latefusion.eval.fusion.measure import Measurer
from latefusion.eval.fusion.study import Study
from latefusion.eval.fusion.summary import schedule_yaml
from latefusion.eval.ledger import Ledger
from latefusion.models import profile_schedule
from latefusion.models.attach import attach
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.entry import CalibratedEntry
from latefusion.models.student.entry_fit import fit_entry


def study(model: Any, attachment: Any, ledger: Path, **goal: Any) -> tuple[dict[str, Any], Measurer]:
    batch = planted_batch(model)
    made = measurer(model, attachment, [batch], ledger)
    other = planted_batch(model, seed=5)
    confirmer = measurer(model, attachment, [other], ledger.with_name(f"confirmed_{ledger.name}"))
    planned_study = Study(made, confirmer, Goal(**{"bound": BOUND, **goal}), True, *counts(made.groups))
    return planned_study.run(
        lambda enter: fit_entry(attachment, [(batch.fresh(), batch.vision)], enter)
    ), made


@pytest.mark.parametrize("family", ["llava", "llava_qwen2"])
@pytest.mark.parametrize(("p", "q"), [(1, 4), (2, 3), (3, 6), (0, 2)])
def test_the_planted_band_is_found_and_its_schedule_answers_as_dense(
    family: str, p: int, q: int, tmp_path: Path
) -> None:
    model = planted(family, p, q)
    with attach(model, VisionSchedule()) as attachment:
        result, _ = study(model, attachment, tmp_path / "measured.jsonl")
    assert (result["ends"]["enter"], result["ends"]["exit"]) == (p, q)
    schedule = result["chosen"]["schedule"]
    assert (schedule["enter"], schedule["exit"]) == (p, None if q == 6 else q)
    assert result["chosen"]["accuracy"] == 1.0 and result["chosen"]["kl"] <= BOUND
    assert ("band of one layer" in result["note"]) == (q - p == 1)
    if p > 0:
        assert result["entry"]["kl_raw"] <= BOUND  # vision is not touched before p
    (tmp_path / "schedule.yaml").write_text(schedule_yaml(result))
    fresh = questions(5, seed=7)
    with torch.no_grad():
        dense = model(**fresh).logits[:, -3:]
        with attach(model, profile_schedule.read_schedule(tmp_path)):
            late = model(**questions(5, seed=7)).logits[:, -3:]
    if schedule["keep"]:
        assert torch.equal(dense.argmax(-1), late.argmax(-1))
    else:
        torch.testing.assert_close(dense, late, atol=1e-4, rtol=1e-4)


def test_a_second_run_measures_nothing_again_and_a_cut_one_goes_on(tmp_path: Path) -> None:
    model, ledger = planted("llava", 1, 4), tmp_path / "measured.jsonl"
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with attach(model, VisionSchedule()) as attachment:
        first, _ = study(model, attachment, ledger)
        whole, made = ledger.read_text(), len(calls)
        again, _ = study(model, attachment, ledger)
        forwards = len(calls) - made - 2  # two make the labels
        assert (
            again == first and ledger.read_text() == whole and forwards <= 8
        )  # two calibrate, three find the way, and three for the confirming prompts
        lines = whole.splitlines(keepends=True)
        ledger.write_text("".join(lines[:3]) + lines[3][:20])
        resumed, _ = study(model, attachment, ledger)
        assert resumed == first and ledger.read_text() == whole
        fresh, _ = study(model, attachment, tmp_path / "fresh.jsonl")
        assert fresh == first, "the same measurements should come out, and the same decision"
        Ledger(ledger, {"about": 2})
        assert len(ledger.read_text().splitlines()) == 1


def test_a_budget_is_kept(tmp_path: Path) -> None:
    model = planted("llava", 1, 5)
    with attach(model, VisionSchedule()) as attachment:
        free, _ = study(model, attachment, tmp_path / "free.jsonl")
        budget = free["chosen"]["flops"] - 0.02
        result, _ = study(model, attachment, tmp_path / "budget.jsonl", budget=budget)
    assert result["chosen"]["flops"] <= budget and result["chosen"]["schedule"]["keep"]
    flops = [p["flops"] for p in result["front"]]
    kl = [p["kl"] for p in result["front"]]
    assert flops == sorted(flops) and kl == sorted(kl, reverse=True)


def test_the_bound_holds_for_the_whole_schedule_and_for_each_of_its_parts(tmp_path: Path) -> None:
    """One that costs something: the limit of the choice is within the bound, and no cheaper rung's is."""
    model = planted("llava", 0, 6)
    with attach(model, VisionSchedule()) as attachment:
        free, _ = study(model, attachment, tmp_path / "measured.jsonl")
        bound = sorted(p["kl"] for p in free["points"])[len(free["points"]) // 2]
        hand = VisionSchedule(enter=1, exit=5)
        result, measurer = study(model, attachment, tmp_path / "measured.jsonl", bound=bound, by_hand=hand)
        kl, _ = measurer.schedule(VisionSchedule.from_dict(result["chosen"]["schedule"]), None, 0.0)
        by_hand, _ = measurer.schedule(hand, None, 0.0)
    chosen, ends = result["chosen"], result["ends"]
    confirmed = result["confirmed"]
    assert 0 < confirmed["kl"] < confirmed["limit"] <= bound and confirmed["held_out"]
    if not chosen["calibrated"]:
        assert chosen["kl"] == pytest.approx(sum(kl) / len(kl))
    for rung in result["ladder"]:
        assert rung["limit"] > bound or rung["flops"] >= chosen["flops"]
    curves = result["effects"]
    assert sum(curves[f"prefix {ends['enter'] + 1}"]["kl"]) / 12 > bound
    assert result["beside"]["by hand"]["schedule"] == hand.to_dict()
    assert result["beside"]["by hand"]["kl"] <= sum(by_hand) / len(by_hand) * 1.5  # calibrated


class Scripted:
    """Measurements by formula: entering at 3 is cheap to hide, but no map can calibrate it.

    Args:
        more: KL of a schedule with keeps beyond what the formula says.
        base: KL that every schedule has.
    """

    def __init__(self, more: float = 0.0, base: float = 0.0):
        self.more, self.base = more, base

    layers = LAYERS
    model = SimpleNamespace(config=shared("llava").config)

    def looks(self) -> list[Any]:
        return []

    def knock_outs(self) -> dict[str, Any]:
        cheap = {*(("prefix", a) for a in (1, 2, 3)), ("suffix", 5)}
        scripted = {f"{kind} {i}": 0.01 if (kind, i) in cheap else 1.0 for kind, i in knock_outs(LAYERS)}
        return {
            key: {"kl": [kl, kl], "right": [True, False]} for key, kl in {**scripted, "dense": 0.0}.items()
        }

    def bands(self, pairs: Any) -> dict[str, Any]:
        return {f"{a} {b}": {"kl": [0.01 * b - 0.04] * 2} for a, b in pairs}

    def schedule(self, schedule: VisionSchedule, entry: Any, flops: float) -> tuple[list[float], list[bool]]:
        at = {0: 0.0, 1: 0.02, 2: 0.03, 3: 0.5}[schedule.enter] + (
            0.3 if entry is None and schedule.enter else 0.0
        )
        kept = 0.01 * len(schedule.keep) + (self.more if schedule.keep else 0.0)
        return [at + self.base + kept] * 2, [True, True]

    def kept(self, schedule: VisionSchedule, entry: Any) -> list[None]:
        return [None, None]


def test_a_band_whose_calibrated_entry_is_beyond_the_bound_is_left_for_the_next() -> None:
    fits: list[int] = []

    def calibrate(enter: int) -> Any:
        fits.append(enter)
        return SimpleNamespace(entry=SimpleNamespace(bias=[0.0]), explained=1.0, tokens=1)

    measurer: Any = Scripted()
    result = Study(measurer, measurer, Goal(bound=0.09), True, 6.0, 32.0).run(calibrate)
    chosen = result["chosen"]
    assert (result["ends"]["enter"], result["ends"]["exit"], fits) == (3, 5, [3, 2])
    assert (chosen["schedule"]["enter"], chosen["schedule"]["exit"], chosen["calibrated"]) == (2, 5, True)
    assert chosen["kl"] == pytest.approx(0.04) and len(chosen["schedule"]["keep"]) == 1
    entry = result["entry"]
    assert [entry[f"kl_{name}"] for name in ("raw", "calibrated", "ceiling")] == pytest.approx(
        [0.33, 0.03, 0.01]
    )
    assert result["beside"]["chosen, raw entry"]["kl"] == pytest.approx(0.34)
    keeps = [
        p["schedule"]["keep"] for p in result["points"] if p["calibrated"] and p["schedule"]["enter"] == 2
    ]
    single = {step for keep in keeps if len(keep) == 1 for step in keep.items()}
    assert single == {(layer, k) for layer in ("3", "4") for k in (16, 8, 4, 2, 1)}
    assert Study(measurer, measurer, Goal(bound=0.09), True, 6.0, 32.0).run(calibrate) == result


def scripted_choice(confirmer: Any, bound: float) -> dict[str, Any]:
    entry = SimpleNamespace(entry=SimpleNamespace(bias=[0.0]), explained=1.0, tokens=1)
    searching: Any = Scripted()
    return Study(searching, confirmer, Goal(bound=bound), True, 6.0, 32.0).run(lambda enter: entry)


def test_what_the_samples_chose_is_refused_where_other_prompts_say_no() -> None:
    """Keeps that cost 0.01 on the samples and 0.21 on other prompts; the band costs 0.03 on both."""
    fooled = scripted_choice(None, 0.09)
    assert fooled["chosen"]["schedule"]["keep"] and not fooled["confirmed"]["held_out"]
    result = scripted_choice(Scripted(more=0.2), 0.09)
    schedule = result["chosen"]["schedule"]
    assert (schedule["enter"], schedule["exit"], schedule["keep"]) == (2, 5, {})
    assert result["confirmed"]["held_out"] and result["confirmed"]["limit"] == pytest.approx(0.03)
    assert any(rung["limit"] == pytest.approx(0.24) for rung in result["ladder"])


def test_a_keep_cannot_rescue_a_band() -> None:
    """Noise that lowers the KL of keeps is not credited: the limit of a rung is not below that of its band."""
    result = scripted_choice(Scripted(more=-0.1, base=0.08), 0.09)
    bands = {r["schedule"]["enter"]: r["limit"] for r in result["ladder"] if not r["schedule"]["keep"]}
    assert bands == {1: pytest.approx(0.10), 0: pytest.approx(0.08)}
    assert result["chosen"]["schedule"]["enter"] == 0, "the safest band is tried where the chosen one fails"
    assert result["confirmed"]["limit"] == pytest.approx(0.08)


def test_where_no_schedule_holds_the_lowest_limit_is_taken_and_the_reason_is_given() -> None:
    result = scripted_choice(Scripted(base=1.0), 0.09)
    assert (
        result["confirmed"]["limit"] > 0.09
        and "no schedule stays within the bound" in result["chosen"]["why"]
    )


def test_too_few_images_to_calibrate_leave_a_schedule_with_the_projectors_own(tmp_path: Path) -> None:
    """Said in a sentence; what was measured before is not thrown away."""
    model = planted("llava", 1, 4)
    with attach(model, VisionSchedule()) as attachment:
        made = measurer(model, attachment, [planted_batch(model)], tmp_path / "m.jsonl")
        few = planted_batch(model, 2)
        result = Study(made, None, Goal(bound=BOUND), True, *counts(made.groups)).run(
            lambda enter: fit_entry(attachment, [(few.fresh(), few.vision)], enter)
        )
    assert result["chosen"]["schedule"]["enter"] == 1 and not result["chosen"]["calibrated"]
    assert result["entry"] is None and "chosen, raw entry" not in result["beside"]
    assert (
        result["note"].startswith("The entry is not calibrated: 8 vision tokens")
        and "\n" not in result["note"]
    )


def test_batches_are_measured_apart_and_put_together_in_the_order_of_the_samples(tmp_path: Path) -> None:
    """Each sample has its own numbers, the same by knock-out, by schedule, and in a batch of all."""
    model = planted("llava", 0, 6)
    whole = planted_batch(model, 7)
    parts = [part(whole, rows) for rows in ([4, 1], [0, 6, 3], [2, 5])]
    with attach(model, VisionSchedule()) as attachment:
        expected = measurer(model, attachment, [whole], tmp_path / "one.jsonl").knock_outs()["late 2"]["kl"]
        made = measurer(model, attachment, parts, tmp_path / "three.jsonl")
        numbers = ((4, 1), (0, 6, 3), (2, 5))
        made.groups = [replace(group, numbers=at) for group, at in zip(made.groups, numbers, strict=True)]
        assert made.knock_outs()["late 2"]["kl"] == pytest.approx(expected, rel=1e-3)
        for hold in (True, False):
            made.plan = replace(made.plan, hold=hold)
            schedule = VisionSchedule(enter=2, exit=None if hold else 6)
            assert made.schedule(schedule, None, 0.0)[0] == pytest.approx(expected, rel=1e-3)
        entry = CalibratedEntry(hidden_size=HIDDEN, places=TOKENS_PER_IMAGE)
        entry.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        assert made.schedule(schedule, entry, 0.0)[0] != made.schedule(schedule, None, 0.0)[0]
        keeping, one = (
            VisionSchedule(keep={3: 2}),
            measurer(model, attachment, [whole], tmp_path / "kept.jsonl"),
        )
        kept = made.kept(keeping, None)
        assert (
            kept == one.kept(keeping, None) and kept[6] is None and len({str(tokens) for tokens in kept}) > 3
        )
        assert all(tokens[-1][0] == 3 and len(tokens[-1][1]) == 2 for tokens in kept if tokens is not None)
    assert len({round(kl, 4) for kl in expected}) == 7


def part(batch: Batch, rows: list[int]) -> Batch:
    features = batch.inputs["mm_encoder_outputs"]["image"].pooler_output
    inputs = {name: batch.inputs[name][rows] for name in ("input_ids", "attention_mask")}
    inputs["mm_encoder_outputs"] = {
        "image": BaseModelOutputWithPooling(pooler_output=[features[i] for i in rows])
    }
    return Batch(("x",) * len(rows), inputs, batch.labels[rows], batch.queries[rows], batch.vision[rows])


def test_a_model_that_needs_no_image_is_reported(tmp_path: Path) -> None:
    model = planted("llava", 0, 0)
    with attach(model, VisionSchedule()) as attachment, pytest.raises(ValueError) as error:
        study(model, attachment, tmp_path / "measured.jsonl")
    assert "does not need its images" in str(error.value) and "\n" not in str(error.value)


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = planted("llava", 1, 4)
    batch = planted_batch(model)
    with torch.no_grad():
        model.get_decoder().layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with (
        attach(model, VisionSchedule()) as attachment,
        pytest.raises(ValueError, match="not finite") as error,
    ):
        Measurer(model, attachment, grouped([batch]), Ledger(tmp_path / "m.jsonl", {}), NO_PLAN).looks()
    assert "\n" not in str(error.value)


def test_logits_that_a_knock_out_makes_infinite_are_refused() -> None:
    dense = Answers(torch.zeros(2, 3).log_softmax(-1), torch.tensor([0, 1]), torch.tensor([0, 1]))
    for broken in (float("nan"), float("-inf")):
        changed = replace(dense, log_probs=dense.log_probs.clone().index_fill_(1, torch.tensor([2]), broken))
        with pytest.raises(ValueError, match="not finite once some of its layers") as error:
            dense.effect(changed)
        assert "\n" not in str(error.value)


def test_everything_that_is_kept_is_json(tmp_path: Path) -> None:
    model = planted("llava", 1, 4)
    with attach(model, VisionSchedule()) as attachment:
        result, _ = study(model, attachment, tmp_path / "measured.jsonl")
    assert json.loads(json.dumps(result))["chosen"] == json.loads(json.dumps(result["chosen"]))
