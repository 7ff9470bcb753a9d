"""Our rules that rank vision tokens for `keep`, against loops over the stock model's own attention maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.families import FAMILIES, LAYERS, MIXED, build, close, prompt, shared, text_tokens, vision_tokens
from helpers.forwards import ranking_rows
from helpers.oracle import masked, ranked
from torch.utils.flop_counter import FlopCounterMode

from latefusion import VisionSchedule
from latefusion.eval.bench.ranking import Unranked
from latefusion.models import schedule as schedules
from latefusion.models.attach import attach
from latefusion.models.policies import reading
from latefusion.models.policies.base import Prompt
from latefusion.models.policies.reading import LastRows
from latefusion.models.policies.scheduled import ScheduleDecision, asking

BAND: dict[str, Any] = {"enter": 1, "exit": 5, "keep": {3: 3, 4: 2}}
SPECIAL = ("llava", "gemma3", "qwen3_vl")
SOME = [pytest.param(f, marks=[] if f in SPECIAL else pytest.mark.slow) for f in FAMILIES]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(("ranking", "most"), [("reading", None), ("question", 2)])
def test_a_rule_keeps_what_loops_keep(
    family: str, side: str, ranking: Any, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most is not None:
        monkeypatch.setattr(schedules, "QUESTION_ROWS", most)
    keeps_what_loops_keep(family, prompt(family, MIXED, side), ranking, most)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(("ranking", "most"), [("reading", None), ("question", 2), ("question", 1)])
def test_layers_scored_together_keep_what_loops_keep(
    family: str, ranking: Any, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where prompts end in text, which is how requests do; in a family whose scores are not plain, one by one."""
    if most is not None:
        monkeypatch.setattr(schedules, "QUESTION_ROWS", most)
    layers: list[int] = []
    shares = LastRows._shares
    monkeypatch.setattr(LastRows, "_shares", lambda self, all: layers.append(len(all)) or shares(self, all))
    for prompts in (["tt I tttt"], ["t I tt I ttt", "I t I ttt"]):
        layers.clear()
        keeps_what_loops_keep(family, prompt(family, prompts, "left"), ranking, most)
        if family == "llava":  # all of the text ends no prompt of two images
            assert layers == ([2, 1] if most or len(prompts) == 1 else [])


@pytest.mark.parametrize("text", ["tt I tttt", "I t I t"])
def test_layers_scored_together_or_one_by_one_have_the_same_shares(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build("llava", "sdpa"), prompt("llava", [text])
    scores: list[torch.Tensor] = []
    select = ScheduleDecision.select

    def noted(self: ScheduleDecision, layer: int) -> Any:
        selection = select(self, layer)
        if layer in self.keep:
            assert self.scores is not None
            scores.append(self.scores.clone())
        return selection

    monkeypatch.setattr(ScheduleDecision, "select", noted)
    for dtype in (torch.float32, torch.bfloat16):
        scores.clear()
        for most in (0, 1024):
            monkeypatch.setattr(reading, "MOST_KEYS", most)
            with torch.no_grad(), attach(model.to(dtype), VisionSchedule(**BAND)):
                model(**inputs)
        apart, together = scores[:2], scores[2:]
        for one, other in zip(apart, together, strict=True):
            assert one.dtype == other.dtype == torch.float32
            torch.testing.assert_close(one, other)


def keeps_what_loops_keep(family: str, inputs: Any, ranking: Any, most: int | None) -> None:
    model = shared(family, "sdpa")
    vision, text = vision_tokens(inputs), text_tokens(inputs)
    seen = ranked(
        shared(family, "eager"),
        inputs,
        vision,
        **BAND,
        queries=[rows if most is None else rows[-most:] for rows in ranking_rows(inputs)],
    )
    with torch.no_grad():
        with masked(model, vision, seen, padding=inputs["attention_mask"]):
            expected = model(**inputs, use_cache=False).logits[text]
        with attach(model, VisionSchedule(**BAND, ranking=ranking)) as attachment:
            assert close(model(**inputs).logits[text], expected)
            kept = [record.kept for record in attachment.trace]
    for chosen, sees, here in zip(seen[4], vision, kept, strict=True):
        assert here == (chosen.nonzero().flatten().tolist() if sees.any() else None)


@pytest.mark.parametrize("most", [1, 2, 3, 100, None])
def test_each_query_is_asked_with_the_text_before_it(most: int | None) -> None:
    vision = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]]).bool()
    answers = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 0, 0], [0] * 10]).bool()
    queries = torch.tensor([[5, 8], [6, 6]])
    column = torch.arange(10)
    text = ~vision & (vision.cumsum(1) > 0) & ~answers & (column <= queries.amax(1, keepdim=True))
    prompt = Prompt(
        vision=vision,
        real=torch.ones_like(vision),
        queries=queries,
        text=text,
        n_vision=(2, 1),
        n_real=(10, 10),
        n_text=tuple(text.sum(1).tolist()),
        n_answer=(2, 0),
        tail=0,
        num_layers=LAYERS,
    )
    expected: list[set[int]] = []
    for row in range(2):
        places = text[row].nonzero().flatten().tolist()
        near = [[p for p in places if p <= query][-(most or 100) :] for query in queries[row].tolist()]
        expected.append(set().union(*near))
    assert [set(row) for row in asking(prompt, most).tolist()] == expected


@pytest.mark.parametrize(
    ("ranking", "text", "most", "more"),
    [
        ("question", 40, 1024, 0),
        ("question", 6, 1024, 0),
        ("reading", 40, 1024, 0),
        ("question", 40, 0, 0),
        ("question", 6, 0, 1),
        ("reading", 40, 0, 1),
        ("reading", 70, 1024, 1),
    ],
)
def test_counted_flops_are_those_that_torch_counts(
    ranking: Any, text: int, most: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many keys or rows, where the whole text asks, one row is computed twice (`asking` keeps room for a query)."""
    monkeypatch.setattr(reading, "MOST_KEYS", most)
    monkeypatch.setattr(schedules, "MOST_KEYS", most)
    model = build("llava", "sdpa")
    inputs = prompt("llava", ["I" + "t" * text])

    def counted(schedule: VisionSchedule) -> int:
        with torch.no_grad(), attach(model, schedule), FlopCounterMode(display=False) as counter:
            model(**inputs)
        return counter.get_total_flops()

    schedule = VisionSchedule(**BAND, ranking=ranking)
    n_vision = int(vision_tokens(inputs).sum())
    n_text = int(inputs["attention_mask"].sum()) - n_vision
    flops = schedule.ranking_flops(model.config, n_text, schedule.vision_tokens(LAYERS, n_vision))
    measured = counted(schedule) - counted(Unranked(**BAND))
    rows = n_text if ranking == "reading" else min(n_text, schedules.QUESTION_ROWS)
    assert measured * rows == flops * (rows + more) > 0
