"""`easy_vqa`: rows from the package's own files, or one sentence without it."""

from importlib.util import find_spec

import pytest

from latefusion.data import easy_vqa

needs_package = pytest.mark.skipif(
    find_spec("easy_vqa") is None, reason=f"needs pip install {easy_vqa.PACKAGE}"
)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(easy_vqa, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps easy-vqa"):
        easy_vqa.load_easy_vqa("test")


@needs_package
def test_rows_are_drawn_by_the_seed_and_have_their_types():
    rows = easy_vqa.load_easy_vqa("test", n_images=20, per_image=3)
    assert rows["id"] == easy_vqa.load_easy_vqa("test", n_images=20, per_image=3)["id"]
    assert rows["id"] != easy_vqa.load_easy_vqa("test", n_images=20, per_image=3, seed=1)["id"]
    assert len(rows) <= 60 and len(set(rows["scene"])) == 20  # a few images have one question
    assert set(rows["type"]) <= {"yes_no", "shape", "color"}
    assert rows[0]["image"].size == (64, 64)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="choose one of train, validation, test"):
        easy_vqa.load_easy_vqa("dev")


@needs_package
def test_splits_share_no_picture():
    scenes = {split: set(easy_vqa.load_easy_vqa(split)["scene"]) for split in easy_vqa.SPLITS}
    pictures = {split: {int(scene.rpartition("-")[2]) for scene in of} for split, of in scenes.items()}
    assert {split: len(of) for split, of in pictures.items()} == {
        "train": 3500,
        "validation": 500,
        "test": 1000,
    }
    assert not pictures["train"] & pictures["validation"]  # test has a folder of its own
