"""Calibration: shared prefills give what each setting alone gives; the choice and its files are right."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import build, prompt, vision_tokens
from helpers.tiny_base import save_tiny_base
from PIL import ImageOps
from rich.console import Console
from rich.progress import Progress

from latefusion.data.scenes import load_scenes
from latefusion.eval import calibrate, evaluate, generate
from latefusion.eval.thresholds import accept, choose, questions, replay
from latefusion.eval.thresholds import prefills as prefills_module
from latefusion.eval.thresholds.prefills import Prompts, ended
from latefusion.eval.thresholds.replay import fusion_layers
from latefusion.eval.thresholds.search import Search
from latefusion.eval.thresholds.settings import grid, policy_of
from latefusion.eval.thresholds.tried import Tried
from latefusion.models.attach import attach
from latefusion.models.base_model import load_base
from latefusion.models.flops import decoder_flops
from latefusion.models.policies import named
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.schedule import VisionSchedule

ANSWERS = [[5, 6, 7], [8], [9, 4]]


def batch_of(family: str, model: Any) -> replay.Batch:
    inputs = prompt(family, ["tt I tt", "t I t I ttt", "I tttt"])
    return replay.Batch.build(model, inputs, ANSWERS)


def dense_outcome(batch: replay.Batch, attachment: Any) -> tuple[torch.Tensor, replay.Outcome]:
    """The dense logits `[B, A, V]`, and their own outcome."""
    with attachment.using(VisionSchedule()):
        logits = batch.logits(attachment)
    return logits, replay.judge(batch, attachment, logits, logits)


@pytest.mark.parametrize(
    ("family", "stages"),
    [
        ("llava", ("middle",)),
        ("llava", ("shallow", "middle", "deep")),
        ("qwen3_vl", ("middle", "deep")),
        ("gemma3", ("shallow", "middle", "deep")),
    ],
)
@torch.no_grad()
def test_shared_prefills_give_what_a_setting_alone_gives(family: str, stages: tuple[str, ...]) -> None:
    model = build(family)
    batch = batch_of(family, model)
    fused, seen = set(), set()
    with attach(model, VisionSchedule()) as attachment:
        dense, same = dense_outcome(batch, attachment)
        assert np.allclose(same.kl, 0)
        for boundary in (1, 2):
            shallow = boundary if "shallow" in stages else 0
            recorded = replay.record(batch, attachment, shallow, "first")
            unpruned = replay.judge(batch, attachment, recorded.logits, dense)
            middle = sorted(recorded.least[boundary + 1 :].flatten())
            for threshold in (middle[len(middle) // 3] + 1e-4, middle[2 * len(middle) // 3] + 1e-4):
                norms = sorted(recorded.norms[3][vision_tokens(batch.inputs)].tolist())
                policy = VisiPruner(
                    boundary=boundary,
                    layer_threshold=min(threshold, 1.0),
                    tokens_threshold=(norms[4] + norms[5]) / 2,
                    exit_threshold=0.95,
                    stages=stages,
                )
                with attachment.using(policy):
                    logits = batch.logits(attachment)
                    alone = replay.judge(batch, attachment, logits, dense)
                    layers = [record.fusion_layer for record in attachment.trace]
                    tokens = [record.tokens for record in attachment.trace]
                fusion = fusion_layers(recorded.least, boundary, policy.layer_threshold)
                assert [None if f == len(recorded.states) else f for f in fusion] == layers
                shared = unpruned
                for layer in {int(f) for f in fusion if f < len(recorded.states) - 1}:
                    results = replay.resume(batch, attachment, recorded, layer, policy)
                    outcome = replay.judge(batch, attachment, results, dense)
                    shared = outcome.where(fusion == layer, shared)
                np.testing.assert_allclose(shared.kl, alone.kl, atol=1e-5)
                np.testing.assert_array_equal(shared.same, alone.same)
                np.testing.assert_array_equal(shared.flops, alone.flops)
                np.testing.assert_array_equal(shared.vision, alone.vision)
                expected = [
                    decoder_flops(model.config, [n - len(a) for n in t])
                    for t, a in zip(tokens, ANSWERS, strict=True)
                ]
                np.testing.assert_array_equal(alone.flops, expected)
                fused |= set(layers)
                seen |= {tuple(t) for t in tokens}
    assert len(fused) >= 2 and len(seen) >= 4, "the settings should differ in what they do"


@torch.no_grad()
def test_an_answer_behind_its_prompt_is_judged_as_if_generated() -> None:
    model = build("llava")
    inputs = prompt("llava", ["tt I tt", "t I t I ttt", "I tttt"])
    policy = VisiPruner(boundary=1, layer_threshold=0.999, tokens_threshold=0.05, stages=("middle", "deep"))
    with attach(model, policy) as attachment:
        written = model.generate(**inputs, max_new_tokens=4, do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
        assert attachment.trace[0].fusion_layer is not None
        answers = written.tolist()
        answers[1][2] = (answers[1][2] + 1) % 90
        batch = replay.Batch.build(model, inputs, answers)
        logits = batch.logits(attachment)
        assert replay.judge(batch, attachment, logits, logits).same.tolist() == [True, False, True]
    assert model.get_decoder().layers[0].forward.__func__ is type(model.get_decoder().layers[0]).forward


# ---------------------------------------------------------------- the command


def test_nearly_cheapest_and_front() -> None:
    kl, flops = np.array([0.5, 0.01, 0.02, 0.03, 0.02]), np.array([0.2, 0.8, 0.6, 0.5, 0.6])
    assert choose.nearly_cheapest(kl, flops, 0.02, [3] * 5) == 2
    assert choose.nearly_cheapest(kl, flops, 1.0, [1, 9, 9, 9, 9]) == 0, "the others are far dearer"
    assert choose.nearly_cheapest(kl, flops, 0.001, [3] * 5) is None
    flops, boundaries = np.array([0.5, 0.52, 0.524, 0.53, 0.523]), [4, 6, 6, 9, 5]
    assert choose.nearly_cheapest(np.full(5, 0.01), flops, 0.02, boundaries) == 1, (
        "it waits till 6, 9 is too dear"
    )
    kl, flops = np.array([0.5, 0.01, 0.02, 0.03, 0.02]), np.array([0.2, 0.8, 0.6, 0.5, 0.6])
    assert choose.front(kl, flops) == [0, 3, 2, 1]
    assert choose.around([0, 3, 2, 1], 2, 3) == [3, 2, 1] and choose.around([0, 3, 2, 1], 0, 2) == [0, 3]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_base(tmp_path_factory.mktemp("base")))


def arguments_for(base: str, folder: Any, **more: Any) -> calibrate.Arguments:
    small = {"samples": 12, "confirm": 0, "batch_size": 4, "layer_thresholds": [0.9, 0.999]}
    small |= {"max_new_tokens": 3, "kl": 0.5}
    return calibrate.Arguments(**{"model": base, "output": str(folder), **small, **more})


def test_the_command_goes_on_where_it_stopped_and_says_the_same(
    base: str, tmp_path: Any, monkeypatch: Any
) -> None:
    small_grid = {"boundaries": [1, 2], "tokens_thresholds": [0.5, 2.0], "confirm": 6}
    bars, add = [], Progress.add_task

    def adding(self: Any, description: str, **more: Any) -> Any:
        bars.append((description, more["total"]))
        return add(self, description, **more)

    monkeypatch.setattr(Progress, "add_task", adding)
    whole = calibrate.calibrate(arguments_for(base, tmp_path / "whole", **small_grid), Console(quiet=True))
    assert bars and all(total > 0 and not name.startswith("0 ") for name, total in bars), bars
    batches, run = [], Prompts.try_on

    def stopping(self: Any, rows: Any, written: Any, settings: Any) -> Any:
        batches.append((rows, settings))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return run(self, rows, written, settings)

    monkeypatch.setattr(Prompts, "try_on", stopping)
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(arguments_for(base, tmp_path / "cut", **small_grid), Console(quiet=True))
    again = calibrate.calibrate(arguments_for(base, tmp_path / "cut", **small_grid), Console(quiet=True))
    assert batches[3] == batches[4] and batches[4] not in batches[:3], "a finished batch was run again"
    for result in (whole, again):
        result["seconds"] = result["arguments"]["output"] = None
    assert again == whole

    policy = named(str(tmp_path / "cut" / "policy.yaml"))
    best = whole["chosen"]
    assert isinstance(policy, VisiPruner) and policy.boundary == best["boundary"]
    assert best["kl"] <= 0.5 and best["prompts"] == whole["prompts"] == 12
    assert best["flops_ratio"] < best["prefill_ratio"] < 1
    assert "of the whole prefill's) at KL" in (tmp_path / "cut" / "policy.yaml").read_text()
    assert whole["confirmed"][-1]["prompts"] == 6 and whole["confirmed"][-1]["limit"] <= 0.5
    assert {whole["confirmed"][-1][name] for name in ("boundary",)} == {best["boundary"]}
    cheaper = [
        s
        for s in whole["settings"]
        if s["prompts"] == 12 and choose.NEARLY * s["flops_ratio"] < best["flops_ratio"]
    ]
    refused = len(whole["confirmed"]) - 1
    assert sum(s["kl"] <= accept.START * 0.5 for s in cheaper) <= refused
    table = (tmp_path / "cut" / "table.md").read_text()
    assert (
        table.startswith("| boundary |")
        and "whole prefill, %" in table
        and f"**{best['boundary']}**" in table
    )


GRID = {
    "boundaries": [0, 2],
    "layer_thresholds": [0.9, 0.999],
    "tokens_thresholds": [0.3, 3.0],
    "stages": [["middle", "deep"], ["middle"]],
    "exit_threshold": 0.9,
}


@torch.no_grad()
def test_the_search_finds_what_trying_all_finds(base: str, tmp_path: Any) -> None:
    """Against every setting on every prompt, each as a policy of its own, from the first layer on."""
    model, processor = load_base(base, dtype=torch.float32)
    arguments = arguments_for(base, tmp_path, samples=15, batch_size=5, **GRID)
    rows, others = questions.read(arguments)
    assert others is None
    with attach(model, VisionSchedule()) as attachment:
        prompts = Prompts(arguments, attachment, processor, rows)
        alone: dict[int, list[tuple[Any, Any]]] = {}
        for batch in (prompts.dense_batch(batch)[0] for batch in prompts.batches):
            dense, unpruned = dense_outcome(batch, attachment)
            for number, setting in enumerate(grid(arguments, GRID["boundaries"], GRID["tokens_thresholds"])):
                with attachment.using(policy_of(setting, arguments)):
                    outcome = replay.judge(batch, attachment, batch.logits(attachment), dense)
                alone.setdefault(number, []).append((outcome.kl, outcome.flops / unpruned.flops))
        kl, cost = (
            np.array([np.concatenate(c).mean() for c in column])
            for column in zip(*(zip(*result, strict=True) for result in alone.values()), strict=True)
        )
        ruled_out = 0
        for bound in (kl.min() / 2, *np.quantile(kl, [0.1, 0.5, 1.0]) + 1e-4):
            search = Search(
                arguments_for(base, tmp_path, kl=float(bound), samples=15, batch_size=5, **GRID),
                attachment,
                processor,
                rows,
            )
            results = search.run()
            columns = results["columns"]
            scores = search.scores
            ran, floors = scores.ran().all(1), (scores.floors / scores.dense).mean(1)
            assert (floors <= cost + 1e-9).all() and floors.max() <= 1
            np.testing.assert_allclose(columns["kl"].mean(1)[ran], kl[ran], atol=1e-5)
            np.testing.assert_allclose(scores.least_flops()[ran], cost[ran])
            waits = scores.boundaries
            expected = choose.nearly_cheapest(kl, cost, bound, waits)
            result = choose.nearly_cheapest(
                np.where(ran, columns["kl"].mean(1), np.inf), scores.least_flops(), bound, waits
            )
            assert (result is None) == (expected is None)
            assert results["accepted"].setting == result
            if result is not None and expected is not None:
                assert (waits[result], cost[result], kl[result]) == pytest.approx(
                    (waits[expected], cost[expected], kl[expected])
                )
            ruled_out += int((~ran).sum())
    assert ruled_out > len(kl), "hardly anything was ruled out"


def test_no_prefill_no_pass_and_no_image_runs_twice(base: str, tmp_path: Any, monkeypatch: Any) -> None:
    """And where nothing fits into memory, everything runs as often as it has to, with the same numbers."""
    model, processor = load_base(base, dtype=torch.float32)
    arguments = arguments_for(base, tmp_path / "held", samples=16, batch_size=8, confirm=6, **GRID)
    rows, others = questions.read(arguments)
    prefills, passes, record, resume = [], [], replay.record, replay.resume

    def recording(batch: Any, *more: Any) -> Any:
        prefills.append(batch)
        return record(batch, *more)

    def resuming(batch: Any, attachment: Any, recorded: Any, fusion: int, policy: VisiPruner) -> Any:
        passes.append((batch.inputs["input_ids"].tolist(), fusion, policy.tokens_threshold, policy.stages))
        return resume(batch, attachment, recorded, fusion, policy)

    monkeypatch.setattr(replay, "record", recording)
    monkeypatch.setattr(replay, "resume", resuming)
    columns = []
    with attach(model, VisionSchedule()) as attachment:
        for room, folder in ((prefills_module.HELD, "held"), (0, "dropped")):
            monkeypatch.setattr(prefills_module, "HELD", room)
            search = Search(
                replace(arguments, output=str(tmp_path / folder)), attachment, processor, rows, others
            )
            prefills.clear()
            passes.clear()
            columns.append(search.run()["columns"])
            batches = len(search.prompts.batches) + len(search.confirming.batches)  # type: ignore[union-attr]
            keys = [str(key) for key in passes]
            assert [len(batch) for batch in search.prompts.batches] == [1, 2, 4, 8, 1]
            assert passes and len(set(keys)) == len(keys)
            batches += 2  # of 8 prompts, whose labels are no dense answers
            assert (len(prefills) == batches) if room else (len(prefills) > batches)
    for name, column in columns[0].items():
        np.testing.assert_allclose(column, columns[1][name], atol=1e-6)
    scenes = {row["scene"] for row in rows.records}
    assert len(search.prompts.images.features) == len(scenes) < len(rows)


def test_kept_numbers_are_of_these_images_and_this_processor(base: str, tmp_path: Any) -> None:
    """The same questions about the picture upside down; and a processor with other settings."""
    rows = questions.of_rows(load_scenes("validation", n_scenes=1).select(range(2)))
    pictures = [{**row, "image": ImageOps.flip(row["image"])} for row in rows.rows]
    flipped = replace(rows, rows=pictures)
    arguments = arguments_for(base, tmp_path, boundaries=[1], tokens_thresholds=[1.0])
    model, processor = load_base(base, dtype=torch.float32)
    names = []
    with attach(model, VisionSchedule()) as attachment:
        for prompts, mean in ((rows, 0.5), (rows, 0.5), (flipped, 0.5), (rows, 0.4)):
            processor.image_processor.image_mean = [mean] * 3
            names.append(Search(arguments, attachment, processor, prompts).fingerprint())
    assert names[0] == names[1] and len(set(names)) == 3


def test_same_answer_is_what_generation_would_write(base: str, tmp_path: Any) -> None:
    """Which settings write a given answer, as accuracy counts it, against what each of them generates."""
    rows = questions.of_rows(load_scenes("validation", n_scenes=2))
    model, processor = load_base(base, dtype=torch.float32)
    with attach(model, VisionSchedule()) as attachment:
        arguments = arguments_for(base, tmp_path, boundaries=[1], tokens_thresholds=[0.5, 2.0])
        search = Search(arguments, attachment, processor, rows)
        inputs = search.prompts.encoded([rows[i] for i in range(len(rows))])
        written = {}
        for number, setting in enumerate([None, *search.settings]):
            policy = VisionSchedule() if setting is None else policy_of(setting, arguments)
            with attachment.using(policy), torch.no_grad():
                kwargs = {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}
                ids = model.generate(**kwargs, max_new_tokens=3, do_sample=False)[
                    :, inputs["input_ids"].shape[1] :
                ]
            written[number] = [ended(row, search.prompts.stops) for row in ids.tolist()]
        batch = replay.Batch.build(model, inputs, written[2])
        outcomes = Tried(lambda: batch, attachment, arguments).outcomes(search.settings)
    for number, outcome in enumerate(outcomes, 1):
        assert outcome.same.tolist() == [a == b for a, b in zip(written[number], written[2], strict=True)]
    assert outcomes[1].same.all() and not outcomes[0].same.all()


def test_other_prompts_accept_a_setting_or_a_dearer_one() -> None:
    """A setting of mean 0.01 on the search that costs 0.2 on other prompts is passed over, those next to it too."""
    search, cost = np.array([0.01, 0.012, 0.013, 0.005, 0.03]), np.array([0.3, 0.302, 0.4, 0.5, 0.2])
    others = {0: np.full(50, 0.2), 2: np.r_[np.zeros(48), 0.3, 0.3], 3: np.full(50, 0.004)}

    def cheapest(bound: float, least: float) -> int | None:
        return choose.nearly_cheapest(np.where(cost >= least, search, np.inf), cost, bound, [0] * 5)

    accepted = accept.accept(cheapest, others.__getitem__, cost.__getitem__, 0.02)
    assert accepted.setting == 3 and list(accepted.limits) == [0, 2, 3]
    assert np.mean(others[2]) < 0.02 < accepted.limits[2], (
        "two prompts of fifty say little: the limit is beyond"
    )
    refused = accept.accept(cheapest, lambda setting: np.full(50, 1.0), cost.__getitem__, 0.02)
    assert refused.setting is None and len(refused.limits) == 3


def test_prompts_about_one_image_do_not_accept_a_setting_together() -> None:
    """Sixty images, ten alike prompts each: as 600 prompts the setting would be within the bound."""
    kl = np.repeat(np.r_[np.zeros(57), 0.3, 0.3, 0.3], 10)
    images = np.repeat(range(60), 10).tolist()

    def outcome(images: Any) -> accept.Accepted:
        return accept.accept(
            lambda bound, least: 0 if least == 0 else None, lambda n: kl, lambda n: 0.5, 0.022, images
        )

    assert outcome(None).setting == 0 and outcome(images).setting is None
    stopped = accept.accept(
        lambda bound, least: 0 if least == 0 else None, lambda n: kl[-40:], lambda n: 0.5, 0.022, images
    )
    assert stopped.setting is None and stopped.limits[0] > kl[-40:].mean() > 0.022, (
        "it ended before all prompts ran"
    )
    names = [str(number) for number in images]
    assert choose.standard_error(kl, names) == pytest.approx(np.std(kl[::10], ddof=1) / 60**0.5)
    assert choose.standard_error(np.r_[kl[:10], np.full(590, np.nan)], names) is None


def test_the_prompts_of_the_search_do_not_confirm_it(base: str, tmp_path: Any) -> None:
    few = arguments_for(base, tmp_path, samples=12, confirm=5)
    searched, others = questions.read(few)
    assert others is not None and (len(searched), len(others)) == (12, 5)
    ids = [{row["id"] for row in part.records} for part in (searched, others)]
    assert not ids[0] & ids[1]
    assert [remark.split(":")[0] for remark in searched.remarks] == [
        "Only 5 other prompts confirm the setting"
    ]
    rows = load_scenes("validation", n_scenes=1).select(range(7))
    searched, others = questions.split(questions.of_rows(rows), few)
    assert others is not None and (len(searched), len(others)) == (3, 4)
    assert "3 search and 4 confirm" in searched.remarks[0]
    rows = load_scenes("validation", n_scenes=80).select(range(questions.ENOUGH + 12))
    enough = arguments_for(base, tmp_path, samples=12, confirm=questions.ENOUGH)
    assert not questions.split(questions.of_rows(rows), enough)[0].remarks


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"kl": 0}, "kl=0 must be positive"),
        ({"stages": [["shallow"]]}, r"stages=\['shallow'\] saves nothing without 'middle'"),
        ({"layer_thresholds": []}, r"layer_thresholds=\[\] leaves nothing to try"),
        ({"layer_thresholds": [1.2]}, "layer_threshold=1.2 is a cosine"),
        (
            {"data": "scenez"},
            r"data=scenez does not exist \(did you mean scenes\?\); data can be scenes, icons",
        ),
        ({"kl": float("inf")}, "kl=inf must be positive and finite"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        (
            {"output": __file__},
            r"output=.*\.py cannot be written \(Not a directory\); choose another output=FOLDER",
        ),
        ({"samples": 0}, "samples=0 must be at least 1"),
        ({"confirm": -1}, "confirm=-1 must be 0 or more"),
        ({"boundaries": [5]}, "boundary=5 leaves no layer to fuse in"),
        (
            {"kl": 1e-9, "boundaries": [0], "layer_thresholds": [1.0], "tokens_thresholds": [50.0]},
            "no setting stays",
        ),
    ],
)
def test_what_cannot_work_is_a_sentence(base: str, tmp_path: Any, more: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        calibrate.calibrate(arguments_for(base, tmp_path, **{"samples": 4, **more}), Console(quiet=True))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", [calibrate.main, generate.main, evaluate.main])
def test_a_wrong_key_is_answered_with_those_that_exist(command: Any) -> None:
    with pytest.raises(
        SystemExit, match=r"error: modle does not exist \(did you mean model\?\); the keys are .*model"
    ):
        command(["modle=embedded"])
    with pytest.raises(SystemExit, match=r"max_new_tokens|batch_size") as error:
        command(["max_new_tokens=many" if command is not evaluate.main else "batch_size=many"])
    assert "many" in str(error.value) and "\n" not in str(error.value)


def test_a_decoder_with_recurrent_layers_is_refused() -> None:
    attachment: Any = SimpleNamespace(traits=SimpleNamespace(attention=(True, False, True)))
    with pytest.raises(
        ValueError, match="softmax attention in every layer, but layer 1 of this decoder runs a"
    ):
        Search(None, attachment, None, None)  # type: ignore[arg-type]
