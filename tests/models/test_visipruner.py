"""VisiPruner against a plain reference: whole models in mixed batches, and its edges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.reference_visipruner import Settings
from helpers.visipruner_prompts import (
    NEW_TOKENS,
    STAGES,
    build,
    check_trace,
    collate,
    generate,
    layout_mask,
    oracle,
    policy_of,
    prompts,
    references,
    settings_of,
)
from torch import Tensor

from latefusion.models.attach import attach
from latefusion.models.policies.base import Decision, Prompt
from latefusion.models.policies.visipruner import decision as fusion
from latefusion.models.policies.visipruner.decision import removal_effect
from latefusion.models.policies.visipruner.settings import VisiPruner
from latefusion.models.schedule import VisionSchedule


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stages", STAGES, ids="+".join)
@torch.no_grad()
def test_a_mixed_batch_equals_each_prompt_alone(stages, attention: str, side: str) -> None:
    model, chosen = build(attention), settings_of(stages)
    runs = references(model, chosen, 1)
    if "middle" in stages:
        assert len({run.fusion_layer for run in runs}) >= 4, "the prompts should fuse in different layers"
    batch = collate(prompts(), side)
    with attach(model, policy_of(chosen), vision_mask=batch.vision) as att:
        logits = model(**batch.inputs).logits
        check_trace(att.trace, runs, batch.offsets)
    for i, run in enumerate(runs):
        last = logits[i, batch.offsets[i] + batch.lengths[i] - 1].double().numpy()
        np.testing.assert_allclose(last, run.logits[0], atol=2e-5)


@pytest.mark.parametrize("sink_rule", ["first", "half"])
@torch.no_grad()
def test_generation_in_a_mixed_batch(sink_rule: str) -> None:
    model, chosen = build(), settings_of(STAGES[-1], sink_rule)
    runs = references(model, chosen)
    assert any(run.exit_layer is not None for run in runs)
    batch = collate(prompts(), "left")
    with attach(model, policy_of(chosen), vision_mask=batch.vision) as att:
        out = generate(model, batch)
        check_trace(att.trace, runs, batch.offsets)
    logits = torch.stack(out.logits, dim=1).double().numpy()  # [B, steps, V]
    for i, run in enumerate(runs):
        assert out.sequences[i].tolist() == run.ids
        np.testing.assert_allclose(logits[i], np.stack(run.logits), atol=5e-5)


@torch.no_grad()
def test_bfloat16_models_decide_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(
            (weights.dtype, value.dtype, *(effect.dtype for effect in removal_effect(weights, value)))
        )
        return removal_effect(weights, value)

    monkeypatch.setattr(fusion, "removal_effect", spy)
    model = build().bfloat16()
    batch = collate([(embeds.bfloat16(), mask) for embeds, mask in prompts()], "left")
    batch.inputs_embeds = batch.inputs_embeds.bfloat16()
    with attach(model, policy_of(settings_of(("middle", "deep"))), vision_mask=batch.vision):
        assert model(**batch.inputs).logits.isfinite().all()
    assert set(seen) == {(torch.float32, torch.bfloat16, torch.float32, torch.float32)}


@torch.no_grad()
def test_keep_none_and_keep_all() -> None:
    """No critical token: vision leaves right after the fusion layer. All critical: the exit still comes."""
    model = build()
    embeds, mask = prompts()[0]
    for tokens_threshold, n_kept in ((100.0, 0), (0.0, 12)):
        chosen = Settings(
            boundary=2,
            layer_threshold=0.999,
            tokens_threshold=tokens_threshold,
            exit_threshold=1e-3,
            stages=("middle", "deep"),
        )
        run = oracle(model).run(embeds.numpy(), mask.numpy(), chosen, NEW_TOKENS)
        assert run.fusion_layer == 3 and run.kept is not None and len(run.kept) == n_kept
        assert run.exit_layer == (4 if n_kept == 0 else 6)
        batch = collate([(embeds, mask)], "left")
        with attach(model, policy_of(chosen), vision_mask=batch.vision) as att:
            assert generate(model, batch).sequences[0].tolist() == run.ids
            check_trace(att.trace, [run], batch.offsets)


@torch.no_grad()
def test_a_prompt_that_ends_in_vision_is_left_alone() -> None:
    """Its last row is a vision token, which the next token is read from."""
    model = build()
    sample = (torch.randn(12, 32), layout_mask("t3 v9"))
    batch = collate([sample], "left")
    dense = generate(model, batch).logits
    chosen = replace(settings_of(("middle", "deep")), layer_threshold=1.0)
    with attach(model, policy_of(chosen), vision_mask=batch.vision) as att:
        assert torch.equal(torch.stack(generate(model, batch).logits), torch.stack(dense))
        assert att.trace[0].fusion_layer is None


@torch.no_grad()
def test_nothing_triggers_is_the_dense_model_bit_for_bit() -> None:
    model = build()
    batch = collate(prompts(), "left")
    with attach(model, VisionSchedule(), vision_mask=batch.vision) as att:
        dense = model(**batch.inputs).logits
        with att.using(VisiPruner(boundary=2, layer_threshold=1e-6, stages=("middle", "deep"))):
            assert torch.equal(model(**batch.inputs).logits, dense)


@torch.no_grad()
def test_layers_are_no_longer_watched_once_all_is_decided() -> None:
    class Recording:
        """The policy, remembering its decisions."""

        def __init__(self, policy: VisiPruner):
            self.policy, self.decisions = policy, list[Decision]()

        def validate(self, num_layers: int) -> None:
            self.policy.validate(num_layers)

        def begin(self, prompt: Prompt) -> Decision:
            self.decisions.append(self.policy.begin(prompt))
            return self.decisions[-1]

    model, chosen = build(), replace(settings_of(("middle",)), layer_threshold=1.0)
    batch = collate(prompts(), "left")
    policy = Recording(policy_of(chosen))
    with attach(model, policy, vision_mask=batch.vision) as att:
        model(**batch.inputs)
        assert {record.fusion_layer for record in att.trace} == {3, None}
    assert policy.decisions[0].watch == set()
