"""What the trained base can do, measured on test, and the files that are shipped: weights, processor,
record and card.
"""

from __future__ import annotations

import json
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from latefusion.data.scene_questions import TYPES
from latefusion.data.scenes import N_SCENES, make_scene, render
from latefusion.training.embedded.architecture import build_model
from latefusion.training.embedded.batches import Packed, draw, pack
from latefusion.training.embedded.card import model_card
from latefusion.training.embedded.pseudo_vision import SIDE
from latefusion.training.embedded.stages import STAGES, Learner
from latefusion.training.embedded.vocabulary import build_processor
from latefusion.training.outcomes import Outcomes, pooled, summary

DATA_SEEDS = (0, 1, 2)
GENERATED_SCENES = 25  # of validation, whose questions are also asked one by one through `generate`
TABLE_SCENES = 5000  # of train, for the table of most frequent answers


def score(logits: Tensor, packed: Packed) -> Iterable[tuple[str, bool]]:
    """(question type, whether greedy decoding gives the answer): every token must be the likeliest given
    those before.
    """
    right = logits.argmax(-1) == packed.labels
    for row, spans in enumerate(packed.spans):
        for kind, start, stop in spans:
            yield kind, bool(right[row, start:stop].all())


@torch.no_grad()
def answer_scenes(
    forward: Callable[[list, Packed], tuple[Tensor, Tensor]],
    *,
    split: str,
    seed: int,
    n_scenes: int,
    batch_size: int = 20,
) -> Outcomes:
    """Outcomes by question type on the first `n_scenes` scenes of a split."""
    outcomes: Outcomes = defaultdict(list)
    for start in track(range(0, n_scenes, batch_size), description=f"{split}, seed {seed}"):
        indices = range(start, min(n_scenes, start + batch_size))
        drawn = draw(seed, indices, split=split, more_counting=False)
        packed = pack(drawn, vision_tokens=SIDE**2)
        for kind, right in score(forward(drawn, packed)[0], packed):
            outcomes[kind].append(right)
    return outcomes


def table_answers(seed: int) -> Outcomes:
    """Test outcomes of a table that knows only the questions: each one's most frequent answer in train."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(TABLE_SCENES):
        for question in make_scene("train", index)[1]:
            seen[question.question][question.answer] += 1
    outcomes: Outcomes = defaultdict(list)
    for index in range(N_SCENES["test"]):
        for question in make_scene("test", index, seed=seed)[1]:
            answers = seen[question.question].most_common(1)
            outcomes[question.type].append(bool(answers) and answers[0][0] == question.answer)
    return outcomes


@torch.no_grad()
def compare_with_generate(learner: Learner, folder: Path) -> dict[str, float]:
    """The saved model on single questions, through its processor and `generate`, against the packed
    outcomes.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(folder)
    agree: list[bool] = []
    right: list[bool] = []
    for index in track(range(GENERATED_SCENES), description="generate"):
        scene, questions = make_scene("validation", index)
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.question}]}]
            for q in questions
        ]
        inputs = processor(
            text=processor.apply_chat_template(turns, add_generation_prompt=True),
            images=[render(scene)] * len(questions),
            padding=True,
            return_tensors="pt",
        ).to(torch.bfloat16)
        tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(tokens, skip_special_tokens=True)
        drawn = [(scene, questions)]
        packed = pack(drawn, vision_tokens=SIDE**2)
        outcomes = [outcome for _, outcome in score(learner.see(drawn, packed)[0], packed)]
        generated = [a == q.answer for a, q in zip(answers, questions, strict=True)]
        right += generated
        agree += [a == b for a, b in zip(generated, outcomes, strict=True)]
    return {
        "questions": len(agree),
        "accuracy": round(100 * sum(right) / len(right), 2),
        "agreement_with_packed": round(100 * sum(agree) / len(agree), 2),
    }


def save_base(learner: Learner, folder: Path) -> None:
    """Weights (bfloat16, tied embeddings once) and processor, as `from_pretrained` reads them."""
    model = build_model(learner.model.config).bfloat16()
    model.load_state_dict(learner.model.state_dict())
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def write_record(
    learner: Learner, blind: Learner, *, cpu_seconds: dict[str, float], folder: Path
) -> dict[str, Any]:
    """Measure base and blind control on test, three data seeds, and write everything that ships to
    `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_base(learner, folder)
    forwards = {"base": learner.see, "blind": lambda drawn, packed: blind.decode(None, None, packed)}
    outcomes = {
        name: [answer_scenes(f, split="test", seed=s, n_scenes=N_SCENES["test"]) for s in DATA_SEEDS]
        for name, f in forwards.items()
    }
    outcomes["table"] = [table_answers(seed) for seed in DATA_SEEDS]
    record = {
        "stages": {
            name: {**asdict(stage), "cpu_seconds": round(cpu_seconds[name])} for name, stage in STAGES.items()
        },
        "test": {
            name: {
                "by_seed": {
                    str(s): summary(o, TYPES, digits=2) for s, o in zip(DATA_SEEDS, by_seed, strict=True)
                },
                "pooled": summary(pooled(by_seed), TYPES, digits=2),
            }
            for name, by_seed in outcomes.items()
        },
        "test_scenes": N_SCENES["test"],
        "generate": compare_with_generate(learner, folder),
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow", "numpy")},
        },
        "threads": torch.get_num_threads(),
    }
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(model_card(record))
    return record
