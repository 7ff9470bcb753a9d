"""Saved, loaded, merged, loaded, saved and loaded again: the same logits, in every family and variant of LoRA."""

import pytest
import torch
from helpers.families import build, prompt
from helpers.tiny_base import shake
from transformers import ProcessorMixin

from latefusion.models import base_model as base
from latefusion.models.attach import attached
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import build_student
from latefusion.models.student.entry import entry_of
from latefusion.models.student.save import load, merge, save_student

PLAIN, RS, DORA = {}, {"rslora": True}, {"dora": True}
SCHEDULE = VisionSchedule(enter=2, exit=5, keep={4: 2})
PROJECTOR = {"internvl": "multi_modal_projector", "smolvlm": "connector"}


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False).logits


class StandIn(ProcessorMixin):
    """These models are given token ids and pixels."""

    def __init__(self):
        pass

    def save_pretrained(self, folder):
        pass


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llava", DORA),
        pytest.param("llava_next", RS, marks=pytest.mark.slow),
        pytest.param("llava_onevision", PLAIN, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", DORA, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", RS, marks=pytest.mark.slow),
        pytest.param("internvl", PLAIN, marks=pytest.mark.slow),
        ("smolvlm", DORA),
        ("gemma3", RS),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value), "lora"),
)
def test_a_student_keeps_its_logits_through_every_form(family, variant, tmp_path, monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(base.AutoProcessor, "from_pretrained", lambda path, **settings: stand_in)
    build(family).save_pretrained(tmp_path / "base")
    student = build_student(
        base.load_base(str(tmp_path / "base"), dtype=torch.float32)[0],
        stand_in,
        base=str(tmp_path / "base"),
        schedule=SCHEDULE,
        rank=2,
        alpha=4,
        dropout=0.0,
        layers=[2, 3, 4],
        entry_rank=2,
        train=[PROJECTOR[family]] if family in PROJECTOR else [],
        **variant,
    )
    inputs = prompt(family, ["tt I ttt", "t I t I tt"], side="right")
    untrained = logits(student.model, dict(inputs))
    shake(student, 0.1)

    def fresh():
        return prompt(family, ["tt I ttt", "t I t I tt"], side="right")

    expected = logits(student.model, fresh())
    real = fresh()["attention_mask"].bool()
    assert (expected - untrained)[real].abs().max() > 1e-2
    save_student(student, tmp_path / "adapter")
    loaded, _ = load(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(logits(loaded, fresh()), expected)
    merge(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    folder = tmp_path / "merged"
    for again in ("again", "and again"):
        model, _ = load(folder, dtype=torch.float32)
        assert attached(model).policy == SCHEDULE and entry_of(model) is not None
        torch.testing.assert_close(logits(model, fresh())[real], expected[real], rtol=1e-4, atol=1e-4)
        folder = tmp_path / again
        model.save_pretrained(folder)  # stock saving, entry adapter among the weights
