"""A teacher in a share of the steps: which ones, what the loss is expected to be, and what is computed."""

import shutil
from collections import Counter
from itertools import pairwise
from math import ceil, floor

import pytest
import torch
from helpers.quick_runs import metrics_entries, run_config, teach_config, train
from helpers.tiny_base import BAND, SMALL, composed, shake, tiny_student

from latefusion.data import sources
from latefusion.models.inputs import unwrapped
from latefusion.recipes.check import check_config
from latefusion.training import assemble
from latefusion.training.monitor import per_token
from latefusion.training.order import teacher_runs
from latefusion.training.step_cost import computed_flops, training_flops


@pytest.fixture
def student():
    return tiny_student()[1]


def batch_of(student):
    rows = sources.scenes("validation", n_scenes=1)
    return assemble.collator_of(student)([rows[i] for i in range(4)])


@pytest.mark.parametrize("share", [1.0, 0.5, 1 / 3, 0.3, 0.125, 0.1, 0.01])
def test_the_share_of_every_stretch_of_steps_and_no_step_preferred(share):
    chosen: Counter[int] = Counter()
    for seed in range(200):
        steps = [step for step in range(60) if teacher_runs(step, share=share, seed=seed)]
        assert floor(60 * share) <= len(steps) <= ceil(60 * share)
        gaps = [b - a for a, b in pairwise(steps)]
        assert all(floor(1 / share) <= gap <= ceil(1 / share) for gap in gaps)
        chosen.update(steps)
    deviation = (200 * share * (1 - share)) ** 0.5
    assert all(abs(chosen[step] - 200 * share) <= 5 * deviation for step in range(60))


def test_over_the_steps_the_loss_is_that_of_a_teacher_in_every_step(student):
    shake(student)
    batch = batch_of(student)

    def losses(*overrides):
        config, _ = tiny_student("kl.weight=0.7", "model.visipruner.boundary=1", *overrides)
        objective = assemble.objective_of(config, student)
        for step in range(8):
            student.model.zero_grad()
            objective.at(step, 8)
            loss, terms = objective(student.model, batch, count=1)
            loss.backward()
            grads = [p.grad.clone() for p in student.model.parameters() if p.grad is not None]
            yield loss.item(), terms, grads

    full = list(losses())
    for share, times in ((0.125, 1), (0.5, 4)):
        part = list(losses(f"kl.share={share}"))
        taught = [int(terms["taught"]) > 0 for _, terms, _ in part]
        assert sum(taught) == times
        assert sum(loss for loss, *_ in part) == pytest.approx(8 * full[0][0], rel=1e-5)
        for n, grad in enumerate(full[0][2]):
            mean = sum(grads[n] for *_, grads in part) / 8
            assert float((mean - grad).norm()) <= 1e-3 * float(grad.norm())
        for ran, (loss, terms, _) in zip(taught, part, strict=True):
            ce, kl = terms["ce"].item(), terms["kl"].item()
            assert loss == pytest.approx(ce + 0.7 / share * kl, rel=1e-5)
            assert kl == (pytest.approx(full[0][1]["kl"].item(), rel=1e-5) if ran else 0)
            assert terms["teacher_right"] == (full[0][1]["teacher_right"] if ran else 0)


def test_where_the_teacher_does_not_run_nothing_of_it_is_computed(student):
    """Forwards are counted at the decoder's last layer, FLOPs by the trace, and both by what the estimate says."""
    config, _ = tiny_student("kl.share=0.25", "teacher=dense")
    objective = assemble.objective_of(config, student)
    objective.counts = True
    batch, forwards = batch_of(student), []
    last = unwrapped(student.model).get_decoder().layers[-1]
    handle = last.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    with_teacher, without = set(), set()
    for step in range(8):
        before = len(forwards)
        objective.at(step, 8)
        _, terms = objective(student.model, batch, count=1)
        ran = forwards[before:]
        assert ran == ([False, True] if objective.taught else [True])
        (with_teacher if objective.taught else without).add(terms["flops"].item())
    handle.remove()
    assert forwards.count(False) == 2 and len(with_teacher) == len(without) == 1
    learnt = int((batch["labels"] != -100).sum())
    with torch.no_grad(), student.attachment.using(objective.kl.policy):
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "queries")}
        student.model(**inputs, use_cache=False)
        teacher = computed_flops(student.attachment, student.model.config, learnt)
    assert with_teacher.pop() - without.pop() == pytest.approx(teacher, rel=1e-6)


def test_the_estimate_counts_the_teacher_by_its_share(student):
    config, schedule = student.model.config, student.schedule
    none, full, part = (
        training_flops(config, schedule, 10, 4, answers=2, **teacher)
        for teacher in ({}, {"teacher": config}, {"teacher": config, "share": 0.125})
    )
    assert part - none == pytest.approx((full - none) / 8, abs=1) and full > none


def test_a_run_says_its_share_and_logs_the_teachers_steps_alone(base, tmp_path, capsys):
    train(base, tmp_path, "train.steps=4", "kl.share=0.5")
    assert "teacher visipruner in 0.5 of the steps" in capsys.readouterr().out
    entries = [e for e in metrics_entries(tmp_path) if "loss" in e]
    taught = [teacher_runs(step, share=0.5, seed=0) for step in range(4)]
    assert [("kl" in e, "teacher_right" in e) for e in entries] == [(ran, ran) for ran in taught]
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["ce"] + 2 * entry.get("kl", 0), rel=1e-3)
    assert per_token({"ce": 6, "kl": 0, "tokens": 3}) == {"ce": 2, "kl": 0}


@pytest.mark.parametrize("engine", ["accelerate", "lightning"])
def test_a_resumed_run_teaches_in_the_same_steps(base, tmp_path, engine):
    options = (f"engine={engine}", "kl.share=0.4", "train.save_every=2", "train.steps=5")
    whole = train(base, tmp_path / "whole", *options)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    cut = train(base, tmp_path / "cut", *options, "resume=true")
    logs = [
        [[e.get(name) for name in ("step", "loss", "ce", "kl", "grad_norm")] for e in entries if "loss" in e]
        for entries in map(metrics_entries, (whole, cut))
    ]
    assert logs[0][2:] == logs[1] and {kl is None for *_, kl, _ in logs[1]} == {True, False}


def test_the_answers_of_a_cache_are_read_in_the_same_steps(base, tmp_path):
    cache = (f"kl.cache={tmp_path / 'cache'}", "kl.top_k=10000", "lora.dropout=0")

    def options(*overrides):
        return composed(
            *("train.threads=1", "train.log_every=1", "train.learning_rate=1e-2", "train.steps=4"),
            *("train.batch_size=4", "data.scenes=3", "eval.enabled=false", "model.visipruner.boundary=1"),
            *(*SMALL, *BAND, f"model.path={base}", "kl.share=0.5", *overrides),
        )

    teach_config(options(*cache))
    run_config(options(*cache, f"output_dir={tmp_path / 'offline'}"))
    run_config(options(f"output_dir={tmp_path / 'online'}"))
    online, offline = (
        [{n: e[n] for n in ("loss", "ce", "kl") if n in e} for e in metrics_entries(tmp_path / name)]
        for name in ("online", "offline")
    )
    assert [set(e) for e in online] == [set(e) for e in offline]
    assert sum("kl" in e for e in online) == 2
    for a, b in zip(online, offline, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


def test_another_share_is_another_run(base, tmp_path):
    train(base, tmp_path, "train.steps=1")
    with pytest.raises(SystemExit, match=r"kl\.share=0\.5 \(it had 1\.0\)"):
        train(base, tmp_path, "train.steps=2", "resume=true", "kl.share=0.5")


@pytest.mark.parametrize("share", ["0", "-0.5", "1.5", "nan"])
def test_a_share_is_above_0_and_at_most_1(share):
    with pytest.raises(ValueError, match=r"kl\.share=.* must be above 0 and at most 1; teacher=none trains"):
        check_config(composed(f"kl.share={share}"))
