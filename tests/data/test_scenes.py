"""`scenes`: the same everywhere, disjoint splits, balanced and right answers, pinned pixels."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from latefusion.data import scenes
from latefusion.data.scene_questions import TYPES
from latefusion.data.scenes import load_scenes, make_scene, render, split_of

GRID = {
    name: (row, column)
    for row, names in enumerate(
        [
            ("top left", "top", "top right"),
            ("left", "center", "right"),
            ("bottom left", "bottom", "bottom right"),
        ]
    )
    for column, name in enumerate(names)
}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def everything(split: str, seed: int) -> str:
    made = [make_scene(split, index, seed=seed) for index in range(20)]
    return sha(repr(made).encode()) + sha(b"".join(render(scene).tobytes() for scene, _ in made))


def test_scenes_do_not_depend_on_the_process():
    code = "from test_scenes import everything; print(everything('train', 3), everything('test', 0))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        env={**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == [everything("train", 3), everything("test", 0)]


def test_a_scene_does_not_depend_on_those_before_it():
    alone = make_scene("validation", 41, seed=2)
    for index in range(5):
        make_scene("validation", index, seed=2)
    assert make_scene("validation", 41, seed=2) == alone


def test_splits_are_disjoint_whatever_the_seed():
    layouts = {split: set() for split in ("train", "validation", "test")}
    for split, seen in layouts.items():
        for seed in (0, 1):
            for index in range(150):
                scene, _ = make_scene(split, index, seed=seed)
                assert split_of(scene) == split
                seen.add(scene.layout())
    assert not layouts["train"] & layouts["test"]
    assert not layouts["train"] & layouts["validation"]
    assert not layouts["validation"] & layouts["test"]
    assert min(map(len, layouts.values())) >= 298  # and hardly a scene occurs twice


def test_jitter_and_background_do_not_move_a_scene_to_another_split():
    scene, _ = make_scene("test", 0)
    items = tuple(item._replace(dx=-item.dx, radius=9) for item in reversed(scene.items))
    moved = scene._replace(items=items, background=(0, 0, 0))
    assert moved.layout() == scene.layout()
    assert scene._replace(items=scene.items[1:]).layout() != scene.layout()


def test_pixels_are_pinned():
    """They depend on Pillow, too (12.0 and 13.0 agree); the base was trained on exactly these."""
    hashes = [sha(render(make_scene("test", index)[0]).tobytes()) for index in range(4)]
    assert hashes == ["8ed45d461794eb7b", "638bd911ad9f7c4f", "3aa2261e0c4e4b1f", "db3549d460c8df66"]


def oracle(scene, question: str) -> str:
    """The answer, found by reading the question's words on a grid of strings."""
    grid = {(i.row, i.column): (i.color, i.shape) for i in scene.items}

    def cells(color=None, shape=None):
        return [at for at, (c, s) in grid.items() if color in (None, c) and shape in (None, s)]

    def only(color=None, shape=None):
        (cell,) = cells(color, shape)
        return cell

    if m := re.fullmatch(r"is there an? (\w+) (\w+)\?", question):
        return "yes" if cells(*m.groups()) else "no"
    if m := re.fullmatch(r"what color is the (\w+)\?", question):
        return grid[only(shape=m[1])][0]
    if m := re.fullmatch(r"what shape is the (\w+) object\?", question):
        return grid[only(color=m[1])][1]
    if m := re.fullmatch(r"is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+)\?", question):
        (r1, c1), (r2, c2) = only(m[1], m[2]), only(m[4], m[5])
        true = {"left of": c1 < c2, "right of": c1 > c2, "above": r1 < r2, "below": r1 > r2}[m[3]]
        return "yes" if true else "no"
    if m := re.fullmatch(r"what (color|shape) is the object just (\w+)(?: of)? the (\w+) (\w+)\?", question):
        r, c = only(m[3], m[4])
        there = {"left": (r, c - 1), "right": (r, c + 1), "above": (r - 1, c), "below": (r + 1, c)}[m[2]]
        return grid[there][m[1] == "shape"]
    if m := re.fullmatch(r"where is the (\w+) (\w+)\?", question):
        return next(name for name, at in GRID.items() if at == only(m[1], m[2]))
    if m := re.fullmatch(r"how many (\w+) objects\?", question):
        return str(sum(m[1] in what for what in grid.values()))
    if m := re.fullmatch(r"what (word|number) is on the sign\?", question):
        assert scene.sign.text.isdigit() == (m[1] == "number")
        return scene.sign.text
    if m := re.fullmatch(r"what is at the ([a-z ]+)\?", question):
        at = GRID[m[1]]
        if at == (scene.sign.row, scene.sign.column):
            return "a sign"
        if at not in grid:
            return "nothing"
        color, shape = grid[at]
        return f"{'an' if color == 'orange' else 'a'} {color} {shape}"
    raise AssertionError(f"no rule for {question!r}")


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(split):
    for index in range(200):
        scene, questions = make_scene(split, index, seed=5)
        places = [(i.row, i.column) for i in scene.items] + [(scene.sign.row, scene.sign.column)]
        assert len(set(places)) == len(places)
        assert len({q.question for q in questions}) == len(questions)
        for q in questions:
            assert q.answer == oracle(scene, q.question), (scene, q)


def test_answers_are_balanced():
    answers = {kind: Counter() for kind in TYPES}
    for index in range(500):
        for q in make_scene("test", index)[1]:
            answers[q.type][q.answer] += 1
    most = {"existence": 0.55, "relation": 0.55, "counting": 0.33, "where": 0.14, "open": 0.15}
    most |= {"attribute": 0.13, "neighbor": 0.13, "reading": 0.05}
    for kind, share in most.items():
        assert max(answers[kind].values()) <= share * answers[kind].total(), (kind, answers[kind])
    totals = {kind: counted.total() for kind, counted in answers.items()}
    assert min(totals.values()) >= 500
    assert set(answers["counting"]) >= set("01234")


def test_load_scenes_is_what_make_scene_gives(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    loaded = load_scenes("validation", 3, seed=1)
    assert set(loaded.column_names) == {"id", "image", "question", "answer", "type", "scene"}
    row = 0
    for index in range(3):
        scene, questions = make_scene("validation", index, seed=1)
        for question in questions:
            got = loaded[row]
            assert (got["type"], got["question"], got["answer"]) == question
            assert got["scene"] == f"validation-1-{index:05d}" and got["id"].startswith(got["scene"])
            row += 1
        assert np.array_equal(np.asarray(got["image"]), np.asarray(render(scene)))
    assert row == len(loaded) == len(set(loaded["id"]))


def test_load_scenes_builds_once(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    first = load_scenes("train", 2)
    monkeypatch.setattr(scenes, "render", lambda scene: pytest.fail("rendered again"))
    assert load_scenes("train", 2)["id"] == first["id"]


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match="split 'dev' does not exist; choose one of train, validation, test"):
        load_scenes("dev")
    with pytest.raises(ValueError, match="n_scenes=0 leaves no scene; give 1 or more"):
        load_scenes("test", 0)
    with pytest.raises(ValueError, match="choose one of"):
        make_scene("tset", 0)
