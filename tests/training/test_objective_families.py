"""The objective on every supported family: the loss of all logits, and a gradient for every adapter."""

import pytest
import torch
import torch.nn.functional as F
from helpers.families import FAMILIES, build, prompt, text_tokens

from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Lora, build_student
from latefusion.training.objective import IGNORE, Distillation, Objective


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family):
    inputs = prompt(family, ["tt I tttt", "ttttt", "t I t I tttt"], side="right")
    text = text_tokens(inputs)
    last = text.int().cumsum(1).argmax(1)  # the last text token of each row
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    for row, at in enumerate(last.tolist()):
        labels[row, at - 1 : at + 1] = inputs["input_ids"][row, at - 1 : at + 1]
    queries = (last - 2)[:, None]
    schedule = VisionSchedule(enter=2, exit=5, keep={4: 2})
    options = {"lora": Lora(rank=2, alpha=2), "entry_rank": 2}
    student = build_student(build(family), None, base=family, schedule=schedule, **options)
    objective = Objective(
        model=student.model,
        attachment=student.attachment,
        kl=Distillation(policy=VisiPruner(boundary=1)),
        share_images=True,
    )
    loss, terms = objective(student.model, {**inputs, "labels": labels, "queries": queries}, count=6)
    loss.backward()
    missing = [n for n, p in student.model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == [] and terms["tokens"] == 6

    with torch.no_grad(), student.attachment.queries(queries, labels != IGNORE):
        logits = student.model(**prompt(family, ["tt I tttt", "ttttt", "t I t I tttt"], side="right")).logits
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    assert terms["ce"].item() == pytest.approx(ce.item(), rel=1e-4)
