"""Packed text: every token gets what it gets in a row of its own, and so do loss and gradients."""

import json

import pytest
import torch
from helpers.data_rows import IMAGE_PART, turn, write_rows
from helpers.families import FAMILIES, HYBRID_FAMILIES, MROPE_FAMILIES, prompt, shared
from helpers.quick_runs import run_config
from helpers.tiny_base import BAND, SMALL, composed, configured, save_tiny_base, shake, tiny_student
from PIL import Image

from latefusion.data.collate import IGNORE
from latefusion.data.packing import Packed, check_isolation, fitted
from latefusion.training import assemble

PACKABLE = [family for family in FAMILIES if family not in ("paligemma", *HYBRID_FAMILIES)]


def conversation(question: str, *answers: str) -> dict:
    turns = [t for answer in answers for t in (turn("user", question), turn("assistant", answer))]
    return {"messages": turns, "images": []}


TEXTS = [
    conversation("is it red?", "yes"),
    conversation("how many large red squares are there?", "2", "3"),
    conversation("what color?", "red"),
    conversation("what is left of the large red circle?", "square", "large", "blue"),
    conversation("red?", "no"),
]


def test_rows_are_no_longer_than_the_longest_sample():
    assert fitted([3, 9, 4, 5, 2]) == [[1], [3, 2], [0, 4]]
    assert fitted([4, 4]) == [[0], [1]]


@pytest.mark.parametrize("one_row", [True, False])
def test_a_batch_by_hand(one_row):
    batch = {
        "input_ids": torch.tensor([[11, 12, 13, 14], [21, 22, 9, 9], [31, 9, 9, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]),
        "labels": torch.tensor([[-100, 12, -100, 14], [-100, 22, -100, -100], [-100] * 4]),
        "queries": torch.tensor([[0, 2], [0, 0], [0, 0]]),
        "teacher_tokens": torch.tensor([[1], [2], [3]]),
        "teacher_logprobs": torch.tensor([[0.1], [0.2], [0.3]]),
    }
    packed = Packed(lambda samples: batch, one_row=one_row, axes=1)([])
    assert "attention_mask" not in packed
    if one_row:
        assert packed["input_ids"].tolist() == [[11, 12, 13, 14, 21, 22, 31]]
        assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0]]
        assert packed["labels"].tolist() == [[-100, 12, -100, 14, -100, 22, -100]]
        assert packed["queries"].tolist() == [[0, 2, 4, 6]]
    else:
        assert packed["input_ids"].tolist() == [[11, 12, 13, 14], [21, 22, 31, 9]]
        assert packed["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
        assert packed["queries"].tolist() == [[0, 2], [0, 2]]
    assert packed["teacher_tokens"].tolist() == [[1], [2], [3]]


def test_the_teachers_answers_follow_their_samples():
    batch = {
        "input_ids": torch.tensor([[11, 12, 9], [21, 22, 23], [31, 32, 33]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]),
        "labels": torch.tensor([[-100, 12, -100], [-100, 22, 23], [-100, -100, 33]]),
        "queries": torch.tensor([[0, 0], [0, 1], [1, 1]]),
        "teacher_tokens": torch.tensor([[120], [220], [230], [330]]),
        "teacher_logprobs": torch.tensor([[1.2], [2.2], [2.3], [3.3]]),
    }
    packed = Packed(lambda samples: batch, one_row=False, axes=1)([])
    learnt = packed["labels"][:, 1:]
    assert learnt[learnt != IGNORE].tolist() == [22, 23, 33, 12]
    assert packed["teacher_tokens"].flatten().tolist() == [220, 230, 330, 120]
    assert packed["teacher_logprobs"].flatten().tolist() == pytest.approx([2.2, 2.3, 3.3, 1.2])


@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, "sdpa") for f in PACKABLE] + [(f, "eager") for f in ("llava", "gemma3", "qwen2_5_vl")],
)
def test_every_token_gets_what_it_gets_alone(family, attention):
    model = shared(family, attention)
    inputs = prompt(family, ["t" * n for n in (9, 4, 6, 3, 2)], side="right")
    batch = {**inputs, "labels": inputs["input_ids"], "queries": torch.zeros(5, 1, dtype=torch.long)}
    packed = Packed.of(model, lambda samples: batch)([])
    assert (packed["position_ids"].dim() == 3) == (family in MROPE_FAMILIES)
    packed_inputs = {name: v for name, v in packed.items() if name not in ("labels", "queries")}
    with torch.no_grad():
        alone = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
        together = model(**packed_inputs, use_cache=False).logits
    places = [(0, 0, 9), (1, 0, 6), (1, 6, 3), (2, 0, 4), (2, 4, 2)]
    order = {9: 0, 4: 1, 6: 2, 3: 3, 2: 4}
    by_sample = dict(zip(order, alone.split([9, 4, 6, 3, 2]), strict=True))
    for row, start, length in places:
        torch.testing.assert_close(
            together[row, start : start + length], by_sample[length], atol=1e-5, rtol=0
        )
    check_isolation(model)


def test_a_model_in_which_samples_see_each_other_is_refused():
    model = shared("llava")

    def forget(module, args, kwargs):
        return args, {**kwargs, "position_ids": None}

    with (
        model.get_decoder().register_forward_pre_hook(forget, with_kwargs=True),
        pytest.raises(ValueError, match=r"Llava.* under sdpa: .* use data\.pack=false"),
    ):
        check_isolation(model)
    check_isolation(model)


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_a_recurrence_that_reads_one_sample_after_the_other_is_refused(family):
    with pytest.raises(ValueError, match=r"packed samples would see each other; use data\.pack=false"):
        check_isolation(shared(family))


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("data.isolate=true", r"data\.pack=true and data\.isolate=true both lay out rows"),
        ("kl.model=other", r"with kl\.model use kl\.cache, or data\.pack=false"),
    ],
)
def test_what_does_not_go_with_packing_is_refused(option, sentence):
    with pytest.raises(ValueError, match=sentence):
        configured("data=dataset", "data.path=x", "data.pack=true", option)


@pytest.mark.parametrize("teacher", ["dense", "none"])
def test_loss_and_gradients_are_those_of_the_padded_batch(teacher):
    config, student = tiny_student(f"teacher={teacher}")
    shake(student)
    collator = assemble.collator_of(student)
    objective = assemble.objective_of(config, student)
    weights = [w for w in student.model.parameters() if w.requires_grad]
    results = []
    for collate in (collator, Packed.of(student.attachment.model, collator)):
        batch = collate(TEXTS)
        count = (batch["labels"] != IGNORE).sum()
        loss, terms = objective(student.model, batch, count=count)
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        results.append((batch, loss, terms, [g for g in grads if g is not None]))
    (padded, loss, terms, gradients), (packed, loss_packed, terms_packed, gradients_packed) = results
    assert packed["input_ids"].numel() < 0.7 * padded["input_ids"].numel()
    assert loss_packed.item() == pytest.approx(loss.item(), rel=1e-5)
    assert {k: v.item() for k, v in terms_packed.items()} == pytest.approx(
        {k: v.item() for k, v in terms.items()}, rel=1e-5
    )
    assert len(gradients) == len(gradients_packed) > 20
    for a, b in zip(gradients, gradients_packed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_run_with_packing_is_the_run_without(tmp_path, monkeypatch):
    base = save_tiny_base(tmp_path / "base")
    seen = []
    before = Packed.packed

    def watched(self, batch, *, pictured=False):
        packed = before(self, batch, pictured=pictured)
        seen.append((pictured, packed["input_ids"].shape[0] < batch["input_ids"].shape[0]))
        return packed

    monkeypatch.setattr(Packed, "packed", watched)
    rows = [{**row, "images": []} for row in TEXTS]
    Image.new("RGB", (20, 20), (200, 0, 0)).save(tmp_path / "a.png")
    rows += [
        {"messages": [turn("user", IMAGE_PART, "what color?"), turn("assistant", "red")], "images": ["a.png"]}
    ] * 4
    data = write_rows(tmp_path, *rows, name="chat.jsonl")
    losses = []
    for pack in ("false", "true"):
        options = (
            *(f"model.path={base}", "data=dataset", f"data.path={data}", "data.group=modality"),
            *("train.threads=1", "train.steps=4", "train.batch_size=4", "train.log_every=1"),
            *("train.learning_rate=1e-2", "eval.enabled=false", "teacher=dense", "train.trackers=[]"),
            *(f"data.pack={pack}", f"output_dir={tmp_path / pack}"),
        )
        run_config(composed(*SMALL, *BAND, *options))
        lines = (tmp_path / pack / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if '"loss"' in line])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    steps = seen[-4:]  # after the check whether this model can
    assert {pictured for pictured, _ in steps} == {True, False} and all(fewer for _, fewer in steps)
