"""Every scorer against cases worked out by hand."""

from __future__ import annotations

import pytest

from latefusion.eval import metrics
from latefusion.eval.tasks import choice, documents, vqa, yes_no
from latefusion.eval.tasks.base import Answer, exact_match


def answer(
    text: str, right: str, *, kind: str = "a", scene: str = "s", name: str = "0", score: float = 0
) -> Answer:
    return Answer(
        system="x", task="t", id=name, type=kind, scene=scene, question="?", answer=right, prediction=text,
        score=score, text_tokens=1, tokens=[1], fusion_layer=None, exit_layer=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "normalised"),
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
def test_vqa_normalisation(text: str, normalised: str) -> None:
    assert vqa.normalise(text) == normalised


@pytest.mark.parametrize(
    ("same", "expected"),
    [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)],
)
def test_vqa_accuracy_leaves_each_of_ten_people_out(same: int, expected: float) -> None:
    """Of three who agree, each left out leaves two (2/3); the other seven leave three (1): (3 * 2/3 + 7) / 10 = 0.9."""
    row = {"answers": ["a cat"] * same + [f"other {i}" for i in range(10 - same)]}
    assert vqa.vqa_accuracy("Cat.", row) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "pope", "mme"),
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
def test_yes_and_no_are_read_as_pope_and_mme_read_them(text: str, pope: str, mme: str) -> None:
    assert (yes_no.pope_parse(text), yes_no.mme_parse(text)) == (pope, mme)


def value(measure: metrics.Measure, answers: list[Answer]) -> float:
    return metrics.measure(measure, [a.scene for a in answers]).value


def test_pope_figures() -> None:
    """3 true yes, 1 false yes, 2 missed, 4 true no: accuracy 70, precision 75, recall 60, F1 200/3, yes 40."""
    pairs = [("Yes", "yes")] * 3 + [("Yes", "no")] + [("No", "yes")] * 2 + [("No", "no")] * 4
    answers = [answer(text, right, kind="random", scene=str(i)) for i, (text, right) in enumerate(pairs)]
    answers += [answer("No", "no", kind="popular", scene=str(i)) for i in range(10)]
    measures = yes_no.pope_measures(answers)
    figures = {
        name: value(measures[f"{name}, random"], answers)
        for name in ("accuracy", "precision", "recall", "F1")
    }
    assert figures == pytest.approx({"accuracy": 70, "precision": 75, "recall": 60, "F1": 200 / 3})
    assert value(measures["yes ratio, random"], answers) == pytest.approx(40)
    assert value(measures["accuracy"], answers) == pytest.approx(85) and "F1, adversarial" not in measures
    assert value(measures["F1, popular"], answers) == 0  # no yes anywhere


def test_mme_counts_an_image_only_if_both_answers_are_right() -> None:
    """existence: 3 of 4 right (75) and 1 of 2 images (50); count: 1 of 2 (50), 0 images; cognition: 100 + 100."""
    rows = [("existence", "a", 1), ("existence", "a", 1), ("existence", "b", 1), ("existence", "b", 0)]
    rows += [("count", "c", 1), ("count", "c", 0), ("code_reasoning", "d", 1), ("code_reasoning", "d", 1)]
    answers = [answer("", "", kind=kind, scene=scene, score=score) for kind, scene, score in rows]
    measures = yes_no.mme_measures(answers)
    assert value(measures["perception"], answers) == pytest.approx(75 + 50 + 50 + 0)
    assert measures["perception"].most == 400 and measures["cognition"].most == 200
    assert value(measures["cognition"], answers) == pytest.approx(200)
    assert value(measures["existence"], answers) == pytest.approx(125)


@pytest.mark.parametrize(
    ("text", "letter"),
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
def test_letters_are_read_by_rule(text: str, letter: str) -> None:
    assert choice.read_letter(text, ["cat", "dog", "horse", "cow"]) == letter


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
    ("text", "expected"),
    [("B", 1), ("b", 1), ("B. dog", 1), ("A", 0), ("dog", 0), ("The answer is B", 0), ("", 0)],
)
def test_scienceqa_reads_as_llava_does(text: str, expected: float) -> None:
    assert choice.scienceqa_score(text, {"answer": "B"}) == expected


def test_seed_takes_the_first_letter() -> None:
    assert choice.first_letter_score("C. horse", {"answer": "C"}) == 1
    assert choice.first_letter_score("horse", {"answer": "C"}) == 0


@pytest.mark.parametrize(
    ("text", "right", "expected"),
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
def test_relaxed_accuracy(text: str, right: str, expected: float) -> None:
    assert documents.relaxed(text, {"answer": right}) == expected


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0), ("ab", "ba", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert documents.edit_distance(a, b) == documents.edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
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
def test_anls(text: str, answers: list[str], expected: float) -> None:
    assert documents.anls(text, {"answers": answers}) == pytest.approx(expected)


def test_exact_match_takes_any_of_several_answers() -> None:
    assert exact_match(" Top  Left.", {"answers": ["top left", "left"]}) == 1
    assert exact_match("top", {"answers": ["top left"]}) == 0
