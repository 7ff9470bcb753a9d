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
from latefusion.models.policies import scheduled
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
    """Where prompts end in text behind a block of vision tokens; in a family whose scores are not plain, one by one."""
    if most is not None:
        monkeypatch.setattr(schedules, "QUESTION_ROWS", most)
    layers: list[int] = []
    add = LastRows._add
    monkeypatch.setattr(
        LastRows, "_add", lambda self, shares, group: layers.append(len(group)) or add(self, shares, group)
    )
    one_block = (["tt I tttt"], ["t I ttt", "tt I ttt"])
    anywhere = (
        ["t I tt I ttt"],
        ["t I tt I ttt", "I t I ttt"],
        ["I tt", "t I tttt"],
        ["I t I tt", "I ttttt"],
    )
    for prompts in (*one_block, *anywhere):
        layers.clear()
        keeps_what_loops_keep(family, prompt(family, prompts, "left"), ranking, most)
        if family == "llava":
            assert layers == ([2, 1] if prompts in one_block or most else [])


def test_padding_inside_a_prompt_is_not_taken_for_vision_tokens() -> None:
    """A mask may hide tokens between image and question; vision tokens then stand elsewhere than before the text."""
    inputs = prompt("llava", ["tt I tttttt"])
    last = int(vision_tokens(inputs)[0].nonzero().max())
    inputs["attention_mask"][0, last + 1 : last + 3] = 0
    keeps_what_loops_keep("llava", inputs, "question", 16)


def test_layers_scored_together_or_one_by_one_have_the_same_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one as they run, and wherever vision tokens stand."""
    model, inputs = build("llava", "sdpa"), prompt("llava", ["tt I tttt"])
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
        for most, anywhere in ((0, False), (1024, False), (0, True)):
            monkeypatch.setattr(scheduled, "MOST_KEYS", most)
            with monkeypatch.context() as patched, torch.no_grad():
                if anywhere:
                    patched.setattr(LastRows, "takes", lambda *_: False)
                with attach(model.to(dtype), VisionSchedule(**BAND)):
                    model(**inputs)
        for one, *others in zip(scores[:2], scores[2:4], scores[4:], strict=True):
            for other in others:
                assert one.dtype == other.dtype == torch.float32
                torch.testing.assert_close(one, other)


def test_heads_whose_values_are_zero_rank_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pruned head, whose shares are 0 of 0, leaves the ranking to the others."""
    model, inputs = build("llava", "sdpa"), prompt("llava", ["tt I tttt"])
    text = model.config.text_config
    dim = text.hidden_size // text.num_attention_heads
    for layer in model.model.language_model.layers:
        layer.self_attn.v_proj.weight.data[:dim] = 0
    kept = []
    for anywhere in (False, True):
        with monkeypatch.context() as patched, torch.no_grad():
            if anywhere:
                patched.setattr(LastRows, "takes", lambda *_: False)
            with attach(model, VisionSchedule(**BAND)) as attachment:
                assert model(**inputs).logits.isfinite().all()
                kept.append(attachment.trace[0].kept)
    assert kept[0] == kept[1]


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
        ("reading", 70, 1024, 1),
    ],
)
def test_counted_flops_are_those_that_torch_counts(
    ranking: Any, text: int, most: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many rows, where the whole text asks, one is computed twice (`asking` keeps room for a query)."""
    monkeypatch.setattr(scheduled, "MOST_KEYS", most)
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
