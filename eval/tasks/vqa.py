"""VQA accuracy: VQAv2, TextVQA and VizWiz, whose questions have ten answers of ten people.

An answer's accuracy is the mean over the ten of `min(1, same / 3)`, where `same` counts how many of the other nine gave
that answer (Antol et al. 2015; Goyal et al. 2017), after the normalisation of the official scripts: `vqaEval.py` of
VQA's repository, and the answer processor of EvalAI that TextVQA's evaluation uses. The two disagree in details; this
is EvalAI's, which always normalises people's answers too.
"""

from __future__ import annotations

import re
from statistics import fmean
from typing import Any

from latefusion.data.question_file import rows_of
from latefusion.eval.tasks.base import SHORT, Files, Task, mapped

NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = ("a", "an", "the")
MARKS = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
FULL_STOP = re.compile(r"\.(?!\d)")  # a full stop that is no decimal point

# What people mean when they leave an apostrophe out
CONTRACTIONS = re.findall(
    r"\S+",
    """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
    """,
)


def _without_one(word: str) -> list[str]:
    """The word without its apostrophe; of several, without each one of them."""
    at = [i for i, letter in enumerate(word) if letter == "'"]
    return [word[:i] + word[i + 1 :] for i in at]


MENDED = {short: word for word in CONTRACTIONS for short in _without_one(word)}
MENDED["somebody'd"] = "somebodyd"  # as the official list has it
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def normalise(answer: str) -> str:
    """An answer as VQA compares it: no case, punctuation or article, number words as digits, apostrophes mended."""
    text = answer.lower().replace("\n", " ").replace("\t", " ")
    text = text.replace(",", "").replace("?", "").replace("'s", " 's").strip()
    thousands = COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or thousands else " ")
    words = [NUMBERS.get(word, word) for word in FULL_STOP.sub("", plain).split()]
    return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, row: dict[str, Any]) -> float:
    """Agreement with the people of `row["answers"]`, each left out in turn."""
    answer, people = normalise(prediction), [normalise(answer) for answer in row["answers"]]
    same = people.count(answer)
    return fmean(min(1.0, (same - (other == answer)) / 3) for other in people)


def vqav2(where: str, split: str) -> Task:
    part = {"validation": "val"}.get(split, split)
    files = Files(
        task="vqav2",
        where=where,
        needs=(
            f"v2_OpenEnded_mscoco_{part}2014_questions.json",
            f"v2_mscoco_{part}2014_annotations.json",
            f"{part}2014",
        ),
        come_from="https://visualqa.org/download.html and https://cocodataset.org/#download",
        hub="lmms-lab/VQAv2",
    )
    files.check()
    if files.local:
        questions = {q["question_id"]: q["question"] for q in files.json(files.needs[0])["questions"]}
        folder = files.path(files.needs[2])
        rows = rows_of(
            [
                {
                    **_question(
                        a["question_id"],
                        questions[a["question_id"]],
                        _texts_of(a["answers"]),
                        a["answer_type"],
                    ),
                    "answer": a["multiple_choice_answer"],
                    "scene": str(a["image_id"]),
                    "images": [folder / f"COCO_{part}2014_{a['image_id']:012d}.jpg"],
                }
                for a in files.json(files.needs[1])["annotations"]
            ]
        )
    else:
        rows = mapped(
            files.hub_rows(split),
            lambda r: {
                **_question(r["question_id"], r["question"], _texts_of(r["answers"]), r["answer_type"]),
                "answer": r["multiple_choice_answer"],
                "scene": str(r["image_id"]),
            },
        )
    return _task("vqav2", rows, split, files)


def textvqa(where: str, split: str, *, hints: bool = False) -> Task:
    """TextVQA; `hints`: what an OCR system read stands in the prompt, as LLaVA's evaluation puts it."""
    name, part = "textvqa_ocr" if hints else "textvqa", {"validation": "val"}.get(split, split)
    needs = [f"TextVQA_0.5.1_{part}.json", "train_images"] + (
        [f"TextVQA_Rosetta_OCR_v0.2_{part}.json"] if hints else []
    )
    files = Files(
        task=name,
        where=where,
        needs=needs,
        come_from="https://textvqa.org/dataset",
        hub="lmms-lab/textvqa",
    )
    files.check()

    def question(row: dict[str, Any], read: list[str]) -> dict[str, Any]:
        base = _question(row["question_id"], row["question"], row["answers"], "reading")
        hint = f"\nReference OCR token: {', '.join(read)}" if hints else ""
        prompt = f"{row['question'].capitalize()}{hint}{SHORT}"
        return {**base, "prompt": prompt, "scene": str(row["image_id"])}

    if files.local:
        read = {}
        if hints:
            read = {r["image_id"]: r["ocr_tokens"] for r in files.json(needs[2])["data"]}
        folder = files.path("train_images")
        rows = rows_of(
            [
                {**question(r, read.get(r["image_id"], [])), "images": [folder / f"{r['image_id']}.jpg"]}
                for r in files.json(needs[0])["data"]
            ]
        )
    else:
        rows = mapped(files.hub_rows(split), lambda r: question(r, r.get("ocr_tokens", [])))
    return _task(name, rows, split, files, ocr=True)


def vizwiz(where: str, split: str) -> Task:
    part = {"validation": "val"}.get(split, split)
    files = Files(
        task="vizwiz",
        where=where,
        needs=(f"{part}.json|Annotations/{part}.json", part),
        come_from="https://vizwiz.org/tasks-and-datasets/vqa/",
        hub="lmms-lab/VizWiz-VQA",
    )
    files.check()

    def question(row: dict[str, Any], name: str, kind: str) -> dict[str, Any]:
        base = _question(name, row["question"], _texts_of(row["answers"]), kind)
        return {**base, "prompt": f"{row['question'].capitalize()}{UNANSWERABLE}{SHORT}", "scene": name}

    if files.local:
        folder = files.path(part)
        rows = rows_of(
            [
                {**question(r, r["image"], r["answer_type"]), "images": [folder / r["image"]]}
                for r in files.json(files.needs[0])
            ]
        )
    else:
        rows = mapped(
            files.hub_rows({"validation": "val"}.get(split, split)),
            lambda r: question(r, str(r["question_id"]), str(r.get("category", "all"))),
        )
    return _task("vizwiz", rows, split, files)


def _texts_of(answers: list[Any]) -> list[str]:
    return [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]


def _question(name: Any, question: str, answers: list[str], kind: str) -> dict[str, Any]:
    most = max(answers, key=answers.count)
    return {
        "id": str(name),
        "question": question,
        "prompt": question + SHORT,
        "answer": most,
        "answers": answers,
        "type": kind,
    }


def _task(name: str, rows: Any, split: str, files: Files, *, ocr: bool = False) -> Task:
    return Task(
        name=name,
        rows=rows,
        metric="VQA accuracy",
        score=vqa_accuracy,
        max_new_tokens=16,
        ocr=ocr,
        split=split,
        source=files.where,
    )
