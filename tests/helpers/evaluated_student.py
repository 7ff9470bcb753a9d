"""A tiny random student and one evaluation of it, shared by the tests of evaluation and report."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from latefusion.data.scenes import load_scenes
from latefusion.eval.comparison.run import run_comparison
from latefusion.eval.comparison.settings import Settings
from latefusion.eval.comparison.systems import System
from latefusion.eval.tasks.base import Task
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Lora, Student, build_student
from latefusion.training.embedded.architecture import build_config
from latefusion.training.embedded.vocabulary import PAD, VOCABULARY, build_processor

LAYERS, WIDTH, HEADS, MLP, VISION = 4, 32, 2, 48, 16
KEEP = VisionSchedule(keep={2: 3})
LATE = VisionSchedule(enter=1, exit=3, keep={2: 5})
SYSTEMS = {
    "dense": System(name="Dense base", policy=VisionSchedule()),
    "pruned": System(name="Keep three", policy=KEEP),
    "student": System(name="Late fusion", policy=LATE, adapters=True),
}


def tiny_model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = build_config(
        patch_size=24, tower_width=32, tower_layers=1, width=WIDTH, layers=LAYERS, heads=HEADS, mlp=MLP
    )
    config.text_config.initializer_range = 0.3
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = list(range(0, len(VOCABULARY), 3))  # so that answers end somewhere
    model.generation_config.pad_token_id = PAD
    return model


@cache
def processor() -> Any:
    return build_processor(patch_size=24)


@cache
def student() -> Student:
    """A student whose LoRA, entry adapter and projector change the answers."""
    built = build_student(
        tiny_model(),
        processor(),
        base="tiny",
        schedule=LATE,
        lora=Lora(rank=2, alpha=4),
        entry_rank=2,
        train=["multi_modal_projector"],
    )
    with torch.no_grad():
        for name, parameter in built.model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.5)
    return built


def naive_answer(model: Any, row: dict[str, Any]) -> tuple[str, int]:
    """One stock `generate` on one prompt without padding: its text, and the number of text tokens."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]
    prompt = processor().apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor()(text=[prompt], images=[row["image"]], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    n_text = int((inputs["input_ids"] != model.config.image_token_id).sum())
    return processor().decode(output, skip_special_tokens=True).strip(), n_text


def naive_with(policy: Any, row: dict[str, Any]) -> tuple[str, int]:
    with student().attachment.using(policy):
        return naive_answer(student().model, row)


@cache
def naive() -> dict[str, list[tuple[str, int]]]:
    """What each system answers to each question, asked one by one."""
    rows, answers = load_scenes("test", 2), {}
    with student().model.disable_adapter():
        answers["dense"] = [naive_with(VisionSchedule(), row) for row in rows]
        answers["pruned"] = [naive_with(KEEP, row) for row in rows]
    answers["student"] = [naive_with(LATE, row) for row in rows]
    return answers


@cache
def questions() -> Any:
    """The scenes, with what the dense model says as the answer to every other question."""
    rows, filler = load_scenes("test", 2), "no no no no no"  # five tokens: evaluation leaves room for six
    dense = [text for text, _ in naive()["dense"]]
    answers = [text if i % 2 == 0 and len(text.split()) < 5 else filler for i, text in enumerate(dense)]
    return rows.remove_columns("answer").add_column("answer", answers)


def task(rows: Any = None, **more: Any) -> Task:
    return Task(**{"name": "scenes", "rows": questions() if rows is None else rows, "split": "test", **more})


def settings(folder: Path, **changes: Any) -> Settings:
    """One evaluation with few prompts to measure."""
    values: dict[str, Any] = {
        "model": student().model,
        "processor": processor(),
        "attachment": student().attachment,
        "systems": SYSTEMS,
        "tasks": [task()],
        "output": folder,
        "title": "tiny",
        "batch_size": 10,
        "latency_prompts": 2,
        "latency_repeats": 1,
    }
    return Settings(**values | changes)


def evaluate(folder: Path, **changes: Any) -> dict[str, Any] | None:
    """The report of one evaluation with few prompts to measure."""
    return run_comparison(settings(folder, **changes))


@cache
def full_run() -> tuple[Path, dict[str, Any]]:
    """An evaluation with everything: controls, sweeps, two rounds of latency."""
    folder = Path(tempfile.mkdtemp(prefix="evaluation-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    results = evaluate(
        folder,
        checkpoint="outputs/tiny",
        latency_repeats=2,
        controls=True,
        batches=[1, 3],
        lengths=[8, 40],
    )
    assert results is not None
    return folder, results
