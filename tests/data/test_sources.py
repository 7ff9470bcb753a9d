"""From files to samples: every layout and format, each damage in its own row, mixtures and streams."""

import json
import os
from base64 import b64encode

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.data_rows import (
    ANSWER,
    IMAGE_PART,
    QUESTION,
    grey_image,
    llava_turns,
    text_part,
    turn,
    write_numbered_rows,
    write_rows,
)
from helpers.pictures import JPEG, PNG

from latefusion.data import sources
from latefusion.data.load import Mixture, data_fingerprint, training_data
from latefusion.data.samples import BadSample, conversation_of
from latefusion.data.streaming import Stream
from latefusion.recipes.schema import DataConfig, PartConfig, Source


@pytest.fixture
def folder(tmp_path):
    grey_image(9).save(tmp_path / "a.png")
    grey_image(8).save(tmp_path / "b.png")
    return tmp_path


def test_scenes_give_one_question_a_row():
    rows = sources.scenes("validation", n_scenes=2)
    sample = rows[0]
    (user, assistant), (image,) = sample["messages"], sample["images"]
    assert user["content"] == [IMAGE_PART, text_part(sample["question"])] and image.size == (96, 96)
    assert assistant == turn("assistant", sample["answer"])


def test_llava_json_places_images_where_they_stand(folder):
    path = write_rows(
        folder,
        {"id": "x", "image": "a.png", "conversations": llava_turns("<image>\nwhat is it?", "red")},
        {
            "id": 5,
            "image": ["a.png", "b.png"],
            "conversations": llava_turns("what is it?\n<image>", "red", "and<image>?", "no"),
        },
        {"conversations": llava_turns("how many?", "2")},
    )
    rows = sources.llava(path, str(folder))
    assert rows[0]["messages"] == [turn("user", IMAGE_PART, "what is it?"), turn("assistant", "red")]
    assert rows[1]["messages"][0] == turn("user", "what is it?", IMAGE_PART)
    assert rows[1]["messages"][2] == turn("user", "and", IMAGE_PART, "?")
    assert [image.getpixel((0, 0))[0] for image in rows[1]["images"]] == [9, 8]
    assert rows[2]["images"] == [] and [rows.identity(i) for i in range(3)] == ["x", "5", "2"]
    assert rows.sizes() == [(22, 1), (35, 2), (10, 0)]


BAD_MESSAGES = [
    ({"messages": []}, "has no messages"),
    ({"messages": [QUESTION]}, "ends with the user, so that there is no last answer"),
    ({"messages": [QUESTION, ANSWER, QUESTION]}, "ends with the user"),
    ({"messages": [ANSWER, QUESTION, ANSWER]}, "begins with the assistant"),
    ({"messages": [{"role": "system", "content": "be kind"}]}, "nothing but a system prompt"),
    ({"messages": [QUESTION, {"role": "assistant", "content": " "}]}, "an empty answer in turn 1"),
    ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "an empty turn 0"),
    (
        {"messages": [QUESTION, turn("assistant", IMAGE_PART, "2")], "images": ["a.png"]},
        "image in the answer of turn 1",
    ),
    (
        {"messages": [{"role": "tool", "content": "x"}, ANSWER]},
        "a message of role 'tool'; it can be system, ",
    ),
    (
        {"messages": [turn("user", {"type": "audio"}), ANSWER]},
        "a message part .*audio.*; parts are texts, images and videos",
    ),
    ({"messages": [turn("user", IMAGE_PART, "?"), ANSWER]}, r"has 0 image\(s\) but 1 placeholder\(s\)"),
    ({"messages": [turn("user", "?"), ANSWER], "images": ["a.png"]}, r"has 1 image\(s\) but 0 placeholder"),
    (
        {"messages": [QUESTION, ANSWER], "audios": ["a.wav"]},
        "has audio in its column 'audios'; only text, images",
    ),
    ({"messages": [turn("user", {"type": "video"}), ANSWER]}, r"has 0 video\(s\) but 1 placeholder\(s\)"),
    (
        {"messages": [turn("user", "<video>?"), ANSWER]},
        "has <video> in a text part of turn 0; give the video",
    ),
    (
        {"messages": [{"role": "user", "content": "<video>?"}, ANSWER]},
        r"has 0 video\(s\) but 1 placeholder\(s\)",
    ),
    *(
        (
            {"messages": [QUESTION, ANSWER], name: "a"},
            f"has {name[:5].lower()} in its column '{name}'; "
            + ("name it videos" if name[0] in "vV" else "only text, images"),
        )
        for name in ("video_url", "video_path", "Video", "audio_file", "audio_urls")
    ),
    (
        {"messages": [QUESTION, ANSWER], "frames": ["a.png"]},
        "has video in its column 'frames'; name it videos",
    ),
    (
        {"messages": [turn("user", {"type": "image", "image": "a.png"}, IMAGE_PART), ANSWER]},
        r"has 0 image\(s\) in its column but 1 image part\(s\) without an image",
    ),
    ({"messages": "hello"}, "has messages that are str, not a list"),
    ({"text": "hello"}, r"has neither messages nor conversations \(it has text\)"),
    ({"conversations": llava_turns("what?", "red"), "image": "a.png"}, r"has 1 image\(s\) but 0 placeholder"),
    ({"conversations": llava_turns("<image>what?", "red")}, r"has 0 image\(s\) but 1 placeholder"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "a turn from 'robot'; it can be from human, gpt"),
    ({"conversations": [{"from": "human"}]}, "a turn without a text 'value'"),
    ({"messages": [QUESTION, ANSWER], "images": ["c.png"]}, r"has a bad image: c\.png cannot be read"),
]


@pytest.mark.parametrize(("record", "reason"), BAD_MESSAGES)
def test_a_row_that_contradicts_itself_is_refused_when_it_is_read(folder, record, reason):
    good = {"messages": [QUESTION, ANSWER], "images": ["b.png"]}
    rows = sources.dataset(write_rows(folder, good, record), split="train")
    assert rows[0]["messages"] == [turn("user", IMAGE_PART, "how many?"), turn("assistant", "2")]
    with pytest.raises(BadSample, match=reason) as error:
        rows[1]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        # as TRL writes it: images first where nothing says where they stand
        ("how many?", [IMAGE_PART, IMAGE_PART, text_part("how many?")]),
        (
            "one <image> and <image>?",
            [text_part("one "), IMAGE_PART, text_part(" and "), IMAGE_PART, text_part("?")],
        ),
        (
            [text_part("a"), IMAGE_PART, text_part("b"), {"type": "image", "text": None}],
            [text_part("a"), IMAGE_PART, text_part("b"), IMAGE_PART],
        ),
    ],
)
def test_contents_are_parts_or_strings(content, parts):
    record = {"messages": [{"role": "user", "content": content}, ANSWER], "images": ["a.png", "b.png"]}
    messages, _ = conversation_of(record)
    assert messages[0]["content"] == parts


@pytest.mark.parametrize(
    ("part", "fix"),
    [
        ({"type": "image", "image": "a.png", "min_pixels": 3136}, r"model\.processor=\{max_pixels"),
        ({"type": "image", "image": "a.png", "resized_height": 28}, r"model\.processor=\{max_pixels"),
        ({"type": "video", "video": "a.mp4", "nframes": 8}, r"data\.max_frames"),
    ],
)
def test_a_size_of_one_image_is_refused_not_ignored(part, fix):
    """Qwen's loader takes them from the part; ours has one processor for all, which they did not reach."""
    record = {"messages": [{"role": "user", "content": [part, text_part("a")]}, ANSWER]}
    with pytest.raises(BadSample, match=rf"^has {list(part)[-1]}=\d+ beside one {part['type']} .*{fix}"):
        conversation_of(record)
    part[list(part)[-1]] = None  # as Arrow fills the parts of other rows
    conversation_of(record)


def test_broken_utf8_and_broken_json_cost_their_own_row(folder):
    good = json.dumps({"messages": [QUESTION, ANSWER]}).encode()
    bad = good.replace(b"many", b"m\xff\xfeny")
    (folder / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join([good, bad, b"{oh", b"[1]", b"", good]))
    rows = sources.dataset(str(folder / "x.jsonl"), split="train")
    assert len(rows) == 5 and rows[0]["messages"] == rows[4]["messages"]
    for index, reason in (
        (1, "broken UTF-8 in turn 0"),
        (2, r"is not JSON \("),
        (3, "is list, not an object"),
    ):
        with pytest.raises(BadSample, match=reason):
            rows[index]
    (folder / "x.json").write_bytes(b"[" + good + b"," + bad + b"]")
    rows = sources.llava(str(folder / "x.json"), None)
    assert rows[0]["messages"][1] == turn("assistant", "2")
    with pytest.raises(BadSample, match="broken UTF-8"):
        rows[1]


def test_missing_data_is_one_sentence_with_the_fix(folder):
    with pytest.raises(FileNotFoundError, match=r"no conversation file at nowhere\.json; .*data\.path="):
        sources.llava("nowhere.json", None)
    path = write_rows(folder, {"id": 1, "image": "c.png", "conversations": llava_turns("<image>", "red")})
    with pytest.raises(FileNotFoundError, match=r"no image folder at nowhere; .*data\.images="):
        sources.llava(path, "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no image c\.png in .*data\.images="):
        sources.llava(path, str(folder))
    (folder / "cut.json").write_text('[{"id": 1')
    with pytest.raises(ValueError, match=r"cut\.json is not a JSON list"):
        sources.llava(str(folder / "cut.json"), None)


def rows_with_images() -> list[dict]:
    def row(data: bytes, answer: str) -> dict:
        messages = [turn("user", {"type": "image", "text": None}, "how many?"), turn("assistant", answer)]
        return {"id": f"row {answer}", "messages": messages, "images": [{"bytes": data, "path": None}]}

    return [row(PNG, "1"), row(JPEG[: len(JPEG) // 2], "2"), row(PNG, "3")]


FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "messages": [
            {
                "role": datasets.Value("string"),
                "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
            }
        ],
        "images": datasets.List(datasets.Image()),
    }
)


@pytest.fixture(params=["saved", "parquet file", "parquet folder", "arrow", "jsonl"])
def stored(request, folder):
    """Three rows, the second's image truncated, in one of the formats."""
    table = datasets.Dataset.from_list(rows_with_images(), features=FEATURES)
    path = folder / "set"
    if request.param == "saved":
        table.save_to_disk(path)
    elif request.param == "arrow":
        path = folder / "set.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.data.schema) as writer:
            writer.write_table(table.data.table)
    elif request.param == "jsonl":
        (folder / "cut.jpg").write_bytes(JPEG[: len(JPEG) // 2])
        names = ("a.png", "cut.jpg", "a.png")
        rows = [{**r, "images": [n]} for r, n in zip(rows_with_images(), names, strict=True)]
        return write_rows(folder, *rows, name="set.jsonl")
    else:
        path.mkdir()
        table.to_parquet(path / "part.parquet")
        path = path / "part.parquet" if request.param.endswith("file") else path
    return str(path)


def test_every_format_gives_the_same_samples(stored):
    rows = sources.dataset(stored, split="train")
    assert len(rows) == 3 and rows.identity(1) == "row 2"
    assert rows[0]["messages"] == [turn("user", IMAGE_PART, "how many?"), turn("assistant", "1")]
    assert rows[0]["images"][0].mode == "RGB" and rows[2]["id"] == "row 3"
    assert [images for _, images in rows.sizes()] == [1, 1, 1] and rows.sizes()[0][0] == 10
    with pytest.raises(BadSample, match=r"has a bad image: .*truncated"):
        rows[1]


def test_every_format_streams_the_same_samples(stored):
    data = DataConfig(source=Source.dataset, path=stored, streaming=True, shuffle_buffer=1)
    streamed = training_data(data).first(6)
    answers = []
    for row in streamed:
        try:
            answers.append(row.make()["messages"][1]["content"][0]["text"])
        except BadSample:
            answers.append("bad")
    assert sorted(answers[:3]) == sorted(answers[3:]) == ["1", "3", "bad"]  # endless: epoch after epoch


def test_text_that_is_no_utf8_costs_its_own_row_in_parquet_too(folder):
    def binary(first: bytes):
        contents = pa.array([first, b"how many?"], pa.binary()).view(pa.string())
        return pa.StructArray.from_arrays([pa.array(["user", "user"]), contents], ["role", "content"])

    answers = pa.StructArray.from_arrays(
        [pa.array(["assistant"] * 2), pa.array(["2", "2"])], ["role", "content"]
    )
    turns = pa.concat_arrays([binary(b"m\xff\xfe").cast(answers.type), answers]).take(pa.array([0, 2, 1, 3]))
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays([0, 2, 4], turns)}), folder / "x.parquet")
    rows = sources.dataset(str(folder / "x.parquet"), split="train")
    assert rows[1]["messages"][0] == turn("user", "how many?") and rows[1]["images"] == []
    with pytest.raises(BadSample, match="broken UTF-8"):
        rows[0]
    assert rows.sizes() == [(0, 0), (10, 0)]


def test_what_is_no_such_data_set_is_refused(folder):
    datasets.Dataset.from_list([{"question": "x"}]).save_to_disk(folder / "other")
    with pytest.raises(ValueError, match=r"no column 'messages' \(it has question\)"):
        sources.dataset(str(folder / "other"), split="train")
    for path in ("nowhere", "nowhere.parquet"):
        with pytest.raises(FileNotFoundError, match="no data set with a split 'train' at"):
            sources.dataset(str(folder / path), split="train")


# ---------------------------------------------------------------------------- mixtures and streams


def test_a_mixture_draws_each_source_by_its_weight(folder):
    parts = [
        sources.dataset(write_numbered_rows(folder, name, n), split="train")
        for name, n in (("a", 10), ("b", 30))
    ]
    mixed = Mixture(parts, [3, 1], seed=0)
    names = [mixed[i]["id"][2:] for i in range(len(mixed))]
    assert len(mixed) == 40 and sum(name[0] == "a" for name in names) == 30
    assert all(names.count(f"a{i}") == 3 for i in range(10))  # repeated whole before any is drawn more often
    assert len({name for name in names if name[0] == "b"}) == 10
    assert mixed.identity(0) == "0:a0" and len(mixed.sizes()) == 40
    assert names != [m["id"][2:] for m in (Mixture(parts, [3, 1], seed=1)[i] for i in range(40))]
    with pytest.raises(ValueError, match=r"data\.parts\[0\]\.weight=1 is less than one row of 40; raise it"):
        Mixture(parts, [1, 100], seed=0)
    plain = Mixture(parts, [10, 30], seed=0)
    assert sorted(plain[i]["id"] for i in range(40)) == sorted({plain[i]["id"] for i in range(40)})


def test_a_mixture_is_what_the_configuration_says(folder):
    chat = write_rows(folder, {"id": "x", "image": "a.png", "conversations": llava_turns("<image>?", "red")})
    parts = [
        PartConfig(source=Source.llava, path=chat, images=str(folder)),
        PartConfig(path=write_numbered_rows(folder, "b", 3)),
    ]
    rows = training_data(DataConfig(source=Source.mixture, parts=parts))
    assert sorted(rows[i]["id"][:3] for i in range(4)) == ["0:x", "0:x", "1:b", "1:b"] and rows[0]["row"] == 0
    (folder / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"none\.jsonl have no rows"):
        training_data(DataConfig(source=Source.dataset, path=str(folder / "none.jsonl")))


def opened(rows) -> list[str]:
    return [row.make()["id"] for row in rows]


def test_a_stream_is_shuffled_and_mixed(folder):
    one = DataConfig(source=Source.dataset, path=write_numbered_rows(folder, "a", 8), streaming=True)
    rows = training_data(one)
    alone = opened(rows.first(16))
    assert sorted(alone[:8]) == sorted(alone[8:]) == [f"a{i}" for i in range(8)] and alone[:8] != alone[8:]
    assert alone[:8] != sorted(alone[:8]) and opened([rows[11], rows.after(11), rows[3]]) == [
        alone[i] for i in (11, 12, 3)
    ]
    two = DataConfig(
        source=Source.mixture,
        streaming=True,
        parts=[
            PartConfig(path=one.path, weight=1),
            PartConfig(path=write_numbered_rows(folder, "b", 5), weight=3),
        ],
    )
    names = opened(training_data(two).first(400))
    assert 60 < sum(name[0] == "a" for name in names) < 140


def test_a_stream_of_nothing_ends_in_a_sentence(folder):
    table = datasets.IterableDataset.from_generator(lambda: iter(())).with_format("arrow")
    with pytest.raises(ValueError, match="the stream has no rows"):
        Stream([table], [dict], weights=[1], seed=0, buffer=1)[0]


def test_image_parts_that_hold_their_images_take_their_places(folder):
    """As Qwen's data have it, also out of a table, where Arrow gives every part every key."""
    url = f"data:image/png;base64,{b64encode((folder / 'b.png').read_bytes()).decode()}"
    parts = [
        {"type": "image", "image": url},
        IMAGE_PART,
        text_part("which?"),
        {"type": "image", "image": "b.png"},
    ]
    record = {"messages": [{"role": "user", "content": parts}, turn("assistant", "2")], "images": ["a.png"]}
    table = datasets.Dataset.from_list([record])
    table.to_parquet(folder / "rows.parquet")
    for path in (write_rows(folder, record, name="rows.jsonl"), str(folder / "rows.parquet")):
        rows = sources.dataset(path, split="train")
        assert rows[0]["messages"][0] == turn("user", IMAGE_PART, IMAGE_PART, "which?", IMAGE_PART)
        assert [image.getpixel((0, 0))[0] for image in rows[0]["images"]] == [8, 9, 8]
        assert rows.sizes() == [(7, 3)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "folder"])
def test_other_rows_under_the_same_name_size_and_time_are_read(folder, kind):
    """`cp -p` and archives keep the time of change, and reordered rows the size."""
    place = folder / "rows"
    place.mkdir()
    file = place / f"rows.{'parquet' if kind == 'folder' else kind}"

    def write(*texts):
        rows = [{"messages": [{"role": "user", "content": text}, ANSWER]} for text in texts]
        if kind == "jsonl":
            file.write_text("\n".join(map(json.dumps, rows)))
        elif kind == "arrow":
            table = pa.Table.from_pylist(rows)
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
        else:
            pq.write_table(pa.Table.from_pylist(rows), file)

    def first():
        rows = sources.dataset(str(place if kind == "folder" else file), split="train")
        return rows[0]["messages"][0]["content"][0]["text"]

    write("one?", "two?")
    before = file.stat()
    assert first() == "one?"
    write("two?", "one?")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert first() == "two?"


def test_a_path_behind_file_is_that_file(folder):
    """Qwen's data name images so: in parts, in columns, and a swapped picture is noticed."""
    url = f"file://{folder}/a.png"
    part = {"type": "image", "image": url}
    path = write_rows(
        folder,
        {"messages": [turn("user", part, "what is it?"), turn("assistant", "red")]},
        {"images": [url, "file://b.png"], "messages": [QUESTION, ANSWER]},
    )
    before = sources.json_rows(path, None)
    assert [[i.getpixel((0, 0))[0] for i in before[n]["images"]] for n in (0, 1)] == [[9], [9, 8]]
    parquet = folder / "rows.parquet"
    messages = [turn("user", IMAGE_PART, "what?"), turn("assistant", "red")]
    pq.write_table(pa.Table.from_pylist([{"images": [url], "messages": messages}]), parquet)
    stored = sources.dataset(str(parquet), split="train")
    assert stored[0]["images"][0].getpixel((0, 0))[0] == 9
    prints = before.fingerprint(), stored.fingerprint()
    grey_image(7).save(folder / "a.png")
    assert all(a != b for a, b in zip(prints, (before.fingerprint(), stored.fingerprint()), strict=True))


def test_addresses_are_bad_rows_and_no_missing_folder(folder):
    rows = {"image": "https://x.org/a.png", "conversations": llava_turns("<image>what?", "red")}
    with pytest.raises(BadSample, match=r"https://x\.org/a\.png is an address; download the image"):
        sources.json_rows(write_rows(folder, rows), None)[0]


def test_a_file_that_cannot_be_read_is_not_called_missing(folder):
    (folder / "rows.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read: Parquet"):
        sources.dataset(str(folder / "rows.parquet"), split="train")
    (folder / "rows.csv").write_bytes(b"image,question,answer\na.png,what?,red\nb.png,caf\xe9?,red\n")
    with pytest.raises(
        ValueError, match=r"rows\.csv cannot be read: line 3 is not UTF-8; save the file as UTF-8"
    ):
        list(sources.records(str(folder / "rows.csv")))


def test_images_are_counted_in_lists_of_every_arrow_kind(folder):
    """polars writes `large_list`."""
    messages = [[QUESTION, ANSWER]] * 3
    images = [["a.png", "b.png"], [], None]
    for kind in (pa.list_(pa.string()), pa.large_list(pa.large_string())):
        table = pa.table({"messages": messages, "images": pa.array(images, kind)})
        pq.write_table(table, folder / "rows.parquet")
        rows = sources.dataset(str(folder / "rows.parquet"), split="train")
        assert [count for _, count in rows.sizes()] == [2, 0, 0]
        assert len(rows[0]["images"]) == 2


def test_rows_of_the_hub_may_not_name_files_of_this_machine(folder, monkeypatch):
    monkeypatch.chdir(folder)
    record = {"messages": [QUESTION, ANSWER], "images": ["a.png"]}
    table = datasets.Dataset.from_list([record]).with_format("arrow")
    with pytest.raises(
        BadSample, match=r"names the file a\.png, but data of the hub have no folder; name one: data\.im"
    ):
        sources.Rows(table, None)[0]
    assert len(sources.Rows(table, folder)[0]["images"]) == 1


def test_a_training_set_is_recognised_by_its_rows_and_its_images_contents(folder):
    """Lost, changed and reordered rows and swapped images give another fingerprint, a copy elsewhere the same."""
    first = {"messages": [QUESTION, ANSWER], "images": ["a.png"]}
    part = {"type": "image", "image": "b.png"}
    second = {"messages": [turn("user", part, "which?"), turn("assistant", "2")]}

    def fingerprint(*records, streaming=False, place=folder):
        path = write_rows(place, *records, name="rows.jsonl")
        data = DataConfig(source=Source.dataset, path=path, streaming=streaming)
        return data_fingerprint(training_data(data))

    copy = folder / "copy"
    copy.mkdir()
    for name in ("a.png", "b.png"):
        (copy / name).write_bytes((folder / name).read_bytes())
    same = fingerprint(first, second)
    assert same == fingerprint(first, second) == fingerprint(first, second, place=copy)
    others = [fingerprint(first), fingerprint(second, first), fingerprint(first, {**second, "id": "x"})]
    streams = [fingerprint(first, second, streaming=True), fingerprint(second, first, streaming=True)]
    for name in ("a.png", "b.png"):
        grey_image(77).save(folder / name)
        others.append(fingerprint(first, second))
    assert len({same, *others, *streams}) == len([same, *others, *streams])


def test_scenes_and_mixtures_have_a_fingerprint_too(folder):
    path = write_numbered_rows(folder, "rows", 4)
    parts = [PartConfig(path=path), PartConfig(path=path, weight=3.0)]
    sets = [DataConfig(source=Source.scenes, split="validation", scenes=2, turns=turns) for turns in (1, 2)]
    sets += [DataConfig(source=Source.scenes, split="validation", scenes=2, seed=1)]
    sets += [DataConfig(source=Source.mixture, parts=parts)]
    once, again = ([data_fingerprint(training_data(data)) for data in sets] for _ in range(2))
    assert once == again and len(set(once)) == len(once)
