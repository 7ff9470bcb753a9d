"""Every benchmark is read from its own files, and what is missing is said in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.benchmark_files import benchmark

from latefusion.data.prompts import images_of
from latefusion.eval.tasks import TASKS, choice, load_task, vqa
from latefusion.eval.tasks.base import Files

LAST_QUESTION: dict[str, tuple[int, str, str]] = {  # questions, prompt and right answer of the last
    "vqav2": (1, "What colour?" + vqa.SHORT, "blue"),
    "gqa": (1, "What colour?" + vqa.SHORT, "blue"),
    "textvqa": (1, "What colour?" + vqa.SHORT, "blue"),
    "textvqa_ocr": (1, "What colour?\nReference OCR token: STOP, go" + vqa.SHORT, "blue"),
    "vizwiz": (1, "What colour?" + vqa.UNANSWERABLE + vqa.SHORT, "blue"),
    "pope": (3, "Is there a dog in the image?" + vqa.SHORT, "yes"),
    "mme": (28, "Is it blue?" + vqa.SHORT, "no"),
    "mmbench": (3, "Which?\nA. dog\nB. cow\nC. cat" + choice.LETTER, "A"),
    "scienceqa_img": (1, "Context: Look.\nWhich?\nA. cat\nB. dog" + choice.LETTER, "B"),
    "seed_image": (1, "Which?\nA. cat\nB. dog\nC. cow\nD. hen" + choice.LETTER, "B"),
    "chartqa": (2, "How many?" + vqa.SHORT, "14"),
    "docvqa": (1, "Who?" + vqa.SHORT, "Ann Lee"),
}


def test_every_task_is_tested() -> None:
    assert set(LAST_QUESTION) == set(TASKS) - {"scenes", "icons", "easy_vqa"}  # made here, or a package


@pytest.mark.parametrize("name", LAST_QUESTION)
def test_files_as_they_are_distributed(name: str, tmp_path: Path) -> None:
    benchmark(name, tmp_path / name)
    task = load_task(name, str(tmp_path / name))
    count, prompt, right = LAST_QUESTION[name]
    row = task.rows[len(task.rows) - 1]
    assert (len(task.rows), row["prompt"], row["answer"]) == (count, prompt, right)
    assert len(set(task.rows["id"])) == count and images_of(row)[0].size in ((8, 8), (64, 64))
    assert (
        task.score(right, row) in (1.0, pytest.approx(1.0))
        and task.score("no" if name == "pope" else "zebra", row) == 0
    )
    assert task.ocr is (name in ("textvqa", "textvqa_ocr", "chartqa", "docvqa"))


@pytest.mark.parametrize("name", LAST_QUESTION)
def test_absent_data_is_one_sentence_with_files_and_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load_task(name, str(tmp_path / name))
    text = str(error.value)
    assert "\n" not in text and f"task {name}" in text and "https://" in text and f"sources.{name}=" in text
    benchmark(name, tmp_path / name)
    files = sorted(path for path in (tmp_path / name).rglob("*") if path.suffix in (".json", ".tsv", ".txt"))
    first = files[0]
    missing = first.relative_to(tmp_path / name).parts[0] if name == "mme" else first.name
    (first.parent.rename(tmp_path / "gone") if name == "mme" else first.unlink())
    if not (name == "textvqa" and "OCR" in first.name):
        with pytest.raises(FileNotFoundError, match=missing.replace(".", r"\.")):
            load_task(name, str(tmp_path / name))


def test_unknown_task_names_a_near_one() -> None:
    with pytest.raises(ValueError, match=r"'pop'.*did you mean pope"):
        load_task("pop", "nowhere")


def test_files_of_a_benchmark_are_read_as_utf8_whatever_is_in_their_texts(tmp_path: Path) -> None:
    files = Files(task="pope", where=str(tmp_path), needs=["q.jsonl", "q.json"], come_from="x")
    row = {"text": "what\u2028is it?"}
    content = "\ufeff" + json.dumps(row, ensure_ascii=False)
    for name in files.needs:
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert files.lines("q.jsonl") == [row] and files.json("q.json") == row
    (tmp_path / "q.jsonl").write_text(content + "\n{oh")
    with pytest.raises(ValueError, match=r"q\.jsonl: line 2 is not JSON"):
        files.lines("q.jsonl")
    (tmp_path / "q.json").write_bytes('{"text": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"q\.json is not JSON in UTF-8"):
        files.json("q.json")
