"""Rows that cannot be used: an error with the row's name, or left out, counted, written down, and listed beforehand."""

import json
from pathlib import Path

import pytest
import torch
from helpers.data_rows import ANSWER, IMAGE_PART, QUESTION, text_part, turn, write_rows
from helpers.pictures import PNG
from helpers.quick_runs import metrics_entries, run_config
from helpers.tiny_base import BAND, SMALL, composed, configured, tiny_base
from PIL import Image

from latefusion.data import validate
from latefusion.data.bad_rows import SKIPPED_FILE, Bad, Checked, Guard, skipped
from latefusion.data.collate import Collator
from latefusion.data.load import training_data
from latefusion.data.samples import BadSample
from latefusion.data.streaming import Lazy, Stream
from latefusion.recipes.schema import OnError
from latefusion.training import prepare, run
from latefusion.training.embedded.vocabulary import IMAGE

SKIP, RAISE = OnError["skip"], OnError["raise"]
REFUSES = "\"{{ raise_exception('Alternate!') }}\""
LONG = {"role": "user", "content": "is there a red circle left of the blue star?"}


def messages(question="how many?"):
    return [turn("user", question), turn("assistant", "2")]


class Rows:
    """Row i answers i; rows 1 and 4 are bad, row 5 is too long for 8 tokens."""

    def __len__(self):
        return 7

    def __getitem__(self, i):
        if i in (1, 4):
            raise BadSample(f"is bad for reason {i}")
        question = LONG["content"] if i == 5 else "how many?"
        return {"messages": [turn("user", question), turn("assistant", str(i))], "images": []}

    def identity(self, i):
        return f"r{i}"

    def place(self, i):
        return i


def guard(tmp_path, *, on_error=SKIP, too_long=SKIP, max_length=8, stream=False):
    _, processor = tiny_base()
    collator = Collator(processor=processor, vision_ids=[IMAGE], stop=["<eos>"], max_length=max_length)
    rows = Checked(Rows())
    return rows, Guard(
        collator,
        on_error=on_error,
        too_long=too_long,
        dataset=Following() if stream else rows,
        folder=tmp_path,
    )


def answers(guard, batch):
    tokens = batch["input_ids"][torch.arange(len(batch["queries"])), batch["queries"][:, 0] + 1]
    return guard.collator.processor.tokenizer.convert_ids_to_tokens(tokens.tolist())


def test_bad_rows_leave_their_places_to_others_and_are_written_down_once(tmp_path):
    rows, collate = guard(tmp_path)
    batch = collate([rows[i] for i in (0, 1, 2, 5)])
    learnt = answers(collate, batch)
    assert learnt[0] == "0" and learnt[2] == "2" and {learnt[1], learnt[3]} <= set("0236")
    assert answers(collate, collate([rows[i] for i in (0, 1, 2, 5)])) == learnt  # a run repeats itself
    lines = [json.loads(line) for line in (tmp_path / SKIPPED_FILE).read_text().splitlines()]
    by_id = {line["id"]: line for line in lines}
    assert len(lines) == len(by_id) == skipped(tmp_path) and {"r1", "r5"} <= set(by_id)
    assert by_id["r1"] == {"row": 1, "id": "r1", "reason": "is bad for reason 1"}
    assert by_id["r5"]["reason"] == "has 16 tokens, more than data.max_length=8"


@pytest.mark.parametrize(
    ("options", "rows_of_batch", "sentence"),
    [
        (
            {"on_error": RAISE},
            (0, 1),
            r"row r1 is bad for reason 1; leave such rows out with data\.on_error=skip\.",
        ),
        (
            {"too_long": RAISE},
            (0, 5),
            r"row r5 has 16 tokens, more than data\.max_length=8; leave such .*data\.too_long=skip",
        ),
    ],
)
def test_each_kind_is_an_error_where_the_user_wants_one(tmp_path, options, rows_of_batch, sentence):
    rows, collate = guard(tmp_path, **options)
    with pytest.raises(ValueError, match=sentence):
        collate([rows[i] for i in rows_of_batch])
    assert skipped(tmp_path) == 0


def test_too_long_and_bad_are_chosen_apart(tmp_path):
    rows, collate = guard(tmp_path, on_error=RAISE, too_long=SKIP, max_length=20)
    assert answers(collate, collate([rows[0], rows[5]])) == ["0", "5"]
    rows, collate = guard(tmp_path, on_error=SKIP, too_long=RAISE)
    assert answers(collate, collate([rows[0], rows[1]]))[0] == "0"


class Following(Stream):
    """Rows 0 to 6 again and again."""

    def __init__(self):
        super().__init__([], [], weights=[], seed=0, buffer=1)

    def __getitems__(self, positions):
        return [Lazy(p, str(p % 7), f"s{p % 7}", lambda p=p: Rows()[p % 7]) for p in positions]

    def after(self, position):
        return self[position + 1]


def test_rows_of_a_stream_leave_their_places_to_those_that_follow(tmp_path):
    rows, (_, collate) = Following(), guard(tmp_path, stream=True)
    assert answers(collate, collate([rows[2], rows[1], rows[7]])) == ["2", "2", "0"]
    assert answers(collate, collate([rows[11]])) == ["6"]  # 4 is bad, and 5, which follows, is too long
    assert skipped(tmp_path) == 3


def test_a_set_without_a_good_row_ends(tmp_path, monkeypatch):
    rows, collate = guard(tmp_path)
    monkeypatch.setattr(Rows, "__getitem__", lambda self, i: (_ for _ in ()).throw(BadSample("is bad")))
    with pytest.raises(
        ValueError, match=r"1000 rows drawn in place of row r0 are all bad; run data/validate\.py"
    ):
        collate([rows[0]])
    assert isinstance(rows[3], Bad)


# ---------------------------------------------------------------------------- whole runs, and the check before


@pytest.fixture
def mixed(tmp_path):
    """Text-only and image rows; one with a truncated image, one that ends with the user, one that is long."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes(PNG[: len(PNG) // 2])
    rows = [
        {"id": "seen", "messages": [turn("user", IMAGE_PART, "how many?"), ANSWER], "images": ["a.png"]},
        {"id": "text", "messages": [QUESTION, ANSWER]},
        {"id": "cut", "messages": [turn("user", IMAGE_PART, "how many?"), ANSWER], "images": ["cut.png"]},
        {"id": "user", "messages": [QUESTION]},
        {"id": "long", "messages": [LONG, ANSWER]},
    ]
    return write_rows(tmp_path, *rows, name="mixed.jsonl")


def train(base, output, data, *overrides):
    options = ("data=dataset", f"data.path={data}", f"model.path={base}", f"output_dir={output}")
    quick = (
        "train.dtype=float32",
        "train.threads=1",
        "train.steps=2",
        "train.batch_size=4",
        "train.log_every=1",
        "model.visipruner.boundary=1",
    )
    run_config(composed(*options, *quick, *SMALL, *BAND, "train.save_every=2", *overrides))


@pytest.mark.parametrize("engine", ["accelerate", "lightning"])
def test_a_run_leaves_bad_rows_out_counts_them_and_says_so(base, tmp_path, mixed, capsys, engine):
    options = ("data.on_error=skip", "data.max_length=12", "train.steps=3", f"engine={engine}")
    train(base, tmp_path / "out", mixed, *options)
    written_down = [json.loads(line) for line in (tmp_path / "out" / SKIPPED_FILE).read_text().splitlines()]
    assert {line["id"] for line in written_down} == {"cut", "user", "long"}
    assert [e for e in metrics_entries(tmp_path / "out") if "loss" in e][-1]["skipped_rows"] == 3
    assert "3 row(s) could not be used and were left out" in capsys.readouterr().out


def test_a_bad_row_stops_a_run_unless_told_otherwise(base, tmp_path, mixed):
    with pytest.raises(
        SystemExit, match=r"^error: row cut has a bad image: cut\.png .*data\.on_error=skip\.$"
    ):
        train(base, tmp_path / "out", mixed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("data.too_long=raise",),
            r"row long has 16 tokens, more than data\.max_length=12; .*data\.too_long=skip",
        ),
        (
            (f"model.processor={{chat_template: {REFUSES}}}",),
            r"row seen is refused by the chat template: Alternate!",
        ),
        (("kl.cache=./none",), r"no teacher's answers in kl\.cache=\./none; write it"),
    ],
)
def test_rows_that_the_processor_refuses_stop_a_run_before_weights_are_loaded(
    base, tmp_path, mixed, options, message, monkeypatch
):
    """And before anything is taken out of the output folder."""
    for name in ("student_of", "settle_schedule", "settle_entry"):
        monkeypatch.delattr(run, name)
    old = tmp_path / "out" / "checkpoint-5"
    old.mkdir(parents=True)
    rows = Path(mixed).read_text().splitlines()
    good = write_rows(tmp_path, *map(json.loads, (rows[0], rows[1], rows[4])), name="good.jsonl")
    with pytest.raises(SystemExit, match=rf"^error: {message}"):
        train(base, tmp_path / "out", good, "data.max_length=12", "overwrite=true", *options)
    assert old.is_dir()


@pytest.mark.parametrize("expected", ["skip", "raise"])
def test_calibration_takes_rows_that_training_takes(base, tmp_path, expected, monkeypatch):
    """Beyond the first rows, which are tried before: row 10 asks too much. Nothing is computed before it is refused."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    seen = {"messages": [turn("user", IMAGE_PART, "how many?"), ANSWER], "images": ["a.png"]}
    long = {**seen, "messages": [turn("user", IMAGE_PART, LONG["content"]), ANSWER]}
    data = write_rows(tmp_path, *[seen] * 10, long, *[seen] * 3, name="rows.jsonl")
    used = []
    monkeypatch.setattr(prepare, "batches", lambda *arguments: used.append(arguments[2]) or [])
    monkeypatch.setattr(prepare, "fit_entry", lambda *_, **more: pytest.fail("computes"))
    options = ("data.max_length=12", f"data.too_long={expected}", "entry.init=calibrated")
    with pytest.raises(
        pytest.fail.Exception if expected == "skip" else SystemExit,
        match="computes"
        if expected == "skip"
        else r"error: row 10 has \d+ tokens, more than data\.max_length",
    ):
        train(base, tmp_path / "out", data, *options)


@pytest.mark.parametrize(
    "options", [("data.group=modality",), ("data.streaming=true", "data.shuffle_buffer=2")]
)
def test_grouped_and_streamed_runs_train(base, tmp_path, mixed, options):
    train(base, tmp_path / "out", mixed, "data.on_error=skip", "train.workers=1", *options)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() and skipped(tmp_path / "out") == 2


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_validate_lists_every_bad_row_with_its_reason(base, mixed, capsys, streaming):
    arguments = ["data=dataset", f"data.path={mixed}", f"model.path={base}", "data.max_length=12"]
    with pytest.raises(SystemExit) as end:
        validate.main([*arguments, f"data.streaming={streaming}"])
    printed = capsys.readouterr()
    lines = dict(line.split("\t") for line in printed.out.splitlines())
    assert end.value.code == 1 and set(lines) == {"cut", "user", "long"}
    assert "cut.png cannot be decoded" in lines["cut"] and "16 tokens" in lines["long"]
    assert "3 of 5 rows cannot be used" in printed.err


def test_validate_passes_good_data_and_refuses_empty_data(base, tmp_path, capsys, monkeypatch):
    good = write_rows(tmp_path, {"messages": [QUESTION, ANSWER]}, name="good.jsonl")
    with pytest.raises(SystemExit) as end:
        validate.main(["data=dataset", f"data.path={good}"])
    assert end.value.code == 0 and "All 1 rows can be used." in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: scenes needs no check"):
        validate.main([])
    with pytest.raises(SystemExit, match=r"error: data\.path is not set"):
        validate.main(["data=dataset"])
    with pytest.raises(SystemExit) as end:
        validate.main(["data=dataset", f"data.path={good}", "model.path=./nowhere"])
    printed = capsys.readouterr().err
    assert end.value.code == 0 and "Neither lengths nor chat template are checked: no model at" in printed


def test_a_mixture_names_the_part_and_the_row(tmp_path, mixed):
    good = write_rows(tmp_path, {"messages": [QUESTION, ANSWER]}, name="good.jsonl")
    parts = f"data.parts=[{{path: {good}}},{{path: {mixed}, weight: 5}}]"
    rows = training_data(configured("data=mixture", parts).data)
    bad = [row.id for row in map(rows.__getitem__, range(len(rows))) if isinstance(row, Bad)]
    assert set(bad) == {"1:cut", "1:user"} and text_part("how many?") in rows[0]["messages"][0]["content"]
