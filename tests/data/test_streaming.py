"""A stream: any process or loader worker takes its positions of one order, and a resumed run reads on near its own."""

import json
import shutil

import datasets
import pytest
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from helpers.data_rows import ANSWER, IMAGE_PART, QUESTION, turn, write_numbered_rows, write_rows
from helpers.launch import launch
from helpers.quick_runs import run_config
from helpers.tiny_base import BAND, SMALL, composed
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from latefusion.data import bad_rows as guard
from latefusion.data import streaming
from latefusion.data.bad_rows import usable
from latefusion.data.load import training_data
from latefusion.recipes.schema import DataConfig, PartConfig, Source, TrainConfig
from latefusion.training import assemble
from latefusion.training.assemble import DESCRIBED
from latefusion.training.order import order_of

MICRO, STEPS = 2, 5


def names(rows) -> list[str]:
    return [row.name for row in rows]


def mixture(folder) -> DataConfig:
    parts = [PartConfig(path=write_numbered_rows(folder, name, n)) for name, n in (("a", 30), ("b", 17))]
    return DataConfig(source=Source.mixture, streaming=True, shuffle_buffer=8, parts=parts)


def taken(data: DataConfig, *, rank: int, world: int, workers: int, batch: int) -> list[list[str]]:
    """The rows of this process's batches, dealt out as the engine's accelerate does it."""
    PartialState(cpu=True)
    rows = training_data(data)
    order = order_of(TrainConfig(steps=STEPS, batch_size=batch), rows, world)
    loader = DataLoader(rows, batch_size=batch, sampler=order, num_workers=workers, collate_fn=names)
    share = {"num_processes": world, "process_index": rank, "put_on_device": False}
    return list(prepare_data_loader(loader, **share))


@pytest.mark.parametrize(("world", "workers"), [(3, 0), (2, 2)])
def test_processes_share_the_rows_of_one(tmp_path, world, workers):
    data = mixture(tmp_path)
    alone = taken(data, rank=0, world=1, workers=0, batch=MICRO * world)
    shares = [taken(data, rank=r, world=world, workers=workers, batch=MICRO) for r in range(world)]
    together = [[name for share in shares for name in share[step]] for step in range(STEPS)]
    assert together == alone and len(alone) == STEPS
    rows = [name for step in alone[:4] for name in step]
    assert len(set(rows)) == len(rows) == 4 * MICRO * world  # of 47: none comes twice so early


FORMATS = {  # of several row groups each
    "one file": lambda rows, folder: rows.to_parquet(folder / "0.parquet", batch_size=7),
    "files": lambda rows, folder: [
        rows.shard(5, i).to_parquet(folder / f"{i}.parquet", batch_size=3) for i in range(5)
    ],
}


@pytest.mark.parametrize("kind", [*FORMATS, "mixture"])
def test_a_stream_goes_on_near_where_it_stood_and_opens_no_row_before(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(streaming, "EVERY", 5)
    monkeypatch.setattr(streaming, "OPEN", 3)
    if kind == "mixture":
        data = mixture(tmp_path)
    else:
        rows = datasets.Dataset.from_list(
            [{"id": f"r{i}", "messages": [QUESTION, ANSWER]} for i in range(40)]
        )
        FORMATS[kind](rows, tmp_path)
        data = DataConfig(source=Source.dataset, path=str(tmp_path), streaming=True, shuffle_buffer=10)
    whole = names(training_data(data).first(120))  # epochs end inside
    read = []
    give = streaming.Shard.next
    monkeypatch.setattr(streaming.Shard, "next", lambda shard: read.append(rows := give(shard)) or rows)
    marking, marks = training_data(data), tmp_path / "stream.jsonl"
    marking.marks = marks
    marking[99]
    marks.write_text(marks.read_text()[:-3])  # a kill cuts the last line off
    for position in (4, 38, 97):
        rows = training_data(data)
        rows.marks = marks
        rows.make = [pytest.fail] * len(rows.make)
        read.clear()
        names_read = [rows[position].name, rows.after(position).name, *names(rows.first(2))]
        assert names_read == [*whole[position : position + 2], *whole[:2]]
        if position > 9:
            rows = training_data(data)
            rows.marks = marks
            read.clear()
            assert names(rows.__getitems__([position, position + 9])) == [
                whole[position],
                whole[position + 9],
            ]
            assert sum(map(len, read)) <= 50, "rows long gone by were read again"
    other = training_data(DataConfig(**{**vars(data), "seed": 1}))
    other.marks, unmarked = marks, training_data(DataConfig(**{**vars(data), "seed": 1}))
    assert other[50].name == unmarked[50].name != whole[50]


def data_of(folder) -> str:
    Image.new("RGB", (16, 16), (200, 0, 0)).save(folder / "a.png")
    exchanges = [("what color?", "red"), ("how many?", "2"), ("is it red?", "yes")]
    rows = [
        {
            "id": f"r{i}",
            "messages": [turn("user", *([IMAGE_PART] if i % 3 else []), question), turn("assistant", answer)],
            "images": ["a.png"] if i % 3 else [],
        }
        for i in range(9)
        for question, answer in [exchanges[i % 2 + (i > 4)]]
    ]
    return write_rows(folder, *rows, name="rows.jsonl")


def streaming_of(data: str) -> tuple[str, ...]:
    return ("data=dataset", f"data.path={data}", "data.streaming=true", "data.shuffle_buffer=4")


def assert_same(actual, expected) -> None:
    for name, weight in load_file(expected / "adapter_model.safetensors").items():
        assert torch.equal(weight, load_file(actual / "adapter_model.safetensors")[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "workers"), [("accelerate", 0), ("lightning", 2)])
def test_a_resumed_stream_goes_on_exactly(base, tmp_path, monkeypatch, capfd, engine, workers):
    monkeypatch.setattr(streaming, "EVERY", 4)
    quick = (
        *("train.steps=3", "train.save_every=2", "train.batch_size=3", "train.log_every=1"),
        *("train.threads=1", "train.learning_rate=1e-2", "lora.dropout=0.2", "eval.enabled=false"),
        *("teacher=none", "train.trackers=[]", f"model.path={base}", f"engine={engine}"),
        f"train.workers={workers}",
    )
    options = (*quick, *SMALL, *BAND, *streaming_of(data_of(tmp_path)))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_config(composed(*options, f"output_dir={whole}"))
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    shutil.copy(whole / "stream.jsonl", cut)
    opened = []
    for module in (guard, assemble):
        monkeypatch.setattr(module, "usable", lambda row: opened.append(row.name) or usable(row))
    capfd.readouterr()
    run_config(composed(*options, f"output_dir={cut}", "resume=true"))
    assert_same(cut, whole)
    if workers:
        line = "The stream goes on at row 6: reading from row 4 up to it, opening none."
        assert capfd.readouterr().out.count(line) == 1
    else:
        assert len(opened) == DESCRIBED + 3, "rows of steps behind the checkpoint were opened"


def losses(output) -> list[float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in lines if "loss" in entry]


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """One process with the joint batch, and its data."""
    output = tmp_path_factory.mktemp("alone")
    data = streaming_of(data_of(tmp_path_factory.mktemp("data")))
    launch("alone", base, output, *data, "train.batch_size=4")
    return output, data


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["accelerate", "lightning", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_two_processes_stream_as_one(base, alone, tmp_path, engine):
    expected, data = alone
    launch("torchrun", base, tmp_path, *data, "train.batch_size=2", f"engine={engine}")
    assert len(losses(expected)) == 3 and losses(tmp_path) == pytest.approx(losses(expected), rel=1e-4)
