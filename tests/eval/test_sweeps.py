"""Sweeps of time: what they run, and how often."""

from __future__ import annotations

import pytest
import torch

from latefusion.data.scenes import load_scenes
from latefusion.eval.comparison import sweeps
from latefusion.eval.comparison.systems import System
from latefusion.models.attach import attach
from latefusion.models.base_model import load_base
from latefusion.models.schedule import VisionSchedule


@pytest.mark.parametrize(("patience", "rounds"), [(0.0, sweeps.FEWEST), (600.0, 4)])
def test_a_slow_point_is_timed_fewer_times(base, monkeypatch, patience, rounds):
    model, processor = load_base(str(base), dtype=torch.float32)
    monkeypatch.setattr(sweeps, "PATIENCE", patience)
    times = iter(range(1, 1000))
    monkeypatch.setattr(sweeps, "seconds", lambda work, device: (work(), next(times))[1])
    systems = {
        "dense": System(name="Dense", policy=VisionSchedule()),
        "band": System(name="Band", policy=VisionSchedule(enter=1, exit=3)),
    }
    with attach(model, VisionSchedule()) as attachment:
        (point,) = sweeps.against_batch(
            model=model,
            processor=processor,
            attachment=attachment,
            rows=list(load_scenes("test", 2).select(range(2))),
            sizes=[2],
            systems=systems,
            reference="dense",
            repeats=4,
            new_tokens=2,
        )
    # a warm-up prefill of each system, then its prefill and its answers in every round
    assert next(times) - 1 == len(systems) * (1 + 2 * rounds)
    assert point["systems"]["band"]["predicted"] < 1
