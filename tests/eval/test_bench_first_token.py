"""The benchmark of the first token, and what the benchmark of ranking takes a prefill apart into."""

import json
import sys

import pytest
import torch

from latefusion.eval.bench import first_token, ranking
from latefusion.eval.bench.timing import llava


def test_a_model_without_layers_gets_them_back():
    model = llava(layers=2, hidden=16, mlp=16, heads=1, device="cpu", dtype="float32")
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with ranking.without_layers(model):
            bare = model(input_ids=ids).logits
        text = model.model.language_model
        assert torch.equal(bare, model.lm_head(text.norm(text.embed_tokens(ids))))
        assert torch.equal(model(input_ids=ids).logits, whole)


@pytest.mark.slow
def test_the_parts_of_a_first_token_are_its_time(tmp_path, monkeypatch, capsys):
    file = tmp_path / "first_token.json"
    words = ["--threads", "1", "--clock", "cpu", "--rounds", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["first_token.py", *words])
    first_token.main()
    rows = {row["policy"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["stock"]["ratio"] == 1 and rows["late_fusion"]["decoder_flops"] < 0.5
    for row in rows.values():
        assert all(part > 0 for part in row["parts_ms"].values())
        assert row["ms"] / 3 < sum(row["parts_ms"].values()) < 3 * row["ms"]
    assert "late_fusion" in capsys.readouterr().out
