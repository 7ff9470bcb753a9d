"""A question or two of each benchmark, in the files that it distributes."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image as Pillow

from latefusion.eval.tasks import yes_no


def picture(path: Path, shade: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new("RGB", (8, 8), (shade, 0, 0)).save(path)
    return path


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


TEN = ["red"] * 4 + ["blue"] * 6


def benchmark(name: str, folder: Path) -> None:
    """One or two questions in the files that the benchmark distributes."""
    annotators = [{"answer": text, "answer_id": i} for i, text in enumerate(TEN, 1)]
    if name == "vqav2":
        write(
            folder / "v2_OpenEnded_mscoco_val2014_questions.json",
            {"questions": [{"question_id": 7, "image_id": 42, "question": "What colour?"}]},
        )
        write(
            folder / "v2_mscoco_val2014_annotations.json",
            {
                "annotations": [
                    {
                        "question_id": 7,
                        "image_id": 42,
                        "answer_type": "other",
                        "multiple_choice_answer": "blue",
                        "answers": annotators,
                    }
                ]
            },
        )
        picture(folder / "val2014/COCO_val2014_000000000042.jpg")
    elif name == "gqa":
        types = {"structural": "query", "semantic": "attr", "detailed": "x"}
        write(
            folder / "testdev_balanced_questions.json",
            {"17": {"imageId": "n1", "question": "What colour?", "answer": "blue", "types": types}},
        )
        picture(folder / "images/n1.jpg")
    elif name in ("textvqa", "textvqa_ocr"):
        write(
            folder / "TextVQA_0.5.1_val.json",
            {"data": [{"question_id": 7, "image_id": "f1", "question": "what colour?", "answers": TEN}]},
        )
        write(
            folder / "TextVQA_Rosetta_OCR_v0.2_val.json",
            {"data": [{"image_id": "f1", "ocr_tokens": ["STOP", "go"]}]},
        )
        picture(folder / "train_images/f1.jpg")
    elif name == "vizwiz":
        write(
            folder / "val.json",
            [{"image": "v1.jpg", "question": "What colour?", "answer_type": "other", "answers": annotators}],
        )
        picture(folder / "val/v1.jpg")
    elif name == "pope":
        for kind in yes_no.POPE_SPLITS:
            line = {
                "question_id": 1,
                "image": "i.jpg",
                "text": "Is there a dog in the image?",
                "label": "yes",
            }
            write(folder / f"coco_pope_{kind}.json", json.dumps(line) + "\n")
        picture(folder / "val2014/i.jpg")
    elif name == "mme":
        for kind in (*yes_no.PERCEPTION, *yes_no.COGNITION):
            separate = kind == "artwork"  # some subtasks keep texts and images apart
            texts = folder / kind / "questions_answers_YN" if separate else folder / kind
            lines = ["Is it red? Please answer yes or no.\tYes", "Is it blue? Please answer yes or no.\tNo"]
            write(texts / "1.txt", "\n".join(lines))
            picture((folder / kind / "images" if separate else folder / kind) / "1.jpg")
    elif name == "mmbench":
        data = io.BytesIO()
        Pillow.new("RGB", (64, 64), (9, 9, 9)).save(data, "PNG")
        row = {
            "index": 3,
            "question": "Which?",
            "hint": "nan",
            "A": "cat",
            "B": "dog",
            "C": "cow",
            "D": "nan",
            "answer": "B",
            "category": "x",
            "l2-category": "logic",
            "image": base64.b64encode(data.getvalue()).decode(),
        }
        folder.mkdir(parents=True)
        with (folder / "MMBench_DEV_EN.tsv").open("w", newline="") as file:
            table = csv.DictWriter(file, row, delimiter="\t")
            table.writeheader()
            table.writerow(row)
    elif name == "scienceqa_img":
        problem = {
            "question": "Which?",
            "choices": ["cat", "dog"],
            "answer": 1,
            "hint": "Look.",
            "image": "image.png",
            "subject": "biology",
        }
        write(folder / "problems.json", {"5": problem, "6": {**problem, "image": None}})
        write(folder / "pid_splits.json", {"test": ["5", "6"]})
        picture(folder / "images/test/5/image.png")
    elif name == "seed_image":
        question = {
            "question": "Which?",
            "choice_a": "cat",
            "choice_b": "dog",
            "choice_c": "cow",
            "choice_d": "hen",
            "answer": "B",
            "data_id": "p1",
            "question_id": "9",
            "question_type_id": 2,
            "data_type": "image",
        }
        write(
            folder / "SEED-Bench.json",
            {"questions": [question, {**question, "data_type": "video"}], "question_type": {"Identity": 2}},
        )
        picture(folder / "SEED-Bench-image/x.png").rename(folder / "SEED-Bench-image/p1")
    elif name == "chartqa":
        for kind in ("human", "augmented"):
            write(
                folder / f"test/test_{kind}.json", [{"imgname": "c.png", "query": "How many?", "label": "14"}]
            )
        picture(folder / "test/png/c.png")
    elif name == "docvqa":
        write(
            folder / "val_v1.0_withQT.json",
            {
                "data": [
                    {
                        "questionId": 4,
                        "question": "Who?",
                        "image": "documents/d.png",
                        "answers": ["Ann Lee", "A. Lee"],
                        "question_types": ["handwritten"],
                    }
                ]
            },
        )
        picture(folder / "documents/d.png")
