"""How far a run trusts its teacher: what it measures, what it decides, and what then runs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.quick_runs import QUICK, metrics_entries, run_config, teach_config, train
from helpers.tiny_base import BAND, SMALL, configured
from helpers.tiny_base import composed as composed_tree
from safetensors.torch import load_file

from latefusion.data.collate import IGNORE, collator_without_weights
from latefusion.data.load import training_data
from latefusion.eval.evaluate import note_on
from latefusion.training import assemble, objective, trust
from latefusion.training.trust_record import read

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


def settle(overrides, monkeypatch=None, resumed=None, measured=None):
    config = configured(*DATA, *overrides)
    if measured is not None:
        monkeypatch.setattr(trust, "ask", lambda *_: measured)
    collator = collator_without_weights(config)
    return trust.settle_trust(
        config, collator, lambda: assemble.base_of(config)[0], training_data(config.data), resumed
    )


@pytest.mark.parametrize(
    ("right", "unsure", "decides", "why"),
    [
        (
            100,
            0,
            "none",
            "knows 100% of 100 training answers: the labels say the same, so this run has no teacher",
        ),
        (96, 0, "none", "the labels say the same"),
        (
            95,
            0,
            "all",
            "is surer of one it knows than of one where the label differs in 50% of pairs: the labels",
        ),
        (80, 0, "all", "so it teaches every token"),
        (80, 10, "none", "differs in 75% of pairs: where the label differs it does not know"),
        (80, 5, "all", "in 62% of pairs"),
        (70, 0, "all", "knows 70%"),
        (69, 0, "none", "too few to teach them"),
        (29, 0, "none", "knows 29% of 100 training answers: too few"),
    ],
)
def test_a_teacher_teaches_if_it_knows_better_than_the_labels(
    tmp_path, monkeypatch, right, unsure, decides, why
):
    """Wrong labels fall on answers that it is sure of; of answers that it does not know it is less sure."""
    known = torch.arange(100) < right
    sure = torch.where(known | (torch.arange(100) >= right + unsure), 0.9, 0.5)
    decision = settle([f"output_dir={tmp_path}"], monkeypatch, measured=(known, sure))
    assert decision.trust == decides and why in str(decision)


@pytest.mark.parametrize(
    ("right", "answers"), [(12, 12), (73, 73), (72, 72), (4, 12), (5, 12), (6, 12), (150, 180), (180, 184)]
)
def test_no_more_is_asked_once_the_share_is_beyond_doubt(right, answers):
    """Wilson's bounds solve |share - p| = z sqrt(p (1 - p) / n), here found by search."""
    share, z = right / answers, 1.959964

    def solve(inside, beyond):
        for _ in range(60):
            p = (inside + beyond) / 2
            off = abs(share - p) > z * (p * (1 - p) / answers) ** 0.5
            inside, beyond = (inside, p) if off else (p, beyond)
        return inside

    low, high = solve(share, 0.0), solve(share, 1.0)
    assert trust.outside(right, answers) == (high < 0.7 or low > 0.95)


class Answers:
    """A data set of one-answer samples, of which a teacher knows a share."""

    def __init__(self, wrong):
        self.wrong = wrong

    def __len__(self):
        return 3000

    def __getitem__(self, i):
        return i


@pytest.mark.parametrize(
    ("every", "steps", "most", "least"),
    [(10**6, 900, 84, 73), (1, 900, 12, 12), (5, 900, 264, 256), (5, 150, 180, 180), (5, 1, 12, 12)],
)
def test_a_teacher_is_asked_no_more_than_it_takes(tmp_path, every, steps, most, least):
    """Every `every`-th answer is wrong; a run of few steps asks a tenth of its samples."""
    config = configured(*DATA, f"output_dir={tmp_path}", f"train.steps={steps}", "train.batch_size=12")
    asked = []

    def guard(samples):
        asked.extend(samples)
        return {"labels": torch.tensor([[IGNORE, 1]] * len(samples)), "at": samples}

    def choose(batch):
        return torch.tensor([int(i % every > 0) for i in batch["at"]]), torch.ones(len(batch["at"]))

    known, _ = trust.measure(config, guard, Answers(every), choose)
    assert len(known) == len(asked) == len(set(asked)) and least <= len(asked) <= most


def test_a_random_teacher_is_asked_and_steps_aside(base, tmp_path):
    decision = settle([*BAND, f"model.path={base}", f"output_dir={tmp_path}"])
    assert decision.trust == "none" and decision.answers >= 4 and decision.right < decision.answers / 2


def test_what_is_given_is_not_measured_and_no_teacher_decides_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "ask", lambda *_: pytest.fail("the teacher was asked"))
    out = f"output_dir={tmp_path}"
    decision = settle([out, "kl.trust=all"])
    assert decision.trust == "all" and "not asked" in str(decision)
    assert settle([out, "teacher=none"]) is None and settle([out, "kl.weight=0"]) is None


@pytest.mark.parametrize("engine", ["deepspeed_zero3", "fsdp2"])
def test_a_teacher_in_shards_must_be_trusted_by_its_user(engine):
    with pytest.raises(ValueError, match=r"kl\.trust=auto cannot ask kl\.model=embedded what it knows"):
        configured(f"engine={engine}", "kl.model=embedded", "kl.trust=auto")
    configured(f"engine={engine}", "kl.model=embedded", "kl.trust=all")


def test_a_run_whose_teacher_steps_aside_is_the_run_without_one(base, tmp_path, capsys, monkeypatch):
    """Bit for bit, also after it stopped and went on; its teacher never runs, and is not asked again."""
    train(base, tmp_path / "none", "teacher=none", "kl.trust=auto")
    capsys.readouterr()
    monkeypatch.setattr(objective.Objective, "teacher_rows", lambda *_: pytest.fail("the teacher ran"))
    train(base, tmp_path / "auto", "kl.trust=auto")
    printed = capsys.readouterr().out
    assert "so this run has no teacher" in printed and ", no teacher, float32" in printed
    before = json.loads((tmp_path / "auto/trust.json").read_text())
    assert before["trust"] == "none"
    monkeypatch.setattr(trust, "ask", lambda *_: pytest.fail("asked again"))
    went_on = shutil.copytree(tmp_path / "auto", tmp_path / "went_on")
    train(base, went_on, "resume=1", "kl.trust=auto")
    assert json.loads((went_on / "trust.json").read_text()) == before
    none, *others = (
        load_file(tmp_path / x / "adapter_model.safetensors") for x in ("none", "auto", "went_on")
    )
    for student in others:
        assert student.keys() == none.keys()
        assert all(torch.equal(student[name], none[name]) for name in none)
    note = note_on(configured("kl.share=0.5"), str(tmp_path / "auto"))
    assert "no teacher. The teacher knows " in note
    assert "trust in the teacher | The teacher knows " in (tmp_path / "auto/README.md").read_text()
    assert not any("teacher_right" in entry for entry in metrics_entries(tmp_path / "auto"))


def test_a_teacher_that_knows_better_teaches(base, tmp_path, capsys, monkeypatch):
    known = torch.arange(100) < 80
    monkeypatch.setattr(trust, "ask", lambda *_: (known, torch.ones(100)))
    train(base, tmp_path / "auto", "kl.trust=auto")
    assert "The teacher knows 80% of 100 training answers" in capsys.readouterr().out
    train(base, tmp_path / "all", "kl.trust=all")
    losses = [[e["kl"] for e in metrics_entries(tmp_path / name) if "loss" in e] for name in ("auto", "all")]
    assert losses[0] == losses[1] and all(kl > 0 for kl in losses[0])


def test_another_trust_is_another_run(base, tmp_path):
    train(base, tmp_path, "train.steps=1", "kl.trust=auto")
    with pytest.raises(SystemExit, match=r"kl\.trust=all \(it had auto\)"):
        train(base, tmp_path, "train.steps=2", "resume=true", "kl.trust=all")
    assert composed_tree().kl.trust.value == "auto"


def test_the_decision_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "trust.json").write_text('{"trust": "labels", "right": 1, "answers": 9, "surer": 0.5}')
    with pytest.raises(ValueError, match="trust=labels, which is of an earlier latefusion"):
        read(tmp_path)


def test_no_answers_are_written_for_a_teacher_that_steps_aside(base, tmp_path, capsys, monkeypatch):
    """The empty cache trains without a teacher, and is refused where the run would have one."""
    cache, out = tmp_path / "cache", f"output_dir={tmp_path / 'run'}"
    options = [*QUICK, *SMALL, *BAND, f"model.path={base}", f"kl.cache={cache}"]
    teach_config(composed_tree(*options, "kl.trust=auto"))
    assert "stays empty" in capsys.readouterr().out and not list(cache.glob("*.arrow"))
    run_config(composed_tree(*options, out, "kl.trust=auto"))
    assert "so this run has no teacher" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is empty, because its teacher knew no better than the labels"):
        run_config(composed_tree(*options, out, "kl.trust=all", "overwrite=true"))
    known = torch.arange(100) < 80
    monkeypatch.setattr(trust, "ask", lambda *_: (known, torch.ones(100)))
    with pytest.raises(SystemExit, match="is empty, because its teacher"):
        run_config(composed_tree(*options, out, "kl.trust=auto", "overwrite=true"))
    teach_config(composed_tree(*options, "kl.trust=auto"))
    assert list(cache.glob("*.arrow"))
