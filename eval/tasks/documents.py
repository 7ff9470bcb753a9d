"""Charts and documents: ChartQA's relaxed accuracy and DocVQA's ANLS.

Relaxed accuracy (Masry et al. 2022, after Methani et al. 2020): a number may be 5% off, `12%` is 0.12, anything else
has to match but for case. ANLS (Biten et al. 2019): one minus the edit distance over the longer length, to the nearest
of the right answers, case and repeated spaces apart; below one half it is 0.
"""

from __future__ import annotations

from typing import Any

from latefusion.data.question_file import rows_of
from latefusion.eval.metrics import Measure
from latefusion.eval.tasks.base import SHORT, Answer, Files, Task, mapped, read_config

TOLERANCE, LEAST = 0.05, 0.5


def relaxed(prediction: str, row: dict[str, Any]) -> float:
    text, right = prediction.strip(), row["answer"].strip()
    number, target = _number(text), _number(right)
    if number is not None and target:  # nothing is within 5% of zero
        return float(abs(number - target) <= TOLERANCE * abs(target))
    return float(text.lower() == right.lower())


def _number(text: str) -> float | None:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(prediction: str, row: dict[str, Any]) -> float:
    """Average normalised Levenshtein similarity of one answer."""
    best = max(_similarity(prediction, answer) for answer in row["answers"])
    return best if best >= LEAST else 0.0


def _similarity(a: str, b: str) -> float:
    a, b = (" ".join(text.lower().split()) for text in (a, b))
    return 1 - edit_distance(a, b) / max(len(a), len(b), 1)


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of letters that turn `a` into `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def chart_halves(answers: list[Answer]) -> dict[str, Measure]:
    """ChartQA's two halves, questions by people and by a machine."""
    measures = {}
    for kind in ("human", "augmented"):
        inside = [float(a.type == kind) for a in answers]
        if any(inside):
            right = [a.score * i for a, i in zip(answers, inside, strict=True)]
            measures[f"relaxed accuracy, {kind}"] = Measure(terms=[(right, inside)])
    return measures


def chartqa(where: str, split: str) -> Task:
    part = {"validation": "val"}.get(split, split)
    kinds = ("human", "augmented")
    files = Files(
        task="chartqa",
        where=where,
        needs=(*(f"{part}/{part}_{kind}.json" for kind in kinds), f"{part}/png"),
        come_from="https://github.com/vis-nlp/ChartQA",
        hub="lmms-lab/ChartQA",
    )
    files.check()

    def question(name: str, text: str, answer: Any, kind: str, chart: str) -> dict[str, Any]:
        return {
            "id": name,
            "question": text,
            "prompt": text + SHORT,
            "answer": str(answer),
            "type": kind,
            "scene": chart,
        }

    if files.local:
        folder = files.path(f"{part}/png")
        rows = rows_of(
            [
                {
                    **question(f"{kind}-{i}", r["query"], r["label"], kind, r["imgname"]),
                    "images": [folder / r["imgname"]],
                }
                for kind in kinds
                for i, r in enumerate(files.json(f"{part}/{part}_{kind}.json"))
            ]
        )
    else:  # the hub's copy does not name the chart: each question counts as one of its own
        rows = mapped(
            files.hub_rows(split),
            lambda r: question(
                str(r["row"]), r["question"], r["answer"], r["type"].partition("_")[0], str(r["row"])
            ),
        )
    return Task(
        name="chartqa",
        rows=rows,
        metric="relaxed accuracy",
        score=relaxed,
        measures=chart_halves,
        max_new_tokens=16,
        ocr=True,
        split=split,
        source=files.where,
    )


def docvqa(where: str, split: str) -> Task:
    part = {"validation": "val"}.get(split, split)
    files = Files(
        task="docvqa",
        where=where,
        needs=(f"{part}_v1.0_withQT.json|{part}_v1.0.json", "documents|spdocvqa_images"),
        come_from="https://rrc.cvc.uab.es/?ch=17",
        hub="lmms-lab/DocVQA",
    )
    files.check()

    def question(row: dict[str, Any], name: Any, document: Any) -> dict[str, Any]:
        return {
            "id": str(name),
            "question": row["question"],
            "prompt": row["question"] + SHORT,
            "answer": row["answers"][0],
            "answers": list(row["answers"]),
            "type": (row.get("question_types") or ["document"])[0],
            "scene": str(document),
        }

    if files.local:
        folder = files.path(files.needs[1])
        rows = rows_of(
            [
                {
                    **question(r, r["questionId"], r["image"]),
                    "images": [folder / r["image"].rpartition("/")[2]],
                }
                for r in files.json(files.needs[0])["data"]
            ]
        )
    else:
        rows = mapped(
            read_config(files.where, "DocVQA", split), lambda r: question(r, r["questionId"], r["docId"])
        )
    return Task(
        name="docvqa",
        rows=rows,
        metric="ANLS",
        score=anls,
        max_new_tokens=32,
        ocr=True,
        split=split,
        source=files.where,
    )
