"""Videos as folders and lists of frames: which are shown, what a row may say, and what is refused. No decoder needed.

`tests/video/` has what needs one, and the families' processors.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.data_rows import ANSWER, QUESTION, llava_turns, text_part, turn, write_rows
from helpers.tiny_base import configured
from PIL import Image

from latefusion.data import sources
from latefusion.data.bad_rows import Checked
from latefusion.data.collate import BadRow, Collator
from latefusion.data.draw import distinct_images, with_images
from latefusion.data.load import data_fingerprint, training_data
from latefusion.data.prompts import prompt_of, videos_of, without_image
from latefusion.data.samples import BadSample, Refused, first_exchange, sample_of, videos_of_sample
from latefusion.data.videos import MAX_TOTAL, STACKED, BadVideo, Video, evenly, load_video, video_arguments
from latefusion.eval.tasks.exact import questions_of_file
from latefusion.models.fingerprint import image_fingerprint, rows_fingerprint
from latefusion.training.embedded.vocabulary import IMAGE, build_processor
from latefusion.training.offline import prompt_hash
from latefusion.training.order import order_of

VIDEO, PICTURE = {"type": "video"}, {"type": "image"}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder `clip` of 12 frames whose grey is their number, `other` of 3, and the picture `a.png`."""
    for name, n in (("clip", 12), ("other", 3)):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("RGB", (8, 6), (i, i, i)).save(tmp_path / name / f"f{i}.png")
    (tmp_path / "clip" / "notes.txt").write_text("not a frame")
    Image.new("RGB", (8, 8), (99, 99, 99)).save(tmp_path / "a.png")
    return tmp_path


def greys(video: Video) -> list[int]:
    return video.frames[:, 0, 0, 0].tolist()


def test_frames_are_evenly_spaced_from_the_first_to_the_last() -> None:
    assert evenly(9, 3) == [0, 4, 8] and evenly(4, 4) == [0, 1, 2, 3] and evenly(5, 1) == [0]
    for total in (1, 2, 7, 31):
        for n in range(1, total + 1):
            at = evenly(total, n)
            assert len(set(at)) == n and at == sorted(at) and at[0] == 0 and (n == 1 or at[-1] == total - 1)


def test_a_folder_is_read_in_the_order_of_its_numbers(clips: Path) -> None:
    video = load_video("clip", clips, max_frames=100)
    assert greys(video) == list(range(12)) and video.frames.shape == (12, 6, 8, 3)  # f2 before f10
    some = load_video("clip", clips, max_frames=4)
    assert greys(some) == [0, 4, 7, 11] == list(some.indices) and some.total == 12 and some.rate == 2.0
    assert some.metadata()["duration"] == 6.0


def test_what_a_row_says_of_its_video_counts(clips: Path) -> None:
    frames = [f"clip/f{i}.png" for i in (3, 1, 2)]
    assert greys(load_video(frames, clips)) == [3, 1, 2]
    video = load_video({"frames": frames, "fps": 5, "max_frames": 2}, clips)
    assert greys(video) == [3, 2] and video.rate == 5
    assert len(load_video({"path": "clip", "max_frames": 50}, clips, max_frames=3).indices) == 3
    assert greys(load_video({"bytes": None, "path": "other", "fps": None}, clips)) == [0, 1, 2]


def test_what_lies_between_two_seconds_is_a_video_of_its_own(clips: Path) -> None:
    """Twelve frames, two a second: frame 3 stands at 1.5 s, frame 8 at 4 s."""
    part = load_video({"path": "clip", "video_start": 1.3, "video_end": 4.2}, clips, max_frames=4)
    assert greys(part) == [3, 5, 6, 8] and part.indices == (0, 2, 3, 5)
    assert (part.total, part.rate, part.metadata()["duration"]) == (6, 2.0, 3.0)
    assert greys(load_video({"path": "clip", "video_start": 5}, clips)) == [10, 11]
    assert greys(load_video({"path": "clip", "video_end": 0}, clips)) == [0]
    assert greys(
        load_video({"frames": ["clip/f5.png", "clip/f7.png"], "fps": 1, "video_start": 1}, clips)
    ) == [7]
    held = {"type": "video", "video": "clip", "video_start": 4, "video_end": 4.5}
    (video,) = sample_of({"messages": [turn("user", held, "what?"), ANSWER]}, clips)["videos"]
    assert greys(video) == [8, 9]
    held = {"type": "video", "max_frames": 2, "video_start": 4}  # of the video in the row's column
    (video,) = sample_of({"messages": [turn("user", held, "what?"), ANSWER], "videos": ["clip"]}, clips)[
        "videos"
    ]
    assert greys(video) == [8, 11]
    rows = [
        {"video": {"path": "clip", "video_end": 1, "max_frames": 2}, "question": "what?", "answers": ["x"]},
        {"video": "other", "question": "what?", "answers": ["x"]},
    ]
    (clips / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = [
        videos_of(row)[0] for row in questions_of_file(str(clips / "q.jsonl"), max_frames=5).rows
    ]
    assert greys(first) == [0, 2] and greys(second) == [0, 1, 2]
    assert first.limit == second.limit == 5  # families that stack show equally many


def test_a_limit_of_one_video_is_not_that_of_its_batch(clips: Path) -> None:
    short = load_video({"path": "clip", "max_frames": 2}, clips, max_frames=5)
    assert greys(short) == [0, 11] and short.limit == 5 and len(short.filled().indices) == 5
    other = load_video("clip", clips, max_frames=3)
    assert video_arguments([short, other], "qwen3_vl")["videos"][0].shape[0] == 2
    for family in STACKED:
        with pytest.raises(
            ValueError, match=f"type {family} takes .* not 3 and 5; give all parts of the data one"
        ):
            video_arguments([short, other], family)


def test_a_short_video_is_filled_evenly_for_families_that_stack() -> None:
    frames = np.arange(3, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    video = Video(frames, (0, 4, 8), 9, 3.0, 7).filled()
    assert greys(video) == [0, 0, 1, 1, 1, 2, 2] and video.indices == (0, 0, 4, 4, 4, 8, 8)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("none.mp4", r"none\.mp4 cannot be read \(No such file"),
        ("https://x.org/a.mp4", "is an address; download the video"),
        ([], "a video has no frames"),
        (["a.png", "none.png"], r"has a bad frame 1: none\.png cannot be read"),
        (["a.png", "clip/f0.png"], r"frames of different sizes \(8 x 6 and 8 x 8\)"),
        ("empty", "^the folder empty has no frames"),
        ({"frames": ["a.png"], "fps": 0}, "has fps=0; give a number above 0"),
        ({"frames": ["a.png"], "fps": "fast"}, "has fps=fast; give a number above 0"),
        ({"path": "clip", "max_frames": -1}, "has max_frames=-1; give a number above 0"),
        ({"path": "clip", "nframes": 8}, "has nframes=8, which is not read; give it max_frames"),
        ({"path": "clip", "video_start": "soon"}, "has video_start=soon; give seconds, 0 or more"),
        ({"path": "clip", "video_end": -1}, "has video_end=-1; give seconds, 0 or more"),
        (
            {"path": "clip", "video_start": 9},
            "no frame from video_start=9 to video_end=6 seconds; it has 12 frames, 2 a",
        ),
        (
            {"path": "clip", "video_start": 3, "video_end": 2},
            "no frame from video_start=3 to video_end=2 seconds",
        ),
        ({"fps": 3}, "is given as nothing"),
        (7, "is given as int"),
        ("", "an empty name"),
        ("a\0b", "cannot be read"),
        ("/dev/null", "a pipe or a device"),
    ],
)
def test_a_bad_video_is_one_sentence(clips: Path, source, reason: str) -> None:
    (clips / "empty").mkdir()
    with pytest.raises(BadVideo, match=reason) as error:
        load_video(source, clips)
    assert "\n" not in str(error.value)
    with pytest.raises(BadSample, match="has a bad video: "):
        sample_of({"messages": [turn("user", {"type": "video"}, "?"), ANSWER], "videos": [source]}, clips)


def test_more_pixels_than_fit_are_refused_before_they_are_stacked(clips: Path, monkeypatch) -> None:
    monkeypatch.setattr("latefusion.data.videos.MAX_TOTAL", 8 * 6 * 4)
    assert len(load_video("clip", clips, max_frames=4).indices) == 4 and MAX_TOTAL > 10**8
    with pytest.raises(BadVideo, match="clip has 5 frames of 8 x 6, more than 192 pixels; lower max_frames"):
        load_video("clip", clips, max_frames=5)


def test_without_a_decoder_a_file_says_what_to_install(clips: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (clips / "a.mp4").write_bytes(b"0123")
    record = {"messages": [turn("user", VIDEO, "?"), ANSWER], "videos": ["a.mp4"]}
    with pytest.raises(
        Refused, match=r"^video files are decoded by PyAV, .* pip install 'latefusion\[video\]'\.$"
    ):
        sample_of(record, clips)  # the run ends: such rows must not be skipped one by one
    row = json.dumps({"video": "a.mp4", "question": "what?", "answers": ["x"]})
    (clips / "q.jsonl").write_text(row)
    with pytest.raises(ValueError, match=r"line 1 \(video files are decoded by PyAV"):
        questions_of_file(str(clips / "q.jsonl"))


def test_every_layout_of_a_row_places_its_videos(clips: Path) -> None:
    held = {"type": "video", "video": "other", "fps": 4.0}
    records = [
        {"messages": [{"role": "user", "content": "<video>what?"}, ANSWER], "videos": ["clip"]},
        {"messages": [QUESTION, ANSWER], "video": "clip", "image": "a.png"},
        {"messages": [turn("user", held, "what?"), ANSWER]},
        {
            "messages": [turn("user", VIDEO, held, "what?"), ANSWER],
            "videos": [["clip/f5.png", "clip/f6.png"]],
        },
        {
            "conversations": llava_turns("<image>\nand <video>\nwhat?", "red"),
            "image": "a.png",
            "video": "other",
        },
        {"messages": [QUESTION, {"role": "assistant", "content": "the tag <video>"}]},
    ]
    rows = sources.dataset(write_rows(clips, *records, name="rows.jsonl"), split="train")
    rows.max_frames = 4
    samples = [rows[i] for i in range(len(records))]
    parts = [[part["type"] for part in sample["messages"][0]["content"]] for sample in samples]
    assert parts == [
        ["video", "text"],
        ["image", "video", "text"],
        ["video", "text"],
        ["video", "video", "text"],
        ["image", "text", "video", "text"],
        ["text"],
    ]
    assert [[greys(v) for v in s.get("videos", [])] for s in samples] == [
        [[0, 4, 7, 11]],
        [[0, 4, 7, 11]],
        [[0, 1, 2]],
        [[5, 6], [0, 1, 2]],
        [[0, 1, 2]],
        [],
    ]
    assert samples[2]["videos"][0].rate == 4 and "videos" not in samples[5]
    assert [size[1] for size in rows.sizes()] == [4, 5, 4, 8, 5, 0]
    table = datasets.Dataset.from_list(
        [
            {"messages": [QUESTION, ANSWER], "videos": ["clip", "other"]},
            {"messages": [QUESTION, ANSWER], "videos": []},
        ]
    )
    table.to_parquet(clips / "rows.parquet")
    stored = sources.dataset(str(clips / "rows.parquet"), split="train")
    assert [greys(v)[-1] for v in stored[0]["videos"]] == [11, 2] and stored.sizes() == [(10, 32), (10, 0)]


def test_steps_of_one_modality_hold_videos_of_like_length(clips: Path) -> None:
    """Rows as they lie in a file: text alone, a picture, a video, two videos, four of each."""
    kinds: list[dict] = [
        {"messages": [turn("user", "?"), ANSWER]},
        {"messages": [turn("user", PICTURE, "?"), ANSWER], "images": ["a.png"]},
        {"messages": [turn("user", VIDEO, "?"), ANSWER], "video": "clip"},
        {"messages": [turn("user", VIDEO, VIDEO, "?"), ANSWER], "videos": ["other", ["a.png"]]},
    ]
    path = write_rows(clips, *(kinds * 4), name="rows.jsonl")
    config = configured("data=dataset", f"data.path={path}", "data.max_frames=3", "data.group=modality")
    dataset = training_data(config.data)
    order = order_of(replace(config.train, steps=4, batch_size=4, accumulation=1), dataset, world=1)
    assert [size[1] for size in dataset.rows.sizes()] == [0, 1, 3, 6] * 4
    steps = [[order.at(4 * step + i) for i in range(4)] for step in range(4)]
    assert sorted([i % 4 for i in step] for step in steps) == [[kind] * 4 for kind in range(4)]
    shown = [[len(videos_of_sample(dataset[i])) for i in step] for step in steps]
    assert sorted(shown) == [[0] * 4, [0] * 4, [1] * 4, [2] * 4]


def test_only_the_videos_before_the_first_answer_are_measured_on(clips: Path) -> None:
    turns = [
        turn("user", VIDEO, "?"),
        turn("assistant", "1"),
        turn("user", VIDEO, "?"),
        turn("assistant", "2"),
    ]
    sample = first_exchange(sample_of({"messages": turns, "videos": ["other", "clip"]}, clips))
    assert len(sample["messages"]) == 2 and [greys(v) for v in sample["videos"]] == [[0, 1, 2]]


def test_profiles_draw_rows_with_videos_and_the_entry_is_fitted_on_them(clips: Path) -> None:
    shown = {"messages": [turn("user", PICTURE, "?"), ANSWER], "images": ["a.png"]}
    both = {"messages": [turn("user", PICTURE, VIDEO, "?"), ANSWER], "images": ["a.png"], "videos": ["clip"]}
    filmed = {"messages": [turn("user", VIDEO, "?"), ANSWER], "videos": ["clip"]}
    rows = Checked(sources.dataset(write_rows(clips, filmed, both, shown, name="rows.jsonl"), split="train"))
    drawn, bad = with_images(rows, needed=None, seed=0)
    assert sorted(row.row for row in drawn) == [0, 1, 2] and not bad
    by_row = {row.row: row.images for row in drawn}
    assert by_row[1] == by_row[0] | by_row[2] and not by_row[0] & by_row[2]
    drawn, bad = with_images(rows, needed=None, seed=0, no_videos="no eyes for it")
    assert [row.row for row in drawn] == [2] and sorted(row.row for row in bad) == [0, 1]
    assert {str(row.error) for row in bad} == {"has a video: no eyes for it"}
    assert len(distinct_images(rows, 3)) == 3


def test_a_row_of_the_hub_may_not_name_a_video_of_this_machine(clips: Path) -> None:
    for source in ("clip", str(clips / "clip"), ["clip/f0.png"], {"frames": [str(clips / "a.png")]}):
        with pytest.raises(BadSample, match="data of the hub have no folder"):
            sample_of({"messages": [turn("user", VIDEO, "?"), ANSWER], "videos": [source]}, None)
    held = {"type": "video", "video": str(clips / "clip"), "fps": 2}
    with pytest.raises(BadSample, match="data of the hub have no folder"):
        sample_of({"messages": [turn("user", held, "?"), ANSWER]}, None)


def test_the_fingerprint_of_data_has_the_contents_of_its_videos(clips: Path) -> None:
    def made(rows: list[dict], **settings) -> str:
        path = write_rows(clips, *rows, name="rows.jsonl")
        options = [f"data.{name}={value}" for name, value in settings.items()]
        return data_fingerprint(training_data(configured("data=dataset", f"data.path={path}", *options).data))

    rows = [{"messages": [{"role": "user", "content": "<video>?"}, ANSWER], "videos": ["clip"]}]
    first = made(rows)
    assert made(rows) == first
    different = {first, made(rows, max_frames=3)}
    different.add(made([{**rows[0], "videos": [{"path": "clip", "fps": 3}]}]))
    Image.new("RGB", (8, 6), (1, 2, 3)).save(clips / "clip" / "f7.png")
    different.add(made(rows))
    (clips / "clip" / "f7.png").rename(clips / "clip" / "f70.png")  # another order of frames
    different.add(made(rows))
    assert len(different) == 5
    as_list = [str(clips / "other" / f"f{i}.png") for i in range(3)]
    assert image_fingerprint("other", clips) == image_fingerprint(as_list) != image_fingerprint(as_list[::-1])


def test_samples_with_opened_videos_are_told_apart(clips: Path) -> None:
    """As a calibration goes on where it stopped only with the same frames."""
    filmed = {"messages": [turn("user", VIDEO, "?"), ANSWER]}
    names = ["clip", "other", {"path": "clip", "fps": 3}, "clip"]
    hashes = [rows_fingerprint([sample_of({**filmed, "videos": [name]}, clips)]) for name in names]
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]


def test_a_kept_answer_of_the_teacher_is_of_these_frames(clips: Path) -> None:
    import torch

    ids = torch.arange(3)
    record = {"messages": [turn("user", VIDEO, "?"), ANSWER], "videos": ["clip"]}
    hashes = {
        prompt_hash(ids, ids, ids, 0, sample_of({**record, "videos": [source]}, clips, max_frames=n))
        for source, n in (("clip", 4), ("clip", 5), ("other", 4), ({"path": "clip", "fps": 9}, 4))
    }
    assert len(hashes) == 4


def test_a_family_that_reads_no_videos_says_so(clips: Path) -> None:
    collate = Collator(
        processor=build_processor(image_size=16, patch_size=8),
        vision_ids=[IMAGE],
        stop=["<eos>"],
        family="llava",
    )
    sample = sample_of({"messages": [turn("user", VIDEO, "?"), ANSWER], "videos": ["clip"]}, clips)
    with pytest.raises(
        BadRow, match="has a video: a model of type llava is shown no videos; use one of qwen2_5_vl"
    ):
        collate([sample])


def test_questions_about_videos_are_asked_with_them(clips: Path) -> None:
    talk = {"messages": [turn("user", VIDEO, "what is it?"), turn("assistant", "red")], "videos": ["other"]}
    rows = [
        {"id": "1", "video": "clip", "question": "what?", "answers": ["a"]},
        {"id": "2", "image": "a.png", "question": "what?", "answers": ["b"]},
        {"id": "3", "videos": [["clip/f1.png", "clip/f9.png"]], "question": "what?", "answers": ["c"]},
        {"id": "4", **talk},
    ]
    (clips / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = questions_of_file(str(clips / "q.jsonl"), max_frames=3)
    assert [[greys(v) for v in videos_of(row)] for row in task.rows] == [
        [[0, 6, 11]],
        [],
        [[1, 9]],
        [[0, 1, 2]],
    ]
    kinds = [[part["type"] for part in prompt_of(row)[0]["content"]] for row in task.rows]
    assert kinds == [["video", "text"], ["image", "text"], ["video", "text"], ["video", "text"]]
    blind = without_image(task.rows[3])
    assert blind["videos"] == [] and prompt_of(blind) == [turn("user", text_part("what is it?"))]
    (clips / "bad.jsonl").write_text(json.dumps({**rows[0], "video": "none"}))
    with pytest.raises(ValueError, match=r"line 1 \(none cannot be read"):
        questions_of_file(str(clips / "bad.jsonl"))
    bare = {"id": "5", "question": "what?", "answers": ["c"], "image": "a.png"}
    (clips / "q2.jsonl").write_text(json.dumps(bare))
    assert not {"videos", "max_frames"} & {*questions_of_file(str(clips / "q2.jsonl")).rows.column_names}
