"""Ranking is in float32 also where a training run computes in bfloat16 under autocast."""

from types import SimpleNamespace

import pytest
import torch
from helpers.families import build, prompt

from latefusion.models.attach import attach
from latefusion.models.executor.attention import _Rows
from latefusion.models.schedule import VisionSchedule


@pytest.mark.parametrize("mask", [None, "additive"])
def test_scores_and_weights_are_float32_under_autocast(mask):
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 6, 8).bfloat16(), torch.randn(1, 2, 6, 8).bfloat16()
    seen = None if mask is None else torch.zeros(1, 1, 6, 6)
    rows = _Rows(SimpleNamespace(is_causal=True), query, key, seen, {})
    index, keys = torch.tensor([[4, 5]]), torch.tensor([[0, 2, 3]])
    expected = rows.scores(index, keys), rows.weights(index)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = rows.scores(index, keys), rows.weights(index)
    for one, other in zip(under_autocast, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_a_schedule_that_ranks_runs_under_autocast():
    model = build("llava")
    with attach(model, VisionSchedule(enter=1, exit=5, keep={3: 2})) as attachment, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(**prompt("llava", ["tt I ttt"]))
        assert attachment.trace[0].tokens[3] == attachment.trace[0].tokens[2] - 2
