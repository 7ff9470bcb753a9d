"""Multiple choice: MMBench (circular), ScienceQA-IMG and SEED-Image.

An answer is read by rule alone: its letter, or, in MMBench, the one choice whose text it repeats. MMBench's published
pipeline asks a chat model where rules fail; here such an answer is wrong, as it is for SEED-Image and ScienceQA-IMG in
LLaVA's evaluation. MMBench is circular (Liu et al. 2023): a question is asked once for each rotation of its choices and
counts as right if all of them are; the vanilla figure counts the first rotation alone.
"""

from __future__ import annotations

import base64
import csv
import re
import sys
from collections import defaultdict
from dataclasses import replace
from typing import Any

from latefusion.data.question_file import rows_of
from latefusion.eval.metrics import Measure
from latefusion.eval.tasks.base import LETTER, Answer, Files, Task, mapped

LETTERS = "ABCDEFGH"
CIRCULAR = "circular accuracy"
ROTATION = 1_000_000  # MMBench numbers rotation r of question i as i + r * ROTATION
SEED_KINDS = dict(
    enumerate(
        (
            "Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location",
            "Instances Counting", "Spatial Relation", "Instance Interaction", "Visual Reasoning",
            "Text Understanding",
        ),
        1,
    )
)  # fmt: skip
LETTER_ALONE = re.compile(r"^\(?([A-Z])(?:[.,:)]|\)\.)?$")


def read_letter(answer: str, choices: list[str]) -> str:
    """The chosen letter, or an empty string: a letter alone among the words, else the only choice repeated in full.

    A lone "A" in a sentence of more than three words may be an article and is not taken for a choice.
    """
    words = answer.strip().split()
    there = LETTERS[: len(choices)]
    matched = [match[1] for word in words if (match := LETTER_ALONE.match(word)) and match[1] in there]
    letters = set(matched)
    if len(letters) == 1 and not ("A" in words and len(words) > 3):
        return matched[0]
    repeated = [letter for letter, text in zip(there, choices, strict=True) if text.lower() in answer.lower()]
    return repeated[0] if not letters and len(repeated) == 1 else ""


def mmbench_score(prediction: str, row: dict[str, Any]) -> float:
    return float(read_letter(prediction, row["choices"]) == row["answer"])


def first_letter_score(prediction: str, row: dict[str, Any]) -> float:
    """SEED: the first letter of the answer."""
    return float(prediction.strip()[:1].upper() == row["answer"])


def scienceqa_score(prediction: str, row: dict[str, Any]) -> float:
    """LLaVA's reading of ScienceQA: the letter alone, or followed by a full stop at the start."""
    text = prediction.strip()
    if text.upper() in LETTERS and len(text) == 1:
        return float(text.upper() == row["answer"])
    return float(len(text) > 1 and text[0].isupper() and text[1] == "." and text[0] == row["answer"])


def circular(answers: list[Answer]) -> list[Answer]:
    """One answer a question: its first rotation, right only if all rotations are."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.scene].append(answer)
    return [replace(group[0], score=min(a.score for a in group)) for group in groups.values()]


def vanilla(answers: list[Answer]) -> dict[str, Measure]:
    """Accuracy on the questions as they are first asked."""
    first = [float(answer.id.endswith("-0")) for answer in answers]
    right = [answer.score * one for answer, one in zip(answers, first, strict=True)]
    return {"vanilla accuracy": Measure(terms=[(right, first)])}


def mmbench(where: str, split: str) -> Task:
    part = {"validation": "dev"}.get(split, split)
    names = [
        f"MMBench_{part.upper()}_EN.tsv",
        f"MMBench_{part.upper()}_EN_V11.tsv",
        f"mmbench_{part}_en_20231003.tsv",
        f"mmbench_{part}_20230712.tsv",
    ]
    files = Files(
        task="mmbench",
        where=where,
        needs=["|".join(names)],
        come_from="https://github.com/open-compass/MMBench",
        hub="lmms-lab/MMBench_EN",
    )
    files.check()
    if files.local:
        csv.field_size_limit(sys.maxsize)  # an image is a field
        with files.path(files.needs[0]).open(encoding="utf-8-sig", newline="") as lines:
            table = list(csv.DictReader(lines, delimiter="\t"))
        pictures = {row["index"]: row["image"] for row in table}
        questions = []
        for row in _rotated(table):
            image = row["image"]
            while len(image) < 64:  # a rotation may name the row that has its picture
                image = pictures[image]
            questions.append({**_mmbench_question(row), "images": [base64.b64decode(image)]})
        rows = rows_of(questions)
    else:
        hub = files.hub_rows(part)
        rotated = _rotated([{**row, "at": i} for i, row in enumerate(hub.remove_columns(["image"]))])
        pictured = hub.select_columns(["image"]).select([row["at"] for row in rotated])
        rows = mapped(
            pictured.add_column("index", [r["index"] for r in rotated]),
            lambda r: _mmbench_question(rotated[r["row"]]),
        )
    return Task(
        name="mmbench",
        rows=rows,
        metric=CIRCULAR,
        score=mmbench_score,
        units=circular,
        measures=vanilla,
        max_new_tokens=16,
        split=part,
        source=files.where,
    )


def scienceqa(where: str, split: str) -> Task:
    files = Files(
        task="scienceqa_img",
        where=where,
        needs=("problems.json", "pid_splits.json", f"images/{split}|{split}"),
        come_from="https://github.com/lupantech/ScienceQA",
        hub="derek-thomas/ScienceQA",
    )
    files.check()

    def question(name: str, row: dict[str, Any]) -> dict[str, Any]:
        hint = f"Context: {row['hint']}\n" if row["hint"] else ""
        return {
            **_choices(name, row["question"], list(row["choices"]), LETTERS[row["answer"]], hint),
            "type": row["subject"],
            "scene": name,
        }

    if files.local:
        problems = files.json("problems.json")
        folder = files.path(files.needs[2])
        rows = rows_of(
            [
                {**question(name, problems[name]), "images": [folder / name / problems[name]["image"]]}
                for name in files.json("pid_splits.json")[split]
                if problems[name]["image"]
            ]
        )
    else:
        with_image = files.hub_rows(split).filter(lambda image: image is not None, input_columns="image")
        rows = mapped(with_image, lambda r: question(str(r["row"]), r))
    return Task(
        name="scienceqa_img",
        rows=rows,
        metric="accuracy",
        score=scienceqa_score,
        max_new_tokens=16,
        split=split,
        source=files.where,
    )


def seed_image(where: str, split: str) -> Task:
    files = Files(
        task="seed_image",
        where=where,
        needs=("SEED-Bench.json", "SEED-Bench-image"),
        come_from="https://huggingface.co/datasets/AILab-CVC/SEED-Bench",
        hub="lmms-lab/SEED-Bench",
    )
    files.check()

    def question(row: dict[str, Any]) -> dict[str, Any]:
        choices = [row[f"choice_{letter}"] for letter in "abcd"]
        kind = row["question_type_id"]
        return {
            **_choices(str(row["question_id"]), row["question"], choices, row["answer"]),
            "type": SEED_KINDS.get(kind, f"type {kind}"),
            "scene": str(row["data_id"]),
        }

    if files.local:
        content = files.json("SEED-Bench.json")
        folder = files.path("SEED-Bench-image")
        rows = rows_of(
            [
                {**question(r), "images": [folder / str(r["data_id"])]}
                for r in content["questions"]
                if r["data_type"] == "image"
            ]
        )
    else:
        still = files.hub_rows("test").filter(lambda kind: kind == "image", input_columns="data_type")
        rows = mapped(still, question)
    return Task(
        name="seed_image",
        rows=rows,
        metric="accuracy",
        score=first_letter_score,
        max_new_tokens=16,
        split="image questions",
        source=files.where,
    )


def _rotated(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with every rotation of every question; files that hold them already stay as they are."""
    if any(int(row["index"]) >= ROTATION for row in table):
        return table
    rotations = []
    for row in table:
        choices = _texts(row)
        right = LETTERS.index(row["answer"])
        for turn in range(len(choices)):
            turned = choices[-turn:] + choices[:-turn] if turn else choices
            moved = LETTERS[(right + turn) % len(choices)]
            named = dict(zip(LETTERS, turned, strict=False))
            rotations.append({**row, **named, "answer": moved, "index": int(row["index"]) + turn * ROTATION})
    return rotations


def _texts(row: dict[str, Any]) -> list[str]:
    """The choices that a row has; tables write absent ones as nothing or `nan`."""
    return [str(row[k]) for k in "ABCD" if str(row.get(k) or "nan").lower() != "nan"]


def _mmbench_question(row: dict[str, Any]) -> dict[str, Any]:
    turn, number = divmod(int(row["index"]), ROTATION)
    hint = str(row.get("hint") or "nan")
    context = "" if hint.lower() == "nan" else f"{hint}\n"
    return {
        **_choices(f"{number}-{turn}", row["question"], _texts(row), row["answer"], context),
        "type": str(row.get("l2-category") or row.get("category") or "all"),
        "scene": str(number),
    }


def _choices(name: str, question: str, choices: list[str], answer: str, context: str = "") -> dict[str, Any]:
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))
    return {
        "id": name,
        "question": question,
        "prompt": f"{context}{question}\n{listed}{LETTER}",
        "answer": answer,
        "choices": choices,
    }
