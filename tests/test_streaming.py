"""A stream on several processes: each takes other rows, together those of one; a resumed run goes on exactly."""

import json
import shutil
from itertools import islice

import pytest
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from launching import launch
from PIL import Image
from safetensors.torch import load_file
from test_sources import IMG, numbered, turn, written
from tiny import BAND, SMALL, composed, save_tiny_base
from torch.utils.data import DataLoader

from latefusion.data.config import DataConfig, PartConfig, Source
from latefusion.data.load import training_data
from latefusion.training import run

MICRO, STEPS = 2, 5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def names(rows) -> list[str]:
    return [row.name for row in rows]


def taken(data: DataConfig, *, rank: int, world: int, workers: int, batch: int) -> list[list[str]]:
    """The rows of this process's batches, dealt out as the engine's accelerate does it."""
    PartialState(cpu=True)
    loader = DataLoader(training_data(data), batch_size=batch, num_workers=workers, collate_fn=names)
    share = {"num_processes": world, "process_index": rank, "put_on_device": False, "dispatch_batches": False}
    return list(islice(prepare_data_loader(loader, **share), STEPS))


@pytest.mark.parametrize(("world", "workers"), [(3, 0), (2, 2)])
def test_processes_share_the_rows_of_one(tmp_path, world, workers):
    parts = [PartConfig(path=numbered(tmp_path, name, n)) for name, n in (("a", 30), ("b", 17))]
    data = DataConfig(source=Source.mixture, streaming=True, shuffle_buffer=8, parts=parts)
    alone = taken(data, rank=0, world=1, workers=workers, batch=MICRO * world)
    shares = [taken(data, rank=r, world=world, workers=workers, batch=MICRO) for r in range(world)]
    together = [[name for share in shares for name in share[step]] for step in range(STEPS)]
    assert together == alone
    rows = [name for step in alone[:4] for name in step]
    assert len(set(rows)) == len(rows) == 4 * MICRO * world  # of 47: none comes twice so early


def data_of(folder) -> str:
    Image.new("RGB", (16, 16), (200, 0, 0)).save(folder / "a.png")
    asked = [("what color?", "red"), ("how many?", "2"), ("is it red?", "yes")]
    rows = [
        {
            "id": f"r{i}",
            "messages": [turn("user", *([IMG] if i % 3 else []), question), turn("assistant", answer)],
            "images": ["a.png"] if i % 3 else [],
        }
        for i in range(9)
        for question, answer in [asked[i % 2 + (i > 4)]]
    ]
    return written(folder, *rows, name="rows.jsonl")


def streaming(data: str) -> tuple[str, ...]:
    return ("data=dataset", f"data.path={data}", "data.streaming=true", "data.shuffle_buffer=4")


def assert_same(found, expected) -> None:
    for name, weight in load_file(expected / "adapter_model.safetensors").items():
        assert torch.equal(weight, load_file(found / "adapter_model.safetensors")[name]), name


@pytest.mark.slow
def test_a_resumed_stream_goes_on_exactly(base, tmp_path):
    quick = (
        *("train.steps=3", "train.save_every=2", "train.batch_size=3", "train.log_every=1"),
        *("train.threads=1", "train.learning_rate=1e-2", "lora.dropout=0.2", "eval.enabled=false"),
        *("teacher=none", "train.trackers=[]", "train.workers=2", f"model.path={base}"),
    )
    options = (*quick, *SMALL, *BAND, *streaming(data_of(tmp_path)))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run.run(composed(*options, f"output_dir={whole}"))
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    run.run(composed(*options, f"output_dir={cut}", "resume=true"))
    assert_same(cut, whole)


@pytest.mark.slow
def test_two_processes_stream_as_one_and_resume_exactly(base, tmp_path):
    options = (*streaming(data_of(tmp_path)), "train.save_every=1", "train.keep_checkpoints=3")
    alone, two, cut = (tmp_path / name for name in ("alone", "two", "cut"))
    launch("alone", base, alone, *options, "train.batch_size=4")
    launch("torchrun", base, two, *options, "train.batch_size=2")
    losses = []
    for output in (alone, two):
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        losses.append([entry["loss"] for entry in lines if "loss" in entry])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    shutil.copytree(two / "checkpoint-2", cut / "checkpoint-2")
    launch("torchrun", base, cut, *options, "train.batch_size=2", "resume=true")
    assert_same(cut, two)
