"""The benchmark of loading runs on what a run is made of, and its numbers agree with each other."""

import json

import pytest
from helpers.tiny_base import BAND, SMALL, save_tiny_base

from latefusion.eval.bench import loading as bench_loading

QUICK = ("data.scenes=4", "train.batch_size=2", "train.threads=1", "model.visipruner.boundary=1")


@pytest.mark.slow
def test_loading_and_training_are_measured_apart_and_together(tmp_path, capsys):
    base, file = save_tiny_base(tmp_path / "base"), tmp_path / "found.json"
    options = (*QUICK, *SMALL, *BAND, f"model.path={base}", f"output_dir={tmp_path}")
    bench_loading.main(["--workers", "0,1", "--steps", "3", "--json", str(file), *options])
    report = json.loads(file.read_text())
    alone, worked = report["workers"]
    assert (alone["workers"], worked["workers"], report["threads"]) == (0, 1, 1)
    for row in report["workers"]:
        assert row["loading"] > 0 and 0 <= row["waits"] < 1 and row["both"] > 0
    assert alone["waits"] > 0  # whoever loads itself waits
    assert "late_fusion on scenes" in capsys.readouterr().out


def test_what_cannot_be_measured_is_a_sentence():
    with pytest.raises(SystemExit, match=r"^error: train\.steps=4 must exceed --steps 20\.$"):
        bench_loading.main(["train.steps=4"])
    with pytest.raises(SystemExit, match=r"^error: recip does not exist"):
        bench_loading.main(["recip=dense"])
