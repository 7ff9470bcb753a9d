"""`icons`: the same everywhere, disjoint layouts and drawings, answers that follow from the board."""

import random
from collections import Counter

import pytest

from latefusion.data.icons import boards, pictures
from latefusion.data.icons.board_questions import STEPS, TYPES, Question, ask, board_questions
from latefusion.data.icons.boards import SIDE, SPLITS, Board, Thing, address, make_board, split_layouts_of
from latefusion.data.icons.pictures import CATEGORY_OF, NAMES, Drawing, drawings, held_out_style

PINNED = (
    "11 yellow hat;12 white wrench;13 green spider;21 purple cake;22 purple hammer;23 purple boot;42 white ;44 red ",
    Question(type="existence", question="Is there a spider?", answer="yes"),
)
SMALL = {"existence", "where", "square", "color", "category", "neighbor"}  # about one small thing


def some(split: str, n: int = 60, seed: int = 0) -> list[Board]:
    return [make_board(split, index, seed=seed) for index in range(n)]


def test_boards_are_the_same_everywhere():
    assert some("train", 20, 3) == some("train", 20, 3)
    assert some("train", 20, 3) != some("train", 20, 4)
    assert board_questions("test", 5) == board_questions("test", 5)
    first = make_board("test", 0)
    assert (first.layout(), board_questions("test", 0)[0]) == PINNED


def test_splits_share_no_layout_and_no_drawing():
    layouts = {split: {board.layout() for board in some(split, 200)} for split in SPLITS}
    shown = {split: {t.drawing for board in some(split, 200) for t in board.things} for split in SPLITS}
    for split in SPLITS:
        assert all(split_layouts_of(board) == split for board in some(split))
        for other in set(SPLITS) - {split}:
            assert not layouts[split] & layouts[other]
    seen = shown["train"] | shown["validation"] | shown["test"]
    assert not seen & shown["new_drawings"]
    assert seen <= set(drawings(held_out=False))
    assert shown["new_drawings"] <= set(drawings(held_out=True))


def test_each_object_is_held_out_in_one_style_and_each_style_for_a_quarter():
    assert len(NAMES) == 60
    assert len(drawings(held_out=True)) == 60
    assert len(drawings(held_out=False)) == 180
    assert set(Counter(map(held_out_style, NAMES)).values()) == {15}


def test_boards_are_sparse_and_things_do_not_overlap():
    for board in some("train", 100):
        cards = board.things + board.blanks
        assert 2 <= len(board.things) <= 9
        assert len({(card.row, card.column) for card in cards}) == len(cards)
        assert len({thing.name for thing in board.things}) == len(board.things)
        assert all(0 <= card.row < SIDE and 0 <= card.column < SIDE for card in cards)


def answer(board: Board, question: Question) -> str:
    """The answer, worked out from the words of the question."""
    words = question.question.rstrip("?").split()
    by_name = {thing.name: thing for thing in board.things}
    at = {(thing.row, thing.column): thing for thing in board.things}
    of = Counter(CATEGORY_OF[name] for name in by_name)
    match question.type:
        case "existence":
            return "yes" if words[-1] in by_name else "no"
        case "where":
            return address(by_name[words[-1]].row, by_name[words[-1]].column)
        case "square":
            return at[int(words[-1][1]) - 1, "ABCDEF".index(words[-1][0])].name
        case "color":
            return by_name[words[-1]].color
        case "category":
            (name,) = [name for name in by_name if CATEGORY_OF[name] == words[1]]
            return name
        case "neighbor":
            down, right = STEPS[" ".join(words[2 : words.index("the")])]
            thing = by_name[words[-1]]
            return at[thing.row + down, thing.column + right].name
        case "relation":
            first, second = by_name[words[2]], by_name[words[-1]]
            left = words[3] == "left"
            return "yes" if (first.column < second.column if left else first.row < second.row) else "no"
    return str(of[words[2].removesuffix("s")])


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_board(split):
    for index, board in enumerate(some(split)):
        for question in ask(board, random.Random(index), dict.fromkeys(TYPES, 3)):
            assert question.answer == answer(board, question), (board, question)


def test_most_questions_are_about_one_small_thing_and_yes_is_no_better_than_no():
    questions = [question for index in range(300) for question in board_questions("train", index)]
    kinds = Counter(question.type for question in questions)
    assert set(kinds) == set(TYPES)
    assert sum(kinds[kind] for kind in SMALL) > 0.75 * len(questions)
    for kind in ("existence", "relation"):
        answers = Counter(question.answer for question in questions if question.type == kind)
        assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_no_name_is_another_color_or_category():
    assert not set(NAMES) & (set(boards.COLORS) | set(pictures.CATEGORIES))


def test_a_missing_npm_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("LATEFUSION_ICONS", str(tmp_path))
    monkeypatch.setattr(pictures.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="npm is not installed"):
        pictures.install()


def test_a_thing_is_drawn_on_its_square(monkeypatch):
    from PIL import Image

    board = Board((Thing(1, 2, "red", Drawing("dog", "noto")),), (Thing(5, 0, "blue", None),))
    image = boards.render(board, lambda drawing: Image.new("RGBA", (64, 64), (0, 0, 0, 255)))
    middle = boards.SQUARE // 2
    assert image.size == (boards.SIZE, boards.SIZE)
    assert image.getpixel((2 * boards.SQUARE + middle, boards.SQUARE + middle)) == (0, 0, 0)
    assert image.getpixel((2 * boards.SQUARE + 5, boards.SQUARE + 5)) == boards.COLORS["red"]
    assert image.getpixel((middle, 5 * boards.SQUARE + middle)) == boards.COLORS["blue"]
    assert image.getpixel((middle, middle)) == boards.BACKGROUND


def test_rows_share_a_file_a_board_and_it_is_drawn_once(monkeypatch, tmp_path):
    from PIL import Image

    from latefusion.data.icons import load_icons

    monkeypatch.setenv("LATEFUSION_ICONS", str(tmp_path))
    drawn = []

    def render(board):
        drawn.append(board)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(load_icons, "render", render)
    rows = load_icons.load_icons("validation", 3, seed=2)
    questions = [q for index in range(3) for q in board_questions("validation", index, 2)]
    assert rows["question"] == [q.question for q in questions]
    assert rows["answer"] == [q.answer for q in questions]
    assert drawn == [make_board("validation", index, seed=2) for index in range(3)]
    assert len(set(rows["scene"])) == len(list(tmp_path.rglob("*.png"))) == 3
    assert rows[0]["image"].size == (8, 8)
    load_icons.load_icons("validation", 4, seed=2)
    assert len(drawn) == 4
    with pytest.raises(ValueError, match="choose one of train"):
        load_icons.load_icons("dev")
