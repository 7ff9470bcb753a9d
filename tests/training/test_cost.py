"""What a step computed, as a share of what the device could: counted, not assumed; the device is made up."""

import json
import re

import pytest
import torch
from helpers.quick_runs import run_config
from helpers.tiny_base import BAND, SMALL, composed, save_tiny_base, tiny_student

from latefusion.data import sources
from latefusion.training import assemble, monitor
from latefusion.training.describe import whole_prefill


def layer(n, d, m):
    """FLOPs of one layer with half as many key heads as heads: q, k, v, o; scores and their sum; gate, up, down."""
    return 2 * n * 3 * d * d + 2 * 2 * n * n * d + 2 * 3 * n * d * m


@pytest.mark.parametrize("teacher", ["none", "dense", "visipruner"])
def test_flops_are_those_of_the_tokens_that_each_layer_computed(teacher):
    config, student = tiny_student(f"teacher={teacher}", "model.visipruner.boundary=1")
    objective = assemble.objective_of(config, student)
    objective.counts = True
    rows = sources.scenes("validation", n_scenes=2)
    text_only = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "how many?"}]}],
        "images": [],
    }
    answer = {"role": "assistant", "content": [{"type": "text", "text": "2"}]}
    text_only["messages"].append(answer)
    for samples in ([rows[i] for i in range(3)], [text_only]):
        batch = assemble.collator_of(student)(samples)
        _, terms = objective(student.model, batch, count=1)
        text = student.model.config.get_text_config()
        d, m, ids = text.hidden_size, text.intermediate_size, batch["input_ids"]
        n_vision = (ids == student.model.config.image_token_id).sum(1).tolist()
        n_text = [real - v for real, v in zip(batch["attention_mask"].sum(1).tolist(), n_vision, strict=True)]
        head = 2 * (batch["labels"] != -100).sum().item() * d * text.vocab_size
        band = [0, 0, 4, 4, 2, 0]
        expected = (
            sum(layer(t + min(v, k), d, m) for t, v in zip(n_text, n_vision, strict=True) for k in band)
            + head
        )
        dense = sum(6 * layer(t + v, d, m) for t, v in zip(n_text, n_vision, strict=True)) + head
        bare = sum(6 * layer(t, d, m) for t in n_text) + head
        taught = terms["flops"].item() - 2 * expected
        if teacher == "visipruner" and any(n_vision):
            assert bare <= taught <= dense
        else:
            assert taught == (0 if teacher == "none" else dense)


def test_the_whole_prefill_is_counted_while_weights_lie_in_shards():
    _, student = tiny_student("teacher=none")
    rows = sources.scenes("validation", n_scenes=1)
    example = assemble.collator_of(student)([rows[0]])
    counted = whole_prefill(2e9, 4e9, student.model, example)
    for weight in student.model.parameters():  # as DeepSpeed's ZeRO-3 leaves them
        weight.ds_id, weight.data = 0, torch.empty(0)
    assert whole_prefill(2e9, 4e9, student.model, example) == counted != ""


@pytest.mark.parametrize(
    ("name", "dtype", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, "highest", 989e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, "highest", 67e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, "high", 156e12),
        ("NVIDIA L40S", torch.bfloat16, "highest", 362e12),
        ("NVIDIA L40", torch.bfloat16, "highest", None),  # is neither an L4 nor an L40S
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, "highest", 165e12),
        ("AMD Instinct", torch.bfloat16, "highest", None),
    ],
)
def test_the_peak_is_the_devices_in_the_dtype_of_the_run(monkeypatch, name, dtype, precision, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert monitor.peak_flops(dtype) == peak


def test_without_a_gpu_there_is_no_share():
    assert monitor.peak_flops(torch.bfloat16) is None


@pytest.mark.parametrize("engine", ["accelerate", "lightning"])
def test_a_run_logs_the_share(tmp_path, monkeypatch, capsys, engine):
    monkeypatch.setattr(monitor, "peak_flops", lambda dtype: 1e9 if dtype is torch.float32 else None)
    base = save_tiny_base(tmp_path / "base")
    quick = ("train.steps=2", "train.batch_size=4", "train.log_every=1", "train.threads=1", "data.scenes=3")
    more = ("eval.enabled=false", "model.visipruner.boundary=1", f"model.path={base}", f"engine={engine}")
    run_config(composed(*BAND, *SMALL, *quick, *more, f"output_dir={tmp_path / 'run'}"))
    entries = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [(e["mfu"], e["samples_per_second"], e["tokens_per_second"]) for e in entries if "loss" in e]
    printed = capsys.readouterr().out
    assert len(shares) == 2 and "MFU" in printed
    costs = (
        r"decoder \S+G, ([\d.]+)% of dense; with vision tower, projector and head \S+G, ([\d.]+)% of dense"
    )
    decoder, whole = map(float, re.search(costs, printed).groups())
    assert decoder < whole < 100
    for (
        share,
        samples,
        tokens,
    ) in shares:  # 3 passes of 6 layers, but the student's without some vision tokens; heads
        most = samples * 3 * 6 * layer(tokens / samples, 32, 32) / 1e9
        assert share == pytest.approx(most, rel=0.4)


def test_a_run_that_narrows_says_what_it_costs_at_the_start(tmp_path, capsys):
    """The FLOPs of the schedule alone would promise a run that begins with every token in every layer."""
    base = save_tiny_base(tmp_path / "base")
    quick = ("train.steps=1", "train.batch_size=2", "train.threads=1", "data.scenes=2", "train.narrow=0.5")
    more = ("eval.enabled=false", "model.visipruner.boundary=1", f"model.path={base}")
    run_config(composed(*BAND, *SMALL, *quick, *more, f"output_dir={tmp_path / 'run'}"))
    costs = r"text tokens\), ([\d.]+)G at the start, from 50% of the steps on: decoder ([\d.]+)G, ([\d.]+)% of dense"
    *_, share = map(float, re.search(costs, capsys.readouterr().out).groups())
    assert share < 100
