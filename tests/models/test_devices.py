"""On another device than the CPU, played by `elsewhere`, nothing mixes devices, and results are those of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_device import Elsewhere, There, inner, move, moved
from helpers.families import FAMILIES, MROPE_FAMILIES, build, prompt, shared
from helpers.tiny_base import shake, tiny_student

from latefusion import VisionSchedule
from latefusion.data.load import training_data
from latefusion.models.attach import attach
from latefusion.models.policies.divprune import DivPrune
from latefusion.models.policies.fastv import FastV
from latefusion.models.policies.random import Random
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.training import assemble

MIXED = ["tt I ttt", "tttt", "t I t I tt"]
POLICIES = {
    "keeps": VisionSchedule(enter=1, exit=5, keep={2: 3, 4: 2}),
    "cross": VisionSchedule(cross=(1, 3)),
    "visipruner": VisiPruner(boundary=1, layer_threshold=0.9999, tokens_threshold=0.01),
    "fastv": FastV(layer=1),
    "random": Random(layer=3),
    "divprune": DivPrune(),
}
NEAR = 2e-6


def test_mixing_devices_is_noticed():
    here, there = torch.arange(4.0), There(torch.arange(4.0))
    with Elsewhere():
        for mixed in (
            lambda: here + there,
            lambda: torch.where(there > 1, here, there),
            lambda: here[there.long()],
        ):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert isinstance(there * 2 + torch.arange(4, device=there.device), There)
        assert isinstance(there[torch.tensor([0, 2])], There) and not isinstance(there.cpu(), There)
        assert (there[2:] + 1).tolist() == [3.0, 4.0] and float(there.sum()) == 6


def forward(model: Any, inputs: dict[str, Any], policy: Any, *, steps: int) -> list[torch.Tensor]:
    """Logits of a prefill and of decode steps, on the CPU."""
    mask, results = inputs["attention_mask"], []
    with torch.no_grad(), Elsewhere(), attach(model, policy):
        out = model(**inputs)
        results.append(inner(out.logits))
        for _ in range(steps):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            ids = torch.full((len(mask), 1), 5, device=mask.device)
            step = model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)
            results.append(inner(step.logits))
    return results


def assert_same_on_the_device(family: str, policy: str) -> None:
    steps = 0 if family in MROPE_FAMILIES else 2
    expected = forward(shared(family), prompt(family, MIXED), POLICIES[policy], steps=steps)
    elsewhere = forward(move(build(family)), moved(prompt(family, MIXED)), POLICIES[policy], steps=steps)
    for a, b in zip(elsewhere, expected, strict=True):
        assert (a - b).abs().max() < NEAR


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy):
    assert_same_on_the_device("llava", policy)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["keeps", "cross", "visipruner"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, policy):
    assert_same_on_the_device(family, policy)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="visipruner teaches"),
        pytest.param(("teacher=none", "lora.train_projector=true"), id="projector", marks=pytest.mark.slow),
        pytest.param(
            ("schedule.enter=0", "schedule.exit=null", "schedule.keep=null", "schedule.cross=[1,3]"),
            id="cross",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_objective_and_its_gradients(options):
    results = []
    for place in (lambda x: x, moved):
        config, student = tiny_student("data.scenes=2", "model.visipruner.boundary=1", *options)
        shake(student)
        samples = training_data(config.data)
        batch = assemble.collator_of(student, config)([samples[i] for i in range(3)])
        objective = assemble.objective_of(config, student)
        if place is moved:
            move(student.model)
        with Elsewhere():
            loss, _ = objective(student.model, place(dict(batch)), count=5)
            loss.backward()
        weights = student.model.named_parameters()
        results.append((float(loss.detach()), {n: inner(p.grad) for n, p in weights if p.grad is not None}))
    (loss, grads), (expected, expected_grads) = results[1], results[0]
    assert (
        loss == pytest.approx(expected, rel=1e-5)
        and grads.keys() == expected_grads.keys()
        and len(grads) > 80
    )
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).norm() < 1e-3 * expected_grads[name].norm() + 1e-4, name
