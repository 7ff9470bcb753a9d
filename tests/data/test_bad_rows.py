"""What users bring, in any mixture: `data/validate.py` lists what training leaves out or stops at, row for row."""

import json
from base64 import b64encode
from collections import Counter

import pytest
import torch
from helpers.data_rows import (
    ANSWER,
    IMAGE_PART,
    QUESTION,
    llava_turns,
    text_part,
    write_numbered_rows,
    write_rows,
)
from helpers.pictures import JPEG, PNG, decompression_bomb
from helpers.quick_runs import run_config
from helpers.tiny_base import BAND, SMALL, composed, configured, save_tiny_base
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from latefusion.data import validate
from latefusion.data.bad_rows import SKIPPED_FILE, Guard, skipped
from latefusion.data.collate import Collator
from latefusion.data.load import parts_of, training_data
from latefusion.data.samples import Refused
from latefusion.data.streaming import Stream
from latefusion.recipes.schema import OnError
from latefusion.training.embedded.vocabulary import IMAGE, build_processor

SKIP, RAISE = OnError["skip"], OnError["raise"]
LIMIT = 40  # tokens


def chat(*messages, images=(), **kept):
    return {"messages": list(messages), "images": list(images), **kept}


def shows(*files):
    return chat(QUESTION, ANSWER, images=files)


def user(content):
    return {"role": "user", "content": content}


def answer(content):
    return {"role": "assistant", "content": content}


def held(image):
    """An image part that holds its image, as Qwen's data have it."""
    return {"type": "image", "image": image}


URL = f"data:image/png;base64,{b64encode(PNG).decode()}"
GOOD = [
    chat(QUESTION, ANSWER),
    shows("a.png"),
    shows("lies.jpg"),
    shows("a.png", "a.png"),
    {"messages": [QUESTION, ANSWER], "images": "a.png"},
    {"messages": [QUESTION, ANSWER], "images": None, "image": "a.png"},
    chat({"role": "system", "content": "be kind"}, QUESTION, ANSWER, QUESTION, answer("3")),
    chat(user("how <eos> many <pad>?"), ANSWER),  # read as a token, but nothing of it is learnt
    chat(user("שלום 👩‍👩‍👧?"), answer("مرحبا 😀")),
    chat(QUESTION, answer("\u200b")),
    chat(user("is it<image>red?"), ANSWER, images=["a.png"]),
    chat(QUESTION, ANSWER, broken="is fun", record=5, latefusion=None),
    {
        "conversations": llava_turns("what?\n<image>", "red", "and <image>?", "no"),
        "image": ["a.png", "a.png"],
    },
    chat(user([held("a.png"), text_part("what?")]), ANSWER),
    chat(user([held(URL), IMAGE_PART, text_part("what?")]), ANSWER, images=["a.png"]),
    chat(user([held("a.png"), text_part("what?")]), ANSWER, images=["a.png"]),
    chat(user([{"type": "image_url", "image_url": {"url": URL}}, text_part("what?")]), ANSWER),
    chat(QUESTION, answer("the tag <video>"), videos=[], video=None, audio=""),
    shows(URL),
]
BAD = [
    {},
    chat(),
    chat(QUESTION),
    chat(QUESTION, ANSWER, QUESTION),
    chat(ANSWER),
    chat(QUESTION, answer("")),
    chat(QUESTION, answer([])),
    chat(user(" \n"), ANSWER),
    chat(user([text_part("")]), ANSWER),
    chat(QUESTION, {"role": "tool", "content": "x"}, ANSWER),
    chat({"role": ["user"], "content": "x"}, ANSWER),
    chat(user(5), ANSWER),
    chat(user([text_part(5)]), ANSWER),
    chat({"role": "user"}, ANSWER),
    chat(None, ANSWER),
    {"messages": {"role": "user"}},
    {"conversations": [{"from": ["human"], "value": "x"}]},
    {"conversations": llava_turns("what?", "red"), "image": "a.png"},
    {"conversations": llava_turns("<image><image>", "red"), "image": "a.png"},
    chat(user([text_part("an <image>?")]), ANSWER),
    chat(QUESTION, answer("an <image>"), images=["a.png"]),
    chat(QUESTION, answer("2 <eos> red")),
    chat(user("what " * LIMIT), ANSWER),
    chat(user("\ud83d?"), ANSWER),
    *map(shows, ["none.png", "cut.jpg", "empty.png", "bomb.png", "folder", "loop", "note.png"]),
    *map(shows, ["a\0.png", "a\udcff.png", "https://x.org/a.png", "a" * 9000, "", None, 5, ["a.png"], {}]),
]
BAD += [
    chat(QUESTION, ANSWER, videos=["a.mp4"]),
    chat(QUESTION, ANSWER, images=["a.png"], video="a.mp4"),
    chat(QUESTION, ANSWER, audios=["a.wav"]),
    chat(user("<video>what happens?"), ANSWER),
    chat(user([{"type": "video", "video": "a.mp4"}, text_part("what?")]), ANSWER),
    {"conversations": llava_turns("<video>\nwhat?", "red")},
    chat(user([held("none.png"), text_part("what?")]), ANSWER),
    chat(user([held("a.png"), IMAGE_PART, text_part("what?")]), ANSWER),
    chat(user([held("a.png"), text_part("what?")]), ANSWER, images=["a.png", "lies.jpg"]),
    shows(URL[:60]),
    shows("data:image/png,raw"),
]
ROWS = st.sampled_from([(row, False) for row in GOOD] + [(row, True) for row in BAD])
NAMES = st.sampled_from([None, "", 0, "dup", "dup", "ü", "a\n\tb", "\ud800", [1], "1"])
BROKEN = [b"null", b"{oh", b"[]]", b"\xff\xfe", b"[" * 9999, b'{"id": ' + b"1" * 5000 + b"}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pictures = {
        "a.png": PNG,
        "lies.jpg": PNG,
        "cut.jpg": JPEG[:200],
        "bomb.png": decompression_bomb(),
        "note.png": b"no",
    }
    for name, data in {**pictures, "empty.png": b""}.items():
        (folder / name).write_bytes(data)
    (folder / "folder").mkdir()
    (folder / "a.mp4").mkdir()  # no frames: a bad row on every machine, with a decoder or without
    (folder / "loop").symlink_to("loop")
    return folder


def small_collator(**options) -> Collator:
    processor = build_processor(image_size=16, patch_size=8)
    return Collator(processor=processor, vision_ids=[IMAGE], stop=["<eos>"], max_length=LIMIT, **options)


def guard_of(rows, folder, on_error=SKIP) -> Guard:
    return Guard(small_collator(), on_error=on_error, too_long=on_error, dataset=rows, folder=folder)


def configuration(path, **options):
    return configured("data=dataset", f"data.path={path}", *(f"data.{k}={v}" for k, v in options.items()))


def reasons_of_validate(data) -> list[tuple[str, str | None]]:
    (part,) = parts_of(data)
    checked = validate.part_findings(part, small_collator(), workers=0, streaming=data.streaming)
    return [(finding.id, finding.reason) for finding in checked]


def taken(rows, some) -> list:
    return rows.__getitems__(some) if isinstance(rows, Stream) else [rows[i] for i in some]


def assert_validate_and_training_agree(
    path, lines: list[bytes], bad: list[bool], *, streaming: bool, out
) -> None:
    """`validate` lists the rows that are bad, and training leaves out these, or stops at each, for the same reasons."""
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    data = configuration(path, streaming=streaming).data
    listed = reasons_of_validate(data)
    assert [reason is not None for _, reason in listed] == bad
    assert all(len((name + str(reason)).splitlines()) == 1 for name, reason in listed)

    rows = training_data(data)
    collate, refuse = guard_of(rows, out), guard_of(rows, None, RAISE)
    for start in range(0, len(lines), 3):
        some = range(start, min(start + 3, len(lines)))
        samples = taken(rows, some)
        collate(samples)
        for sample in samples:
            try:
                refuse([sample])
            except Refused as error:
                assert any(str(error).startswith(f"row {name} {why};") for name, why in listed if why)
    file = out / SKIPPED_FILE
    left_out = list(map(json.loads, file.read_text().splitlines())) if file.exists() else []
    assert Counter((line["id"], line["reason"]) for line in left_out) == Counter(f for f in listed if f[1])
    assert len({line["row"] for line in left_out}) == len(left_out) == skipped(out) == sum(bad)


@pytest.mark.parametrize("streaming", [False, True])
def test_validate_lists_just_what_training_leaves_out(folder, tmp_path, streaming):
    named = [{**row, "id": f"row {i % 20}"} if i % 3 else row for i, row in enumerate([*GOOD, *BAD])]
    lines = [*(json.dumps(row).encode() for row in named), *BROKEN]
    bad = [False] * len(GOOD) + [True] * (len(BAD) + len(BROKEN))
    assert_validate_and_training_agree(folder / "all.jsonl", lines, bad, streaming=streaming, out=tmp_path)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(ROWS, NAMES) | st.sampled_from(BROKEN), max_size=10), st.booleans())
def test_they_agree_on_any_rows_in_any_order(folder, tmp_path_factory, drawn, streaming):
    lines, bad = [json.dumps({**GOOD[1], "id": "first"}).encode()], [False]
    for row in drawn:
        lines.append(row if isinstance(row, bytes) else json.dumps({**row[0][0], "id": row[1]}).encode())
        bad.append(True if isinstance(row, bytes) else row[0][1])
    assert_validate_and_training_agree(
        folder / "any.jsonl", lines, bad, streaming=streaming, out=tmp_path_factory.mktemp("out")
    )


def test_every_row_has_a_size_to_be_grouped_by(folder):
    path = write_rows(folder, *GOOD, *BAD, name="sizes.jsonl")
    sizes = training_data(configuration(path, group="length").data).rows.sizes()
    assert len(sizes) == len(GOOD) + len(BAD) and sizes[3] == (10, 2)


def test_a_row_that_a_mixture_repeats_is_left_out_once_by_all_workers(folder, tmp_path):
    bad = write_rows(folder, chat(QUESTION), chat(QUESTION, ANSWER), chat(QUESTION), name="few.jsonl")
    good = write_numbered_rows(folder, "many", 20)
    for streaming in ("true", "false"):
        parts = f"data.parts=[{{path: {bad}, weight: 3}},{{path: {good}}}]"
        rows = training_data(configured("data=mixture", parts, f"data.streaming={streaming}").data)
        for share in (range(10), range(10, 20)):  # as two loader workers, each with its guard
            guard_of(rows, tmp_path / streaming)(taken(rows, share))
        lines = (tmp_path / streaming / SKIPPED_FILE).read_text().splitlines()
        assert skipped(tmp_path / streaming) == 2
        assert {(json.loads(line)["row"], json.loads(line)["id"]) for line in lines} == {
            ("0:0", "0:0"),
            ("0:2", "0:2"),
        }


def test_workers_give_the_batches_of_a_loader_without_workers(folder, tmp_path):
    path = write_rows(folder, *[{**row, "id": i} for i, row in enumerate([*GOOD, *BAD])], name="work.jsonl")
    rows = training_data(configuration(path).data)

    def batches(workers):
        collate = guard_of(rows, tmp_path / str(workers))
        return list(DataLoader(rows, batch_size=5, num_workers=workers, collate_fn=collate))

    for alone, by_workers in zip(batches(0), batches(2), strict=True):
        assert alone.keys() == by_workers.keys() and all(
            torch.equal(alone[name], by_workers[name]) for name in alone
        )
    assert skipped(tmp_path / "2") == skipped(tmp_path / "0") == len(BAD)


def test_a_bad_row_far_into_a_run_ends_it_in_one_sentence(folder, tmp_path):
    rows = [{"id": f"g{i}", **GOOD[0]} for i in range(9)] + [{"id": f"b{i}", **BAD[2]} for i in range(9)]
    base = save_tiny_base(tmp_path / "base")
    path, out = write_rows(folder, *rows, name="late.jsonl"), f"output_dir={tmp_path / 'out'}"
    quick = ("train.dtype=float32", "train.steps=9", "teacher=none", "train.trackers=[]", "train.threads=1")
    with pytest.raises(SystemExit, match=r"^error: row b\d ends with the user, .*data\.on_error=skip\.$"):
        options = ("data=dataset", f"data.path={path}", f"model.path={base}", "train.workers=1")
        run_config(composed(*options, *quick, *SMALL, *BAND, out))


@pytest.mark.parametrize(("content", "streaming"), [("[ ]\n", "true"), (" \n", "false")])
def test_data_without_a_row_are_refused_by_both(tmp_path, content, streaming):
    (tmp_path / "none.json").write_text(content)
    options = ["data=dataset", f"data.path={tmp_path / 'none.json'}", f"data.streaming={streaming}"]
    with pytest.raises(SystemExit, match=r"^error: the data at .*none\.json have no rows; name others"):
        validate.main(options)
    with pytest.raises(SystemExit, match=r"^error: the data at .*none\.json have no rows; name others"):
        run_config(composed(*options, f"output_dir={tmp_path / 'out'}"))


def test_files_of_other_kinds_and_damaged_ones_are_one_sentence(tmp_path):
    for name, data, reason in (
        ("rows.txt", b"{}", r"rows\.txt does not end in \.parquet, \.arrow, \.csv, \.json, \.jsonl"),
        ("rows.parquet", b"no", "cannot be read: .* smaller than the minimum file footer"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SystemExit, match=f"^error: .*{reason}"):
            validate.main(["data=dataset", f"data.path={tmp_path / name}"])
