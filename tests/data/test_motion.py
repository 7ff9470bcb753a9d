"""The set `motion`: its answers follow from the order of frames alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from latefusion.data.motion import FRAMES, ask, main, make_clip, render, way_of, write_clips
from latefusion.data.question_file import question_rows
from latefusion.data.scenes import SIZE
from latefusion.data.sources import dataset

CLIPS = [make_clip("train", i) for i in range(600)]


def test_a_clip_is_a_function_of_its_seed_split_and_number() -> None:
    assert make_clip("test", 3) == make_clip("test", 3) != make_clip("test", 4)
    assert make_clip("test", 3, seed=1) != make_clip("test", 3) != make_clip("train", 3)
    with pytest.raises(ValueError, match="split 'all' does not exist; choose one of train"):
        make_clip("all", 0)


def test_what_lies_in_which_lane_is_of_one_split() -> None:
    layouts = [
        {make_clip(split, i).layout() for i in range(300)} for split in ("train", "validation", "test")
    ]
    assert not layouts[0] & layouts[1] and not layouts[0] & layouts[2] and not layouts[1] & layouts[2]
    assert all(clip.reversed().layout() == clip.layout() for clip in CLIPS)


def test_a_reversed_clip_has_the_frames_backwards_and_every_answer_opposite() -> None:
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    for clip in CLIPS[:40]:
        frames, backwards = render(clip), render(clip.reversed())
        assert all(np.array_equal(a, b) for a, b in zip(frames, backwards[::-1], strict=True))
        assert clip.reversed().reversed() == clip
        for question, other in zip(ask(clip), ask(clip.reversed()), strict=True):
            assert question.question == other.question
            if question.type == "direction":
                assert other.answer == opposite[question.answer]
            else:
                assert {question.answer, other.answer} == {mover.color for mover in clip.movers}


def test_answers_are_balanced_and_no_frame_tells_them() -> None:
    """Where a shape stands in a frame is as often near one end of its lane as near the other, whichever way it goes."""
    counts = Counter(
        question.answer for clip in CLIPS for question in ask(clip) if question.type == "direction"
    )
    assert sorted(counts) == ["bottom", "left", "right", "top"]
    assert max(counts.values()) < 1.2 * min(counts.values())
    for frame in range(FRAMES):
        places = {
            way: [m.along(frame) for clip in CLIPS for m in clip.movers if way_of(m) == way]
            for way in (-1, 1)
        }
        quarters = [np.histogram(places[way], 4, (0, SIZE))[0] / len(places[way]) for way in (-1, 1)]
        assert np.abs(np.array(quarters) - 0.25).max() < 0.06  # of about 750 each: four deviations


def test_a_shape_is_drawn_where_it_stands_and_comes_in_on_the_other_side() -> None:
    clip = next(c for c in CLIPS if c.axis == "across" and any(m.along(0) < 4 for m in c.movers))
    mover = next(m for m in clip.movers if m.along(0) < 4)
    frame = np.asarray(render(clip)[0])
    row = frame[mover.lane * 32 + 16]
    assert not np.array_equal(row[0], clip.background) and not np.array_equal(row[-1], clip.background)
    assert frame.shape == (SIZE, SIZE, 3)


def test_the_command_writes_what_training_and_evaluation_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"output={tmp_path}", "train=3", "test=2"])
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'train.jsonl'}, {tmp_path / 'test.jsonl'}"
    rows = dataset(str(tmp_path / "train.jsonl"), split="train")
    assert len(rows) == 3 and rows[0]["videos"][0].frames.shape == (FRAMES, SIZE, SIZE, 3)
    assert len(rows[0]["messages"]) == 2 * len(ask(make_clip("train", 0)))
    questions = question_rows(str(tmp_path / "test.jsonl"))
    assert len(questions) == sum(len(ask(make_clip("test", i))) for i in range(2))
    with pytest.raises(SystemExit, match="error: train=0 must be at least 1"):
        main(["train=0"])
    write_clips(tmp_path / "again", "test", 2)
    assert [json.loads(line) for line in (tmp_path / "again" / "test.jsonl").read_text().splitlines()] == [
        json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()
    ]
