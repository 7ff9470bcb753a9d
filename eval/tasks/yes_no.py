"""Questions answered yes or no: POPE (does the model see what is not there?) and MME (fourteen abilities).

POPE (Li et al. 2023) parses an answer's first sentence: "No", "not" or "no" among its words is a no, anything else a
yes. MME (Fu et al. 2023) reads the first four letters; neither yes nor no in them counts as wrong. MME asks two
questions an image; a subtask scores its accuracy plus `accuracy+`, the share of images with both right, each of 100.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from latefusion.data.question_file import rows_of
from latefusion.eval.metrics import Measure
from latefusion.eval.tasks.base import SHORT, Answer, Files, Task, mapped

POPE_SPLITS = ("random", "popular", "adversarial")
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope_parse(answer: str) -> str:
    """`yes` or `no`, as POPE's own evaluation reads an answer."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_parse(answer: str) -> str:
    """`yes`, `no` or `other`, as MME's own evaluation reads an answer."""
    text = answer.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text]
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def pope_score(prediction: str, row: dict[str, Any]) -> float:
    return float(pope_parse(prediction.strip()) == row["answer"])


def mme_score(prediction: str, row: dict[str, Any]) -> float:
    return float(mme_parse(prediction) == row["answer"])


def pope_measures(answers: list[Answer]) -> dict[str, Measure]:
    """Accuracy, precision, recall, F1 (of "yes") and the share of yes, for each split and over all."""
    measures: dict[str, Measure] = {}
    for name in ("all", *POPE_SPLITS):
        inside = [name in ("all", a.type) for a in answers]
        yes = [pope_parse(a.prediction) == "yes" for a in answers]
        true = [a.answer == "yes" for a in answers]
        rows = list(zip(inside, yes, true, strict=True))
        hit = [float(i and y and t) for i, y, t in rows]
        answered_yes = [float(i and y) for i, y, _ in rows]
        is_yes = [float(i and t) for i, _, t in rows]
        right = [float(i and y == t) for i, y, t in rows]
        if any(inside):
            of = "" if name == "all" else f", {name}"
            both = [s + t for s, t in zip(answered_yes, is_yes, strict=True)]
            measures |= {
                f"accuracy{of}": Measure(terms=[(right, [float(i) for i in inside])]),
                f"precision{of}": Measure(terms=[(hit, answered_yes)]),
                f"recall{of}": Measure(terms=[(hit, is_yes)]),
                f"F1{of}": Measure(terms=[(hit, both)], scale=200),
                f"yes ratio{of}": Measure(terms=[(answered_yes, [float(i) for i in inside])]),
            }
    return measures


def mme_measures(answers: list[Answer]) -> dict[str, Measure]:
    """MME's two scores, perception (of 2000) and cognition (of 800), and each subtask's (of 200)."""
    pairs: dict[str, list[int]] = defaultdict(list)
    for i, answer in enumerate(answers):
        pairs[answer.scene].append(i)
    terms = {}
    for name in (*PERCEPTION, *COGNITION):
        inside = [float(a.type == name) for a in answers]
        right = [a.score * i for a, i in zip(answers, inside, strict=True)]
        images, both = [0.0] * len(answers), [0.0] * len(answers)
        for rows in pairs.values():  # an image counts at its first question
            images[rows[0]] = inside[rows[0]]
            both[rows[0]] = inside[rows[0]] * float(all(answers[i].score for i in rows))
        if any(inside):
            terms[name] = [(right, inside), (both, images)]
    scores = {}
    for title, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        parts = [part for name in names for part in terms.get(name, [])]
        if parts:
            scores[title] = Measure(terms=parts, most=100 * len(parts))
    return scores | {name: Measure(terms=parts, most=200) for name, parts in terms.items()}


def pope(where: str, split: str) -> Task:
    files = Files(
        task="pope",
        where=where,
        needs=(*(f"coco_pope_{name}.json" for name in POPE_SPLITS), "val2014"),
        come_from="https://github.com/AoiDragon/POPE/tree/main/output/coco and https://cocodataset.org/#download",
        hub="lmms-lab/POPE",
    )
    files.check()

    def question(name: str, text: str, answer: str, kind: str, image: str) -> dict[str, Any]:
        return {
            "id": f"{kind}-{name}",
            "question": text,
            "prompt": text + SHORT,
            "answer": answer.strip().lower(),
            "type": kind,
            "scene": image,
        }

    if files.local:
        folder = files.path("val2014")
        rows = rows_of(
            [
                {
                    **question(str(r["question_id"]), r["text"], r["label"], kind, r["image"]),
                    "images": [folder / r["image"]],
                }
                for kind in POPE_SPLITS
                for r in files.lines(f"coco_pope_{kind}.json")
            ]
        )
    else:
        rows = mapped(
            files.hub_rows("test"),
            lambda r: question(
                str(r["question_id"]), r["question"], r["answer"], r["category"], r["image_source"]
            ),
        )
    return Task(
        name="pope",
        rows=rows,
        metric="accuracy",
        score=pope_score,
        measures=pope_measures,
        max_new_tokens=16,
        split="three splits",
        source=files.where,
    )


def mme(where: str, split: str) -> Task:
    files = Files(
        task="mme",
        where=where,
        needs=(*PERCEPTION, *COGNITION),
        come_from="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
        hub="lmms-lab/MME",
    )
    files.check()
    if files.local:
        rows = rows_of([q for kind in files.needs for q in _mme_folder(files.path(kind), kind)])
    else:
        rows = mapped(
            files.hub_rows("test"),
            lambda r: _mme_question(
                r["category"], f"{r['question_id']}", r["row"], r["question"], r["answer"]
            ),
        )
    return Task(
        name="mme",
        rows=rows,
        metric="accuracy",
        score=mme_score,
        measures=mme_measures,
        max_new_tokens=16,
        split="test",
        source=files.where,
    )


def _mme_folder(folder: Path, kind: str) -> list[dict[str, Any]]:
    """A subtask: `NAME.txt` of two lines `question TAB answer` beside its image, or in folders of their own."""
    texts, images = folder, folder
    if (folder / "questions_answers_YN").is_dir():
        texts, images = folder / "questions_answers_YN", folder / "images"
    ask = partial(_mme_question, kind)
    rows = []
    for text in sorted(texts.glob("*.txt")):
        image = next(
            path for end in (".jpg", ".png", ".jpeg") if (path := images / f"{text.stem}{end}").is_file()
        )
        for i, line in enumerate(text.read_text("utf-8-sig").strip().split("\n")):
            question, _, answer = line.partition("\t")
            rows.append({**ask(f"{kind}/{image.name}", i, question, answer), "images": [image]})
    return rows


def _mme_question(kind: str, image: str, number: int, question: str, answer: str) -> dict[str, Any]:
    text = question.replace(" Please answer yes or no.", "").strip()
    return {
        "id": f"{image}-{number}",
        "question": text,
        "prompt": text + SHORT,
        "answer": answer.strip().lower(),
        "type": kind,
        "scene": image,
    }
