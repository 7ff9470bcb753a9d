"""Every scorer against cases worked out by hand; every loader on files in its benchmark's own format."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image
from PIL import Image as Pillow

from latefusion.eval import metrics
from latefusion.eval.predict import Answer, exact_match, images_of
from latefusion.eval.tasks import TASKS, choice, documents, load_task, vqa, yes_no
from latefusion.eval.tasks.exact import own


def answer(
    said: str, right: str, *, kind: str = "a", scene: str = "s", name: str = "0", score: float = 0
) -> Answer:
    return Answer(
        system="x", task="t", id=name, type=kind, scene=scene, question="?", answer=right, prediction=said,
        score=score, text_tokens=1, tokens=[1], fusion_layer=None, exit_layer=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("The cat", "cat"),  # article
        ("two dogs", "2 dogs"),  # number word
        ("none", "0"),
        ("dont", "don't"),  # apostrophe
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),  # comma in a number
        ("yes, it is", "yes it is"),
        ("u.s.", "us"),  # full stops
        ("2.5", "2.5"),  # but not a decimal point
        ("black-white", "black white"),  # a mark between letters is a space
        ("black - white", "black white"),  # beside a space it goes
        ("(x)", "x"),
        ("the dog's", "dog 's"),
        ("  What?\n", "what"),
        ("a an the", ""),
    ],
)
def test_vqa_normalisation(given: str, wanted: str) -> None:
    assert vqa.normalise(given) == wanted


@pytest.mark.parametrize(
    ("same", "wanted"),
    [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)],
)
def test_vqa_accuracy_leaves_each_of_ten_people_out(same: int, wanted: float) -> None:
    """Of three who agree, each left out leaves two (2/3); the other seven leave three (1): (3 * 2/3 + 7) / 10 = 0.9."""
    row = {"answers": ["a cat"] * same + [f"other {i}" for i in range(10 - same)]}
    assert vqa.vqa_accuracy("Cat.", row) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("said", "pope", "mme"),
    [
        ("Yes", "yes", "yes"),
        ("No.", "no", "no"),
        ("no, there is none", "no", "no"),
        ("There is not. Yes.", "no", "other"),  # POPE reads the first sentence, MME four letters
        ("Yes. No.", "yes", "yes"),
        ("I see a dog", "yes", "other"),  # POPE: not a no is a yes
        ("NO", "yes", "no"),  # POPE knows "No" and "no"
        ("nothing", "yes", "no"),
        ("y", "yes", "yes"),
        ("", "yes", "other"),
    ],
)
def test_yes_and_no_are_read_as_pope_and_mme_read_them(said: str, pope: str, mme: str) -> None:
    assert (yes_no.pope_parse(said), yes_no.mme_parse(said)) == (pope, mme)


def value(found: metrics.Measure, answers: list[Answer]) -> float:
    return metrics.measure(found, [a.scene for a in answers]).value


def test_pope_figures() -> None:
    """3 true yes, 1 false yes, 2 missed, 4 true no: accuracy 70, precision 75, recall 60, F1 200/3, yes 40."""
    pairs = [("Yes", "yes")] * 3 + [("Yes", "no")] + [("No", "yes")] * 2 + [("No", "no")] * 4
    answers = [answer(said, right, kind="random", scene=str(i)) for i, (said, right) in enumerate(pairs)]
    answers += [answer("No", "no", kind="popular", scene=str(i)) for i in range(10)]
    found = yes_no.pope_measures(answers)
    figures = {
        name: value(found[f"{name}, random"], answers) for name in ("accuracy", "precision", "recall", "F1")
    }
    assert figures == pytest.approx({"accuracy": 70, "precision": 75, "recall": 60, "F1": 200 / 3})
    assert value(found["yes ratio, random"], answers) == pytest.approx(40)
    assert value(found["accuracy"], answers) == pytest.approx(85) and "F1, adversarial" not in found
    assert value(found["F1, popular"], answers) == 0  # no yes anywhere


def test_mme_counts_an_image_only_if_both_answers_are_right() -> None:
    """existence: 3 of 4 right (75) and 1 of 2 images (50); count: 1 of 2 (50), 0 images; cognition: 100 + 100."""
    rows = [("existence", "a", 1), ("existence", "a", 1), ("existence", "b", 1), ("existence", "b", 0)]
    rows += [("count", "c", 1), ("count", "c", 0), ("code_reasoning", "d", 1), ("code_reasoning", "d", 1)]
    answers = [answer("", "", kind=kind, scene=scene, score=score) for kind, scene, score in rows]
    found = yes_no.mme_measures(answers)
    assert value(found["perception"], answers) == pytest.approx(75 + 50 + 50 + 0)
    assert found["perception"].most == 400 and found["cognition"].most == 200
    assert value(found["cognition"], answers) == pytest.approx(200)
    assert value(found["existence"], answers) == pytest.approx(125)


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("B. a dog", "B"),
        ("The answer is D.", "D"),
        ("A dog and a cat", ""),  # an article, and two choices repeated
        ("A", "A"),
        ("I think it is a cat", "A"),  # the text of A alone
        ("A or B", ""),
        ("E", ""),  # there is no E
        ("bird", ""),
    ],
)
def test_letters_are_read_by_rule(said: str, letter: str) -> None:
    assert choice.read_letter(said, ["cat", "dog", "horse", "cow"]) == letter


def test_circular_needs_every_rotation() -> None:
    rows = [("q1", 0, 1), ("q1", 1, 1), ("q2", 0, 1), ("q2", 1, 0), ("q3", 0, 0), ("q3", 1, 1)]
    answers = [answer("", "", scene=q, name=f"{q}-{turn}", score=score) for q, turn, score in rows]
    assert [(unit.scene, unit.score) for unit in choice.circular(answers)] == [
        ("q1", 1),
        ("q2", 0),
        ("q3", 0),
    ]
    assert value(choice.vanilla(answers)["vanilla accuracy"], answers) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [("B", 1), ("b", 1), ("B. dog", 1), ("A", 0), ("dog", 0), ("The answer is B", 0), ("", 0)],
)
def test_scienceqa_reads_as_llava_does(said: str, wanted: float) -> None:
    assert choice.scienceqa_score(said, {"answer": "B"}) == wanted


def test_seed_takes_the_first_letter() -> None:
    assert choice.first_letter_score("C. horse", {"answer": "C"}) == 1
    assert choice.first_letter_score("horse", {"answer": "C"}) == 0


@pytest.mark.parametrize(
    ("said", "right", "wanted"),
    [
        ("105", "100", 1),  # 5% off
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("-95", "-100", 1),
        ("12%", "0.12", 1),
        ("12", "12%", 0),
        ("Germany", "germany", 1),
        ("Germany ", "Austria", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),  # nothing is within 5% of zero
        ("2,000", "2000", 0),  # no number, and another text
    ],
)
def test_relaxed_accuracy(said: str, right: str, wanted: float) -> None:
    assert documents.relaxed(said, {"answer": right}) == wanted


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0), ("ab", "ba", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert documents.edit_distance(a, b) == documents.edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("said", "answers", "wanted"),
    [
        ("Kitten", ["kitten"], 1),
        ("sitting", ["kitten"], 1 - 3 / 7),  # above the threshold
        ("abcd", ["abxy"], 0.5),  # one half counts
        ("abcde", ["abxyz"], 0),  # two fifths do not
        ("a  b", ["A B"], 1),
        ("cat", ["dog", "car"], 1 - 1 / 3),  # the nearest
        ("", ["x"], 0),
    ],
)
def test_anls(said: str, answers: list[str], wanted: float) -> None:
    assert documents.anls(said, {"answers": answers}) == pytest.approx(wanted)


def test_exact_match_takes_any_of_several_answers() -> None:
    assert exact_match(" Top  Left.", {"answers": ["top left", "left"]}) == 1
    assert exact_match("top", {"answers": ["top left"]}) == 0


# Loaders


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
    said = [{"answer": text, "answer_id": i} for i, text in enumerate(TEN, 1)]
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
                        "answers": said,
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
            [{"image": "v1.jpg", "question": "What colour?", "answer_type": "other", "answers": said}],
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
            own_folders = kind == "artwork"  # some subtasks keep texts and images apart
            texts = folder / kind / "questions_answers_YN" if own_folders else folder / kind
            lines = ["Is it red? Please answer yes or no.\tYes", "Is it blue? Please answer yes or no.\tNo"]
            write(texts / "1.txt", "\n".join(lines))
            picture((folder / kind / "images" if own_folders else folder / kind) / "1.jpg")
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


FOUND: dict[str, tuple[int, str, str]] = {  # questions, prompt and right answer of the last
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
    assert set(FOUND) == set(TASKS) - {"scenes"}


@pytest.mark.parametrize("name", FOUND)
def test_files_as_they_are_distributed(name: str, tmp_path: Path) -> None:
    benchmark(name, tmp_path / name)
    task = load_task(name, str(tmp_path / name))
    count, prompt, right = FOUND[name]
    row = task.rows[len(task.rows) - 1]
    assert (len(task.rows), row["prompt"], row["answer"]) == (count, prompt, right)
    assert len(set(task.rows["id"])) == count and images_of(row)[0].size in ((8, 8), (64, 64))
    assert (
        task.score(right, row) in (1.0, pytest.approx(1.0))
        and task.score("no" if name == "pope" else "zebra", row) == 0
    )
    assert task.ocr is (name in ("textvqa", "textvqa_ocr", "chartqa", "docvqa"))


@pytest.mark.parametrize("name", FOUND)
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


def test_hub_sets_have_other_columns(tmp_path: Path) -> None:
    """As the hub's copies name them; read here from a set saved to disk."""
    image = {"image": str(picture(tmp_path / "i.png"))}
    rows = [
        {
            **image,
            "question_id": "1",
            "question": "Is there a dog?",
            "answer": "yes",
            "category": "popular",
            "image_source": "i",
        },
        {
            **image,
            "question_id": "2",
            "question": "Is there a cat?",
            "answer": "no",
            "category": "random",
            "image_source": "i",
        },
    ]
    Dataset.from_list(rows).cast_column("image", Image()).save_to_disk(tmp_path / "pope")
    found = load_task("pope", str(tmp_path / "pope")).rows[1]
    assert (found["id"], found["answer"], found["scene"], found["image"].size) == (
        "random-2",
        "no",
        "i",
        (8, 8),
    )

    row = {
        **image,
        "index": 3,
        "question": "Which?",
        "hint": "",
        "A": "cat",
        "B": "dog",
        "C": "nan",
        "D": "nan",
        "answer": "A",
        "category": "x",
    }
    Dataset.from_list([row]).cast_column("image", Image()).save_to_disk(tmp_path / "mmbench")
    turned = load_task("mmbench", str(tmp_path / "mmbench")).rows
    assert [(r["id"], r["answer"], r["choices"]) for r in turned] == [
        ("3-0", "A", ["cat", "dog"]),
        ("3-1", "B", ["dog", "cat"]),
    ]


def test_unknown_task_names_a_near_one() -> None:
    with pytest.raises(ValueError, match=r"'pop'.*did you mean pope"):
        load_task("pop", "nowhere")


def test_own_questions(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "question": "What?", "answers": ["x", "y"], "type": "easy"},
        {"image": None, "question": "Why?", "answers": "z"},
    ]
    write(tmp_path / "my.jsonl", "\n".join(map(json.dumps, lines)))
    task = own(str(tmp_path / "my.jsonl"))
    assert [(r["answer"], r["answers"], r["type"], len(r["images"])) for r in task.rows] == [
        ("x", ["x", "y"], "easy", 1),
        ("z", ["z"], "all", 0),
    ]
    assert task.score("Y.", task.rows[0]) == 1


def test_bad_rows_are_listed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path / "broken.png", "no picture")
    good = {"image": "a.png", "question": "What?", "answers": ["x"]}
    bad: list[Any] = ["{", [1], {"image": "a.png", "question": "What?"}, {**good, "answers": []}]
    bad += [{**good, "question": " "}, {**good, "image": "b.png"}, {**good, "image": "broken.png"}]
    lines = [good, *bad]
    write(tmp_path / "my.jsonl", "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    with pytest.raises(ValueError) as error:
        own(str(tmp_path / "my.jsonl"))
    text = str(error.value)
    assert (
        "7 rows" in text
        and "line 2 (not JSON)" in text
        and "line 4 (no 'answers')" in text
        and "2 more" in text
    )
    write(tmp_path / "my.jsonl", "\n".join(json.dumps({**good, "id": 1}) for _ in range(2)))
    with pytest.raises(ValueError, match="id '1' twice"):
        own(str(tmp_path / "my.jsonl"))
    write(tmp_path / "my.jsonl", json.dumps({**good, "image": "broken.png"}))
    with pytest.raises(ValueError, match="no image that can be read"):
        own(str(tmp_path / "my.jsonl"))
