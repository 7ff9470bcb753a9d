"""The inference benchmark: its trigger does what it says, at VisiPruner's full work, and its numbers add up."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from latefusion.eval.bench import inference as bench
from latefusion.models.attach import attach
from latefusion.models.policies.visipruner.decision import removal_effect


def arguments(**more: Any) -> argparse.Namespace:
    defaults = {"shape": "tiny", "vision": 24, "device": "cpu", "dtype": "float32", "clock": "cpu"}
    return argparse.Namespace(**{**defaults, "rounds": 1, "steps": 1, **more})


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(bench.SHAPES, "tiny", (8, 32, 48, 2))
    return bench.build(arguments())


@torch.no_grad()
def test_the_trigger_fixes_the_work_and_looks_all_the_same(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    from latefusion.models.policies.visipruner import decision as fusion

    monkeypatch.setattr(
        fusion, "removal_effect", lambda *a: (looked.append(a[0].shape), removal_effect(*a))[1]
    )
    here = bench.Bench(model, arguments(), batch=2, text=6)
    tokens = {}
    for name, variant in bench.variants(8, ["sdpa"]).items():
        if variant.policy is None:
            continue
        looked.clear()
        with attach(model, variant.policy) as att:
            here.prefill()
            records = att.trace
        assert records[0].tokens == records[1].tokens == [30] * 4 + [16] * 2 + [6] * 2
        assert records[0].exit_layer == 6 and (
            len(records[0].kept or ()),
            len(set(records[0].kept or ())),
        ) == (10, 10)
        # layers 2 and 3 look for fusion (the boundary is 1), 4 and 5 for the exit
        assert len(looked) == (0 if name == "no decision" else 4)
        tokens[name] = here.predicted(variant.policy)
    assert len(tokens) == 3 and len(set(tokens.values())) == 1 and 0.4 < tokens["no decision"] < 0.8


def test_the_command_writes_its_rows(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    words = "bench --shape tiny --vision 24 --batch 1 --text 6 --rounds 1 --steps 1 --threads 1 --json"
    monkeypatch.setattr(sys, "argv", [*words.split(), str(file)])
    bench.main()
    report = json.loads(file.read_text())
    stock, *others = report["rows"]
    assert stock["variant"] == "stock" and stock["ttft"]["ratio"] == 1.0 and stock["met"] is None
    assert [row["variant"] for row in others] == [
        "no decision",
        "VisiPruner, middle, deep",
        "VisiPruner, all stages",
    ]
    # 30 tokens in 4 of 8 layers, 16 in 2, 6 in 2; keys and values of 32 float32 each
    assert stock["kv_bytes"] == 8 * 30 * 2 * 32 * 4
    assert all(row["kv_bytes"] == (4 * 30 + 2 * 16 + 2 * 6) * 2 * 32 * 4 for row in others)
    assert all(row["peak_bytes"] > 0 and row["tpot"]["ms"] > 0 for row in report["rows"])
    assert len(report["decision"]) == 2 and "% of the host's time" in report["decision"][0]
    table = file.with_suffix(".md").read_text().splitlines()
    assert len(table) == 6 and "VisiPruner, all stages" in table[-1]
    assert "VisiPruner, all stages" in capsys.readouterr().out


def test_a_shape_that_is_done_is_not_measured_again(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, measured, run = tmp_path / "rows.json", [], bench.Bench.run
    monkeypatch.setattr(bench.Bench, "run", lambda self, v: (measured.append(self.text), run(self, v))[1])
    words = "bench --shape tiny --vision 24 --batch 1 --rounds 1 --steps 1 --threads 1 --json"
    for text in (["4"], ["4", "6"]):
        monkeypatch.setattr(sys, "argv", [*words.split(), str(file), "--text", *text])
        bench.main()
    assert measured == [4, 6]
    assert [row["text"] for row in json.loads(file.read_text())["rows"]] == [4] * 4 + [6] * 4
    monkeypatch.setattr(sys, "argv", [*words.split(), str(file), "--text", "4", "--steps", "2"])
    bench.main()  # other rounds are another measurement
    assert measured == [4, 6, 4]
