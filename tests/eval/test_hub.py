"""The hub's copies, from files in exactly their layout (columns, types, nesting as their cards state them) to a report.

`docs/evaluation.md` names each card.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, Features, Image, List, Value
from helpers.tiny_base import save_tiny_base
from PIL import Image as Pillow

from latefusion.data.prompts import images_of
from latefusion.eval.evaluate import main
from latefusion.eval.tasks import TASKS, load_task

INT, TEXT, FLAG = Value("int64"), Value("string"), Value("bool")
TEXTS, PICTURE = List(TEXT), Image()
TEN = ["red"] * 4 + ["blue"] * 6


def png(shade: int) -> dict[str, Any]:
    """A picture as the hub's parquet files hold it."""
    data = io.BytesIO()
    Pillow.new("RGB", (8, 8), (shade, 0, 0)).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": f"{shade}.png"}


# The repository's table: configuration, split, files, columns with their types, rows
Table = tuple[str, str, str, dict[str, Any], list[dict[str, Any]]]
MCQ = {
    "index": INT, "question": TEXT, "hint": TEXT, "A": TEXT, "B": TEXT, "C": TEXT, "D": TEXT, "answer": TEXT,
    "category": TEXT, "image": PICTURE, "source": TEXT, "l2-category": TEXT, "comment": TEXT, "split": TEXT,
}  # fmt: skip
WHICH = {
    "question": "Which?", "hint": "nan", "category": "x", "image": png(1), "source": "s", "comment": "nan",
    "l2-category": "logic", "split": "dev", "C": "nan", "D": "nan",
}  # fmt: skip
SCIENCE = {
    "image": PICTURE, "question": TEXT, "choices": TEXTS, "answer": Value("int8"), "hint": TEXT, "task": TEXT,
    "grade": TEXT, "subject": TEXT, "topic": TEXT, "category": TEXT, "skill": TEXT, "lecture": TEXT, "solution": TEXT,
}  # fmt: skip
SUM = {
    "question": "Which?", "choices": ["cat", "dog"], "answer": 1, "hint": "Look.", "task": "closed choice",
    "grade": "grade2", "subject": "natural science", "topic": "biology", "category": "c", "skill": "s",
    "lecture": "", "solution": "",
}  # fmt: skip
SEED = {
    "answer": TEXT, "choice_a": TEXT, "choice_b": TEXT, "choice_c": TEXT, "choice_d": TEXT, "data_id": TEXT,
    "data_type": TEXT, "question": TEXT, "question_id": TEXT, "question_type_id": Value("int16"),
    "image": List(PICTURE), "segment": List(INT),
}  # fmt: skip
FOUR = {
    "answer": "B", "choice_a": "cat", "choice_b": "dog", "choice_c": "cow", "choice_d": "hen", "data_id": "p1",
    "question": "Which?", "segment": None,
}  # fmt: skip
TEXTVQA = {
    "image_id": TEXT, "question_id": Value("int32"), "question": TEXT, "question_tokens": TEXTS, "image": PICTURE,
    "image_width": Value("int32"), "image_height": Value("int32"), "flickr_original_url": TEXT,
    "flickr_300k_url": TEXT, "answers": TEXTS, "image_classes": TEXTS, "set_name": TEXT, "ocr_tokens": TEXTS,
}  # fmt: skip
SIGN = {
    "image_id": "f1", "question_id": 7, "question": "what colour?", "question_tokens": ["what", "colour"],
    "image": png(2), "image_width": 8, "image_height": 8, "flickr_original_url": "", "flickr_300k_url": "",
    "answers": TEN, "image_classes": ["Sign"], "set_name": "val", "ocr_tokens": ["STOP", "go"],
}  # fmt: skip
LAYOUTS: dict[str, list[Table]] = {
    "vqav2": [
        (
            "default", "validation", "data/validation-00000-of-00001.parquet",
            {
                "question_type": TEXT, "multiple_choice_answer": TEXT,
                "answers": List({"answer": TEXT, "answer_confidence": TEXT, "answer_id": INT}),
                "image_id": INT, "answer_type": TEXT, "question_id": INT, "question": TEXT, "image": PICTURE,
            },
            [
                {
                    "question_type": "what", "multiple_choice_answer": "blue", "image_id": 42, "answer_type": "other",
                    "answers": [
                        {"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(TEN, 1)
                    ],
                    "question_id": 42001, "question": "What colour?", "image": png(3),
                }
            ],
        )
    ],
    "gqa": [
        (
            "testdev_balanced_images", "testdev", "testdev_balanced_images/testdev-00000-of-00001.parquet",
            {"id": TEXT, "image": PICTURE},
            [{"id": "n0", "image": png(4)}, {"id": "n1", "image": png(5)}],
        ),
        (
            "testdev_balanced_instructions", "testdev", "testdev_balanced_instructions/testdev-00000-of-00001.parquet",
            {
                "id": TEXT, "imageId": TEXT, "question": TEXT, "answer": TEXT, "fullAnswer": TEXT, "isBalanced": FLAG,
                "groups": {"global": TEXT, "local": TEXT}, "entailed": TEXT, "equivalent": TEXT,
                "types": {"structural": TEXT, "semantic": TEXT, "detailed": TEXT}, "semanticStr": TEXT,
            },
            [
                {
                    "id": "17", "imageId": "n1", "question": "What colour?", "answer": "blue", "fullAnswer": "Blue.",
                    "isBalanced": True, "groups": {"global": None, "local": "x"}, "entailed": "[]", "equivalent": "[]",
                    "types": {"structural": "query", "semantic": "attr", "detailed": "x"}, "semanticStr": "",
                }
            ],
        ),
    ],
    "textvqa": [("default", "validation", "data/validation-00000-of-00001.parquet", TEXTVQA, [SIGN])],
    "textvqa_ocr": [("default", "validation", "data/validation-00000-of-00001.parquet", TEXTVQA, [SIGN])],
    "vizwiz": [
        (
            "default", "val", "data/val-00000-of-00001.parquet",
            {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answers": TEXTS, "category": TEXT},
            [
                {
                    "question_id": "VizWiz_val_00000000", "image": png(6), "question": "what colour?", "answers": TEN,
                    "category": "other",
                }
            ],
        )
    ],
    "pope": [
        (
            "default", "test", "data/test-00000-of-00001.parquet",
            {
                "id": TEXT, "question_id": TEXT, "question": TEXT, "answer": TEXT, "image_source": TEXT,
                "image": PICTURE, "category": TEXT,
            },
            [
                {
                    "id": str(i), "question_id": "1", "question": "Is there a dog in the image?", "answer": "yes",
                    "image_source": "COCO_val2014_000000310196", "image": png(7), "category": kind,
                }
                for i, kind in enumerate(("adversarial", "popular", "random"))
            ],
        )
    ],
    "mme": [
        (
            "default", "test", "data/test-00000-of-00001.parquet",
            {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answer": TEXT, "category": TEXT},
            [
                {
                    "question_id": "code_reasoning/0020.png", "image": png(8), "category": "code_reasoning",
                    "question": f"Is it {colour}? Please answer yes or no.", "answer": right,
                }
                for colour, right in (("red", "Yes"), ("blue", "No"))
            ],
        )
    ],
    "mmbench": [
        (
            "default", "dev", "data/dev-00000-of-00001.parquet", MCQ,
            [
                {**WHICH, "index": 3, "A": "cat", "B": "dog", "answer": "A"},
                {**WHICH, "index": 1_000_003, "A": "dog", "B": "cat", "answer": "B"},
            ],
        )
    ],
    "scienceqa_img": [
        (
            "default", "test", "data/test-00000-of-00001.parquet", SCIENCE,
            [{**SUM, "image": png(9)}, {**SUM, "image": None}],
        )
    ],
    "seed_image": [
        (
            "default", "test", "data/test-00000-of-00001.parquet", SEED,
            [
                {**FOUR, "question_id": "9", "data_type": "image", "question_type_id": 2, "image": [png(10)]},
                {
                    **FOUR, "question_id": "10", "data_type": "video", "question_type_id": 11,
                    "image": [png(11), png(12)], "segment": [1, 2],
                },
            ],
        )
    ],
    "chartqa": [
        (
            "default", "test", "data/test-00000-of-00001.parquet",
            {"type": TEXT, "question": TEXT, "answer": TEXT, "image": PICTURE},
            [
                {"type": kind, "question": "How many?", "answer": "14", "image": png(13)}
                for kind in ("human_test", "augmented_test")
            ],
        )
    ],
    "docvqa": [
        (
            "DocVQA", "validation", "DocVQA/validation-00000-of-00001.parquet",
            {
                "questionId": TEXT, "question": TEXT, "question_types": TEXTS, "image": PICTURE, "docId": INT,
                "ucsf_document_id": TEXT, "ucsf_document_page_no": TEXT, "answers": TEXTS, "data_split": TEXT,
            },
            [
                {
                    "questionId": "49153", "question": "Who?", "question_types": ["figure/diagram"], "image": png(14),
                    "docId": 14465, "ucsf_document_id": "pybv0228", "ucsf_document_page_no": "81",
                    "answers": ["Ann Lee", "A. Lee"], "data_split": "val",
                }
            ],
        )
    ],
}  # fmt: skip
FOUND: dict[str, list[tuple[str, str, str, int]]] = {  # id, right answer, type, shade of the picture
    "vqav2": [("42001", "blue", "other", 3)],
    "gqa": [("17", "blue", "query", 5)],
    "textvqa": [("7", "blue", "reading", 2)],
    "textvqa_ocr": [("7", "blue", "reading", 2)],
    "vizwiz": [("VizWiz_val_00000000", "blue", "other", 6)],
    "pope": [(f"{kind}-1", "yes", kind, 7) for kind in ("adversarial", "popular", "random")],
    "mme": [
        (f"code_reasoning/0020.png-{i}", right, "code_reasoning", 8) for i, right in enumerate(("yes", "no"))
    ],
    "mmbench": [("3-0", "A", "logic", 1), ("3-1", "B", "logic", 1)],
    "scienceqa_img": [("0", "B", "natural science", 9)],
    "seed_image": [("9", "B", "Instance Identity", 10)],
    "chartqa": [("0", "14", "human", 13), ("1", "14", "augmented", 13)],
    "docvqa": [("49153", "Ann Lee", "figure/diagram", 14)],
}


def repository(name: str, folder: Path) -> Path:
    """The hub's files in a folder, as `hf download` leaves them, its card on top."""
    configs = []
    for config, split, file, columns, rows in LAYOUTS[name]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=Features(columns)).to_parquet(folder / file)
        pattern = file.replace("-00000-of-00001.parquet", "-*")
        configs.append({"config_name": config, "data_files": [{"split": split, "path": pattern}]})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("hub")
    for name in LAYOUTS:
        repository(name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield folder


def test_every_benchmark_has_its_layout() -> None:
    assert set(LAYOUTS) == set(FOUND) == set(TASKS) - {"scenes", "icons", "easy_vqa"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_hub_s_layout_is_read(name: str, hub: Path) -> None:
    task = load_task(name, str(hub / name))
    printed = []
    for row in task.rows:
        (picture,) = images_of(row)
        printed.append((row["id"], row["answer"], row["type"], picture.convert("RGB").getpixel((0, 0))[0]))
        assert task.score(row["answer"], row) == pytest.approx(1)
    assert printed == FOUND[name]
    if name.startswith("textvqa"):
        assert ("Reference OCR token: STOP, go" in task.rows[0]["prompt"]) is (name == "textvqa_ocr")


def test_a_copy_saved_to_disk_is_read(tmp_path: Path) -> None:
    _, _, _, columns, rows = LAYOUTS["pope"][0]
    Dataset.from_list(rows, features=Features(columns)).save_to_disk(tmp_path / "pope")
    assert [row["id"] for row in load_task("pope", str(tmp_path / "pope")).rows] == [
        name for name, *_ in FOUND["pope"]
    ]


@pytest.mark.slow
def test_from_the_hub_s_files_to_a_report(hub: Path, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", layers=3)
    sources = ",".join(f"{name}: {hub / name}" for name in LAYOUTS)
    words = [
        f"model={base}",
        "policies=[{vtw: {layer: 2}}]",
        f"tasks=[{','.join(LAYOUTS)}]",
        f"output={tmp_path / 'out'}",
    ]
    main([*words, f"sources={{{sources}}}", "controls=false", "batches=[]", "lengths=[]"])
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {name: task["questions"] for name, task in report["data"]["tasks"].items()} == {
        name: len(rows) for name, rows in FOUND.items()
    }
    assert set(report["systems"]["vtw"]["tasks"]) == set(LAYOUTS)
    assert {name for name, task in report["data"]["tasks"].items() if task["ocr"]} == {
        "textvqa", "textvqa_ocr", "chartqa", "docvqa",
    }  # fmt: skip
    assert "F1, adversarial" in report["systems"]["vtw"]["tasks"]["pope"]["measures"]
    assert (
        report["systems"]["vtw"]["tasks"]["mmbench"]["score"]["overall"]["n"] == 1
    )  # one question, two rotations
    page = (tmp_path / "out/report.html").read_text()
    assert "Accuracy on text in images, %" in page and page.count("data:image/") > 0
