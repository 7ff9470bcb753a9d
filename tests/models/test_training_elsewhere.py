"""An attachment inside somebody else's trainer: the labels of a forward say where prompts end."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers.families import IMAGE, build, prompt

from latefusion import VisionSchedule
from latefusion.models.attach import attach
from latefusion.models.policies import named

RANKING = {
    "keep": VisionSchedule(keep={2: 2}),
    "hidrop": VisionSchedule(keep={2: 2}, ranking="hidrop"),
    "fastv": named("fastv", layer=2, keep_ratio=0.5),
    "visipruner": named(
        "visipruner", boundary=1, layer_threshold=1.0, tokens_threshold=1e-4, stages=["middle"]
    ),
}
QUESTION = 5  # text tokens after the image, of which the last two answer


def row() -> dict[str, Any]:
    """ "t I ttttt": one token, an image, a question of three tokens and an answer of two."""
    return prompt("llava", ["t I " + "t" * QUESTION])


def labels_of(inputs: dict[str, Any], learnt: int = 2) -> torch.Tensor:
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -learnt:] = inputs["input_ids"][:, -learnt:]
    return labels


def with_answer(inputs: dict[str, Any], answer: int) -> dict[str, Any]:
    ids = inputs["input_ids"].clone()
    ids[:, -2:] = answer
    return {**inputs, "input_ids": ids}


@pytest.fixture
def model() -> Any:
    return build("llava").train()


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_answer_chooses_vision_tokens(model: Any, name: str) -> None:
    """Whatever the answer is, the kept tokens are those of the prompt alone, in training and in evaluation."""
    inputs = row()
    with attach(model, RANKING[name]) as att:
        kept = []
        for answer in range(20, 40):
            taught = with_answer(inputs, answer)
            model(**taught, labels=labels_of(taught)).loss.backward()
            kept.append(att.trace[0].kept)
            with torch.no_grad():
                model(**taught, labels=labels_of(taught))
            assert att.trace[0].kept == kept[-1]
        prompts = {n: v[:, :-2] for n, v in inputs.items() if n in ("input_ids", "attention_mask")}
        with torch.no_grad():
            model.eval()(**{**inputs, **prompts})
        assert att.trace[0].kept is not None and all(tokens == att.trace[0].kept for tokens in kept)


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_labels_choose_as_named_queries_do(model: Any, name: str) -> None:
    inputs = row()
    labels = labels_of(inputs)
    queries = torch.tensor([[inputs["input_ids"].shape[1] - 3]])
    with attach(model, RANKING[name]) as att:
        alone = model(**inputs, labels=labels).logits
        with att.queries(queries, answers=labels != -100):
            assert torch.equal(model(**inputs).logits, alone)


def test_it_is_said_once(model: Any) -> None:
    inputs = row()
    with attach(model, RANKING["keep"]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(**inputs, labels=labels_of(inputs))
    notes = [str(w.message) for w in caught if "labels of this forward" in str(w.message)]
    assert len(notes) == 1 and notes[0].startswith(
        "VisionSchedule chooses vision tokens by what comes before the first"
    )


@pytest.mark.parametrize("name", RANKING)
def test_a_training_forward_that_says_nothing_is_refused(model: Any, name: str) -> None:
    inputs = row()
    with attach(model, RANKING[name]) as att:
        with pytest.raises(
            ValueError, match=r"this training forward does not say where the prompt ends.*pass labels"
        ):
            model(**inputs)
        with att.queries(torch.tensor([[inputs["input_ids"].shape[1] - 3]])):
            model(**inputs)
        with torch.no_grad():
            model(**inputs)  # generation and evaluation need no labels
        model.eval()(**inputs)


def test_what_does_not_rank_trains_as_before(model: Any) -> None:
    inputs = row()
    for policy in (VisionSchedule(enter=1, exit=4), VisionSchedule(cross=[1, 3]), named("divprune")):
        with attach(model, policy), warnings.catch_warnings():
            warnings.simplefilter("error")
            unlabelled = model(**inputs).logits
            labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
            assert torch.equal(model(**inputs, labels=labels).logits, unlabelled)


def test_labels_that_teach_the_question_are_refused(model: Any) -> None:
    """Labels of every token, or of all text behind the image, leave nothing to rank by but the answer."""
    inputs = row()
    everything = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    for labels in (everything, labels_of(inputs, learnt=QUESTION)):
        with (
            attach(model, RANKING["keep"]),
            pytest.raises(ValueError, match=r"the labels begin before it: set the labels of everything but"),
        ):
            model(**inputs, labels=labels)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_first_answer_after_an_image_counts(model: Any) -> None:
    """Two turns: the second has read the first answer, so neither of them ranks; a row without answer keeps all."""
    inputs = prompt("llava", ["t I " + "t" * 8])
    labels = torch.full_like(inputs["input_ids"], -100)
    length = labels.shape[1]
    for place in (length - 6, length - 1):  # an answer of one token each
        labels[0, place] = inputs["input_ids"][0, place]
    with attach(model, RANKING["keep"]) as att:
        alone = model(**inputs, labels=labels).logits
        with att.queries(torch.tensor([[length - 7]]), answers=labels != -100):
            assert torch.equal(model(**inputs).logits, alone)
        model(**inputs, labels=torch.full_like(labels, -100))
        assert set(att.trace[0].vision) == {4}


def test_an_interrupted_forward_leaves_no_labels(model: Any) -> None:
    inputs = row()
    with attach(model, VisionSchedule(exit=4)) as att:

        def stop(*args: Any) -> None:
            raise KeyboardInterrupt

        handle = model.lm_head.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs, labels=labels_of(inputs))
        handle.remove()
        assert att._running.labels is None
