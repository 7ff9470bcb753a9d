"""How far a run trusts its teacher: what it measures, what it decides, and what the loss then is."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.quick_runs import metrics_entries, train
from helpers.tiny_base import BAND, configured, shake, tiny_base, tiny_student
from helpers.tiny_base import composed as composed_tree

from latefusion.data import sources
from latefusion.data.collate import IGNORE, collator_without_weights
from latefusion.data.load import training_data
from latefusion.eval.evaluate import note_on
from latefusion.models.attach import attach
from latefusion.models.policies.configured import visipruner
from latefusion.training import assemble, trust
from latefusion.training.loss import distillation, distillation_from

DATA = ("data.scenes=4", "model.visipruner.boundary=1")


def test_an_answer_is_known_if_the_first_choice_is_right_at_each_of_its_tokens():
    labels = torch.full((2, 9), IGNORE)
    labels[0, 2:4] = torch.tensor([5, 6])  # right
    labels[0, 6:8] = torch.tensor([7, 8])  # its second token is wrong
    labels[1, 1] = 9  # right
    labels[1, 8] = 4  # wrong, at the end of a row
    choices, sure = torch.tensor([5, 6, 7, 0, 9, 3]), torch.tensor([0.9, 0.4, 1.0, 0.8, 0.3, 0.7])
    known, surest = trust.answers_known(labels, choices, sure)
    assert known.tolist() == [True, False, True, False]
    assert surest.tolist() == pytest.approx([0.4, 0.8, 0.3, 0.7]), "the least sure of an answer's tokens"
    assert trust.answers_known(labels, torch.tensor([5, 6, 7, 8, 9, 4]), sure)[0].all()
    nothing = torch.tensor([], dtype=torch.long)
    assert not len(trust.answers_known(torch.full((1, 3), IGNORE), nothing, nothing.float())[0])


def test_answers_next_to_each_other_in_the_batch_are_two():
    labels = torch.tensor([[IGNORE, IGNORE, 3], [IGNORE, 4, IGNORE]])
    known, _ = trust.answers_known(labels, torch.tensor([3, 0]), torch.ones(2))
    assert known.tolist() == [True, False]


def test_the_chance_to_be_surer_is_counted_over_all_pairs():
    known, sure = torch.rand(60) < 0.6, (20 * torch.rand(60)).round() / 20
    pairs = [(a > b) + (a == b) / 2 for a in sure[known].tolist() for b in sure[~known].tolist()]
    assert trust.chance_surer(known, sure) == pytest.approx(sum(pairs) / len(pairs))
    assert trust.chance_surer(torch.ones(3) > 0, torch.rand(3)) is None
    assert trust.chance_surer(torch.ones(3) < 0, torch.rand(3)) is None


def test_weights_scale_each_token_and_all_ones_change_nothing():
    logits, teacher, weights = torch.randn(6, 9), torch.randn(6, 9), torch.rand(6)
    each = torch.stack([distillation(logits[i : i + 1], teacher[i : i + 1], 1.5) for i in range(6)])
    weighted = distillation(logits, teacher, 1.5, weights)
    assert weighted.item() == pytest.approx((each * weights).sum().item(), rel=1e-5)
    logprobs, tokens = (teacher / 1.5).log_softmax(-1).topk(9)
    assert distillation_from(logits, tokens, logprobs, 1.5, weights).item() == pytest.approx(
        weighted.item(), rel=1e-4
    )
    logprobs, tokens = logprobs[:, :3], tokens[:, :3]  # the rest of the vocabulary counts as one
    each = torch.stack(
        [distillation_from(logits[i : i + 1], tokens[i : i + 1], logprobs[i : i + 1], 1.5) for i in range(6)]
    )
    assert distillation_from(logits, tokens, logprobs, 1.5, weights).item() == pytest.approx(
        (each * weights).sum().item(), rel=1e-4
    )


def test_by_label_a_token_counts_by_the_teachers_probability_of_its_label():
    """The oracle computes every logit, with nothing shared between teacher and student."""
    config, student = tiny_student(
        "kl.trust=labels", "kl.temperature=1.5", "model.visipruner.boundary=1", "kl.weight=0.7"
    )
    shake(student)
    rows = sources.scenes("validation", n_scenes=1)
    batch = assemble.collator_of(student)([rows[i] for i in range(4)])
    loss, terms = assemble.objective_of(config, student)(student.model, batch, count=1)
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "queries")}
    base, _ = tiny_base()
    teacher = attach(base, visipruner(config.model.visipruner))
    places = (batch["queries"], batch["labels"] != IGNORE)
    with torch.no_grad(), student.attachment.queries(*places), teacher.queries(*places):
        s, t = student.model(**inputs).logits, base(**inputs).logits
    kl, right = 0.0, 0
    for b, p in (batch["labels"] != IGNORE).nonzero().tolist():
        p_t, p_s = (torch.softmax(x[b, p - 1].double() / 1.5, -1) for x in (t, s))
        kl += 1.5**2 * (p_t[batch["labels"][b, p]] * (p_t * (p_t / p_s).log()).sum()).item()
        right += int(t[b, p - 1].argmax() == batch["labels"][b, p])
    assert terms["kl"].item() == pytest.approx(kl, rel=1e-4) and kl > 0
    assert loss.item() == pytest.approx(terms["ce"].item() + 0.7 * kl, rel=1e-4)
    assert terms["teacher_right"].item() == right


def settle(overrides, monkeypatch=None, resumed=None, measured=None):
    config = configured(*DATA, *overrides)
    if measured is not None:
        monkeypatch.setattr(trust, "ask", lambda *_: measured)
    collator = collator_without_weights(config)
    return trust.settle_trust(
        config, collator, lambda: assemble.base_of(config)[0], training_data(config.data), resumed
    )


@pytest.mark.parametrize(
    ("right", "unsure", "decided"),
    [
        (100, 0, "all"),
        (80, 0, "all"),
        (80, 10, "labels"),
        (80, 1, "all"),
        (60, 0, "labels"),
        (29, 0, "labels"),
    ],
)
def test_a_teacher_that_knows_most_answers_counts_fully_if_it_is_sure_of_the_others_too(
    tmp_path, monkeypatch, right, unsure, decided
):
    """Wrong labels fall on answers that it is sure of; of answers that it does not know it is less sure."""
    known = torch.arange(100) < right
    sure = torch.where(known | (torch.arange(100) >= right + unsure), 0.9, 0.5)
    decision = settle([f"output_dir={tmp_path}"], monkeypatch, measured=(known, sure))
    assert decision.trust == decided and f"knows {right}% of 100 training answers" in str(decision)
    assert ("in 50% of pairs" in str(decision)) == (right < 100 and not unsure)


def test_a_random_teacher_is_asked_and_steps_aside(base, tmp_path):
    decision = settle([*BAND, f"model.path={base}", f"output_dir={tmp_path}"])
    assert decision.trust == "labels" and decision.answers >= 20 and decision.right < decision.answers / 2


def test_what_is_given_is_not_measured_and_no_teacher_decides_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "ask", lambda *_: pytest.fail("the teacher was asked"))
    out = f"output_dir={tmp_path}"
    assert settle([out, "kl.trust=all"]).trust == "all"
    assert settle([out, "kl.trust=labels"]).trust == "labels"
    assert settle([out, "teacher=none"]) is None and settle([out, "kl.weight=0"]) is None
    sharded = settle([out, "engine=deepspeed_zero3", "kl.model=embedded"])
    assert sharded.trust == "labels" and "not asked" in str(sharded)


def test_a_run_says_what_it_decided_and_keeps_it_when_it_goes_on(base, tmp_path, capsys, monkeypatch):
    train(base, tmp_path, "train.steps=2", "kl.trust=auto")
    assert "% of " in (printed := capsys.readouterr().out) and "The teacher knows " in printed
    note = note_on(configured("kl.share=0.5"), str(tmp_path))
    assert "teacher visipruner in 0.5 of the steps. The teacher knows " in note
    assert "trust in the teacher | The teacher knows " in (tmp_path / "README.md").read_text()
    before = json.loads((tmp_path / "trust.json").read_text())
    assert before["trust"] == "labels"
    assert all(0 <= e["teacher_right"] <= 1 for e in metrics_entries(tmp_path) if "loss" in e)
    monkeypatch.setattr(trust, "ask", lambda *_: pytest.fail("asked again"))
    train(base, tmp_path, "train.steps=3", "resume=true", "kl.trust=auto")
    assert json.loads((tmp_path / "trust.json").read_text()) == before


def test_another_trust_is_another_run(base, tmp_path):
    train(base, tmp_path, "train.steps=1", "kl.trust=auto")
    with pytest.raises(SystemExit, match=r"kl\.trust=all \(it had auto\)"):
        train(base, tmp_path, "train.steps=2", "resume=true", "kl.trust=all")
    assert composed_tree().kl.trust.value == "auto"
