"""The objective: its value, its independence of batching, and a teacher that is the base and nothing else."""

import pytest
import torch
from helpers.tiny_base import shake, tiny_base, tiny_student
from peft.tuners.lora import LoraLayer

from latefusion.data import sources
from latefusion.data.collate import IGNORE, label_columns
from latefusion.models.attach import attach
from latefusion.models.policies.configured import visipruner
from latefusion.models.schedule import VisionSchedule
from latefusion.training import assemble
from latefusion.training.loss import distillation


@pytest.fixture(scope="module")
def rows():
    return sources.scenes("validation", n_scenes=2)


def batch_of(student, rows, indices):
    collate = assemble.collator_of(student)
    return collate([rows[i] for i in indices])


def gradients(student) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}


def test_kl_is_the_textbook_sum():
    s, t = torch.randn(5, 7), torch.randn(5, 7)
    p, q = torch.softmax(t.double() / 2, -1), torch.softmax(s.double() / 2, -1)
    assert distillation(s, t, 2.0).item() == pytest.approx(4 * (p * (p / q).log()).sum().item(), rel=1e-5)
    assert distillation(s, s, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_label_columns_are_the_union_over_rows():
    labels = torch.full((2, 6), -100)
    labels[0, 3], labels[1, 5] = 7, 8
    assert label_columns(labels).tolist() == [2, 4]
    assert label_columns(torch.full((2, 6), -100)).tolist() == [0]


def test_loss_is_cross_entropy_plus_kl_over_all_logits(rows):
    """The oracle computes every logit, with nothing shared between teacher and student."""
    config, student = tiny_student("kl.weight=0.7", "kl.temperature=1.5", "model.visipruner.boundary=1")
    shake(student)
    batch = batch_of(student, rows, range(5))
    loss, terms = assemble.objective_of(config, student)(student.model, batch, count=11)

    inputs = {k: v for k, v in batch.items() if k not in ("labels", "queries")}
    base, _ = tiny_base()
    teacher = attach(base, visipruner(config.model.visipruner))
    places = (batch["queries"], batch["labels"] != IGNORE)
    with torch.no_grad(), student.attachment.queries(*places), teacher.queries(*places):
        s, t = student.model(**inputs).logits, base(**inputs).logits
    ce = kl = 0.0
    for b, p in (batch["labels"] != -100).nonzero().tolist():
        log_s, log_t = (x[b, p - 1].double() for x in (s, t))
        ce -= log_s.log_softmax(-1)[batch["labels"][b, p]].item()
        p_t, p_s = torch.softmax(log_t / 1.5, -1), torch.softmax(log_s / 1.5, -1)
        kl += 1.5**2 * (p_t * (p_t / p_s).log()).sum().item()
    assert terms["ce"].item() == pytest.approx(ce, rel=1e-4) and terms["kl"].item() == pytest.approx(
        kl, rel=1e-4
    )
    assert loss.item() == pytest.approx((ce + 0.7 * kl) / 11, rel=1e-4) and kl > 0.1


@pytest.mark.parametrize("teacher", ["visipruner", "dense"])
def test_teacher_is_the_base_under_its_policy_whatever_was_trained(rows, teacher):
    config, student = tiny_student(
        f"teacher={teacher}", "lora.dropout=0.5", "lora.train_projector=true", "model.visipruner.boundary=1"
    )
    shake(student)
    student.model.train()
    objective = assemble.objective_of(config, student)
    batch = batch_of(student, rows, range(4))
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "queries")}
    learnt = torch.ones_like(batch["labels"], dtype=torch.bool)
    with student.attachment.queries(batch["queries"]):
        rows, reading = objective.teacher_rows(inputs, learnt)
        taught = objective.readout.call_head(rows, lambda rows, read: reading(read)(rows))
    base, _ = tiny_base()
    attachment = attach(base, objective.kl.policy)
    with torch.no_grad(), attachment.queries(batch["queries"]):
        expected = base(**inputs).logits.flatten(0, 1)
    torch.testing.assert_close(taught, expected, rtol=0, atol=0)
    assert student.model.training and student.attachment.policy == student.schedule
    assert not next(m for m in student.model.modules() if isinstance(m, LoraLayer)).disable_adapters


def test_a_new_student_is_the_base_under_the_schedule(rows):
    _, student = tiny_student()
    batch = batch_of(student, rows, range(3))
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "queries")}
    base, _ = tiny_base()
    with torch.no_grad(), attach(base, student.schedule):
        expected = base(**inputs).logits
    with torch.no_grad():
        assert torch.equal(student.model(**inputs).logits, expected)


def test_gradient_does_not_depend_on_how_a_step_is_cut_into_batches(rows):
    config, student = tiny_student("teacher=dense")
    shake(student)
    objective = assemble.objective_of(config, student)
    collate = assemble.collator_of(student)
    samples = [rows[i] for i in range(8)]
    count = sum(int((collate([s])["labels"] != -100).sum()) for s in samples)
    results = []
    for size in (8, 4, 2):
        student.model.zero_grad()
        for i in range(0, 8, size):
            objective(student.model, collate(samples[i : i + size]), count=count)[0].backward()
        results.append(gradients(student))
    assert results[0].keys() == {n for n, p in student.model.named_parameters() if p.requires_grad}
    for other in results[1:]:
        worst = max(((other[n] - g).abs().max() / g.abs().max()).item() for n, g in results[0].items())
        assert worst < 2e-3  # float32 noise of a steep random network; a wrong divisor gives 1 and more


def test_sharing_image_features_changes_nothing(rows):
    config, student = tiny_student("teacher=dense")
    shake(student)
    batch = batch_of(student, rows, range(4))
    objective = assemble.objective_of(config, student)
    assert objective.share_images
    shared, _ = objective(student.model, batch, count=8)
    objective.share_images = False
    apart, _ = objective(student.model, batch, count=8)
    assert torch.equal(shared, apart)


def test_entry_adapter_and_projector_learn_where_vision_enters_late(rows):
    config, student = tiny_student("teacher=none", "lora.train_projector=true")
    batch = batch_of(student, rows, range(4))
    assemble.objective_of(config, student)(student.model, batch, count=8)[0].backward()
    grads = gradients(student)
    for part in (
        "vision_entry.modules_to_save.default.scale",
        "vision_entry.modules_to_save.default.up.weight",
    ):
        assert any(n.endswith(part) and g.abs().max() > 0 for n, g in grads.items()), part
    assert any("multi_modal_projector" in n and g.abs().max() > 0 for n, g in grads.items())
    assert not any("vision_tower" in n for n in grads)


@pytest.mark.parametrize("projector", ["true", "false"])
def test_a_batch_of_text_alone_still_gives_every_weight_a_gradient(projector):
    config, student = tiny_student("model.visipruner.boundary=1", f"lora.train_projector={projector}")
    content = [{"type": "text", "text": "how many?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "2"}]}
    batch = assemble.collator_of(student)(
        [{"messages": [{"role": "user", "content": content}, answer], "images": []}]
    )
    assemble.objective_of(config, student)(student.model, batch, count=2)[0].backward()
    missing = [n for n, p in student.model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []  # DDP and ZeRO wait for each of them


def test_a_batch_of_text_alone_runs_in_bfloat16_where_the_projector_trains():
    """As on hardware with bfloat16: frozen weights in it, those that train in float32, autocast around the forward."""
    config, student = tiny_student("teacher=none", "lora.train_projector=true")
    for weight in student.model.parameters():
        weight.data = weight.data if weight.requires_grad else weight.data.bfloat16()
    content = [{"type": "text", "text": "how many?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "2"}]}
    batch = assemble.collator_of(student)(
        [{"messages": [{"role": "user", "content": content}, answer], "images": []}]
    )
    forward = torch.autocast("cpu", torch.bfloat16)(student.model)
    loss, _ = assemble.objective_of(config, student)(forward, batch, count=2)
    loss.backward()
    grads = [p.grad for n, p in student.model.named_parameters() if "projector" in n and p.requires_grad]
    assert loss.isfinite() and all(grad is not None and not grad.any() for grad in grads) and grads


def test_no_teacher_and_no_weight_mean_no_second_forward():
    config, student = tiny_student("teacher=none")
    assert assemble.objective_of(config, student).kl.policy is None
    config.kl.weight, config.teacher = 0.0, type(config.teacher).dense
    assert assemble.objective_of(config, student).kl.policy is None
    config.kl.weight = 1.0
    assert assemble.objective_of(config, student).kl.policy == VisionSchedule()
