"""`VisionSchedule`: what it refuses, what it counts, what it answers layer by layer."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latefusion.models.policies.base import AttentionCall, Prompt
from latefusion.models.policies.ranking import best
from latefusion.models.schedule import RANKINGS, SCHEDULE_FILE, VisionSchedule

NUM_LAYERS = 12


@st.composite
def schedules(draw: st.DrawFn) -> VisionSchedule:
    """Any schedule that fits a decoder of NUM_LAYERS layers."""
    enter = draw(st.integers(0, NUM_LAYERS - 1))
    exit_layer = draw(st.none() | st.integers(enter + 1, NUM_LAYERS))
    end = NUM_LAYERS if exit_layer is None else exit_layer
    layers = sorted(draw(st.sets(st.integers(enter + 1, max(enter + 1, end - 1)), max_size=4)))
    layers = [layer for layer in layers if layer < end]
    counts = sorted((draw(st.integers(1, 40)) for _ in layers), reverse=True)
    return VisionSchedule(enter=enter, exit=exit_layer, keep=dict(zip(layers, counts, strict=True)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"enter": None}, r"^enter has None where a whole number must be\.$"),
        ({"enter": -1}, r"^enter=-1 must not be negative; layers count from 0\.$"),
        ({"enter": 5, "exit": 5}, r"^enter=5 must be below exit=5, .*choose enter < 5, or exit > 5\.$"),
        ({"enter": 8, "exit": 4}, r"^enter=8 must be below exit=4, .*choose enter < 4, or exit > 8\.$"),
        ({"exit": 0}, r"^enter=0 must be below exit=0"),
        ({"enter": 3, "keep": {3: 10}}, r"^keep=\{3: 10\} must lie after enter=3 and before the last layer"),
        (
            {"enter": 3, "exit": 6, "keep": {6: 10}},
            r"^keep=\{6: 10\} must lie after enter=3 and before exit=6",
        ),
        ({"keep": {0: 10}}, r"^keep=\{0: 10\} must lie after enter=0"),
        ({"keep": {4: 0}}, r"^keep=\{4: 0\} must keep at least one token; to drop all use exit=4\.$"),
        ({"keep": {4: 10, 6: 11}}, r"^keep=\{6: 11\} grows from 10: .*choose at most 10\.$"),
        ({"keep": {6: 11, 4: 10}}, r"^keep=\{6: 11\} grows from 10"),
    ],
)
def test_contradictions_are_one_sentence(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        VisionSchedule(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (VisionSchedule(enter=12), r"^enter names layer 12, but .* layers 0 to 11; choose at most 11\.$"),
        (VisionSchedule(exit=13), r"^exit names layer 13, .*choose at most 12\.$"),
        (VisionSchedule(keep={12: 3}), r"^keep names layer 12, .*choose at most 11\.$"),
    ],
)
def test_layers_beyond_the_decoder_are_refused(schedule: VisionSchedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule.validate(NUM_LAYERS)


def test_a_keep_of_more_tokens_than_there_are_is_refused_with_both_numbers() -> None:
    schedule = VisionSchedule(enter=2, keep={4: 500, 8: 16})
    with pytest.raises(
        ValueError, match=r"^keep=\{4: 500\} is more than the 144 vision tokens of an image, so it "
    ):
        schedule.check_keep(144, "an image")
    assert schedule.check_keep(500, "an image") is None  # it raised nothing


def test_the_last_layers_are_allowed() -> None:
    for schedule in (
        VisionSchedule(enter=NUM_LAYERS - 1, exit=NUM_LAYERS),
        VisionSchedule(keep={NUM_LAYERS - 1: 3}),
    ):
        assert schedule.validate(NUM_LAYERS) is None  # it raised nothing


def test_vision_tokens_layer_by_layer() -> None:
    assert VisionSchedule().vision_tokens(4, 100) == [100] * 4
    assert VisionSchedule(enter=1, exit=3).vision_tokens(4, 100) == [0, 100, 100, 0]
    schedule = VisionSchedule(enter=2, exit=8, keep={4: 30, 6: 5})
    assert schedule.vision_tokens(10, 100) == [0, 0, 100, 100, 30, 30, 5, 5, 0, 0]
    assert schedule.vision_tokens(10, 7) == [0, 0, 7, 7, 7, 7, 5, 5, 0, 0]
    hidrop = VisionSchedule(enter=8, exit=24, keep={10: 215, 14: 10, 16: 5, 18: 1})
    assert sum(hidrop.vision_tokens(32, 576)) / 32 == pytest.approx(64, abs=1)


@given(schedules(), st.integers(0, 50))
def test_vision_tokens_rise_once_and_never_grow_again(schedule: VisionSchedule, n_vision: int) -> None:
    tokens = schedule.vision_tokens(NUM_LAYERS, n_vision)
    end = NUM_LAYERS if schedule.exit is None else schedule.exit
    assert len(tokens) == NUM_LAYERS
    assert all(n == 0 for layer, n in enumerate(tokens) if layer < schedule.enter or layer >= end)
    assert tokens[schedule.enter] == n_vision
    inside = tokens[schedule.enter : end]
    assert inside == sorted(inside, reverse=True)
    for layer, k in schedule.keep.items():
        assert tokens[layer] == min(k, n_vision)


@given(schedules())
def test_dict_and_json_round_trip(schedule: VisionSchedule) -> None:
    assert VisionSchedule.from_dict(schedule.to_dict()) == schedule
    assert VisionSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_save_and_load(tmp_path) -> None:
    schedule = VisionSchedule(enter=2, exit=8, keep={6: 5, 4: 30})
    schedule.save(tmp_path)
    assert json.loads((tmp_path / SCHEDULE_FILE).read_text()) == {
        "enter": 2,
        "exit": 8,
        "keep": {"4": 30, "6": 5},
        "ranking": "question",
    }
    assert VisionSchedule.load(tmp_path) == schedule


def test_a_schedule_saved_before_there_was_another_rule_keeps_its_own(tmp_path) -> None:
    (tmp_path / SCHEDULE_FILE).write_text('{"enter": 2, "exit": 8, "keep": {"4": 30}}')
    assert VisionSchedule.load(tmp_path) == VisionSchedule(enter=2, exit=8, keep={4: 30}, ranking="reading")
    assert VisionSchedule.from_dict({"enter": 2}) == VisionSchedule(enter=2)
    for ranking in RANKINGS:
        schedule = VisionSchedule(enter=2, exit=8, keep={4: 30}, ranking=ranking)
        schedule.save(tmp_path)
        assert VisionSchedule.load(tmp_path) == schedule


def test_from_dict_fills_defaults_and_refuses_strangers() -> None:
    assert VisionSchedule.from_dict({}) == VisionSchedule()
    assert VisionSchedule.from_dict({"enter": 1, "keep": None}) == VisionSchedule(enter=1)
    with pytest.raises(
        ValueError,
        match=r"^a vision schedule has no 'leave'; it has enter, exit, keep, cross, ranking, freeze_prefix\.$",
    ):
        VisionSchedule.from_dict({"enter": 1, "leave": 4})


@given(st.data())
def test_best_is_the_top_with_ties_to_the_earlier(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    row = st.lists(st.integers(0, 4), min_size=n, max_size=n)
    scores = data.draw(st.lists(row, min_size=1, max_size=3))
    among = [[data.draw(st.booleans()) for _ in range(n)] for _ in scores]
    counts = [data.draw(st.integers(0, sum(row))) for row in among]
    result = best(torch.tensor(scores, dtype=torch.float32), torch.tensor(among), counts)
    for got, row_scores, row_among, k in zip(result.tolist(), scores, among, counts, strict=True):
        candidates = [i for i in range(n) if row_among[i]]
        chosen = sorted(candidates, key=lambda i: (-row_scores[i], i))[:k]
        assert [i for i in range(n) if got[i]] == sorted(chosen)


@settings(deadline=None, max_examples=50)
@given(schedules(), st.integers(0, 2**31))
def test_decisions_agree_with_vision_tokens(schedule: VisionSchedule, seed: int) -> None:
    """Carried out layer by layer on random attention, samples see as many tokens as the schedule says."""
    torch.manual_seed(seed)
    vision = torch.rand(3, 30) < torch.tensor([[0.8], [0.3], [0.0]])
    vision[:, -1] = False
    n_vision = tuple(vision.sum(1).tolist())
    prompt = Prompt(
        vision=vision,
        real=torch.ones_like(vision),
        queries=torch.full((3, 1), 29),
        text=~vision & (vision.cumsum(1) > 0),
        n_vision=n_vision,
        n_real=(30, 30, 30),
        n_text=tuple((~vision & (vision.cumsum(1) > 0)).sum(1).tolist()),
        n_answer=(0, 0, 0),
        tail=0,
        num_layers=NUM_LAYERS,
    )
    decision = schedule.begin(prompt)
    active, entered = vision, schedule.enter == 0
    expected = [schedule.vision_tokens(NUM_LAYERS, n) for n in n_vision]
    if decision is None:
        assert expected == [[n] * NUM_LAYERS for n in n_vision]
        return
    for layer in range(NUM_LAYERS):
        selection = decision.select(layer)
        if selection is not None:
            assert selection.counts == tuple(selection.vision.sum(1).tolist())
            if entered:
                assert not (selection.vision & ~active).any(), "a token that left came back"
            active = selection.vision
        entered |= bool(active.any())
        assert active.sum(1).tolist() == [tokens[layer] for tokens in expected]
        if layer in decision.watch:
            assert decision.attended(layer, random_call(~vision | active)) is None


def random_call(present: Tensor) -> AttentionCall:
    """Attention over the tokens `present` `[B, T]`, right-aligned, with random weights and values."""
    batch = len(present)
    width = int(present.sum(1).max())
    order = present.int().argsort(dim=1, stable=True)[:, -width:]
    index = torch.where(present.gather(1, order), order, -1)
    heads, kv_heads, dim = 4, 2, 8
    weights = torch.rand(batch, heads, width, width).masked_fill(index[:, None, None] < 0, 0)
    return AttentionCall(
        query=torch.randn(batch, heads, width, dim),
        key=torch.randn(batch, kv_heads, width, dim),
        value=torch.randn(batch, kv_heads, width, dim),
        query_index=index,
        key_index=index,
        scaling=dim**-0.5,
        run=lambda value, rows: pytest.fail("a schedule changes no attention"),
        weights=lambda rows: weights[:, :, : rows.shape[1]],
        scores=lambda rows, keys: torch.rand(batch, heads, rows.shape[1], keys.shape[1]),
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"enter": 2.5}',
        '{"enter": true}',
        '{"exit": "${oc.env:HOME}"}',
        '{"keep": [1]}',
        '{"keep": {"3": 2.7}}',
        '{"keep": {"3": null}}',
        '{"cross": 5}',
        '{"cross": ["x"]}',
        '{"positions": "original"}',
        "[1]",
        "{enter",
    ],
)
def test_a_file_that_is_not_a_schedule_is_refused_in_a_sentence(text, tmp_path):
    (tmp_path / "vision_schedule.json").write_text(text)
    with pytest.raises(ValueError, match=r"vision_schedule\.json is damaged: ") as error:
        VisionSchedule.load(tmp_path)
    assert "\n" not in str(error.value)
