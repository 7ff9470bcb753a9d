"""The benchmark of training steps: which recipes it compares, and one small run of it."""

import json
import sys
from argparse import Namespace

import pytest
import torch

from latefusion.eval.bench import training as bench_training
from latefusion.models.schedule import VisionSchedule


def test_recipes_are_compared_on_the_schedules_they_give_the_published_model():
    published = bench_training.recipes(32, 576)
    assert next(iter(published)) == "dense"
    assert published["late_fusion"] == VisionSchedule(enter=8, exit=24)
    keep = {10: 215, 14: 10, 16: 5, 18: 1}
    assert published["late_fusion_pyramid"] == VisionSchedule(enter=8, exit=24, keep=keep)
    half = bench_training.recipes(16, 288)["late_fusion_pyramid"]
    assert half == VisionSchedule(enter=4, exit=12, keep={5: 108, 7: 5, 8: 2, 9: 1})
    read = [0, 1, 7, 8, 9, 10, 11, 14]
    assert published["cross_only"] == VisionSchedule(cross=read)
    assert published["vica_7b"] == VisionSchedule(cross=read, freeze_prefix=True)
    assert published["hidrop_tok64"] == VisionSchedule(enter=8, exit=24, keep=keep, ranking="hidrop")
    assert "vica_13b" not in published  # of another model
    assert bench_training.recipes(16, 288)["cross_only"] == VisionSchedule(cross=[0, 1, 4, 5, 6, 7])
    assert len({json.dumps(s.to_dict()) for s in published.values()}) == len(published)


def test_what_the_machine_allows_is_a_mean_over_layers_of_steps_on_text():
    pyramid = [64] * 4 + [640, 279, 279, 74, 69, 65, 65, 65] + [64] * 4
    assert bench_training.sizes(pyramid) == [64, 279, 640]  # 65 to 74 lie between the first two
    times = {10: [1.0, 2.0, 4.0], 20: [3.0, 6.0, 12.0]}
    limit = bench_training.allowed([10, 20, 15, 10], times, [3.0, 6.0, 24.0])
    assert limit == (1 + 3 + 2 + 1) / 4 / 3  # the median round


def test_the_step_under_masks_has_the_gradients_of_ours():
    args = Namespace(
        layers=4,
        hidden=64,
        vision=6,
        text=12,
        batch=2,
        device="cpu",
        dtype="float32",
        rounds=1,
        threads=1,
        clock="cpu",
    )
    bench = bench_training.Bench(args, 4)
    bench.optimizer.step = lambda: None
    bench.optimizer.zero_grad = lambda: None
    weights = [
        (name, p) for name, p in bench.student.model.named_parameters() if p.requires_grad and "lora" in name
    ]
    for _, weight in weights:
        torch.nn.init.normal_(weight, std=0.1)
    # reads from layer 0 on: a later entry would run the entry adapter, which the masked step leaves out
    for schedule in (
        VisionSchedule(cross=[0, 2]),
        VisionSchedule(cross=[0, 1, 3], freeze_prefix=True),
    ):
        gradients = []
        for step in (bench.step(schedule), bench.under_masks(schedule), bench.step(VisionSchedule())):
            bench.student.model.zero_grad()
            step()
            gradients.append(torch.cat([w.grad.flatten() for _, w in weights if w.grad is not None]))
        ours, under_masks, dense = gradients
        assert ours.abs().max() > 1e-3
        torch.testing.assert_close(under_masks, ours, rtol=1e-3, atol=1e-6)
        assert (dense - ours).abs().max() > 1e-3


@pytest.mark.slow
def test_a_small_run_writes_what_it_shows(tmp_path, monkeypatch, capsys):
    sizes = "--layers 8 --hidden 64 --vision 32 --text 16 --rounds 2 --threads 1 --clock cpu"
    monkeypatch.setattr(sys, "argv", ["x", *sizes.split(), "--json", str(tmp_path / "found.json")])
    bench_training.main()
    report = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["recipe"], row["lora"]): row for row in report["steps"]}
    dense = rows["dense", "all"]
    assert dense["speedup"] == dense["peak_ratio"] == dense["predicted_speedup"] == 1
    for name in ("late_fusion", "late_fusion_pyramid"):
        in_all, busy = rows[name, "all"], rows[name, "busy"]
        assert in_all["predicted_speedup"] > 1.3 and 0.2 < in_all["peak_ratio"] < 0.9
        assert in_all["allowed_speedup"] > 0 and in_all["share_of_allowed"] > 0
        assert busy["predicted_speedup"] > in_all["predicted_speedup"]  # no backward pass below the band
        assert busy["peak_bytes"] < in_all["peak_bytes"]
    cheapest = max(
        (name for name, lora in rows if lora == "all"), key=lambda n: rows[n, "all"]["predicted_speedup"]
    )
    assert [(r["recipe"], r["teacher"]) for r in report["teachers"]] == [
        (name, teacher) for name in ("dense", cheapest) for teacher in ("online", "offline")
    ]
    assert [row["step"] for row in report["masks"]] == ["dense", "under masks", "ours"]
    assert report["masks"][2]["of_masked"]["ratio"] > 0
    assert report["teachers"][0]["predicted_ratio"] == 1.5 and report["teachers"][1]["predicted_ratio"] == 1
    printed = capsys.readouterr().out
    assert "late_fusion_pyramid" in printed and "targets of late_fusion, LoRA in busy layers" in printed
