"""Several questions in a row: each must get exactly what it gets in a row of its own."""

from __future__ import annotations

import pytest
import torch

from latefusion.data import sources
from latefusion.data.collate import IGNORE, Collator
from latefusion.data.turns import Conversations, isolate_turns
from latefusion.models.attach import attach
from latefusion.models.base_model import load_base
from latefusion.models.policies.fastv import FastV
from latefusion.models.policies.visipruner import VisiPruner
from latefusion.models.schedule import VisionSchedule


@pytest.fixture(scope="module")
def base():
    return load_base("embedded", dtype=torch.float64)


@pytest.fixture(scope="module")
def rows():
    return sources.scenes("validation", n_scenes=3)


def collator(base, isolate):
    model, processor = base
    return Collator(
        processor=processor, vision_ids=[model.config.image_token_id], stop=["<eos>"], isolate=isolate
    )


def answers(base, batch):
    """Logits and labels of every answer token, in reading order."""
    labels = batch.pop("labels")
    batch.pop("queries")
    with torch.no_grad():
        logits = base[0](**batch).logits
    learnt = labels[:, 1:] != IGNORE
    return logits[:, :-1][learnt], labels[:, 1:][learnt]


@pytest.mark.parametrize("turns", [2, 5, 13])
def test_conversations_hold_every_question_once_and_one_image(rows, turns):
    scenes = rows.with_format(None)["scene"]
    conversations = Conversations(rows, scenes, turns)
    questions = []
    for i, part in enumerate(conversations.ranges):
        sample = conversations[i]
        assert len({scenes[k] for k in part}) == 1
        assert len(sample["messages"]) == 2 * len(part) <= 2 * turns
        images = [p for m in sample["messages"] for p in m["content"] if p["type"] == "image"]
        assert len(images) == len(sample["images"]) == 1
        questions += [m["content"][-1]["text"] for m in sample["messages"][::2]]
    assert questions == rows.with_format(None)["question"][:]


@pytest.mark.parametrize("schedule", [VisionSchedule(), VisionSchedule(enter=2, exit=11)])
def test_a_packed_turn_gets_what_it_gets_alone(base, rows, schedule):
    n = rows.with_format(None)["scene"][:].count(rows.with_format(None)["scene"][0])
    packed = Conversations(rows, rows.with_format(None)["scene"], 4)
    first = [packed[i] for i, part in enumerate(packed.ranges) if part.stop <= n]
    with attach(base[0], schedule):
        alone, labels_alone = answers(base, collator(base, None)([rows[i] for i in range(n)]))
        together, labels_together = answers(base, collator(base, torch.float64)(first))
    assert torch.equal(labels_alone, labels_together)
    assert torch.allclose(alone, together, atol=1e-9)


def test_turns_that_see_each_other_answer_differently(base, rows):
    packed = Conversations(rows, rows.with_format(None)["scene"], 4)
    isolated, _ = answers(base, collator(base, torch.float64)([packed[0]]))
    joined, _ = answers(base, collator(base, None)([packed[0]]))
    assert not torch.allclose(isolated, joined, atol=1e-3)


RANKING = {
    "keep": VisionSchedule(enter=2, exit=11, keep={4: 72, 8: 24}),
    "visipruner": VisiPruner(
        boundary=7, layer_threshold=0.9998, tokens_threshold=0.7, stages=("middle", "deep")
    ),
    "fastv": FastV(layer=3),
}


@pytest.mark.parametrize("policy", RANKING.values(), ids=RANKING)
@torch.no_grad()
def test_later_turns_get_what_a_chat_on_a_kept_cache_gets(base, rows, policy):
    """No turn ranks vision tokens but the first: later ones have read answers, the first is asked before any."""
    model, _ = base
    sample = Conversations(rows, rows.with_format(None)["scene"], 4)[1]
    batch = collator(base, None)([sample])
    labels, queries = batch.pop("labels"), batch.pop("queries")
    prompt_length = int(queries[0, 0]) + 1
    tokens = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
    with attach(model, policy) as attachment:
        with attachment.queries(queries, answers=labels != IGNORE):
            row = model(**tokens, **batch, use_cache=False).logits[:, prompt_length:]
        first = model(
            **{name: value[:, :prompt_length] for name, value in tokens.items()}, **batch, use_cache=True
        )
        chat = model(
            input_ids=tokens["input_ids"][:, prompt_length:],
            attention_mask=tokens["attention_mask"],
            past_key_values=first.past_key_values,
        ).logits
    assert torch.allclose(row, chat, atol=1e-9)


def test_an_image_after_the_question_is_not_ranked_by_it(base, rows):
    """No text before the answer has read it: a policy that ranks is refused, a band is not."""
    first, second = rows[0], rows[20]
    sample = {name: first[name] + second[name] for name in ("messages", "images")}
    batch = collator(base, None)([sample])
    labels, queries = batch.pop("labels"), batch.pop("queries")
    for policy in (VisionSchedule(enter=2, exit=11), RANKING["keep"]):
        with attach(base[0], policy) as attachment, attachment.queries(queries), torch.no_grad():
            if policy.keep:
                with pytest.raises(ValueError, match="an image comes after the last of the queries"):
                    base[0](**batch, use_cache=False)
            else:
                assert base[0](**batch, use_cache=False).logits.shape[:2] == labels.shape


def test_mask_and_positions_by_hand():
    vision = torch.tensor([[False, True, True, False, False, False, False, False]])
    answer = torch.tensor([[False, False, False, False, True, False, True, False]])
    real = torch.tensor([[True] * 7 + [False]])
    out = isolate_turns(vision, answer, real, torch.float32)
    assert out["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 3]]
    seen = (out["attention_mask"][0, 0] == 0).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
    ]


def test_an_image_after_an_answer_is_refused():
    vision = torch.tensor([[True, False, True, False]])
    answer = torch.tensor([[False, True, False, True]])
    with pytest.raises(ValueError, match=r"data\.isolate=false"):
        isolate_turns(vision, answer, torch.ones_like(vision), torch.float32)
