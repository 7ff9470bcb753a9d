"""A trained student answers in vLLM as in `latefusion.load`: text and images go through vLLM's own processor."""

import json
import random

import pytest
import torch
from helpers.served_bases import SIDE, Base
from helpers.served_models import TOP, Answer, engine, save_student, worst_difference
from PIL import Image, ImageDraw

import latefusion.__main__
from latefusion.data.scene_questions import COLORS
from latefusion.models.attach import attach
from latefusion.models.base_model import load_base
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Lora, build_student
from latefusion.models.student.restore import load
from latefusion.models.student.save import save_student as save_student_folder
from latefusion.serving.plugin import MODELS

STEPS, BATCH, QUESTIONS = 30, 8, 48
ANSWER = 2  # tokens: the color, and the end
SCHEDULE = VisionSchedule(cross=[2, 4, 6, 8])


def drawn(rng):
    """A square in one of the colours, and the colour's name."""
    color = rng.choice(list(COLORS))
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    side, x, y = rng.randint(16, 30), rng.randint(2, 60), rng.randint(2, 60)
    ImageDraw.Draw(picture).rectangle((x, y, x + side, y + side), fill=COLORS[color])
    return picture, color


def asked(processor, color=None):
    """A conversation as text; with its answer for training."""
    content = [{"type": "image"}, {"type": "text", "text": "what color is the square?"}]
    turns = [{"role": "user", "content": content}]
    if color is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": color}]})
    return processor.apply_chat_template(turns, add_generation_prompt=color is None)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The folder of the embedded base, its decoder trained under frozen vision tokens."""
    torch.manual_seed(0)
    model, processor = load_base("embedded", dtype=torch.float32)
    model.requires_grad_(False)
    model.get_decoder().requires_grad_(True)
    optimizer, rng = torch.optim.AdamW(model.get_decoder().parameters(), lr=1e-3), random.Random(0)
    with attach(model, SCHEDULE):
        for _ in range(STEPS):
            rows = [drawn(rng) for _ in range(BATCH)]
            texts = [asked(processor, color) for _, color in rows]
            inputs = processor(text=texts, images=[picture for picture, _ in rows], return_tensors="pt")
            labels = torch.full_like(inputs["input_ids"], -100)
            labels[:, -ANSWER:] = inputs["input_ids"][:, -ANSWER:]
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    folder = tmp_path_factory.mktemp("student")
    return save_student(folder, SCHEDULE, Base(model, processor, 3, lambda image: 144, (6, 99)))


def test_a_student_of_adapters_is_exported_beside_vllm(tmp_path, monkeypatch):
    """`latefusion export` as `latefusion[vllm]` installs it: the merged student answers as its adapters do."""
    torch.manual_seed(0)
    model, processor = load_base("embedded", dtype=torch.float32)
    student = build_student(
        model, processor, base="embedded", schedule=SCHEDULE, lora=Lora(rank=4, alpha=8), entry_rank=4
    )
    with torch.no_grad():
        for weight in student.model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    save_student_folder(student, tmp_path / "student")
    words = [
        f"checkpoint={tmp_path / 'student'}",
        f"output={tmp_path / 'served'}",
        "merge=true",
        "dtype=float32",
    ]
    monkeypatch.setattr("sys.argv", ["latefusion", "export", *words])
    latefusion.__main__.main()
    inputs = processor(text=asked(processor), images=drawn(random.Random(3))[0], return_tensors="pt")
    logits = []
    for folder in ("student", "served"):
        loaded, _ = load(tmp_path / folder, dtype=torch.float32)
        with torch.no_grad():
            logits.append(loaded(**inputs).logits[:, -1])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "served" / "config.json").read_text())["architectures"] == [MODELS[0]]


def test_a_trained_student_answers_as_in_the_executor(student, note):
    from vllm import SamplingParams

    rng = random.Random(1)
    rows = [drawn(rng) for _ in range(QUESTIONS)]
    model, processor = load(student, dtype=torch.float32)
    text, expected, logprobs = asked(processor), [], []
    for picture, _ in rows:
        inputs = processor(text=text, images=picture, return_tensors="pt")
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        expected.append(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        logprobs.append([torch.log_softmax(logits[0], -1).tolist() for logits in out.logits])
    colors = [color for _, color in rows]
    right = [
        processor.decode(ids, skip_special_tokens=True).strip() == color
        for ids, color in zip(expected, colors, strict=True)
    ]
    print(f"{sum(right)} of {QUESTIONS} right")
    assert sum(right) > 0.8 * QUESTIONS
    with engine(student) as llm:
        prompts = [{"prompt": text, "multi_modal_data": {"image": picture}} for picture, _ in rows]
        parameters = SamplingParams(temperature=0, max_tokens=6, logprobs=TOP)
        outputs = [output.outputs[0] for output in llm.generate(prompts, parameters, use_tqdm=False)]
    assert [list(output.token_ids) for output in outputs] == expected
    assert sum(o.text.strip() == color for o, color in zip(outputs, colors, strict=True)) == sum(right)
    served = [
        Answer(list(o.token_ids), [{t: v.logprob for t, v in step.items()} for step in o.logprobs])
        for o in outputs
    ]
    reference = [Answer(ids, steps) for ids, steps in zip(expected, logprobs, strict=True)]
    note(worst_difference(served, reference))
    assert worst_difference(served, reference) < 2e-4
