"""Engines that shard weights, on a run with all that could make its processes wait for each other or differ.

Another model teaches, in shards of its own; the projector trains; some batches have images and some have none.
"""

import json
from functools import cache

import pytest
from helpers.launch import launch
from helpers.tiny_base import save_tiny_base
from PIL import Image

pytestmark = pytest.mark.slow
NAMES = ("loss", "ce", "kl", "grad_norm")


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """What an engine logs on two processes, and its folder."""
    base = save_tiny_base(tmp_path_factory.mktemp("base"))
    larger = save_tiny_base(tmp_path_factory.mktemp("larger"), layers=9, seed=3)
    data = tmp_path_factory.mktemp("data")
    Image.new("RGB", (20, 30), (200, 0, 0)).save(data / "a.jpg")
    questions = ["<image>\nwhat color is it?"] * 3 + [
        "how many?",
        "is it?",
        "how many?",
    ]  # shuffled: one of each a step
    records = [
        {
            **({"image": "a.jpg"} if question.startswith("<image>") else {}),
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}],
        }
        for question in questions
    ]
    (data / "mix.json").write_text(json.dumps(records))
    options = (
        *("data=llava_mix665k", f"data.path={data / 'mix.json'}", f"data.images={data}", "data.group=none"),
        *(
            f"kl.model={larger}",
            "kl.visipruner.boundary=2",
            "lora.train_projector=true",
            "train.batch_size=1",
        ),
    )

    @cache
    def of(engine, dtype):
        output = tmp_path_factory.mktemp(engine)
        launch("torchrun", base, output, *options, f"engine={engine}", f"train.dtype={dtype}")
        entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [entry[name] for entry in entries if "loss" in entry for name in NAMES], output

    return of


def test_fsdp2_trains_as_ddp(logged):
    """The same arithmetic, in shards; only norms are summed in another order."""
    (sharded, _), (expected, _) = logged("fsdp2", "bfloat16"), logged("accelerate", "bfloat16")
    assert len(sharded) == 3 * len(NAMES) and sharded == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-4), ("bfloat16", 1e-1)])
def test_zero3_trains_as_ddp(logged, dtype, near):
    """In bfloat16 DeepSpeed rounds weights where autocast rounds what goes into products: up to 6e-2 apart."""
    (sharded, output), (expected, _) = logged("deepspeed_zero3", dtype), logged("accelerate", dtype)
    assert len(sharded) == 3 * len(NAMES) and sharded == pytest.approx(expected, rel=near)
    assert (output / "checkpoint-3" / "global_step3").is_dir()
    sizes = {path: path.stat().st_size for path in output.glob("checkpoint-3/*.safetensors")}
    assert len(sizes) == 1 and max(sizes.values()) < 200_000, (
        "the teacher is among the weights that are saved"
    )
